"""Evaluations of frozen features: probes of each layer, nearest neighbours, linear evaluation by SGD, few labels.

All processes share the passes over the images; the first one holds the features and fits the classifiers.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from ssl_geometry.data.images import stratified
from ssl_geometry.data.plan import BatchPlan
from ssl_geometry.geometry.classification import FEW, L2, accuracies, in_validation_split, one_hot
from ssl_geometry.geometry.knn import directions_vary, knn_vote
from ssl_geometry.geometry.logistic import converged_probes
from ssl_geometry.geometry.neighbors import RANKING, nearest_directions
from ssl_geometry.geometry.ridge import ridge_probe, ridge_probe_of_few, sufficient_statistics
from ssl_geometry.measure.engine import measure_together
from ssl_geometry.measure.features import Features
from ssl_geometry.measure.measurement import Occasion
from ssl_geometry.measure.probes import FEW_SELECTION, SOLVER, STATISTICS
from ssl_geometry.measure.processes import alone, this_process
from ssl_geometry.metrics import ProbeBank
from ssl_geometry.metrics.probe_bank import MOMENTUM

POOLED = "pooled"
"""The layer of all evaluations but the curve over layers: the input of a classification head."""
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Learning rates of linear evaluation, on features of the probe bank's scale."""
TEMPERATURE = 0.07
"""Of the votes of nearest neighbours."""

Found = Mapping[str, Mapping[str, Sequence[float]]]
"""Metric to the numbers of each layer (``top1``, ...)."""
Together = Callable[[], AbstractContextManager[None]]
Batches = Callable[[int], Iterable[tuple[Tensor, Tensor, Tensor]]]
"""Epoch to batches of features, labels and indices."""


@dataclass
class FrozenFeatures:
    """One network, and the features of all images on the measuring device (in the first process)."""

    occasion: Occasion
    """The network, its images and its epochs."""
    depths: dict[str, float]
    train: Mapping[str, Tensor]
    train_labels: Tensor
    train_index: Tensor
    test: Mapping[str, Tensor]
    test_labels: Tensor
    train_images: int | None = None
    """How many training images were asked for; None for all."""
    folder: Path | None = None
    """Folder of features that do not fit into memory."""
    together: Together = nullcontext
    """Context of a pass; see :func:`measure_together`."""
    method: Any = None
    """The method that the network belongs to, for evaluations that train it further."""

    @property
    def name(self) -> str:
        """Of the network."""
        return self.occasion.subject.name

    @property
    def num_classes(self) -> int:
        """Of the images."""
        return self.occasion.images.num_classes

    def accuracies(self, scores: Tensor) -> dict[str, list[float]]:
        """Accuracies of the scores of the test images, (N, C)."""
        return {key: [float(value)] for key, value in accuracies(scores, self.test_labels).items()}


class Evaluation:
    """One way to evaluate how well the features of a network predict the classes."""

    name: ClassVar[str]
    on_every_process: ClassVar[bool] = False
    """Whether all processes take part; else the first one runs it alone."""

    def protocol(self) -> dict[str, Any]:
        """Everything that affects its numbers, except images and network."""
        raise NotImplementedError

    def evaluate(self, frozen: FrozenFeatures, progress: Any) -> Found:
        """Its numbers, by metric.

        Args:
            frozen: the network and its features.
            progress: a ``rich`` progress display, to which it adds its task.
        """
        raise NotImplementedError


@dataclass
class LayerProbes(Evaluation):
    """Converged classifiers on every layer: figure 3, left, of Grigg et al. 2021."""

    name: ClassVar[str] = "layers"

    @override
    def protocol(self) -> dict[str, Any]:
        return {"l2": list(L2), "solver": f"logistic regression: {SOLVER}"}

    @override
    def evaluate(self, frozen: FrozenFeatures, progress: Any) -> Found:
        validation = in_validation_split(frozen.train_index)
        targets = one_hot(frozen.train_labels, frozen.num_classes)
        task = progress.add_task(f"{frozen.name}: logistic regression, {len(frozen.train)} layers", total=1)
        logistic = converged_probes(frozen.train, frozen.train_labels, validation, frozen.num_classes, L2)
        ridge = {}
        for layer, x in frozen.train.items():
            if len(x) < FEW:
                ridge[layer] = ridge_probe_of_few(x, frozen.train_labels, frozen.num_classes, L2)
                continue
            fit, selected_on = (sufficient_statistics(x[part], targets[part]) for part in (~validation, validation))
            ridge[layer] = ridge_probe(fit, selected_on, x[validation], frozen.train_labels[validation], L2)
        progress.advance(task)
        found: dict[str, dict[str, list[float]]] = {}
        for metric, probes in (("logistic_probe", logistic), ("ridge_probe", ridge)):
            found[metric] = {}
            for layer, probe in probes.items():
                (logits,) = probe.logits(frozen.test[layer])
                numbers = frozen.accuracies(logits)
                numbers |= {"l2": [float(probe.l2[0])], "gradient_norm": [float(probe.gradient_norm[0])]}
                for key, values in numbers.items():
                    found[metric].setdefault(key, []).extend(values)
        return found


@dataclass
class NearestNeighbors(Evaluation):
    """k-nearest-neighbour classification by weighted vote and by majority vote of training images.

    Args:
        k: numbers of neighbours to evaluate.
    """

    k: Sequence[int]
    name: ClassVar[str] = "knn"

    @override
    def protocol(self) -> dict[str, Any]:
        similarity = f"cosine, {RANKING}"
        return {"similarity": similarity, "k": list(self.k), "temperature": TEMPERATURE, "selection": "none"}

    @override
    def evaluate(self, frozen: FrozenFeatures, progress: Any) -> Found:
        found = {}
        classes, vary = frozen.num_classes, directions_vary(frozen.train[POOLED])
        ids, distances, _ = nearest_directions(frozen.test[POOLED], frozen.train[POOLED], max(self.k))
        for k in self.k:
            for temperature, kind in ((TEMPERATURE, ""), (None, "_majority")):
                predicted = knn_vote(distances[:, :k], ids[:, :k], frozen.train_labels, classes, temperature)
                # One more column than classes, for images without neighbours.
                numbers = frozen.accuracies(one_hot(predicted % (classes + 1), classes + 1))
                found[f"knn{k}{kind}"] = numbers if vary else {key: [math.nan] for key in numbers}
        if not vary:
            reason = "features of all training images have the same direction"
            warnings.warn(f"{frozen.name}: accuracy of nearest neighbours is NaN: {reason}", stacklevel=2)
        return found


@dataclass
class LinearEvaluation(Evaluation):
    """SGD with a cosine schedule on pooled features that are computed once, for all learning rates together.

    Args:
        epochs: of SGD.
        weight_decay: of SGD.
        batch_size: images in a step.
    """

    epochs: int
    weight_decay: float
    batch_size: int
    name: ClassVar[str] = "linear"

    @override
    def protocol(self) -> dict[str, Any]:
        return {
            "epochs": self.epochs,
            "batch": self.batch_size,
            "weight_decay": self.weight_decay,
            "learning_rates": list(RATES),
            "schedule": "cosine",
            "momentum": MOMENTUM,
            "statistics": STATISTICS,
        }

    @override
    def evaluate(self, frozen: FrozenFeatures, progress: Any) -> Found:
        features, n = frozen.train[POOLED], len(frozen.train_labels)

        def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
            order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).to(features.device)
            for rows in order.split(self.batch_size):
                yield features[rows], frozen.train_labels[rows], frozen.train_index[rows]

        return {"linear_eval": self._learned(frozen, batches, progress, "linear evaluation")}

    def _learned(self, frozen: FrozenFeatures, batches: Batches, progress: Any, title: str) -> dict[str, list[float]]:
        """Train two banks in parallel: one without the validation split, to select the learning rate on it, and one on
        all images, whose classifier of that learning rate is tested. Other processes take no part in the steps.
        """
        widths = {POOLED: frozen.train[POOLED].shape[1]}
        selecting, final = (
            ProbeBank(widths, frozen.num_classes, RATES, [self.weight_decay]).to(frozen.train_labels.device)
            for _ in range(2)
        )
        steps = math.ceil(len(frozen.train_labels) / self.batch_size) * self.epochs
        task = progress.add_task(f"{frozen.name}: {title}", total=steps)
        step = 0
        for epoch in range(self.epochs):
            selecting.forget()
            of_epoch = batches(epoch)
            with alone():
                for features, labels, index in of_epoch:
                    rate = (1 + math.cos(math.pi * step / steps)) / 2
                    selecting.step({POOLED: features}, labels, index, rate)
                    final.step({POOLED: features}, labels, None, rate)
                    step += 1
                    progress.advance(task)
        best = selecting.best()
        (logits,) = final.logits({POOLED: frozen.test[POOLED]}, best)
        return {**frozen.accuracies(logits), "learning_rate": final.learning_rate[best].tolist()}


@dataclass
class AugmentedLinearEvaluation(LinearEvaluation):
    """Linear evaluation on freshly augmented images in every epoch; every process computes its share of them.

    Args:
        view: the augmentation.
    """

    view: str
    name: ClassVar[str] = "linear_augmented"
    on_every_process: ClassVar[bool] = True

    @override
    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), "training views": self.view}

    @override
    def evaluate(self, frozen: FrozenFeatures, progress: Any) -> Found:
        plan = BatchPlan(torch.arange(len(frozen.train_labels)), [], seed=0)
        widths = {POOLED: frozen.train[POOLED].shape[1]}

        def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
            augmented = Features(widths, {"bank": frozen.train_images}, self.view, epoch, frozen.folder)
            measure_together([augmented], frozen.occasion, together=frozen.together)
            features = augmented.of("bank")[POOLED]
            plan.set_epoch(epoch)
            order = plan.order().to(features.device)
            parts = order.split(self.batch_size)
            return ((features[rows], frozen.train_labels[rows], frozen.train_index[rows]) for rows in parts)

        rank, _ = this_process()
        if rank:
            for epoch in range(self.epochs):
                batches(epoch)
            return {}
        title = f"linear evaluation, {self.view} views"
        return {"linear_eval_augmented": self._learned(frozen, batches, progress, title)}


@dataclass
class FewLabels(Evaluation):
    """Logistic regression on a stratified share of the labels: mean and standard deviation over draws.

    Args:
        fractions: of the labels.
        draws: random subsets for each fraction below 1.
    """

    fractions: Sequence[float]
    draws: int
    name: ClassVar[str] = "labels"

    @override
    def protocol(self) -> dict[str, Any]:
        selection = (
            "accuracy on a tenth of each class of a subset, one image at least; a class of one image is learnt from"
            f"{FEW_SELECTION}"
        )
        subsets = {"fractions": list(self.fractions), "draws": self.draws}
        return {"l2": list(L2), "solver": SOLVER, **subsets, "selection": selection}

    @override
    def evaluate(self, frozen: FrozenFeatures, progress: Any) -> Found:
        found: dict[str, dict[str, list[float]]] = {}
        n, device = len(frozen.train_labels), frozen.train_labels.device
        task = progress.add_task(f"{frozen.name}: few labels", total=len(self.fractions))
        for fraction in self.fractions:
            values, chosen = [], {}
            for draw in range(self.draws if fraction < 1 else 1):
                rows = stratified(frozen.train_labels.cpu(), draw)[: round(fraction * n)].to(device)
                features, labels = {POOLED: frozen.train[POOLED][rows]}, frozen.train_labels[rows]
                validation = stratified_validation_split(labels)
                probe = converged_probes(features, labels, validation, frozen.num_classes, L2)[POOLED]
                (logits,) = probe.logits(frozen.test[POOLED])
                values.append(frozen.accuracies(logits))
                chosen[f"l2_draw{draw + 1}"] = [float(probe.l2[0])]
            several = {key: [value[key][0] for value in values] for key in values[0]}
            numbers = {key: [statistics.mean(draws)] for key, draws in several.items()}
            if len(values) > 1:
                numbers["sd"] = [statistics.stdev(next(iter(several.values())))]
            found[f"labels_{100 * fraction:g}%"] = {**numbers, **chosen}
            progress.advance(task)
        return found


def stratified_validation_split(labels: Tensor) -> Tensor:
    """A stratified validation split: 10 % of each class, at least one image, but never the only one of a class.

    Args:
        labels: class of each image, (N,) int64; multi-hot labels, (N,C), give 10 % of all images.

    Returns:
        Which images are in the validation split, (N,) bool: the last of each class.

    Example:
        >>> stratified_validation_split(torch.tensor([0, 0, 1, 2, 1, 1])).tolist()
        [False, True, False, False, False, True]
    """
    validation = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    parts = [labels == value for value in labels.unique()] if labels.ndim == 1 else [~validation]
    for part in parts:
        rows = part.nonzero().squeeze(1)
        if len(rows) > 1:
            validation[rows[-max(1, len(rows) // 10) :]] = True
    return validation
