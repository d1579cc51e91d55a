"""Measures as ``torchmetrics.Metric`` classes: state over batches and ranks, usable in any loop."""

from ssl_geometry.metrics.cka import LayerwiseCKA
from ssl_geometry.metrics.knn import KNNAccuracy

__all__ = ["KNNAccuracy", "LayerwiseCKA"]
