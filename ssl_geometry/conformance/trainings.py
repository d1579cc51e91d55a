"""Checks of whole trainings: what is left behind, what is the same again."""

import torch
from torch import Tensor, nn

from ssl_geometry.conformance.state import differing, same
from ssl_geometry.conformance.trial import SAVED_AFTER, Trial, Witness
from ssl_geometry.conformance.verdict import NotApplicable, Verdict, listed, verb
from ssl_geometry.geometry.spectrum import mean_cosine, rankme
from ssl_geometry.methods import Method

LEFT = 0.25
"""Features collapse where their mean cosine has come closer to 1, by at least this factor, and their RankMe falls."""


def trains(trial: Trial) -> Verdict:
    """Losses are finite, and every parameter that is to learn changes."""
    main = trial.main
    for number, loss in enumerate(main.losses, 1):
        if not loss.isfinite():
            return Verdict(
                f"the loss of batch {number} is {float(loss)}",
                fix="look for a division by a length or variance of 0, a logarithm of 0, or too high a learning rate",
            )
    learned = [name for name, before in main.start.items() if not same(before, main.parameters[name])]
    if not learned:
        return Verdict("no parameter changes", fix="return a loss that depends on the outputs of self.backbone")
    first, last = float(main.losses[0]), float(main.losses[-1])
    return Verdict(f"loss {first:.4g} -> {last:.4g} in {len(main.losses)} batches, {len(learned)} tensors learn")


def resume(trial: Trial) -> Verdict:
    """Interrupted in the middle of an epoch and continued from its checkpoint, training gives the same bits."""
    main, resumed = trial.main, trial.resumed
    rest = main.losses[SAVED_AFTER:]
    fix = (
        "keep all that a step reads in buffers (self.register_buffer) or in on_save_checkpoint; see the line checkpoint"
    )
    for number, (one, other) in enumerate(zip(rest, resumed.losses, strict=True), SAVED_AFTER + 1):
        if not same(one, other):
            return Verdict(
                f"the loss of batch {number} is {float(other):.7g} after a resume, {float(one):.7g} without", fix=fix
            )
    if names := _changed(main, resumed):
        return Verdict(f"{listed(names)} {verb(names)} not the same after a resume", fix=fix)
    return Verdict(f"{len(rest)} batches after a resume in mid-epoch, all bits equal")


def checkpoint(trial: Trial) -> Verdict:
    """Tensors, numbers and random streams that a step reads are in the checkpoint."""
    main, resumed = trial.main, trial.resumed
    assert main.save_to is not None
    if "method" not in torch.load(main.save_to, weights_only=True):
        return Verdict(
            "it does not name its class and options, so that no command but fit can read it",
            fix="call super().on_save_checkpoint(checkpoint) in yours",
        )
    lost = differing(main.outside_when_saved, resumed.outside_at_start)
    if not lost:
        return Verdict(f"{len(main.state)} tensors in the checkpoint; what is outside of it stays as it was built")
    if not resume(trial).is_fault:
        return Verdict(f"{listed(lost)} {verb(lost)} not in the checkpoint, and no later step depends on it")
    return Verdict(
        f"{listed(lost)} {verb(lost)} not in the checkpoint",
        fix=f"self.register_buffer({lost[0].rpartition('.')[2].partition('[')[0]!r}, tensor), persistent, changed in "
        "place (a queue: ssl_geometry.methods.Queue); a random stream: seed it from self.hparams['seed'] and "
        "self.trainer.global_step",
    )


def accumulation(trial: Trial) -> Verdict:
    """Gradients of several batches may make one step: moving averages and schedules then move once."""
    main = trial.main
    if not main.method.automatic_optimization:
        if type(main.method).after_step is not Method.after_step and not main.progresses:
            return Verdict(
                "after_step is never called",
                fix="a method that calls its optimiser itself calls self.after_step(self.progress) after it as well",
            )
        raise NotApplicable("it calls its optimiser itself (manual optimisation)")
    if main.moved_between:
        return Verdict(
            f"{listed(main.moved_between)} {verb(main.moved_between, 'moves', 'move')} in batches between two steps of "
            "the optimiser",
            fix="do it in after_step(progress), which is called once after each step of the optimiser",
        )
    steps = main.steps[-1]
    if len(main.progresses) != steps:
        return Verdict(
            f"after_step was called {len(main.progresses)} times in {steps} steps of the optimiser",
            fix="leave optimizer_step to Method, or call super().optimizer_step(...)",
        )
    return Verdict(f"{len(main.losses)} batches, {steps} steps of the optimiser, {steps} calls of after_step")


def measuring(trial: Trial) -> Verdict:
    """Measurements and validation change nothing of training."""
    main, measured = trial.main, trial.measured
    fix = (
        "measurements run in evaluation mode: let forward, features and hooks of validation change nothing there, as "
        "statistics of batch norm, modes or attributes"
    )
    names = _changed(main, measured)
    for number, (one, other) in enumerate(zip(main.losses, measured.losses, strict=True), 1):
        if not same(one, other):
            also = f"; {listed(names)} {verb(names, 'differs', 'differ')} at the end" if names else ""
            return Verdict(f"with measurements, the loss of batch {number} is another one{also}", fix=fix)
    if names:
        return Verdict(f"with measurements, {listed(names)} {verb(names, 'differs', 'differ')} at the end", fix=fix)
    return Verdict("with and without measurements and validation, all bits equal")


def parameters(trial: Trial) -> Verdict:
    """Every trainable parameter gets a gradient in every step, as DDP demands."""
    main = trial.main
    if names := list(main.without_gradient):
        return Verdict(
            f"{listed(names)} {verb(names, 'gets', 'get')} no gradient: DDP would stop the second step",
            fix="use it in the loss, remove it, or set requires_grad_(False) (a moving average: "
            "ssl_geometry.methods.Teacher)",
        )
    trained = sum(parameter.requires_grad for parameter in main.method.parameters())
    return Verdict(f"all {trained} trainable tensors get a gradient")


def weight_decay(trial: Trial) -> Verdict:
    """Biases and normalisation layers have no weight decay."""
    main = trial.main
    if not main.decayed:
        raise NotApplicable("no parameter has weight decay")
    spared = {
        name
        for path, module in main.method.named_modules()
        for key, _ in module.named_parameters(path, recurse=False)
        for name in [key]
        if name.endswith("bias") or _is_norm(module)
    }
    if wrong := [name for name in main.decayed if name in spared]:
        return Verdict(
            f"{listed(wrong)} {verb(wrong, 'has', 'have')} weight decay",
            fix="put biases and normalisation layers into a group with weight_decay 0, as Method.parameter_groups does",
        )
    return Verdict(f"on {len(main.decayed)} tensors, none of them a bias or of a normalisation layer")


def waits(trial: Trial) -> Verdict:
    """A step does not wait for the device."""
    notes = list(trial.main.waits.notes)
    if notes:
        return Verdict(
            listed(notes),
            fix="keep numbers as tensors (torch.where, masked_fill, index_copy_); log them with self.log_mean",
        )
    return Verdict("no number of a tensor is read in a step, and no shape depends on one")


def two_processes(trial: Trial) -> Verdict:
    """Loss and gradients of two processes are those of one with the same images."""
    alone, together = trial.pair.numbers()
    apart = {name: _apart(alone, together, name) for name in alone}
    wrong = [name for name, gap in apart.items() if not gap <= trial.pair.tolerance]
    if not wrong:
        return Verdict(f"losses and gradients within {max(apart.values()):.0e} of those of one process")
    losses = [name for name in wrong if name.startswith("loss")]
    if losses and losses[0] == "loss of step 1":
        one, two = float(alone[losses[0]]), float(together[losses[0]])
        return Verdict(
            f"the {losses[0]} is {two:.5g} on two processes, {one:.5g} on one",
            fix="gather what the loss compares, with gradients (ssl_geometry.methods.gathered); take the mean",
        )
    if wrong[0].endswith("step 1"):
        return Verdict(
            f"the loss is that of one process, the {wrong[0]} is not ({apart[wrong[0]]:.0%} off)",
            fix="gather with gradients: ssl_geometry.methods.gathered, not torch.distributed.all_gather",
        )
    return Verdict(
        f"the {wrong[0]} is another one than on one process ({apart[wrong[0]]:.1g} off)",
        fix="what a step leaves for the next (queues, centres, statistics) must be that of all processes: gather first",
    )


def collapse(trial: Trial) -> Verdict:
    """After a short training, features of different images, and what the head makes of them, are not all alike."""
    seen = []
    for name, (start, end) in trial.features.items():
        if not end.isfinite().all():
            return Verdict(f"{name} are not finite after a short training", fix="lower --model.lr")
        cosines, ranks = ([float(measure(x)) for x in (start, end)] for measure in (mean_cosine, rankme))
        found = f"{name}: mean cosine {cosines[0]:.3f} -> {cosines[1]:.3f}, RankMe {ranks[0]:.1f} -> {ranks[1]:.1f}"
        if not (1 - cosines[1] >= LEFT * (1 - cosines[0]) or ranks[1] >= ranks[0]):
            return Verdict(
                found,
                fix="the loss must keep images apart: negatives, a predictor with stop-gradient, variance, centring",
            )
        seen.append(found)
    return Verdict("; ".join(seen))


def _changed(main: Witness, other: Witness) -> list[str]:
    """Tensors that are not the same at the end of two trainings."""
    return differing(main.state, other.state) + differing(main.optimizer_state, other.optimizer_state)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _apart(alone: dict[str, Tensor], together: dict[str, Tensor], name: str) -> float:
    """How far a value is off, relative to its size, or to a small share of the largest gradient's."""
    one, two = alone[name], together.get(name)
    if two is None:
        return float("inf")
    largest = max(float(value.abs().max()) for key, value in alone.items() if key.startswith("gradient") and len(value))
    floor = 1e-4 * largest if name.startswith("gradient") else 1e-6
    return float((one - two).abs().max()) / max(float(one.abs().max()), floor)
