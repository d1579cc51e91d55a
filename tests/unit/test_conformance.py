"""The conformance kit finds each planted fault and nothing else, and raises no alarm on a method of this package."""

import importlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_geometry import doctor, methods
from ssl_geometry.conformance import CHECKS, Verdict, check_method
from ssl_geometry.conformance.state import outside
from ssl_geometry.conformance.waits import Waits
from ssl_geometry.errors import UserError
from ssl_geometry.methods import MAE, Method, SimCLR, Teacher
from ssl_geometry.methods.base import Batch
from tests.faulty_methods.working import Distilled, Queued
from tests.methods import METHODS, ByItself
from tests.processes import PROCESSES

SLOW = {"compile", "two_processes", "collapse"}
QUICK = [check.__name__ for check in CHECKS if check.__name__ not in SLOW]
FAULTS: dict[str, set[str]] = {
    "average_in_each_batch": {"accumulation"},
    "decayed_norms": {"weight_decay"},
    "equal_views": {"views"},
    "gradient_into_teacher": {"teacher"},
    "item_in_step": {"waits"},
    "measured_batch_norm": {"measuring"},
    "queue_not_in_checkpoint": {"resume", "checkpoint"},
    "random_noise": {"replay"},
    "summed_loss": {"loss_scale"},
    "unused_parameter": {"parameters"},
}
"""A planted fault to the checks that must find it; all others must not."""


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda kind: PROCESSES)


def faulty(name: str) -> type[Method]:
    return importlib.import_module(f"tests.faulty_methods.{name}").Faulty


def faults(method: type[Method], checks: list[str], **options: Any) -> dict[str, Verdict]:
    return {verdict.check: verdict for verdict in check_method(method, options, checks) if verdict.is_fault}


def options(name: str) -> dict[str, Any]:
    """Of the table, for images of ten classes."""
    return {key: value for key, value in METHODS[name].items() if key != "num_classes"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(name: str) -> None:
    found = faults(faulty(name), QUICK)
    assert found.keys() == FAULTS[name], list(map(str, found.values()))


@pytest.mark.parametrize(
    ("name", "evidence", "fix"),
    [
        ("negatives_not_gathered", "the loss of step 1 is", "gather what the loss compares"),
        ("gathered_without_gradient", "the loss is that of one process, the gradient of", "gather with gradients"),
    ],
)
def test_two_processes_find_what_is_not_gathered(name: str, evidence: str, fix: str) -> None:
    (verdict,) = faults(faulty(name), ["two_processes"]).values()
    assert verdict.evidence.startswith(evidence)
    assert verdict.fix.startswith(fix)


class InFloat32(SimCLR):
    """Casts, so that it does not train in double precision."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.last = nn.Linear(128, 8)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        first, second = (self.last(output.float()) for output in outputs)
        return super().loss((first, second), batch)


def test_two_processes_of_a_method_that_casts_to_float32() -> None:
    assert not faults(InFloat32, ["two_processes"])


def test_a_queue_and_a_teacher_are_no_fault() -> None:
    assert not faults(Queued, [*QUICK, "two_processes"])


def test_collapse_is_found() -> None:
    assert faults(faulty("collapsing"), ["collapse"]).keys() == {"collapse"}
    assert not faults(Distilled, ["collapse"])


@pytest.mark.parametrize("name", METHODS)
def test_no_method_is_alarmed(name: str) -> None:
    assert not faults(getattr(methods, name), QUICK, **options(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_no_method_collapses(name: str) -> None:
    assert not faults(getattr(methods, name), ["collapse"], **options(name))


@pytest.mark.slow
def test_compiled_blocks_of_mae_are_its_eager_ones() -> None:
    (verdict,) = check_method(MAE, options("MAE"), ["compile"])
    assert verdict.applies
    assert not verdict.fix, verdict.evidence


@pytest.mark.slow
def test_compiled_and_on_two_processes_a_method_is_not_alarmed() -> None:
    """The others: tests/integration/test_compile.py, tests/distributed/test_methods.py."""
    assert not faults(SimCLR, ["compile", "two_processes"], **options("SimCLR"))


# -- what single checks see ------------------------------------------------------------------------------------------


class WhereCompiled(nn.Module):
    """Compiled, it computes something else."""

    def forward(self, images: Tensor) -> Tensor:
        features = images.mean((2, 3))
        return 2 * features if torch.compiler.is_compiling() else features


def where_compiled() -> nn.Module:
    return nn.Sequential(WhereCompiled(), nn.Linear(3, 16))


def test_a_backbone_that_computes_something_else_when_compiled() -> None:
    found = faults(SimCLR, ["compile"], backbone=f"{__name__}.where_compiled")
    assert "compiled" in found["compile"].evidence


class Around(SimCLR):
    """Does not call its backbone, but its parts."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone.forward(images))


def test_a_backbone_that_is_not_called_is_not_compiled() -> None:
    (verdict,) = check_method(Around, checks=["compile"])
    assert not verdict.applies


class Cancelling(SimCLR):
    """A variance as a difference of large numbers, in the trainer's precision."""

    def outputs(self, views: Any, batch: Batch) -> tuple[Tensor, ...]:
        first, second = super().outputs(views, batch)
        x = first + 100
        return first, second, (x * x).mean() - x.mean().square()

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        first, second, variance = outputs
        return super().loss((first, second), batch) + variance


class Growing(SimCLR):
    """Its buffer is not there before the first step."""

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        if not hasattr(self, "last"):
            self.register_buffer("last", outputs[0].detach())
        return super().loss(outputs, batch)


class Manual(ByItself, SimCLR):
    """Calls its optimiser itself."""


class ManualWithTeacher(Manual):
    """Its teacher never moves."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher = Teacher(self)

    def after_step(self, progress: float) -> None:
        assert self.teacher is not None
        self.teacher.follow(self, 0.9)


class Unnamed(SimCLR):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1


class Counting(SimCLR):
    """Where it is stands in a number of Python."""

    step = 0

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        self.step += 1
        return super().loss(outputs, batch) * self.step


class KeepingGraphs(SimCLR):
    """Its queue holds tensors with their history."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("rows", torch.ones(1, 128))

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        loss = super().loss(outputs, batch) + (outputs[0] @ self.rows.T).square().mean()
        self.rows = outputs[1]
        return loss


class Overwriting(KeepingGraphs):
    """Its queue changes between the loss and the backward pass."""

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        loss = super(KeepingGraphs, self).loss(outputs, batch) + (outputs[0] @ self.rows.T).square().mean()
        self.rows.copy_(outputs[1][:1].detach())
        return loss


class PerImage(SimCLR):
    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        return outputs[0].mean(1)


class Failing(SimCLR):
    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        raise TypeError("no such thing")


class Unbuilt(SimCLR):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        raise ValueError("no such thing")


class Fixed(SimCLR):
    """Takes no option."""

    def __init__(self) -> None:
        super().__init__(backbone=f"{__name__}.where_compiled", image_size=16)


class Diverging(SimCLR):
    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        return super().loss(outputs, batch) * torch.inf


@pytest.mark.parametrize(
    ("method", "check", "words"),
    [
        (Cancelling, "autocast", "under bfloat16"),
        (Growing, "resume", 'Unexpected key(s) in state_dict: "last"'),
        (Diverging, "trains", "the loss of batch 1 is inf"),
        (Failing, "trains", "TypeError in test_conformance.py:"),
        (ManualWithTeacher, "accumulation", "after_step is never called -> "),
        (Unnamed, "checkpoint", "does not name its class and options"),
        (PerImage, "trains", "PerImage.loss returns a tensor of shape (8,) -> expected a scalar"),
        (Counting, "checkpoint", "step is not in the checkpoint"),
        (KeepingGraphs, "trains", "a second time -> keep x.detach(), not x, from one step to the next"),
        (Overwriting, "trains", "inplace operation -> change buffers in after_step, or give the loss a clone"),
        (Unbuilt, "trains", "ValueError in test_conformance.py:"),
    ],
)
def test_what_else_is_found(method: type[Method], check: str, words: str) -> None:
    assert words in str(faults(method, [check])[check])


def test_a_method_that_does_not_train_has_one_line() -> None:
    (verdict,) = check_method(Failing)
    assert verdict.check == "trains"
    assert str(verdict).endswith("no such thing -> see there")


def test_manual_optimisation_is_checked_as_far_as_that_goes() -> None:
    verdicts = {verdict.check: verdict for verdict in check_method(Manual, checks=QUICK)}
    assert not [str(verdict) for verdict in verdicts.values() if verdict.is_fault]
    assert {name for name, verdict in verdicts.items() if not verdict.applies} == {
        *("accumulation", "replay", "views", "teacher", "loss_scale", "autocast")
    }


def test_a_class_that_no_other_process_can_import() -> None:
    class Local(SimCLR):
        pass

    (verdict,) = check_method(Local, checks=["two_processes"])
    assert not verdict.applies
    assert "another process cannot import it" in verdict.evidence


def test_nothing_is_left_behind() -> None:
    before = torch.get_rng_state()
    list(check_method(SimCLR, checks=["trains", "measuring"]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("wait", "words"),
    [
        (lambda x: float(x.sum()), "a number or a condition of Python"),
        (lambda x: x if x.sum() > 0 else -x, "a number or a condition of Python"),
        (lambda x: x.tolist(), ".tolist()"),
        (lambda x: x.detach().cpu(), ".cpu()"),
        (lambda x: x.numpy(), ".numpy()"),
        (lambda x: x.to("cpu"), '.to("cpu")'),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: (2 * x)[x > 0.5], "indexing by a boolean mask"),
        (lambda x: x.masked_select(x > 0.5), "masked_select"),
        (lambda x: x.unique(), "unique"),
        (lambda x: torch.tensor([1.0], device=x.device), "numbers of Python"),
        (lambda x: torch.zeros(4).put_(torch.arange(4), x).sum().item(), "a number or a condition of Python"),
    ],
)
def test_waits(wait: Any, words: str) -> None:
    waits, x = Waits(), torch.rand(4)
    with waits.noted([x]):
        wait(x)
    assert any(words in note and "test_conformance.py:" in note for note in waits.notes), waits.notes


def test_what_does_not_wait() -> None:
    waits, x = Waits(), torch.rand(4)
    with waits.noted([x]):
        _ = x[torch.arange(2)], x.masked_fill(x > 0.5, 0), x[1:], x.to(x.device), torch.where(x > 0.5, x, 0)
        _ = torch.randperm(4).tolist(), float(torch.rand(())), x.repeat_interleave(2), x.topk(2)
    assert not waits.notes


def test_what_lies_outside_of_a_checkpoint() -> None:
    module: Any = nn.Linear(2, 2)
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("lost", torch.zeros(1), persistent=False)
    module.same, module.rows = module.weight, [torch.zeros(1), {"a": torch.zeros(2).numpy()}]
    module.generator, module.number = torch.Generator(), 3
    assert set(outside(module)) == {
        *("lost", "rows[0]", "rows[1]['a']", "generator", "number", "in_features", "out_features")
    }


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--method=tests.faulty_methods.item_in_step.Faulty", "--checks=[waits, loss_scale, teacher]"])
    assert ended.value.code == 1
    shown, error = capsys.readouterr()
    lines = shown.splitlines()
    assert lines[0].startswith("Faulty with warmup_epochs=0, compile=False, backbone=resnet10, width=0.0625")
    assert "do   waits: .item(), or a tensor as a number or a condition of Python at item_in_step.py:" in shown
    assert "fine loss scale: loss of 8 images" in shown
    assert "-    teacher: nothing follows" in shown
    assert error.splitlines()[-1] == "1 fault in Faulty"


def test_options_of_the_method_are_those_of_fit(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main(["--method", "ssl_geometry.methods.SimCLR", "--model.output_dim", "4", "--checks", "[parameters]"])
    shown = capsys.readouterr().out
    assert "output_dim=4" in shown
    assert "temperature" not in shown


def test_a_method_without_options(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main([f"--method={__name__}.Fixed", "--checks=[parameters]"])
    assert "fine parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method=tests.faulty_methods.unimportable.X"], "cannot be imported .ZeroDivisionError: division by zero"),
        (["--method=ssl_geometry.methods.SimCLR", '--model={"temperature":1}'], "--model: give its options one by one"),
        (
            ["--method=ssl_geometry.methods.SimCLR", "--checks=[two_processes]", "--skip_parity"],
            "--skip_parity leaves nothing to check",
        ),
        (["--method=ssl_geometry.methods.SimCR"], "--method ssl_geometry.methods.SimCR: .*expected the import path"),
        (["--method=torch.nn.Linear"], "--method torch.nn.Linear: no subclass of ssl_geometry.methods.Method"),
        (["--method=ssl_geometry.methods.SimCLR", "--model.temprature=1"], "did you mean '--model.temperature'"),
        (["--method=ssl_geometry.methods.SimCLR", "--model.temperature=0"], "--model.temperature 0.*above 0"),
        (["--method=ssl_geometry.methods.SimCLR", "--checks=[wait]"], "--checks wait: .*did you mean 'waits'"),
    ],
)
def test_mistakes(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(args)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_options_that_a_method_does_not_take() -> None:
    with pytest.raises(UserError, match="temperature 0"):
        list(check_method(SimCLR, {"temperature": 0.0}))
