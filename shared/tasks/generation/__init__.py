"""Invented images that look like the real ones."""

from shared.tasks.generation.data import batch, blank, decode, decoded_by, read_samples
from shared.tasks.generation.learning import class_weights, collect, count_classes, show, step
from shared.tasks.generation.metrics import consistent, summarise
from shared.tasks.generation.models import MODELS, build_model, check, example, head_prefix, parts, reference
from shared.tasks.generation.predict import generate, predict, write

__all__ = [
    "MODELS",
    "batch",
    "blank",
    "build_model",
    "check",
    "class_weights",
    "collect",
    "consistent",
    "count_classes",
    "decode",
    "decoded_by",
    "example",
    "generate",
    "head_prefix",
    "parts",
    "predict",
    "read_samples",
    "reference",
    "show",
    "step",
    "summarise",
    "write",
]
