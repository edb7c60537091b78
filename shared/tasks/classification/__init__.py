"""One or several labels per image."""

from shared.composed import find_cases as find
from shared.composed import missing_notices as notices
from shared.tasks.classification.data import batch, decode, decoded_by, read_samples
from shared.tasks.classification.explain import explainable
from shared.tasks.classification.learning import class_weights, collect, count_classes, step
from shared.tasks.classification.metrics import consistent, summarise
from shared.tasks.classification.models import MODELS, build_model, check, example, head_prefix, parts
from shared.tasks.classification.predict import predict, write

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
    "notices",
    "parts",
    "predict",
    "read_samples",
    "step",
    "summarise",
    "write",
]
