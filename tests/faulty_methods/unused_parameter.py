"""A layer is built and not used: DDP waits for its gradient."""

from typing import Any

from torch import nn

from ssl_geometry.methods import SimCLR


class Faulty(SimCLR):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classifier = nn.Linear(self.num_features, 10, bias=False)
