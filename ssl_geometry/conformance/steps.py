"""Checks of single steps, taken with copies of a method that has trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.modules.module import register_module_forward_pre_hook

from ssl_geometry.conformance.state import copied, differing
from ssl_geometry.conformance.trial import Trial, step
from ssl_geometry.conformance.verdict import NotApplicable, Verdict, listed
from ssl_geometry.methods import Method
from ssl_geometry.methods.base import Batch

DOUBLED = 1.7
"""A loss of twice the images that is at least so many times as large is a sum over them."""
MORE_NEGATIVES = 0.8
"""A contrastive loss rises by up to log 2 where there are twice as many negatives."""
COMPILED = 1e-3
"""Of loss and gradients, relative to the loss and the largest gradient."""
LOW_PRECISION = 0.1
"""Of a loss under bfloat16, relative to that of float32."""
PERTURBED = 0.1
FOLLOWS = 0.99
"""Cosine of a parameter's move with the way to another one, from which on it follows that one."""


def views(trial: Trial) -> Verdict:
    """The views of one image differ."""
    method, batch = trial.copy(), trial.main.batches[0]
    declared = sum(len(numbers) for _, numbers in method.training_views)
    if declared < 2:
        raise NotApplicable("one view of each image")
    with _seen(batch) as found:
        step(method, batch, backward=False)
    if not found:
        raise NotApplicable("no module is called with images")
    if len(found) < declared:
        return Verdict(
            f"{declared} views of each image are declared, the networks see {len(found)} different",
            fix="let --model.views make them at random, and use each of them in outputs(views, batch)",
        )
    return Verdict(f"{declared} views of each image, all different")


def replay(trial: Trial) -> Verdict:
    """The same step, taken again, sees the same views and has the same loss and gradients."""
    batch = trial.main.batches[0]
    runs = [_replayed(trial, batch, seed) for seed in (0, 1, 0)]
    fix = (
        "derive random numbers from (seed, epoch, index) as views do (ssl_geometry.data.random_numbers), or from a "
        "generator seeded with self.hparams['seed'] and self.trainer.global_step"
    )
    if differing(runs[0], runs[2]):
        return Verdict("a step that is taken again has another loss or gradient", fix=fix)
    if differing(runs[0], runs[1]):
        return Verdict("a step depends on the global random stream, which is another one in each process", fix=fix)
    return Verdict("loss and gradients are the same bits when a step is taken again")


def teacher(trial: Trial) -> Verdict:
    """What follows the student as a moving average gets no gradient."""
    method = trial.copy()
    step(method, trial.main.batches[0], backward=False)  # what after_step takes from one
    names = _followers(method)
    if not names:
        raise NotApplicable("nothing follows as a moving average")
    learning = [name for name in names if name in trial.main.with_gradient]
    if learning:
        return Verdict(
            f"the gradient reaches {listed(learning)}",
            fix="run the teacher under torch.no_grad(), as Teacher.forward does, with requires_grad_(False)",
        )
    return Verdict(f"{len(names)} tensors follow, none gets a gradient")


def loss_scale(trial: Trial) -> Verdict:
    """The loss is a mean over the batch, not a sum."""
    first, second = trial.main.batches[:2]
    once, other, twice, both = (
        float(step(trial.copy(), part, backward=False)[0])
        for part in (first, second, _joined(first, first), _joined(first, second))
    )
    mean = (once + other) / 2
    ratios = [twice / once if once else 1.0, both / mean if mean else 1.0]
    evidence = f"loss of {len(first['index'])} images {once:.4g}, of twice as many {both:.4g}"
    if min(ratios) >= DOUBLED and abs(both) - abs(mean) > MORE_NEGATIVES:
        return Verdict(evidence, fix="average over images (reduction='mean'): the learning rate depends on it")
    return Verdict(evidence)


def autocast(trial: Trial) -> Verdict:
    """Under autocast to bfloat16 the loss is close to that in float32."""
    batch = trial.main.batches[0]
    full, _ = step(trial.copy(), batch)
    half, gradients = step(trial.copy(), batch, torch.autocast("cpu", torch.bfloat16))
    evidence = f"loss {float(full):.4g} in float32, {float(half):.4g} under bfloat16"
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if bad or not abs(half - full) <= LOW_PRECISION * abs(full) + LOW_PRECISION / 10:
        evidence += f", and the gradient of {listed(bad)} is not finite" if bad else ""
        return Verdict(
            evidence,
            fix="compute the loss in float32: in loss(outputs, batch), where autocast is off; no small constants in "
            "half precision",
        )
    return Verdict(evidence)


def compile(trial: Trial) -> Verdict:
    """With its parts compiled, loss and gradients of a method are those of the eager one."""
    batch, method = trial.main.batches[0], trial.copy()
    loss, gradients = step(trial.copy(), batch)
    method.compile_parts(backend="aot_eager")
    torch._dynamo.reset()
    graphs = counters["stats"]["unique_graphs"]
    found, others = step(method, batch)
    if counters["stats"]["unique_graphs"] == graphs:
        raise NotApplicable("a step calls none of self.compiled_parts as a whole")
    evidence = f"loss {float(loss):.6g} eagerly, {float(found):.6g} compiled"
    largest = max((gradient.abs().max() for gradient in gradients.values()), default=loss.new_zeros(()))
    apart = [
        name
        for name, gradient in gradients.items()
        if name not in others or (gradient - others[name]).abs().max() > COMPILED * largest
    ]
    if apart or not torch.isclose(found, loss, rtol=COMPILED, atol=COMPILED / 10):
        evidence += f", the gradient of {listed(apart)} differs" if apart else ""
        return Verdict(evidence, fix="no Python state or branches on values in the backbone; or --model.compile false")
    return Verdict(evidence)


@contextmanager
def _seen(batch: Batch) -> Iterator[list[Tensor]]:
    """The different views of a batch that modules are called with while it lasts, (B, 3, S, S) each."""
    images, found = len(batch["index"]), list[Tensor]()

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.ndim == 4 and x.shape[1] == 3 and len(x) % images == 0:
            for view in x.detach().split(images):
                if not any(view.shape == other.shape and torch.equal(view, other) for other in found):
                    found.append(view.clone())

    handle = register_module_forward_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def _replayed(trial: Trial, batch: Batch, seed: int) -> dict[str, Tensor]:
    """Views, loss and gradients of a step, without dropout, which may draw from the global stream."""
    method = trial.copy()
    for module in method.modules():
        if "drop" in type(module).__name__.lower():
            module.eval()
    with _seen(batch) as found:
        loss, gradients = step(method, batch, seed=seed)
    return {"loss": loss, **gradients, **{f"view {number}": view for number, view in enumerate(found)}}


def _followers(method: Method) -> list[str]:
    """Parameters that ``after_step`` moves towards another one of the same shape, and those of ``self.teacher``."""
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=PERTURBED)
    before = copied(method.named_parameters())
    method.after_step(0.01)
    moved = {name: p.detach() - before[name] for name, p in method.named_parameters() if p.numel() > 1}
    still = [before[name] for name, way in moved.items() if not way.any()]
    declared = [] if method.teacher is None else [name for name in before if name.startswith("teacher.")]
    return declared + [
        name
        for name, way in moved.items()
        if name not in declared and way.any()
        if any(_parallel(way, other - before[name]) for other in still if other.shape == way.shape)
    ]


def _parallel(a: Tensor, b: Tensor) -> bool:
    return bool(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > FOLLOWS)


def _joined(first: Batch, second: Batch) -> Batch:
    return {key: torch.cat([first[key], second[key]]) for key in first}  # type: ignore[return-value, literal-required]
