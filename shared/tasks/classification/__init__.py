"""One or several labels per image."""

from shared.tasks.classification.data import load, read_samples
from shared.tasks.classification.learning import class_weights, collect, count_classes, step
from shared.tasks.classification.metrics import consistent, summarise
from shared.tasks.classification.models import build_model, check, head_prefix

__all__ = [
    "build_model",
    "check",
    "class_weights",
    "collect",
    "consistent",
    "count_classes",
    "head_prefix",
    "load",
    "read_samples",
    "step",
    "summarise",
]
