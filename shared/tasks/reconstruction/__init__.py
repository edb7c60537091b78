"""The image itself is learnt; an image that comes out badly is unlike those learnt from."""

from shared.tasks.reconstruction.data import batch, decode, decoded_by, read_samples
from shared.tasks.reconstruction.learning import class_weights, collect, count_classes, step
from shared.tasks.reconstruction.metrics import consistent, summarise
from shared.tasks.reconstruction.models import MODELS, build_model, check, example, head_prefix, parts
from shared.tasks.reconstruction.predict import predict, write

__all__ = [
    "MODELS",
    "batch",
    "build_model",
    "check",
    "class_weights",
    "collect",
    "consistent",
    "count_classes",
    "decode",
    "decoded_by",
    "example",
    "head_prefix",
    "parts",
    "predict",
    "read_samples",
    "step",
    "summarise",
    "write",
]
