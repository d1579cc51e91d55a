"""All parameters have weight decay."""

from typing import Any

from ssl_geometry.methods import SimCLR


class Faulty(SimCLR):
    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters()), "weight_decay": self.hparams["weight_decay"]}]
