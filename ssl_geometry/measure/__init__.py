"""What is measured of a network, without a trainer: the same code live, offline and in a notebook."""

from ssl_geometry.measure.cka import CKA
from ssl_geometry.measure.engine import measure_together
from ssl_geometry.measure.images import MeasurementImages
from ssl_geometry.measure.invariance import Invariance
from ssl_geometry.measure.measurement import Measured, Measurement, Occasion
from ssl_geometry.measure.neighbors import Neighborhoods
from ssl_geometry.measure.notebook import Measurements, measure
from ssl_geometry.measure.probes import Probes
from ssl_geometry.measure.requests import Request, pooled
from ssl_geometry.measure.spectrum import Spectrum
from ssl_geometry.measure.subject import Subject

__all__ = [
    "CKA",
    "Invariance",
    "Measured",
    "Measurement",
    "MeasurementImages",
    "Measurements",
    "Neighborhoods",
    "Occasion",
    "Probes",
    "Request",
    "Spectrum",
    "Subject",
    "measure",
    "measure_together",
    "pooled",
]
