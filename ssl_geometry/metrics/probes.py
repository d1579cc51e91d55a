"""Converged linear classifiers on frozen features of each layer, over batches and ranks.

Protocol: pooled features of clean labelled training images (the bank) and of test images. The regularisation strength
is selected by the accuracy on a fixed validation split (10 % of the bank; five-fold cross-validation for fewer than 100
images), the classifier is refitted on the whole bank and evaluated once on the test images.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from ssl_geometry.geometry.classification import (
    FEW,
    L2,
    LinearProbe,
    accuracies,
    check_bank,
    check_features,
    check_labels,
    in_validation_split,
    unchecked_one_hot,
)
from ssl_geometry.geometry.logistic import converged_probes
from ssl_geometry.geometry.ridge import merge_statistics, ridge_probe, ridge_probe_of_few, sufficient_statistics
from ssl_geometry.metrics.features import KeptRows


class _LayerProbe(KeptRows):
    """Test images, and the accuracy of a classifier of each layer on them.

    ``compute`` reports invalid features and labels, so that no check of a batch synchronises with the device.
    """

    higher_is_better = True
    kept: ClassVar[Sequence[str]] = ("queries",)
    """Names of the images whose features are kept for each layer."""
    labels: list[Tensor]
    bank_labels: list[Tensor]
    bank_index: list[Tensor]

    def __init__(
        self, widths: Mapping[str, int], num_classes: int, l2: Sequence[float] = L2, multi_label: bool = False
    ) -> None:
        super().__init__()
        self.multi_label = multi_label
        self.widths, self.num_classes, self.l2 = dict(widths), num_classes, tuple(l2)
        for name in ("labels", "bank_labels"):
            self._add_rows(name, torch.long, (num_classes,) if multi_label else ())
        self._add_rows("bank_index", torch.long)
        # Features are kept flat: a rank without images then contributes an empty tensor, whatever the width.
        for name in self.kept:
            for number in range(len(self.widths)):
                self._add_rows(f"{name}{number}")

    def _keep(self, name: str, features: Mapping[str, Tensor]) -> None:
        for number, layer in enumerate(self.widths):
            getattr(self, f"{name}{number}").append(features[layer].detach().float().flatten())

    def _kept(self, name: str) -> dict[str, Float[Tensor, "N D"]]:
        return {
            layer: dim_zero_cat(getattr(self, f"{name}{number}")).view(-1, width)
            for number, (layer, width) in enumerate(self.widths.items())
        }

    def update_bank(
        self,
        features: Mapping[str, Float[Tensor, "B D"]],
        labels: Int64[Tensor, " B"],
        index: Int64[Tensor, " B"],
    ) -> None:
        """Add training images.

        Args:
            features: of each layer.
            labels: class of each image.
            index: index of each image in the data set, unique over all ranks; it determines the validation split.
        """
        self._computed = None  # a cached result is out of date
        self.bank_labels.append(labels)
        self.bank_index.append(index)

    def update(self, features: Mapping[str, Float[Tensor, "B D"]], labels: Int64[Tensor, " B"]) -> None:
        """Add test images.

        Args:
            features: of each layer.
            labels: class of each image.
        """
        self.labels.append(labels)
        self._keep("queries", features)

    def compute(self) -> dict[str, Float[Tensor, " L"]]:
        """For each layer ``top1`` and ``mean_per_class`` in [0, 1], and the selected ``l2``.

        Raises:
            ValueError: features that are not finite, labels out of range, no test or validation image, or a bank that
                no classifier can be fitted to.
        """
        labels, queries = dim_zero_cat(self.labels), self._kept("queries")
        check_bank(dim_zero_cat(self.bank_labels), self.num_classes)
        check_labels(labels, self.num_classes)
        if not len(labels):
            raise ValueError("no test image was given")
        for layer, values in queries.items():
            check_features(f"layer {layer}, test images", values)
        found = []
        for layer, probe in self._fit().items():
            (logits,) = probe.logits(queries[layer])
            found.append({**accuracies(logits, labels), "l2": probe.l2[0], "gradient_norm": probe.gradient_norm[0]})
        return {name: torch.stack([row[name].double() for row in found]) for name in found[0]}

    def _fit(self) -> dict[str, LinearProbe]:
        raise NotImplementedError


class RidgeProbe(_LayerProbe):
    """Ridge regression of the one-hot classes on each layer, exact and in closed form from sufficient statistics.

    It keeps the sufficient statistics of the bank (a matrix of D + 1 rows per layer), the features of the validation
    split and those of the first 100 images of each rank: memory hardly grows with the bank.

    Args:
        widths: layer to number of its features.
        num_classes: number of classes.
        l2: regularisation strengths to select from; see :func:`ssl_geometry.geometry.ridge.ridge`.
        multi_label: whether an image can have several classes; labels are then multi-hot, (B, C).

    Example:
        >>> probe, labels = RidgeProbe({"layer": 4}, num_classes=4), torch.arange(80) % 4
        >>> probe.update_bank({"layer": torch.eye(4)[labels]}, labels, index=torch.arange(80))
        >>> probe.update({"layer": torch.eye(4)}, torch.arange(4))
        >>> float(probe.compute()["top1"])
        1.0
    """

    kept = ("queries", "validation", "few")
    broken: Tensor

    def __init__(
        self, widths: Mapping[str, int], num_classes: int, l2: Sequence[float] = L2, multi_label: bool = False
    ) -> None:
        super().__init__(widths, num_classes, l2, multi_label)
        for number, width in enumerate(widths.values()):
            zeros = torch.zeros(2, width + 1, width + 1 + num_classes, dtype=torch.float64)
            self.add_state(f"sums{number}", zeros, dist_reduce_fx=_merge)  # training and validation split
        self.add_state("broken", torch.zeros(len(widths), dtype=torch.long), dist_reduce_fx="sum")

    def update_bank(
        self, features: Mapping[str, Tensor], labels: Int64[Tensor, " B"], index: Int64[Tensor, " B"]
    ) -> None:
        """Add training images; see the base class."""
        super().update_bank(features, labels, index)
        validation = in_validation_split(index)
        stray = (labels < 0) | (labels >= (2 if self.multi_label else self.num_classes))  # `compute` reports it
        targets = unchecked_one_hot(labels.masked_fill(stray, 0), self.num_classes)
        parts = [part.nonzero().squeeze(1) for part in (~validation, validation)]  # once: each mask synchronises
        for number, layer in enumerate(self.widths):
            self.broken[number] += (~features[layer].isfinite().all(1)).sum()
            sums = getattr(self, f"sums{number}")
            new = torch.stack([sufficient_statistics(features[layer][some], targets[some]) for some in parts])
            sums.copy_(_merge(torch.stack([sums, new])))
        self._keep("validation", {layer: value[parts[1]] for layer, value in features.items()})
        room = max(0, FEW - sum(len(part) for part in self.bank_index[:-1]))
        self._keep("few", {layer: value[:room] for layer, value in features.items()})

    def _fit(self) -> dict[str, LinearProbe]:
        index, order = dim_zero_cat(self.bank_index).sort()
        validation = in_validation_split(dim_zero_cat(self.bank_index))
        few = len(index) < FEW
        labels = dim_zero_cat(self.bank_labels)[order if few else validation]
        features = self._kept("few" if few else "validation")
        found = {}
        for number, (layer, broken) in enumerate(zip(self.widths, self.broken.tolist(), strict=True)):
            if broken:
                raise ValueError(f"layer {layer}: features of {broken} of {len(validation)} images are not finite")
            if few:
                found[layer] = ridge_probe_of_few(features[layer][order], labels, self.num_classes, self.l2)
                continue
            fit, selected_on = getattr(self, f"sums{number}")
            found[layer] = ridge_probe(fit, selected_on, features[layer], labels, self.l2)
        return found


def _merge(parts: Float[Tensor, "P 2 D+1 D+1+C"]) -> Float[Tensor, "2 D+1 D+1+C"]:
    return torch.stack([merge_statistics(part) for part in parts.unbind(1)])


class LogisticProbe(_LayerProbe):
    """Multinomial logistic regression on each layer to convergence, all layers and regularisation strengths at once.

    Args:
        widths: layer to number of its features.
        num_classes: number of classes.
        l2: regularisation strengths to select from; see :func:`ssl_geometry.geometry.logistic.logistic_regression`.
        multi_label: whether an image can have several classes; labels are then multi-hot, (B, C).

    Example:
        >>> probe, labels = LogisticProbe({"layer": 4}, num_classes=4), torch.arange(80) % 4
        >>> probe.update_bank({"layer": torch.eye(4)[labels]}, labels, index=torch.arange(80))
        >>> probe.update({"layer": torch.eye(4)}, torch.arange(4))
        >>> float(probe.compute()["top1"])
        1.0
    """

    kept = ("queries", "bank")

    def update_bank(
        self, features: Mapping[str, Tensor], labels: Int64[Tensor, " B"], index: Int64[Tensor, " B"]
    ) -> None:
        """Add training images; see the base class."""
        super().update_bank(features, labels, index)
        self._keep("bank", features)

    def _fit(self) -> dict[str, LinearProbe]:
        index, order = dim_zero_cat(self.bank_index).sort()  # the same order of sums for any number of ranks
        bank = {layer: value[order] for layer, value in self._kept("bank").items()}
        labels = dim_zero_cat(self.bank_labels)[order]
        return converged_probes(bank, labels, in_validation_split(index), self.num_classes, self.l2)
