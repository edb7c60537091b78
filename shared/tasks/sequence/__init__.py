"""One or several labels for a whole film, scan series or signal."""

from shared.tasks.sequence.data import batch, decode, decoded_by, read_samples
from shared.tasks.sequence.explain import explainable
from shared.tasks.sequence.learning import class_weights, collect, count_classes, step
from shared.tasks.sequence.metrics import consistent, summarise
from shared.tasks.sequence.models import MODELS, build_model, check, example, head_prefix, parts
from shared.tasks.sequence.predict import find, predict, write

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
    "explainable",
    "find",
    "head_prefix",
    "parts",
    "predict",
    "read_samples",
    "step",
    "summarise",
    "write",
]
