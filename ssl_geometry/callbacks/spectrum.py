"""Spectra of each layer's features while a network trains: rank, decay, LiDAR, alignment, uniformity, mean cosine.

Protocol: averages over space of each layer's activations, clean measurement images; LiDAR and alignment compare
augmented copies (the views of SimCLR, which the monitor of neighbourhoods asks for as well).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from ssl_geometry import __version__
from ssl_geometry.callbacks.cka import run_name
from ssl_geometry.callbacks.measure import Epochs, Findings, Moment, Monitor, Reduced, Request, pooled
from ssl_geometry.callbacks.neighbors import LAYERS
from ssl_geometry.callbacks.probes import layer_widths
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.geometry.spectrum import (
    CONSTANT,
    FIRST,
    LAST,
    LIDAR_DELTA,
    LIDAR_EPS,
    POTENTIAL,
    RANK_SHARE,
    RANKME_EPS,
)
from ssl_geometry.metrics import Spectrum
from ssl_geometry.models.taps import layer_depths
from ssl_geometry.ranges import at_least, check_arguments
from ssl_geometry.records import Protocol, record
from ssl_geometry.report.moments import Row, curve_rows, pictures, scalars

VIEW = "simclr"


class SpectrumMonitor(Monitor):
    """RankMe, effective rank, participation ratio, alpha-ReQ, LiDAR, alignment, uniformity, mean cosine of each layer.

    Args:
        every_n_epochs: measure at the start, after every n-th epoch and after the last one; 0 switches it off.
        layers: which layers; see ``--cka.layers``. None takes stages, pooled features and head, as far as the network
            has them.
        copies: augmented copies of each image that LiDAR compares; 0 leaves LiDAR and alignment out.
    """

    options = "spectrum"

    def __init__(
        self,
        every_n_epochs: Epochs = 0,
        layers: str | list[str] | None = None,
        copies: Annotated[int, at_least(2, also=0)] = 10,
    ) -> None:
        check_arguments(SpectrumMonitor, locals(), "--spectrum.")
        super().__init__(every_n_epochs)
        self.layers, self.copies = layers, copies
        self.curves: list[Row] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn the widths of the layers."""
        if self.every_n_epochs > 0 and hasattr(pl_module, "measuring_view"):
            shape = trainer.datamodule.image_shape  # type: ignore[attr-defined]
            names = self.layer_names(pl_module, LAYERS)
            self._widths = layer_widths(pl_module, names, shape)

    def requests(self, method: L.LightningModule) -> Sequence[Request]:
        """Pooled features of clean images and of copies."""
        names = self.layer_names(method, LAYERS)
        self._depths = layer_depths(method, names)
        self._clean = Request(names, pooled)
        self._copies = [Request(names, pooled, VIEW, draw) for draw in range(self.copies)]
        return [self._clean, *self._copies]

    def begin(self, trainer: L.Trainer, method: L.LightningModule) -> None:
        """Fresh sums."""
        self._spectrum = Spectrum(self._widths, self.copies).to(method.device)
        self._images = torch.zeros((), dtype=torch.long, device=method.device)

    def update(self, batch_number: int, reduced: Reduced, batch: Mapping[str, Tensor]) -> None:
        """One batch."""
        copies = None
        if self.copies:
            copies = {layer: torch.stack([reduced[draw][layer] for draw in self._copies], 1) for layer in self._depths}
        self._spectrum.update(reduced[self._clean], copies, batch["index"])
        self._images += len(batch["index"])

    def finish(self, trainer: L.Trainer, method: Any, moment: Moment) -> Findings:
        """A row for each layer and number."""
        protocol = spectrum_protocol(trainer.datamodule, method, self.copies)  # type: ignore[attr-defined]
        run = run_name(trainer)
        common = {
            "run": run,
            "model": run,
            "split": "measure",
            "epoch": moment.epoch,
            "step": moment.step,
            "n": int(trainer.strategy.reduce(self._images, reduce_op="sum")),
            "protocol": protocol.hash,
        }
        rows = spectrum_records(self._spectrum.compute(), self._depths, **common)
        self.curves += curve_rows(rows)
        return Findings(rows, scalars(rows), pictures(rows, self.curves), [protocol])

    def state_dict(self) -> dict[str, Any]:
        """The curves so far."""
        return {"curves": self.curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint left."""
        self.curves = state_dict["curves"]


def spectrum_records(
    found: Mapping[str, Float[Tensor, " L"]], depths: Mapping[str, float], **common: Any
) -> list[dict[str, Any]]:
    """Rows for each number of each layer.

    Args:
        found: metric to its value for each layer.
        depths: layer to depth, in the order of the values.
        common: what all rows share.
    """
    views = dict.fromkeys(("lidar", "alignment"), VIEW)
    return [
        record(**common, metric=metric, view=views.get(metric, "clean"), layer=layer, depth=depth, value=value)
        for metric, values in found.items()
        for (layer, depth), value in zip(depths.items(), values.reshape(-1).tolist(), strict=True)
    ]


def spectrum_protocol(data: DataModule, network: Any, copies: int) -> Protocol:
    """All that changes a number of a spectrum, the same live and afterwards.

    Args:
        data: whose measurement images were seen.
        network: what was measured; its precision and its views count.
        copies: augmented copies of each image.
    """
    return Protocol(
        {
            "metric": "spectra of features",
            "pooling": "average over space",
            "network": f"evaluation mode, {network.dtype}",
            "views": {"clean": network.clean_view.spec, "copies": network.measuring_view(VIEW).spec},
            "copies": copies,
            "rankme": f"eps {RANKME_EPS:g}",
            "lidar": f"{copies} views of each image, delta {LIDAR_DELTA:g}, eps {LIDAR_EPS:g} for all eigenvalues",
            "alpha_req": f"eigenvalues {FIRST} to {LAST}, at most {RANK_SHARE:g} of the rank; weights 1/i",
            "constant": f"variation within {CONSTANT} roundings of the mean",
            "uniformity": f"t = {POTENTIAL:g}",
            "images": data.measure_ids,
            "n": data.measure_size,
            "versions": {"ssl_geometry": __version__, "torch": torch.__version__},
        }
    )
