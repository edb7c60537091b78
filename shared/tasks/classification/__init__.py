"""One or several labels per image."""

from shared.tasks.classification.data import batch, decode, decoded_by, read_samples
from shared.tasks.classification.learning import class_weights, collect, count_classes, step
from shared.tasks.classification.metrics import consistent, summarise
from shared.tasks.classification.models import build_model, check, head_prefix, parts

__all__ = [
    "batch",
    "build_model",
    "check",
    "class_weights",
    "collect",
    "consistent",
    "count_classes",
    "decode",
    "decoded_by",
    "head_prefix",
    "parts",
    "read_samples",
    "step",
    "summarise",
]
