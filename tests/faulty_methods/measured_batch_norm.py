"""Evaluation runs in training mode, and moves the statistics of batch norm."""

from typing import Any

from torch import Tensor

from ssl_geometry.methods import SimCLR


class Faulty(SimCLR):
    def features(self, images: Tensor, precision: Any = "float32") -> Tensor:
        self.train()
        return super().features(images, precision)
