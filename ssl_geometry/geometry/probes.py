"""What can be read off frozen features: by linear classifiers, and by their nearest neighbours.

Protocol: hyper-parameters are chosen on a fixed tenth of the training images, the classifier is fitted again on all of
them, and test images are looked at once. Linear classifiers see features that are standardised on the training images.
Neighbours are found by cosine similarity among clean (un-augmented) training images, and vote with weight
exp(similarity / temperature), as in Wu et al. 2018.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

L2 = tuple(10.0**power for power in range(-6, 3))
"""Strengths of the penalty that are tried where none are given."""
HELD_OUT = 10  # one image of so many teaches nothing and chooses
MEMORY = 12  # steps that L-BFGS remembers
TRIALS = 12  # of a step's length, at most
GROUP_BYTES = {"cpu": 0, "cuda": 3 * 2**30}
"""Working memory up to which layers of one width are solved together, by device.

On a CPU each layer is solved alone: its strengths keep the cores busy, and three layers of 10,000 x 512 features
together take twice as long as one after the other, for they leave the caches and wait for the slowest.
"""


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
        """What each classifier says to each image, before any softmax."""
        return features.to(self.weight.dtype) @ self.weight + self.bias[:, None]

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


def one_hot(labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"], num_classes: int) -> Float[Tensor, "N C"]:
    """Labels as targets, float32: one column a class; labels of several classes an image are that already.

    Example:
        >>> one_hot(torch.tensor([1, 0]), 2)
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
        classes an image ``mAP``, the mean over classes that are present of the average precision. float64.

    Example:
        >>> accuracies(torch.eye(3)[[0, 0, 0, 1]], torch.tensor([0, 0, 0, 2]))["mean_per_class"]
        tensor(0.5000, dtype=torch.float64)
    """
    if labels.ndim == 1:
        right = (scores.argmax(1) == labels).double()
        number = torch.bincount(labels, minlength=scores.shape[1])
        by_class = torch.zeros(len(number), dtype=torch.float64, device=labels.device).index_add_(0, labels, right)
        return {"top1": right.mean(), "mean_per_class": (by_class / number)[number > 0].mean()}
    pairs = zip(scores.unbind(1), labels.unbind(1), strict=True)
    areas = torch.stack([_average_precision(column, truth) for column, truth in pairs])
    return {"mAP": areas.nanmean()}


def _average_precision(scores: Float[Tensor, " N"], labels: Int64[Tensor, " N"]) -> Float[Tensor, ""]:
    """Sum over thresholds of precision times the gain in recall; images of equal scores pass a threshold together."""
    ordered, order = scores.sort(descending=True)
    found = labels[order].double().cumsum(0)
    last = torch.cat([ordered[1:] != ordered[:-1], ordered.new_ones(1, dtype=torch.bool)])
    rank = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    precision, recall = (found / rank)[last], (found / found[-1])[last]
    return (precision * recall.diff(prepend=recall.new_zeros(1))).sum()


# -- ridge -------------------------------------------------------------------------------------------------------------


def ridge_sums(features: Float[Tensor, "N D"], targets: Float[Tensor, "N C"]) -> Float[Tensor, "D+1 D+1+C"]:
    """All that ridge regression needs of some images: [x, 1]' [x, 1, y], float64. Sums over batches and ranks add up.

    Args:
        features: of each image.
        targets: of each image; see :func:`one_hot`.
    """
    x = torch.cat([features.double(), features.new_ones(len(features), 1, dtype=torch.float64)], 1)
    return x.T @ torch.cat([x, targets.double()], 1)


def ridge(sums: Float[Tensor, "D+1 D+1+C"], l2: Sequence[float] = L2) -> LinearProbe:
    """Minimise (1/N) |y - x W - b|^2 + l2 |W|^2 on standardised features, in closed form for all strengths at once.

    Args:
        sums: of the images, as of :func:`ridge_sums`.
        l2: strengths of the penalty.

    Returns:
        Regressions in float64. A feature that does not vary has the weight 0; collinear ones share theirs.

    Raises:
        ValueError: sums that are not finite, or of no image.

    References:
        Hoerl & Kennard, *Ridge regression*, 1970.

    Example:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> probe = ridge(ridge_sums(x, x[:, :1] * 2 + 1), l2=[1e-9])
        >>> [round(value, 3) for value in probe.weight.flatten().tolist()], round(float(probe.bias), 3)
        ([2.0, 0.0, 0.0], 1.0)
    """
    width = len(sums) - 1
    n = sums[-1, width]
    if not bool(sums.isfinite().all()) or not bool(n > 0):
        raise ValueError(f"ridge regression of {int(n.nan_to_num())} images: features or targets are not finite")
    mean, target_mean = sums[-1, :width] / n, sums[-1, width + 1 :] / n
    second = sums[:-1, :width] / n
    covariance = second - mean[:, None] * mean
    cross = sums[:-1, width + 1 :] / n - mean[:, None] * target_mean
    variance = covariance.diagonal()
    resolution = 64 * torch.finfo(torch.float64).eps
    varies = variance > resolution * second.diagonal()
    scale = torch.where(varies, variance.clamp_min(0).rsqrt(), 0)
    values, vectors = torch.linalg.eigh(scale[:, None] * covariance * scale)
    strengths = torch.tensor(l2, dtype=torch.float64, device=sums.device)
    projected = vectors.T @ (scale[:, None] * cross)
    shrunk = projected / (values.clamp_min(0)[:, None] + strengths[:, None, None])
    standard = vectors @ shrunk  # (S, D, C), of standardised features
    weight = scale[:, None] * standard
    bias = target_mean - mean @ weight
    correlation, aim = scale[:, None] * covariance * scale, scale[:, None] * cross
    gradient = 2 * (correlation @ standard + strengths[:, None, None] * standard - aim)
    # |y|^2 is not among the sums: of one-hot targets it is their sum. The objective is reported up to that constant.
    fit = (standard * (correlation @ standard - 2 * aim)).sum((1, 2))
    objective = fit + strengths * standard.square().sum((1, 2))
    return LinearProbe(weight, bias, strengths, objective, gradient.abs().amax((1, 2)))


def ridge_probe(
    fit: Float[Tensor, "D+1 D+1+C"],
    held: Float[Tensor, "D+1 D+1+C"],
    held_features: Float[Tensor, "M D"],
    held_labels: Int64[Tensor, " M"] | Int64[Tensor, "M C"],
    l2: Sequence[float] = L2,
) -> LinearProbe:
    """Ridge regression whose strength is chosen on held-out images, fitted again on all.

    Args:
        fit: sums of the images to learn from.
        held: sums of the held-out images.
        held_features: of the held-out images.
        held_labels: of the held-out images.
        l2: strengths to choose from; of equally right ones the strongest.

    Returns:
        One regression (S = 1).

    Raises:
        ValueError: features that are not finite, or no held-out images.
    """
    best = _choose(ridge(fit, l2), held_features, held_labels)
    return ridge(fit + held, [l2[best]])


def _choose(probe: LinearProbe, features: Tensor, labels: Tensor) -> int:
    if not len(labels):
        raise ValueError("no held-out image chooses the strength of the penalty: give more images")
    rights = [float(next(iter(accuracies(scores, labels).values()))) for scores in probe.scores(features)]
    order = sorted(range(len(rights)), key=lambda number: (rights[number], float(probe.l2[number])))
    return order[-1]


# -- logistic regression -----------------------------------------------------------------------------------------------


def converged_probes(
    features: Mapping[str, Float[Tensor, "N D"]],
    labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"],
    held: Bool[Tensor, " N"],
    num_classes: int,
    l2: Sequence[float] = L2,
) -> dict[str, LinearProbe]:
    """Logistic regression on every layer, its strength chosen on held-out images, fitted again on all.

    Args:
        features: layer to features.
        labels: class of each image, or zeros and ones where images show several.
        held: which images are held out.
        num_classes: number of classes.
        l2: strengths to choose from; of equally right ones the strongest.

    Returns:
        Layer to one classifier (S = 1).

    Raises:
        ValueError: as of :func:`logistic_regression`.
    """
    tried = logistic_regression({name: x[~held] for name, x in features.items()}, labels[~held], num_classes, l2)
    best = {name: _choose(probe, features[name][held], labels[held]) for name, probe in tried.items()}
    found: dict[str, LinearProbe] = {}
    for number in sorted(set(best.values())):  # layers that chose the same strength are one problem
        some = {name: x for name, x in features.items() if best[name] == number}
        found |= logistic_regression(some, labels, num_classes, [l2[number]])
    return {name: found[name] for name in features}


def logistic_regression(
    features: Mapping[str, Float[Tensor, "N D"]],
    labels: Int64[Tensor, " N"] | Int64[Tensor, "N C"],
    num_classes: int,
    l2: Sequence[float] = L2,
    *,
    tolerance: float = 3e-6,
    max_iterations: int = 2000,
) -> dict[str, LinearProbe]:
    """Minimise mean cross-entropy + l2/2 |W|^2 on standardised features, for all layers and strengths.

    L-BFGS in the principal axes of each layer. There the Hessian is near to a diagonal, the mean of p (1 - p) of a
    class times the eigenvalue of an axis, which is its first guess. The length of a step is found on logits alone,
    which are linear in it: a step costs one product with the features and one with their transpose, for all strengths
    of all layers of one width together.

    Args:
        features: layer to features; layers may differ in width.
        labels: class of each image, in [0, num_classes); or zeros and ones where images show several, which gives one
            binary regression a class.
        num_classes: number of classes.
        l2: strengths of the penalty; scikit-learn's C is 1 / (N l2). Biases are not penalised.
        tolerance: a problem is solved where the largest entry of its gradient is at most this share of the objective;
            the default is near what float32 can tell, and leaves the objective within 1e-7 of the optimum, relative.
        max_iterations: at most; a problem that is not solved then is named in a warning.

    Returns:
        Layer to classifiers, float32, with objective and gradient evaluated in float64.

    Raises:
        ValueError: one class only, labels out of range, fewer images than classes, or features that are not finite.

    References:
        Liu & Nocedal, *On the limited memory BFGS method for large scale optimization*, 1989.

    Example:
        >>> x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        >>> probe = logistic_regression({"layer": x}, (x[:, 0] > 0).long(), num_classes=2, l2=[1e-3, 1e-1])["layer"]
        >>> probe.weight.shape, bool((probe.gradient_norm < 1e-5).all())
        (torch.Size([2, 4, 2]), True)
    """
    _check(features, labels, num_classes)
    targets = one_hot(labels, num_classes)
    strengths = torch.tensor(l2, dtype=torch.float64, device=labels.device)
    found: dict[str, LinearProbe] = {}
    for group in _groups(features, len(l2) * num_classes):
        axes = [_principal_axes(features[name]) for name in group]
        x = torch.stack([axis.inputs for axis in axes])
        squares = torch.stack([axis.squares for axis in axes])
        weights = _minimise(x, targets, squares, strengths, labels.ndim == 1, tolerance, max_iterations)
        for name, axis, inputs, weight in zip(group, axes, x, weights, strict=True):
            objective, gradient = _evaluate(inputs, targets, weight, strengths, labels.ndim == 1)
            unsolved = ~(gradient <= 10 * tolerance * objective)  # what float32 leaves open is within this
            if bool(unsolved.any()):
                which = ", ".join(f"{value:g}" for value in strengths[unsolved].tolist())
                warnings.warn(
                    f"logistic regression of {name} stopped before the optimum for l2 {which}: the largest entry of "
                    f"the gradient is {float(gradient.max()):.1e}",
                    stacklevel=2,
                )
            turned = axis.turn @ weight[..., :-1].mT  # back from the principal axes to the raw features
            bias = weight[..., -1] - axis.mean @ turned
            found[name] = LinearProbe(turned, bias, strengths, objective, gradient)
    return {name: found[name] for name in features}


def _check(features: Mapping[str, Tensor], labels: Tensor, num_classes: int) -> None:
    for name, x in features.items():
        broken = int((~x.isfinite().all(1)).sum())
        if broken:
            raise ValueError(f"layer {name}: features of {broken} of {len(x)} images are not finite")
        if len(x) != len(labels):
            raise ValueError(f"layer {name}: features of {len(x)} images, labels of {len(labels)}")
    if labels.ndim == 2:
        return
    if len(labels) < num_classes:
        raise ValueError(f"{len(labels)} images for {num_classes} classes: a classifier needs one a class at least")
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels from {low} to {high}: expected 0 to {num_classes - 1} for {num_classes} classes")
    if low == high:
        raise ValueError(f"all {len(labels)} images are of class {low}: a classifier needs two classes at least")


class _Axes(NamedTuple):
    inputs: Float[Tensor, "N M+1"]
    """Standardised features in their M = min(N, D) principal axes, and a column of ones."""
    squares: Float[Tensor, " M+1"]
    """Mean squares of those columns."""
    turn: Float[Tensor, "D M"]
    """Raw, centred features times this are the inputs."""
    mean: Float[Tensor, " D"]


def _principal_axes(features: Float[Tensor, "N D"]) -> _Axes:
    mean = features.mean(0, dtype=torch.float64).float()
    centered = features.float() - mean
    shift = centered.mean(0)  # what rounding left of the mean
    mean, centered = mean + shift, centered - shift
    deviation = centered.square().mean(0).sqrt()
    varies = deviation > 8 * torch.finfo(torch.float32).eps * features.float().square().mean(0).sqrt()
    scale = torch.where(varies, 1 / deviation, 0)
    standard = centered * scale
    n, width = standard.shape
    if n < width:  # then n axes hold all that varies: the others' weights are 0
        values, images = torch.linalg.eigh((standard @ standard.T / n).double())
        resolution = torch.finfo(torch.float32).eps * values[-1]
        lengths = torch.where(values > resolution, (n * values).clamp_min(0).sqrt(), 0)
        turn = (standard.T @ images.float()) * torch.where(lengths > 0, 1 / lengths, 0).float()
    else:
        values, vectors = torch.linalg.eigh((standard.T @ standard / n).double())
        turn = vectors.float()
    inputs = torch.cat([standard @ turn, standard.new_ones(n, 1)], 1)
    squares = torch.cat([values.clamp_min(0).float(), values.new_ones(1).float()])
    return _Axes(inputs, squares, scale[:, None] * turn, mean)


def _groups(features: Mapping[str, Tensor], columns: int) -> list[list[str]]:
    """Layers of one width, as many together as fit into the working memory."""
    by_width: dict[int, list[str]] = {}
    for name, x in features.items():
        by_width.setdefault(x.shape[1], []).append(name)
    groups = []
    for width, names in by_width.items():
        n = len(features[names[0]])
        each = 4 * (2 * n * width + 5 * n * columns + (2 * MEMORY + 6) * width * columns)
        budget = GROUP_BYTES.get(features[names[0]].device.type, GROUP_BYTES["cuda"])
        some = max(1, budget // each)
        groups += [names[start : start + some] for start in range(0, len(names), some)]
    return groups


def _minimise(
    x: Float[Tensor, "G N E"],
    targets: Float[Tensor, "N C"],
    squares: Float[Tensor, "G E"],
    l2: Float[Tensor, " S"],
    multinomial: bool,
    tolerance: float,
    max_iterations: int,
) -> Float[Tensor, "G S C E"]:
    """Weights of all problems; the last of the E columns is the bias."""
    # Images come last in logits: a softmax over classes then runs along the images, 14 times faster on a CPU than over
    # ten classes that lie side by side.
    y = targets.T.contiguous()
    classes, n = y.shape
    share = y.mean(1).clamp(1e-6, 1 - 1e-6)
    weight = x.new_zeros(len(x), len(l2), classes, x.shape[2])
    weight[..., -1] = share.log() - (0 if multinomial else (1 - share).log())
    done = weight.clone()
    columns = torch.arange(len(l2), device=x.device)  # strengths that are not solved in all layers
    steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def penalties() -> Float[Tensor, "1 S 1 E"]:
        penalty = l2[columns].float().view(1, -1, 1, 1).repeat(1, 1, 1, x.shape[2])
        penalty[..., -1] = 0
        return penalty

    def inverse_hessian(logits: Tensor) -> Float[Tensor, "G S C E"]:
        p = logits.softmax(2) if multinomial else logits.sigmoid()
        spread = (p * (1 - p)).mean(3).clamp_min(1e-8)
        return 1 / (spread[..., None] * squares[:, None, None] + penalty)

    def times(direction: Tensor) -> Float[Tensor, "G S C N"]:
        return (direction.flatten(1, 2) @ x.mT).unflatten(1, direction.shape[1:3])

    def gradient_at(logits: Tensor) -> Float[Tensor, "G S C E"]:
        errors = _errors(logits, y, multinomial)
        return (errors.flatten(1, 2) @ x).unflatten(1, errors.shape[1:3]) / n + penalty * weight

    penalty = penalties()
    logits = times(weight)
    gradient = gradient_at(logits)
    for iteration in range(max_iterations):
        if iteration % 5 == 0:
            objective = _loss(logits, y, multinomial) + (penalty * weight.square()).sum((2, 3)) / 2
            unsolved = ~(gradient.abs().amax((2, 3)) <= tolerance * objective)
            keep = unsolved.any(0)
            if not bool(keep.all()):
                done[:, columns] = weight
                columns, unsolved = columns[keep], unsolved[:, keep]
                weight, gradient, logits = weight[:, keep], gradient[:, keep], logits[:, keep]
                steps = [(step[:, keep], change[:, keep], inverse[:, keep]) for step, change, inverse in steps]
                penalty = penalties()
            if not len(columns):
                return done
            guess = inverse_hessian(logits)
        direction = _two_loops(gradient, guess, steps)
        direction_logits = times(direction)
        slope = (gradient * direction).sum((2, 3))
        length = _length(logits, direction_logits, weight, direction, penalty, y, slope, multinomial)
        step = (length * unsolved)[..., None, None] * direction
        weight = weight + step
        logits = torch.addcmul(logits, (length * unsolved)[..., None, None], direction_logits)
        change, gradient = -gradient, gradient_at(logits)
        change += gradient
        curvature = (step * change).sum((2, 3))
        steps.append((step, change, torch.where(curvature > 0, 1 / curvature, 0)))
        del steps[:-MEMORY]
    done[:, columns] = weight
    return done


def _errors(logits: Tensor, y: Float[Tensor, "C N"], multinomial: bool) -> Float[Tensor, "G S C N"]:
    """Probabilities less targets, without a difference of numbers near 1: such are those of images learnt well."""
    if not multinomial:
        sign = 1 - 2 * y
        return sign * (sign * logits).sigmoid()
    others = logits.softmax(2).mul_(1 - y)
    return others.sub_(y * others.sum(2, keepdim=True))


def _loss(logits: Tensor, y: Float[Tensor, "C N"], multinomial: bool) -> Float[Tensor, "G S"]:
    normalizer = logits.logsumexp(2) if multinomial else F.softplus(logits).sum(2)
    return (normalizer - (logits * y).sum(2)).mean(2, dtype=torch.float64).float()


def _two_loops(gradient: Tensor, guess: Tensor, steps: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The direction of L-BFGS."""
    direction = -gradient
    shares = []
    for step, change, inverse in reversed(steps):
        share = (inverse * (step * direction).sum((2, 3)))[..., None, None]
        direction = torch.addcmul(direction, share, change, value=-1)
        shares.append(share)
    if steps:
        _, change, inverse = steps[-1]
        scale = inverse * (change * guess * change).sum((2, 3))
        direction = direction * torch.where(scale > 0, 1 / scale, 1)[..., None, None]
    direction = direction * guess
    for (step, change, inverse), share in zip(steps, reversed(shares), strict=True):
        back = (inverse * (change * direction).sum((2, 3)))[..., None, None]
        direction = torch.addcmul(direction, share - back, step)
    return direction


def _length(
    logits: Tensor,
    direction_logits: Tensor,
    weight: Tensor,
    direction: Tensor,
    penalty: Tensor,
    y: Tensor,
    slope: Tensor,
    multinomial: bool,
) -> Float[Tensor, "G S"]:
    """How far to go along each direction: to where the slope is at most half as steep (the loss is convex)."""
    along, bend = (penalty * weight * direction).sum((2, 3)), (penalty * direction.square()).sum((2, 3))
    length, low, high = torch.ones_like(slope), torch.zeros_like(slope), torch.full_like(slope, torch.inf)
    for _ in range(TRIALS):
        errors = _errors(torch.addcmul(logits, length[..., None, None], direction_logits), y, multinomial)
        here = (errors * direction_logits).sum((2, 3)) / logits.shape[3] + along + length * bend
        far, near = here > 0.5 * slope.abs(), here < 0.9 * slope
        if not bool((far | near).any()):
            break
        high, low = torch.where(far, length, high), torch.where(near, length, low)
        secant = length * slope / (slope - here)
        middle = torch.where(high.isinf(), 2 * length, (low + high) / 2)
        inside = (secant > low) & (secant < high) & far
        length = torch.where(far | near, torch.where(inside, secant, middle), length)
    return length


def _evaluate(
    x: Float[Tensor, "N E"],
    targets: Float[Tensor, "N C"],
    weight: Float[Tensor, "S C E"],
    l2: Float[Tensor, " S"],
    multinomial: bool,
) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    """Objective and largest entry of its gradient, float64, some images at a time."""
    exact = weight.double()
    penalised = torch.cat([exact[..., :-1], torch.zeros_like(exact[..., -1:])], 2)
    loss, gradient = torch.zeros_like(l2), torch.zeros_like(exact)
    for part, y in zip(x.split(8192), targets.split(8192), strict=True):
        part, y = part.double(), y.T.double()
        logits = (exact.flatten(0, 1) @ part.T).unflatten(0, exact.shape[:2])
        normalizer = logits.logsumexp(1) if multinomial else F.softplus(logits).sum(1)
        loss += (normalizer - (logits * y).sum(1)).sum(1)
        errors = _errors(logits[None], y, multinomial)[0]
        gradient += (errors.flatten(0, 1) @ part).unflatten(0, exact.shape[:2])
    gradient = gradient / len(x) + l2[:, None, None] * penalised
    return loss / len(x) + l2 * penalised.square().sum((1, 2)) / 2, gradient.abs().amax((1, 2))


# -- nearest neighbours ------------------------------------------------------------------------------------------------


def knn_predict(
    queries: Float[Tensor, "N D"],
    bank: Float[Tensor, "M D"],
    labels: Int64[Tensor, " M"],
    num_classes: int,
    k: int = 20,
    temperature: float | None = 0.07,
    chunk: int = 1024,
) -> Int64[Tensor, " N"]:
    """Predict classes by a vote of the k most similar images of the bank.

    Args:
        queries: features to classify.
        bank: features with known classes.
        labels: classes of the bank, in [0, num_classes).
        num_classes: number of classes.
        k: neighbours that vote; the whole bank votes where it is smaller.
        temperature: a neighbour votes with weight exp(cosine / temperature); None counts heads.
        chunk: queries compared at once; bounds the memory at ``chunk * M`` similarities.

    Returns:
        The class with the largest vote for each query (the smaller class number on ties).

    Raises:
        ValueError: an empty bank, or k < 1.

    References:
        Wu et al., *Unsupervised feature learning via non-parametric instance discrimination*, 2018, section 3.4.

    Example:
        >>> bank = torch.eye(3).repeat(4, 1)
        >>> knn_predict(torch.eye(3) + 0.1, bank, torch.arange(3).repeat(4), num_classes=3, k=4)
        tensor([0, 1, 2])
    """
    if len(bank) == 0 or k < 1:
        raise ValueError(
            f"k-nearest-neighbour classification needs a bank and k >= 1, got {len(bank)} images and k={k}"
        )
    bank = F.normalize(bank.float(), dim=1)
    k = min(k, len(bank))
    predictions = []
    for part in queries.split(chunk):
        similarity, neighbours = (F.normalize(part.float(), dim=1) @ bank.T).topk(k, dim=1)
        # exp(s/T) up to a factor that every vote of the query shares: no overflow at small temperatures
        weights = (
            torch.ones_like(similarity)
            if temperature is None
            else ((similarity - similarity[:, :1]) / temperature).exp()
        )
        votes = weights.new_zeros(len(part), num_classes).scatter_add_(1, labels[neighbours], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions) if predictions else labels.new_empty(0)
