"""A case has one label as a picture has, so the metrics are those of classification."""

from shared.tasks.classification.metrics import consistent, summarise

__all__ = ["consistent", "summarise"]
