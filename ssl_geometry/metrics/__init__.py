"""Measures as ``torchmetrics.Metric`` classes: state over batches and ranks, usable in any loop."""

from ssl_geometry.metrics.cka import ClassCKA, InvarianceCKA, LayerwiseCKA
from ssl_geometry.metrics.knn import KNNAccuracy
from ssl_geometry.metrics.neighborhoods import AugmentationManifolds, Neighborhoods
from ssl_geometry.metrics.overlap import InvarianceKNN, MutualKNN
from ssl_geometry.metrics.probe_bank import ProbeBank
from ssl_geometry.metrics.probes import LogisticProbe, RidgeProbe
from ssl_geometry.metrics.spectrum import Spectrum

__all__ = [
    "AugmentationManifolds",
    "ClassCKA",
    "InvarianceCKA",
    "InvarianceKNN",
    "KNNAccuracy",
    "LayerwiseCKA",
    "LogisticProbe",
    "MutualKNN",
    "Neighborhoods",
    "ProbeBank",
    "RidgeProbe",
    "Spectrum",
]
