"""Images and labels that linear classifiers learn from, are chosen by and are tested on.

Protocol: hyper-parameters are chosen on a fixed tenth of the training images, of fewer than 100 by five-fold
cross-validation; the classifier is fitted again on all of them, and test images are looked at once. Classifiers see
features that are standardised on the training images.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

L2 = tuple(10.0**power for power in range(-6, 3))
"""Strengths of the penalty that are tried where none are given."""
HELD_OUT = 10  # one image of so many teaches nothing and chooses
FEW = 100
"""Fewer images choose by cross-validation: a tenth of them is too few to choose by."""
FOLDS = 5
BLOCK = 2**20
"""Numbers of float64 that are computed at once where images are gone through in blocks."""


class LinearProbe(NamedTuple):
    """Linear classifiers of one layer, one for each of S strengths of the penalty, in units of the raw features."""

    weight: Float[Tensor, "S D C"]
    bias: Float[Tensor, "S C"]
    l2: Float[Tensor, " S"]
    objective: Float[Tensor, " S"]
    """What was minimised, at the solution, float64."""
    gradient_norm: Float[Tensor, " S"]
    """Largest entry of its gradient there, for standardised features, float64."""

    def scores(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "S N C"]:
        """What each classifier says to each image, before any softmax, float64."""
        # Weights are those of raw features, whose mean may be a million times their deviation: float32 would lose them.
        parts = features.split(rows_at_once(features.shape[1]))
        return torch.cat([part.double() @ self.weight + self.bias[:, None] for part in parts], 1)

    def chosen(self, number: int) -> "LinearProbe":
        """One of the strengths, S = 1."""
        return LinearProbe(*(part[number : number + 1] for part in self))


def held_out(index: Int64[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """A fixed tenth of all images, by their numbers: the same in every run, order and process.

    Args:
        index: number of each image in its data set.

    Example:
        >>> round(float(held_out(torch.arange(100_000)).float().mean()), 2)
        0.1
    """
    mixed = (index + 1) * -7046029254386353131  # the golden ratio in 64 bits; then the shifts of splitmix
    mixed = (mixed ^ (mixed >> 31)) * -4658895280553007687
    return (mixed ^ (mixed >> 29)) % HELD_OUT == 0


def choosing_folds(
    labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"], held: Bool[Tensor, " N"], num_classes: int
) -> Bool[Tensor, "F N"]:
    """Which images choose, of classifiers that learn from the others: one set of them, or five for a few images.

    Args:
        labels: class of each image, or zeros and ones where images show several.
        held: the images that choose where there are 100 or more.
        num_classes: number of classes.

    Returns:
        ``held`` alone, or each image in one of five folds, dealt out class by class in their order; folds whose others
        could not teach (see :func:`check_bank`) are left out.

    Raises:
        ValueError: no image chooses.

    Example:
        >>> choosing_folds(torch.tensor([0, 1, 0, 1, 0]), torch.zeros(5, dtype=torch.bool), 2).int().argmax(0)
        tensor([0, 3, 1, 4, 2])
    """
    if len(labels) >= FEW:
        folds = held[None]
    else:
        order = labels.argsort(stable=True) if labels.ndim == 1 else torch.arange(len(labels), device=labels.device)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=labels.device) % FOLDS)
        folds = place == torch.arange(FOLDS, device=labels.device)[:, None]
        least = num_classes if labels.ndim == 1 else 2
        others = [labels[~fold] for fold in folds]
        teach = [len(rest) < len(labels) and len(rest) >= least and bool((rest != rest[0]).any()) for rest in others]
        folds = folds[torch.tensor(teach, device=labels.device)]
    if not bool(folds.any()):
        raise ValueError("no held-out image chooses the strength of the penalty: give more images")
    return folds


def rows_at_once(columns: int) -> int:
    """How many images are gone through at once."""
    return max(1, BLOCK // columns)


def check_features(name: str, features: Float[Tensor, "N D"]) -> None:
    """Refuse features that are not finite.

    Args:
        name: what they are, as the message calls them.
        features: of each image.

    Raises:
        ValueError: how many of how many images are broken.
    """
    broken = sum(int((~part.isfinite().all(1)).sum()) for part in features.split(rows_at_once(features.shape[1])))
    if broken:
        raise ValueError(f"{name}: features of {broken} of {len(features)} images are not finite")


def check_labels(labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"], num_classes: int) -> None:
    """Refuse labels of classes that are not there.

    Args:
        labels: class of each image, or zeros and ones where images show several.
        num_classes: number of classes.

    Raises:
        ValueError: what the labels are.
    """
    if labels.ndim == 2 and labels.shape[1] != num_classes:
        raise ValueError(f"labels of {labels.shape[1]} classes: expected {num_classes}")
    low, high = (int(end) for end in labels.aminmax()) if labels.numel() else (0, 0)
    if labels.ndim == 2 and (low < 0 or high > 1):
        raise ValueError(f"labels from {low} to {high}: expected zeros and ones where images show several classes")
    if labels.ndim == 1 and (low < 0 or high >= num_classes):
        raise ValueError(f"labels from {low} to {high}: expected 0 to {num_classes - 1} for {num_classes} classes")


def check_bank(labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"], num_classes: int) -> None:
    """Refuse labels that teach nothing.

    Args:
        labels: class of each image to learn from, or zeros and ones where images show several.
        num_classes: number of classes.

    Raises:
        ValueError: as of :func:`check_labels`, fewer images than classes, or one class only.
    """
    check_labels(labels, num_classes)
    if len(labels) < (num_classes if labels.ndim == 1 else 2):
        raise ValueError(f"{len(labels)} images for {num_classes} classes: a classifier needs one a class at least")
    if bool((labels == labels[0]).all()):
        alike = f"of class {int(labels[0])}" if labels.ndim == 1 else "labelled alike"
        raise ValueError(f"all {len(labels)} images are {alike}: a classifier needs two classes at least")


def one_hot(labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"], num_classes: int) -> Float[Tensor, "N C"]:
    """Labels as targets, float32: one column a class; labels of several classes an image are that already.

    Raises:
        ValueError: labels of classes that are not there.

    Example:
        >>> one_hot(torch.tensor([1, 0]), 2)
        tensor([[0., 1.],
                [1., 0.]])
    """
    check_labels(labels, num_classes)
    return unchecked_one_hot(labels, num_classes)


def unchecked_one_hot(labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"], num_classes: int) -> Float[Tensor, "N C"]:
    """The same of labels that are known to be right: it does not wait for the device to look at them.

    Example:
        >>> unchecked_one_hot(torch.tensor([1, 0]), 2)
        tensor([[0., 1.],
                [1., 0.]])
    """
    return (F.one_hot(labels, num_classes) if labels.ndim == 1 else labels).float()


def accuracies(
    scores: Float[Tensor, "N C"], labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"]
) -> dict[str, Float[Tensor, ""]]:
    """How right scores are.

    Args:
        scores: of each image and class.
        labels: class of each image, or zeros and ones where images show several.

    Returns:
        ``top1`` and ``mean_per_class`` (the mean over classes that are present of the share that is right); for several
        classes an image ``mAP``, the mean over classes that are present of the average precision. float64; not a number
        where there is no image, or no class is present.

    Raises:
        ValueError: scores that are not numbers, or labels of classes that are not there.

    Example:
        >>> accuracies(torch.eye(3)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 2]))["mean_per_class"]
        tensor(0.5000, dtype=torch.float64)
    """
    check_labels(labels, scores.shape[1])
    if broken := int(scores.isnan().any(1).sum()):
        raise ValueError(f"scores of {broken} of {len(scores)} images are not numbers")
    if labels.ndim == 2:
        return {"mAP": _mean_average_precision(scores, labels)}
    right = (scores.argmax(1) == labels).double()
    number = torch.bincount(labels, minlength=scores.shape[1])
    by_class = torch.zeros(len(number), dtype=torch.float64, device=labels.device).index_add_(0, labels, right)
    return {"top1": right.mean(), "mean_per_class": (by_class / number)[number > 0].mean()}


def _mean_average_precision(scores: Float[Tensor, "N C"], labels: Int64[Tensor, "N C"]) -> Float[Tensor, ""]:
    from sklearn.metrics import average_precision_score  # half a second to import; most data have one class an image

    finite = scores.nan_to_num()  # infinity keeps its place; NaN is reported by the callers
    pairs = zip(labels.T.cpu().numpy(), finite.T.cpu().numpy(), strict=True)
    found = [average_precision_score(truth, column) for truth, column in pairs if truth.any()]
    return scores.new_tensor(found, dtype=torch.float64).mean()


def choose_strength(
    parts: Sequence[tuple[LinearProbe, Tensor, Tensor]], loss: Callable[[Tensor, Tensor], Float[Tensor, ""]]
) -> int:
    """The strength that is right most often; the loss decides among equals, and a few held-out images leave many.

    Args:
        parts: classifiers, and the features and labels of images that they have not seen.
        loss: of scores and labels.
    """
    labels = torch.cat([part[2] for part in parts])
    if not len(labels):
        raise ValueError("no held-out image chooses the strength of the penalty: give more images")
    strengths = parts[0][0].l2
    check_labels(labels, parts[0][0].weight.shape[2])
    found = []
    for number in range(len(strengths)):
        scores = torch.cat([probe.chosen(number).scores(features)[0] for probe, features, _ in parts])
        if labels.ndim == 1:
            right = (scores.argmax(1) == labels).double().mean()
        else:
            right = _mean_average_precision(scores, labels).nan_to_num(0)  # no class of these images is present
        found.append(torch.stack([scores.isnan().any(1).sum(), right, -loss(scores, labels), strengths[number]]))
    places = torch.stack(found).tolist()  # of all strengths in one read
    if broken := int(max(place[0] for place in places)):
        raise ValueError(f"scores of {broken} of {len(labels)} images are not numbers")
    return places.index(max(places))


def check_strengths(l2: Sequence[float], zero: bool) -> None:
    """Refuse strengths of the penalty that mean nothing; 0 is one of them unless ``zero``.

    Raises:
        ValueError: no strength, or one that is negative or infinite.
    """
    if not len(l2):
        raise ValueError("no strength of the penalty is given")
    for strength in l2:
        if not 0 <= strength < float("inf") or not (strength or zero):
            least = "of at least" if zero else "above"
            raise ValueError(f"l2 {strength:g}: expected a strength of the penalty {least} 0")


def is_varying(variance: Float[Tensor, " D"], mean: Float[Tensor, " D"]) -> Bool[Tensor, " D"]:
    """Features that vary by more than the rounding of float32; the others say nothing."""
    return variance > torch.finfo(torch.float32).eps ** 2 * (variance + mean.square())
