"""Boxes around objects."""

from shared.tasks.detection.data import batch, decode, decoded_by, read_samples
from shared.tasks.detection.formats import find
from shared.tasks.detection.learning import class_weights, collect, count_classes, step
from shared.tasks.detection.metrics import consistent, notices, summarise
from shared.tasks.detection.models import MODELS, build_like, build_model, check, example, head_prefix, parts
from shared.tasks.detection.predict import draw, predict, write

__all__ = [
    "MODELS",
    "batch",
    "build_like",
    "build_model",
    "check",
    "class_weights",
    "collect",
    "consistent",
    "count_classes",
    "decode",
    "decoded_by",
    "draw",
    "example",
    "find",
    "head_prefix",
    "notices",
    "parts",
    "predict",
    "read_samples",
    "step",
    "summarise",
    "write",
]
