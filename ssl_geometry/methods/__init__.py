"""Methods: one LightningModule a file. Subclass :class:`Method` and give ``loss``."""

from ssl_geometry.methods.base import Method
from ssl_geometry.methods.published import Published
from ssl_geometry.methods.simclr import SimCLR
from ssl_geometry.methods.supervised import Supervised
from ssl_geometry.methods.teacher import Teacher

__all__ = ["Method", "Published", "SimCLR", "Supervised", "Teacher"]
