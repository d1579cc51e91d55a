"""What every method has: views as data, schedules, steps of the optimiser, teachers, backbones of any kind."""

import copy
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from ssl_geometry import methods
from ssl_geometry.callbacks.finite import StopOnNaN
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.data.views import View, ViewSpec
from ssl_geometry.errors import UserError
from ssl_geometry.fit import fit
from ssl_geometry.measure import Subject
from ssl_geometry.methods import Method, SimCLR, Teacher
from ssl_geometry.methods.base import Batch
from ssl_geometry.probe import load_subjects
from ssl_geometry.runs.networks import load_method, load_networks
from tests.methods import METHODS, RESNET, ByItself, as_options, build, by_hand, images
from tests.training import quiet_trainer

BATCH = images(4)


class Any_(Method):
    """Takes whatever views there are, and remembers them."""

    num_views = None

    def outputs(self, views: Any, batch: Batch) -> tuple[Tensor, ...]:
        self.seen = views
        return super().outputs(views, batch)

    def loss(self, outputs: tuple[Tensor, ...], batch: Batch) -> Tensor:
        return sum(output.square().mean() for output in outputs)  # type: ignore[return-value]


class Follower(Any_):
    """Has a teacher, which follows it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = nn.Linear(self.num_features, 4)
        self.teacher = Teacher(self)
        self.progresses: list[float] = []

    def after_step(self, progress: float) -> None:
        assert self.teacher is not None
        self.progresses.append(progress)
        self.teacher.follow(self, 0.9)


def test_views_are_numbered_over_all_ways_that_they_are_made() -> None:
    specs = [ViewSpec(augment="byol", count=2), ViewSpec(augment="crop", size=8, count=3), ViewSpec(augment="flip")]
    method = by_hand(Any_(**RESNET, views=specs, seed=5), 1)
    method.training_step(BATCH, 0)
    assert [view.shape[-1] for view in method.seen] == [16, 16, 8, 8, 8, 16]
    for number, (augment, size) in enumerate([*2 * [("byol", 16)], *3 * [("crop", 8)], ("flip", 16)]):
        view = View(augment, size=size)
        expected = view(BATCH["image"], BATCH["index"], seed=5, epoch=0, view=number)
        torch.testing.assert_close(method.seen[number], expected, rtol=0, atol=0)


def test_views_of_one_size_go_through_the_network_in_one_forward() -> None:
    method = Any_(**RESNET).eval()
    calls: list[int] = []
    method.backbone.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    views = [torch.rand(4, 3, size, size) for size in (16, 8, 16, 8, 8)]
    outputs = method.encode(views)
    assert calls == [8, 12]
    for view, output in zip(views, outputs, strict=True):
        torch.testing.assert_close(output, method(view))


def test_a_vision_transformer_takes_views_of_several_sizes() -> None:
    options: dict[str, Any] = {"backbone": "vit_tiny_patch16_224", "image_size": 48}
    method = by_hand(Any_(**options, views=[ViewSpec(augment="crop"), ViewSpec(augment="crop", size=32)]), 1)
    assert method.training_step(BATCH, 0).isfinite()
    torch.manual_seed(0)
    one_size = Any_(**options).eval()
    method.load_state_dict(one_size.state_dict())
    x = torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(method.eval()(x), one_size(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([ViewSpec(augment="crop", count=3)], "--model.views: 3 of each image; SimCLR takes 2"),
        ([], "--model.views: 0 of each image; SimCLR takes 2"),
        ([{"augment": "crop", "sise": 8}], "--model.views .*sise.*expected {augment: ..., size: pixels"),
        ([{"size": 8}], "expected {augment: ..., size: pixels, count: number}"),
        ([{"augment": "crop", "count": 0}], "count 0, expected a number of views, at least 1"),
        ([{"augment": "corp"}], "'corp'; did you mean 'crop'"),
        ([{"augment": "crop", "size": 0}], "size is 0"),
    ],
)
def test_mistakes_in_views(views: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SimCLR(**RESNET, views=views)


@pytest.mark.parametrize("name", ["DINO", "SwAV", "LeJEPA"])
def test_global_views_come_first(name: str) -> None:
    views = [ViewSpec(augment="crop", size=8, count=2), ViewSpec(augment="crop", count=2)]
    with pytest.raises(UserError, match=rf"view 1 has 8 pixels, a later one 16; {name} takes the global views first"):
        build(name, views=views)
    assert len(build(name, views=views[::-1]).training_views) == 2


def test_views_made_one_way_are_as_many_as_the_method_takes() -> None:
    assert SimCLR(**RESNET, views=[ViewSpec(augment="crop")]).training_views[0][1] == range(2)


# -- steps -----------------------------------------------------------------------------------------------------------


def train(method: Method, folder: Path, **options: Any) -> L.Trainer:
    data = DataModule(
        dataset="digits", image_size=16, limit_train=64, limit_test=16, measure_size=16, batch_size=16, val_fraction=0
    )
    trainer = quiet_trainer(default_root_dir=folder, limit_val_batches=0, **options)
    trainer.fit(method, datamodule=data)
    return trainer


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 8), (3, 4), (4, 2)])
def test_after_step_comes_once_for_each_step_of_the_optimiser(tmp_path: Path, accumulated: int, steps: int) -> None:
    """Also where the last batches of an epoch are fewer than are accumulated."""
    method = Follower(**RESNET)
    trainer = train(method, tmp_path, max_epochs=2, accumulate_grad_batches=accumulated)
    assert trainer.global_step == method.total_steps == steps
    assert method.progresses == [(step + 1) / steps for step in range(steps)]
    assert method.progress == 1


def test_the_teacher_has_taken_each_step_that_the_student_took(tmp_path: Path) -> None:
    method = Follower(**RESNET, optimizer="sgd", lr=0.1)
    assert method.teacher is not None
    expected = copy.deepcopy(method.teacher)
    students: list[Any] = []
    step = method.after_step
    method.after_step = lambda progress: (  # type: ignore[method-assign,assignment]
        students.append([p.detach().clone() for p in [*method.backbone.parameters(), *method.head.parameters()]]),
        step(progress),
    )
    train(method, tmp_path)
    for parameters in students:
        for mine, theirs in zip(expected.parameters(), parameters, strict=True):
            mine.data = 0.9 * mine.data + 0.1 * theirs
    for mine, theirs in zip(method.teacher.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.grad is None
    assert len(students) == 4


def test_the_learning_rate_ends_at_its_minimum(tmp_path: Path) -> None:
    method = Follower(**RESNET | {"warmup_epochs": 1}, lr=0.4, min_lr=0.1)
    rates: list[float] = []
    method.after_step = lambda progress: rates.append(method.optimizers().param_groups[0]["lr"])  # type: ignore
    train(method, tmp_path, max_epochs=3)
    scale = 16 / 256
    assert rates[0] == pytest.approx(0.4 * scale / 4)
    assert max(rates) == pytest.approx(0.4 * scale)
    assert rates[-1] == pytest.approx(0.1 * scale, rel=0.2)
    assert sorted(rates[4:], reverse=True) == rates[4:]
    with pytest.raises(UserError, match=r"--model\.min_lr 1: above the learning rate, --model.lr 0.5"):
        Method(**RESNET, lr=0.5, min_lr=1.0)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_file_of_at_most_100_lines(name: str) -> None:
    file = Path(str(inspect.getsourcefile(getattr(methods, name))))
    assert len(file.read_text(encoding="utf-8").splitlines()) <= (60 if name == "SimCLR" else 100)


def test_betas_are_those_of_adamw() -> None:
    optimizer = Method(**RESNET, optimizer="adamw", betas=(0.8, 0.95)).build_optimizer(0.1)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}
    with pytest.raises(UserError, match=r"--model\.betas"):
        Method(**RESNET, betas=(0.9, 1.5))


def test_an_overfitted_batch_is_the_same_in_each_epoch(tmp_path: Path) -> None:
    method, seen = Any_(**RESNET), list[Tensor]()
    method.loss = lambda outputs, batch: (seen.append(batch["index"]), outputs[0].sum())[1]  # type: ignore
    train(method, tmp_path, overfit_batches=2, max_epochs=2)
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])


class Manual(ByItself, Any_):
    """Calls its optimiser itself."""


def test_manual_optimisation_has_no_loss_to_look_at(tmp_path: Path) -> None:
    assert train(Manual(**RESNET), tmp_path, callbacks=[StopOnNaN()]).global_step == 4


@pytest.mark.parametrize("name", METHODS)
def test_weights_of_half_precision(name: str) -> None:
    """As with ``--trainer.precision bf16-true``; the loss stays in float32."""
    method = by_hand(build(name).to(torch.bfloat16), 1)
    loss = method.training_step(BATCH, 0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()


# -- which network is measured ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("measured", ["student", "teacher", "both"])
def test_the_network_that_is_measured(measured: Any) -> None:
    method = Follower(**RESNET, measured=measured).eval()
    assert method.teacher is not None
    nn.init.zeros_(method.teacher.backbone.conv1.weight)
    is_teacher = measured == "teacher"
    assert (Subject.of(method).network is method.teacher) == is_teacher
    assert (method.features(BATCH["image"]).abs().max() < 1e-6) == is_teacher
    assert Subject.of(method).layers("head") == ("head",)


def test_without_a_teacher_it_cannot_be_measured() -> None:
    with pytest.raises(UserError, match=r"--model\.measured both: SimCLR has no teacher; leave it out"):
        _ = build("SimCLR", measured="both").network


# -- backbones -------------------------------------------------------------------------------------------------------


def flat() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12))


def of_maps() -> nn.Module:
    return nn.Conv2d(3, 4, 1)


def of_text() -> str:
    return "no network"


def raising() -> nn.Module:
    raise OSError("no weights\nthere")


def of_one_size() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))


def unpooled() -> nn.Module:
    return nn.Flatten()


class Counted(nn.Module):
    """Knows how many features it gives."""

    @property
    def num_features(self) -> int:
        return 3

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def with_arguments(width: int) -> nn.Module:
    return nn.Linear(width, width)


HERE = "tests.unit.test_method"


def test_a_backbone_by_import_path_and_as_a_module(tmp_path: Path) -> None:
    method = Any_(backbone=f"{HERE}.flat", image_size=16)
    assert method.num_features == 12
    assert method.backbone[2].num_batches_tracked == 0, "to look at its features changed nothing"
    assert by_hand(method, 1).training_step(BATCH, 0).isfinite()
    module = Any_(backbone=flat(), image_size=16)
    assert module.num_features == 12
    assert module.init_args["backbone"] == "torch.nn.modules.container.Sequential"


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (f"{HERE}.of_maps", r"'.*of_maps' gives \(2, 4, 16, 16\) for two images, expected pooled features \(2, D\)"),
        (f"{HERE}.of_text", "makes str, expected a torch module"),
        (f"{HERE}.with_arguments", "cannot be made without arguments"),
        (f"{HERE}.missing", "is unknown"),
        ("no_such_package.net", "is unknown"),
        (f"{HERE}.raising", r"cannot be made \(OSError: no weights\)"),
        ("tests.faulty_methods.unimportable.net", r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        (f"{HERE}.of_one_size", r"does not take images of 16 pixels \(RuntimeError: .*\)"),
        (f"{HERE}.unpooled", "gives 768 features, but 300 for images of 10 pixels; expected features that are pooled"),
        ("tests.methods.tiny_vit", r"does not take images of 10 pixels \(AssertionError: Input height \(10\)"),
        ("vit_tiny_patch16_224", r"does not take images of 10 pixels \(AssertionError: Input height \(10\)"),
    ],
)
def test_mistakes_in_backbones(backbone: str, message: str) -> None:
    views = [ViewSpec(augment="crop"), ViewSpec(augment="crop", size=10)]
    with pytest.raises(UserError, match=message) as error:
        Any_(backbone=backbone, image_size=16, views=views)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="for ResNets"):
        Method(backbone=f"{HERE}.flat", image_size=16, width=0.5)


def test_a_backbone_that_knows_its_features() -> None:
    assert Method(backbone=f"{HERE}.Counted", image_size=16).num_features == 3


def test_the_patch_size_is_in_the_checkpoint(tmp_path: Path) -> None:
    method = SimCLR(backbone="test_vit", image_size=16, patch_size=4)
    checkpoint: dict[str, Any] = {"state_dict": method.state_dict(), "epoch": 0, "pytorch-lightning_version": "2"}
    method.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    assert load_method(tmp_path / "a.ckpt").method.backbone.patch_embed.num_patches == 16


@pytest.mark.parametrize("named", ["antigravity.geohash", "sys.exit", "ssl_geometry.fit.main", "torch.nn.init.ones_"])
def test_a_checkpoint_does_not_decide_which_backbone_is_called(tmp_path: Path, named: str) -> None:
    """Whether its module is imported already or not."""
    method = SimCLR(**RESNET)
    checkpoint: dict[str, Any] = {"state_dict": method.state_dict(), "epoch": 0, "pytorch-lightning_version": "2"}
    method.on_save_checkpoint(checkpoint)
    checkpoint["method"]["init_args"]["backbone"] = named
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=f"{re.escape(named)} is not imported on the word of a checkpoint"):
        load_method(tmp_path / "a.ckpt")


# -- options that a class sets itself ----------------------------------------------------------------------------------


class Setting(SimCLR):
    """Takes some options and sets others."""

    def __init__(self, weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(optimizer="adamw", lr=1e-3, **kwargs)


class Taking(SimCLR):
    """Takes one option."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(**RESNET, measured="student", seed=seed)


@pytest.mark.parametrize(
    ("cls", "given", "option"),
    [(Setting, RESNET, "--model.weight=2"), (Taking, {}, "--seed_everything=5")],
)
def test_a_class_may_set_options_itself(cls: type[Method], given: dict[str, Any], option: str, tmp_path: Path) -> None:
    """Its checkpoint names those that it takes; trained by the command, which knows no others."""
    run = fit(
        [
            *(f"--model={HERE}.{cls.__name__}", *as_options("model", given), option),
            *("--data.dataset=digits", "--data.limit_train=32", "--data.limit_test=16", "--data.measure_size=16"),
            *("--data.batch_size=16", "--trainer.max_epochs=1", "--loggers=[]", f"--runs={tmp_path}"),
            *("--cka.every_n_epochs=0", "--probes.every_n_epochs=0"),
        ]
    )
    trained = load_method(run.directory)
    assert trained.architecture == "resnet10"
    assert trained.method.hparams["lr"] == {Setting: 1e-3, Taking: 0.3}[cls]
    assert trained.method.init_args.keys().isdisjoint({"lr", "optimizer"})
    assert len(load_networks([f"a={run.directory}", "b=random"])) == 2


def test_pixels_next_to_a_teacher(tmp_path: Path) -> None:
    """``probe`` measures raw pixels seen as the first network sees images."""
    method, file = build("DINO", measured="teacher"), tmp_path / "a.ckpt"
    nn.init.normal_(method.head.last_layer.weight)  # type: ignore[union-attr, arg-type]
    checkpoint: dict[str, Any] = {"state_dict": method.state_dict(), "epoch": 0, "pytorch-lightning_version": "2"}
    method.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, file)
    subjects = load_subjects(SimpleNamespace(models=[f"a={file}"]))
    assert [Subject.of(loaded.method).network is loaded.method.teacher for loaded in subjects.values()] == [
        *(True, True, False)
    ]
