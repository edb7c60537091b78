"""The class of every pixel or voxel, and of the whole image if asked for."""

from shared.composed import missing_notices as notices
from shared.tasks.segmentation.data import batch, decode, decoded_by, read_samples
from shared.tasks.segmentation.explain import explainable
from shared.tasks.segmentation.learning import class_weights, collect, count_classes, step
from shared.tasks.segmentation.metrics import consistent, summarise
from shared.tasks.segmentation.models import MODELS, build_model, check, example, head_prefix, parts
from shared.tasks.segmentation.predict import find, predict, write

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
