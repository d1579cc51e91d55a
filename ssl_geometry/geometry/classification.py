"""Training, validation and test images of linear classifiers, and the accuracy that they reach.

Protocol: hyper-parameters are selected on a fixed validation split (10 % of the training images; five-fold
cross-validation for fewer than 100 images). The classifier is then refitted on all training images and evaluated once
on the test images. Features are standardised with the statistics of the training images.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

L2 = tuple(10.0**power for power in range(-6, 3))
"""Default grid of regularisation strengths."""
VALIDATION_ONE_IN = 10  # one image in ten is in the validation split
FEW = 100
"""With fewer training images, hyper-parameters are selected by cross-validation instead of a validation split."""
FOLDS = 5
BLOCK = 2**20
"""Block size, in float64 numbers, of loops over images."""


class LinearProbe(NamedTuple):
    """Linear classifiers of one layer, one per regularisation strength (S of them), for raw features."""

    weight: Float[Tensor, "S D C"]
    bias: Float[Tensor, "S C"]
    l2: Float[Tensor, " S"]
    objective: Float[Tensor, " S"]
    """Value of the objective at the solution, float64."""
    gradient_norm: Float[Tensor, " S"]
    """Largest absolute entry of the objective's gradient at the solution, for standardised features, float64."""

    def logits(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "S N C"]:
        """Logits (ridge regression: predictions) of each classifier for each image, float64."""
        # Weights are those of raw features, whose mean may be a million times their deviation: float32 would lose them.
        parts = features.split(rows_at_once(features.shape[1]))
        return torch.cat([part.double() @ self.weight + self.bias[:, None] for part in parts], 1)

    def chosen(self, number: int) -> "LinearProbe":
        """The classifier of one regularisation strength, S = 1."""
        return LinearProbe(*(part[number : number + 1] for part in self))


def in_validation_split(index: Int64[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Which images belong to the validation split (10 %), by a hash of their index: the same in every run and process.

    Args:
        index: index of each image in its data set.

    Example:
        >>> round(float(in_validation_split(torch.arange(100_000)).float().mean()), 2)
        0.1
    """
    mixed = (index + 1) * -7046029254386353131  # the golden ratio in 64 bits; then the shifts of splitmix
    mixed = (mixed ^ (mixed >> 31)) * -4658895280553007687
    return (mixed ^ (mixed >> 29)) % VALIDATION_ONE_IN == 0


def validation_folds(
    labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"], validation: Bool[Tensor, " N"], num_classes: int
) -> Bool[Tensor, "F N"]:
    """Validation images of each fold: the validation split alone, or five folds for fewer than 100 images.

    Args:
        labels: class of each image, or a multi-hot row per image (multi-label).
        validation: the validation split, used for 100 images or more.
        num_classes: number of classes.

    Returns:
        One row per fold. Five folds are stratified by class. A fold is dropped where no classifier can be fitted to
        its training images (see :func:`check_bank`).

    Raises:
        ValueError: no validation image is left.

    Example:
        >>> validation_folds(torch.tensor([0, 1, 0, 1, 0]), torch.zeros(5, dtype=torch.bool), 2).int().argmax(0)
        tensor([0, 3, 1, 4, 2])
    """
    if len(labels) >= FEW:
        folds = validation[None]
    else:
        order = labels.argsort(stable=True) if labels.ndim == 1 else torch.arange(len(labels), device=labels.device)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=labels.device) % FOLDS)
        folds = place == torch.arange(FOLDS, device=labels.device)[:, None]
        least = num_classes if labels.ndim == 1 else 2
        others = [labels[~fold] for fold in folds]
        usable = [len(rest) < len(labels) and len(rest) >= least and bool((rest != rest[0]).any()) for rest in others]
        folds = folds[torch.tensor(usable, device=labels.device)]
    if not bool(folds.any()):
        raise ValueError("no held-out image to select the regularisation strength on: use more images")
    return folds


def rows_at_once(columns: int) -> int:
    """How many images a block holds."""
    return max(1, BLOCK // columns)


def check_features(name: str, features: Float[Tensor, "N D"]) -> None:
    """Refuse features that are not finite.

    Args:
        name: what the message calls them.
        features: of each image.

    Raises:
        ValueError: features that are not finite, with the number of images that have any.
    """
    broken = sum(int((~part.isfinite().all(1)).sum()) for part in features.split(rows_at_once(features.shape[1])))
    if broken:
        raise ValueError(f"{name}: features of {broken} of {len(features)} images are not finite")


def check_labels(labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"], num_classes: int) -> None:
    """Refuse labels out of range.

    Args:
        labels: class of each image, or a multi-hot row per image (multi-label).
        num_classes: number of classes.

    Raises:
        ValueError: labels out of range.
    """
    if labels.ndim == 2 and labels.shape[1] != num_classes:
        raise ValueError(f"labels of {labels.shape[1]} classes: expected {num_classes}")
    low, high = (int(end) for end in labels.aminmax()) if labels.numel() else (0, 0)
    if labels.ndim == 2 and (low < 0 or high > 1):
        raise ValueError(f"labels from {low} to {high}: expected 0 and 1 (multi-label)")
    if labels.ndim == 1 and (low < 0 or high >= num_classes):
        raise ValueError(f"labels from {low} to {high}: expected 0 to {num_classes - 1} for {num_classes} classes")


def check_bank(labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"], num_classes: int) -> None:
    """Refuse training labels that no classifier can be fitted to.

    Args:
        labels: class of each training image, or a multi-hot row per image (multi-label).
        num_classes: number of classes.

    Raises:
        ValueError: labels out of range, fewer images than classes, or a single class.
    """
    check_labels(labels, num_classes)
    if len(labels) < (num_classes if labels.ndim == 1 else 2):
        raise ValueError(f"{len(labels)} images for {num_classes} classes: a classifier needs at least one per class")
    if bool((labels == labels[0]).all()):
        same = f"are of class {int(labels[0])}" if labels.ndim == 1 else "have the same labels"
        raise ValueError(f"all {len(labels)} images {same}: a classifier needs at least two classes")


def one_hot(labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"], num_classes: int) -> Float[Tensor, "N C"]:
    """One-hot targets, float32; multi-hot labels are only converted.

    Raises:
        ValueError: labels out of range.

    Example:
        >>> one_hot(torch.tensor([1, 0]), 2)
        tensor([[0., 1.],
                [1., 0.]])
    """
    check_labels(labels, num_classes)
    return unchecked_one_hot(labels, num_classes)


def unchecked_one_hot(labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"], num_classes: int) -> Float[Tensor, "N C"]:
    """:func:`one_hot` of labels that are known to be valid; it does not synchronise with the device to check them.

    Example:
        >>> unchecked_one_hot(torch.tensor([1, 0]), 2)
        tensor([[0., 1.],
                [1., 0.]])
    """
    return (F.one_hot(labels, num_classes) if labels.ndim == 1 else labels).float()


def accuracies(
    scores: Float[Tensor, "N C"], labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"]
) -> dict[str, Float[Tensor, ""]]:
    """Accuracy of predictions.

    Args:
        scores: of each image and class, such as logits; the largest is the prediction.
        labels: class of each image, or a multi-hot row per image (multi-label).

    Returns:
        ``top1`` and ``mean_per_class`` (mean of the accuracies of the classes that are present); for multi-label images
        ``mAP``, the mean average precision of the classes that are present. float64; NaN without images or classes.

    Raises:
        ValueError: scores that are NaN, or labels out of range.

    Example:
        >>> accuracies(torch.eye(3)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 2]))["mean_per_class"]
        tensor(0.5000, dtype=torch.float64)
    """
    check_labels(labels, scores.shape[1])
    if broken := int(scores.isnan().any(1).sum()):
        raise ValueError(f"scores of {broken} of {len(scores)} images are NaN")
    if labels.ndim == 2:
        return {"mAP": _mean_average_precision(scores, labels)}
    correct = (scores.argmax(1) == labels).double()
    number = torch.bincount(labels, minlength=scores.shape[1])
    by_class = torch.zeros(len(number), dtype=torch.float64, device=labels.device).index_add_(0, labels, correct)
    return {"top1": correct.mean(), "mean_per_class": (by_class / number)[number > 0].mean()}


def _mean_average_precision(scores: Float[Tensor, "N C"], labels: Int64[Tensor, "N C"]) -> Float[Tensor, ""]:
    from sklearn.metrics import average_precision_score  # half a second to import, and few data sets are multi-label

    finite = scores.nan_to_num()  # infinity keeps its place; NaN is reported by the callers
    pairs = zip(labels.T.cpu().numpy(), finite.T.cpu().numpy(), strict=True)
    found = [average_precision_score(truth, column) for truth, column in pairs if truth.any()]
    return scores.new_tensor(found, dtype=torch.float64).mean()


def choose_l2(
    parts: Sequence[tuple[LinearProbe, Tensor, Tensor]], loss: Callable[[Tensor, Tensor], Float[Tensor, ""]]
) -> int:
    """The index of the regularisation strength of the best validation accuracy; ties are broken by validation loss.

    Ties are common on small validation splits.

    Args:
        parts: per fold, classifiers, and the features and labels of its validation images.
        loss: of logits and labels.
    """
    labels = torch.cat([part[2] for part in parts])
    if not len(labels):
        raise ValueError("no held-out image to select the regularisation strength on: use more images")
    strengths = parts[0][0].l2
    check_labels(labels, parts[0][0].weight.shape[2])
    found = []
    for number in range(len(strengths)):
        logits = torch.cat([probe.chosen(number).logits(features)[0] for probe, features, _ in parts])
        if labels.ndim == 1:
            accuracy = (logits.argmax(1) == labels).double().mean()
        else:
            accuracy = _mean_average_precision(logits, labels).nan_to_num(0)  # NaN where no class is present
        found.append(torch.stack([logits.isnan().any(1).sum(), accuracy, -loss(logits, labels), strengths[number]]))
    places = torch.stack(found).tolist()  # one device synchronisation for all strengths
    if broken := int(max(place[0] for place in places)):
        raise ValueError(f"logits of {broken} of {len(labels)} images are NaN")
    return places.index(max(places))


def check_l2(l2: Sequence[float], zero: bool) -> None:
    """Refuse regularisation strengths that are negative or infinite, and 0 unless ``zero``.

    Raises:
        ValueError: no strength, or an invalid one.
    """
    if not len(l2):
        raise ValueError("no regularisation strength is given")
    for strength in l2:
        if not 0 <= strength < float("inf") or not (strength or zero):
            least = "of at least" if zero else "above"
            raise ValueError(f"l2 {strength:g}: expected a regularisation strength {least} 0")


def is_varying(variance: Float[Tensor, " D"], mean: Float[Tensor, " D"]) -> Bool[Tensor, " D"]:
    """Which features vary by more than float32 rounding; the others carry no information."""
    return variance > torch.finfo(torch.float32).eps ** 2 * (variance + mean.square())
