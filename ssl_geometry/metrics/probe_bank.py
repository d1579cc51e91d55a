"""Linear classifiers of many layers, with many learning rates and weight decays, trained as one batched tensor.

Protocol: logistic regression by SGD with momentum on standardised features (running mean and variance of the steps
before; at the first step, of its own batch), initialised at zero. No classifier is trained on the validation split (see
:func:`~ssl_geometry.geometry.classification.in_validation_split`); the accuracy on it selects the hyper-parameters of
each layer. With several processes, the sums of a step are reduced: every process holds the classifiers that a single
process would have, up to the rounding of gradients that are sent in bfloat16.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.distributed import all_reduce, get_world_size, is_available, is_initialized

from ssl_geometry.geometry.classification import in_validation_split

LEARNING_RATES = (0.1, 0.3, 1.0, 3.0)
WEIGHT_DECAYS = (0.0, 1e-3)
MOMENTUM = 0.9
MEMORY = 0.99  # decay of the running mean and variance per step


class ProbeBank(nn.Module):
    """Linear classifiers on the features of each layer; the caller provides the features of every step.

    Features are divided by their standard deviations and by the square root of the width, so that the curvature of the
    loss is at most 1/2 for any width, and every learning rate below 7 is stable. A step makes no host synchronisation
    and draws no random number.

    Args:
        widths: layer to number of its features.
        num_classes: number of classes.
        learning_rates: of SGD, on features of that scale.
        weight_decays: every learning rate is tried with every weight decay; biases are not decayed.
        momentum: of SGD.
        sent_in: dtype in which processes reduce the gradients of the weights, which are nearly all of the traffic:
            ``classifiers x classes x sum of widths`` numbers per step. The sums for biases, running statistics and
            validation accuracy are always reduced in float32.

    Example:
        >>> labels = torch.arange(64) % 4
        >>> bank = ProbeBank({"layer": 4}, num_classes=4)
        >>> for step in range(20):
        ...     bank.step({"layer": torch.eye(4)[labels]}, labels, index=torch.arange(64))
        >>> bank.logits({"layer": torch.eye(4)}).argmax(2)
        tensor([[0, 1, 2, 3]])
    """

    learning_rate: Tensor
    """Of each classifier, (H,)."""
    weight_decay: Tensor
    """Of each classifier, (H,)."""
    scale: Tensor
    weight: Tensor
    bias: Tensor
    weight_velocity: Tensor
    bias_velocity: Tensor
    mean: Tensor
    variance: Tensor
    steps: Tensor
    seen: Tensor
    correct: Tensor
    validated: Tensor

    def __init__(
        self,
        widths: Mapping[str, int],
        num_classes: int,
        learning_rates: Sequence[float] = LEARNING_RATES,
        weight_decays: Sequence[float] = WEIGHT_DECAYS,
        momentum: float = MOMENTUM,
        sent_in: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.widths = dict(widths)
        self.num_classes = num_classes
        self.momentum, self.sent_in = momentum, sent_in
        layers, width, heads = len(widths), max(widths.values()), len(learning_rates) * len(weight_decays)
        grid = torch.cartesian_prod(torch.tensor(learning_rates), torch.tensor(weight_decays)).view(heads, 2)
        for name, value in {
            "learning_rate": grid[:, 0].contiguous(),
            "weight_decay": grid[:, 1].contiguous(),
            "scale": torch.tensor([1 / math.sqrt(width) for width in widths.values()]).view(-1, 1, 1),
        }.items():
            self.register_buffer(name, value, persistent=False)
        for name, shape in {
            "weight": (layers, width, heads, num_classes),
            "bias": (layers, heads, num_classes),
            "weight_velocity": (layers, width, heads, num_classes),
            "bias_velocity": (layers, heads, num_classes),
            "mean": (layers, 1, width),
            "variance": (layers, 1, width),
            "steps": (),
            "seen": (layers,),  # images in mean and variance, with decayed weights
            "correct": (layers, heads),  # validation images classified correctly since the last `forget`
            "validated": (layers,),  # validation images since then
        }.items():
            self.register_buffer(name, torch.zeros(shape))
        self._begun = False  # whether there was a step; known without asking the device
        self.register_load_state_dict_post_hook(_note_steps)

    @torch.no_grad()
    def step(
        self,
        features: Mapping[str, Float[Tensor, "VB D"]],
        labels: Int64[Tensor, " B"],
        index: Int64[Tensor, " B"] | None = None,
        rate: float = 1.0,
    ) -> None:
        """One step of SGD of all classifiers. Every process must call it, each with its share of the global batch.

        Args:
            features: of each layer; V views of all images, view by view.
            labels: class of each image; images of class -1 are left out.
            index: index of each image in the data set, for the validation split; None trains on all images.
            rate: factor on every learning rate, for schedules.
        """
        stacked = self._stack(features)
        usable = stacked.isfinite().all(2)  # an image that overflowed is left out in this layer
        if not self._begun:
            self._begin(stacked, usable)
        centered = torch.where(usable[..., None], stacked - self.mean, 0)
        views = centered.shape[1] // len(labels)
        labels = labels.repeat(views)
        held_out = (
            torch.zeros_like(labels, dtype=torch.bool) if index is None else in_validation_split(index).repeat(views)
        )
        training, validation = ((labels >= 0) & part & usable for part in (~held_out, held_out))  # (L, VB)
        inputs = centered * self._inverse_deviation()
        logits = self._logits(inputs)  # (L, VB, H, C)
        correct = (logits.argmax(3) == labels[:, None]).float()
        errors = logits.softmax(3)
        errors[:, torch.arange(len(labels), device=labels.device), :, labels] -= 1
        errors *= training[..., None, None]
        gradient = self._gradient_over_processes(inputs.mT @ errors.flatten(2))
        sums = [
            errors.sum(1),
            centered.sum(1),
            centered.square().sum(1),
            torch.einsum("lrh,lr->lh", correct, validation.float()),
            torch.stack([training.float().sum(1), validation.float().sum(1), usable.float().sum(1)]),
        ]
        flat = torch.cat([part.flatten() for part in sums])
        parts = _over_processes(flat).split([part.numel() for part in sums])
        bias_gradient, first, second, correct, count = (
            part.view(shaped.shape) for part, shaped in zip(parts, sums, strict=True)
        )
        self._descend(gradient.view_as(self.weight), bias_gradient, count[0].clamp_min(1), rate)
        self._move_statistics(first.unsqueeze(1), second.unsqueeze(1), count[2])
        self.correct += correct
        self.validated += count[1]

    def _gradient_over_processes(self, gradient: Float[Tensor, "L D HC"]) -> Float[Tensor, "L D HC"]:
        if not _several_processes():
            return gradient
        used = [part[:width] for part, width in zip(gradient, self.widths.values(), strict=True)]  # the rest is zero
        sent = torch.cat([part.flatten() for part in used]).to(self.sent_in)
        all_reduce(sent)
        parts = sent.split([part.numel() for part in used])
        torch._foreach_copy_(used, [part.view_as(shaped) for part, shaped in zip(parts, used, strict=True)])
        return gradient

    def _descend(self, gradient: Tensor, bias_gradient: Tensor, count: Tensor, scale: float) -> None:
        decay, rate = self.weight_decay[:, None], self.learning_rate[:, None]
        self.weight_velocity.mul_(self.momentum).add_(gradient / count[:, None, None, None])
        self.weight_velocity.addcmul_(self.weight, decay)
        self.bias_velocity.mul_(self.momentum).add_(bias_gradient / count[:, None, None])
        self.weight.addcmul_(self.weight_velocity, rate, value=-scale)
        self.bias.addcmul_(self.bias_velocity, rate, value=-scale)

    def _begin(self, stacked: Tensor, usable: Tensor) -> None:
        """Start the running statistics with the mean and variance of the first batch."""
        known = torch.where(usable[..., None], stacked, 0).double()
        count = _over_processes(usable.double().sum(1)).clamp_min(1)[:, None, None]
        mean = _over_processes(known.sum(1, keepdim=True)) / count
        apart = torch.where(usable[..., None], known - mean, 0)
        self.mean.copy_(mean)
        self.variance.copy_(_over_processes(apart.square().sum(1, keepdim=True)) / count)
        self._begun = True

    def _move_statistics(self, first: Tensor, second: Tensor, count: Tensor) -> None:
        # Relative to the old mean, so that nothing cancels where features vary little around a large mean.
        older = MEMORY * self.seen
        self.seen.copy_(older + count)
        total, weight = self.seen.clamp_min(1)[:, None, None], older[:, None, None]
        shift = first / total
        self.variance.copy_((weight * self.variance + second) / total - shift.square())
        self.mean += shift
        self.steps += 1

    def _inverse_deviation(self) -> Tensor:
        # Constant features get weight 0, among them the padding up to the common width.
        resolution = 8 * torch.finfo(self.mean.dtype).eps
        varies = self.variance > resolution**2 * self.mean.square()
        return torch.where(varies, self.variance.rsqrt(), 0) * self.scale

    def _stack(self, features: Mapping[str, Tensor]) -> Float[Tensor, "L B D"]:
        rows = len(next(iter(features.values())))
        stacked = self.mean.new_zeros(len(self.widths), rows, self.mean.shape[2])
        for number, (layer, width) in enumerate(self.widths.items()):
            stacked[number, :, :width] = features[layer]
        return stacked

    def _logits(self, inputs: Float[Tensor, "L B D"]) -> Float[Tensor, "L B H C"]:
        bias = self.bias.flatten(1).unsqueeze(1)
        return torch.baddbmm(bias, inputs, self.weight.flatten(2)).unflatten(2, self.bias.shape[1:])

    @torch.no_grad()
    def best(self) -> Int64[Tensor, " L"]:
        """The classifier of each layer with the best validation accuracy since :meth:`forget`.

        Ties go to the first; the result is the same in every process.

        Raises:
            ValueError: layers for which no validation image was seen.
        """
        if unseen := [layer for layer, number in zip(self.widths, self.validated.tolist(), strict=True) if not number]:
            raise ValueError(f"no held-out image to select the classifiers of {', '.join(unseen)} on: use more images")
        return self.correct.argmax(1)

    @torch.no_grad()
    def logits(
        self, features: Mapping[str, Float[Tensor, "B D"]], chosen: Int64[Tensor, " L"] | None = None
    ) -> Float[Tensor, "L B C"]:
        """Logits of one classifier per layer for each image.

        Args:
            features: of each layer.
            chosen: which classifier of each layer; None takes the best.

        Raises:
            ValueError: as in :meth:`best`.
        """
        logits = self._logits((self._stack(features) - self.mean) * self._inverse_deviation())
        chosen = self.best() if chosen is None else chosen
        return logits[torch.arange(len(logits), device=logits.device), :, chosen]

    def forget(self) -> None:
        """Reset the validation accuracies, because the network has changed since."""
        self.correct.zero_()
        self.validated.zero_()


def _several_processes() -> bool:
    return is_available() and is_initialized() and get_world_size() > 1


def _over_processes(sums: Tensor) -> Tensor:
    if _several_processes():
        all_reduce(sums)
    return sums


def _note_steps(bank: ProbeBank, keys: object) -> None:
    bank._begun = bool(bank.steps > 0)
