"""The monitor in projects that know nothing of this package: their own modules, batches, loops and loaders."""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torchvision
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ssl_geometry.callbacks import GeometryMonitor
from ssl_geometry.data.views import View
from ssl_geometry.errors import UserError
from ssl_geometry.measure import (
    CKA,
    Invariance,
    Measurement,
    MeasurementImages,
    Neighborhoods,
    Probes,
    Spectrum,
    Subject,
    measure,
)
from ssl_geometry.records import read_records

SIDE = 32
CLEAN = View("none", size=SIDE, normalize="cifar10")


class TinyImages(Dataset):
    """PIL images of three classes that differ in colour, with names."""

    def __init__(self, n: int = 60, transform: Any = None, labels: bool = True) -> None:
        noise = torch.randint(0, 120, (n, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(n))
        self.pixels = noise.to(torch.uint8)
        for number in range(n):
            self.pixels[number, number % 3] += 100
        self.transform, self.labels = transform, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Any:
        image = v2.functional.to_pil_image(self.pixels[i])
        if self.transform is not None:
            image = self.transform(image)
        return (image, i % 3, f"{i}.png") if self.labels else image


TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)])


def loader(batch_size: int = 16) -> DataLoader:
    """(views, label, name) tuples."""
    return DataLoader(TinyImages(48, lambda image: [TO_TENSOR(image), TO_TENSOR(image)]), batch_size, drop_last=True)


def small_convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class TwoViews(L.LightningModule):
    """Backbone and projection head as in lightly's examples."""

    def __init__(self, backbone: nn.Module | None = None, features: int = 16) -> None:
        super().__init__()
        self.backbone = backbone or small_convnet()
        self.projection_head = nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, 8))
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views, _, _ = batch
        a, b = (self.projection_head(self.backbone(view) + 0.01 * torch.randn(1, device=self.device)) for view in views)
        loss = (a - b).square().mean() - a.var()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class StudentAndTeacher(L.LightningModule):
    """Manual optimisation by two optimisers, and a teacher that follows by a moving average."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.student = nn.ModuleDict({"backbone": small_convnet(), "head": nn.Linear(16, 8)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        views, _, _ = batch
        optimizers: Any = self.optimizers()
        student = self.student["head"](self.student["backbone"](views[0]))
        with torch.no_grad():
            teacher = self.teacher["head"](self.teacher["backbone"](views[1]))
        self.manual_backward((student - teacher - 0.1).square().mean())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.student[part].parameters(), lr=2.0) for part in ("backbone", "head")]


def trainer(root: Path, *monitors: L.Callback, **options: Any) -> L.Trainer:
    given = {"max_epochs": 2, "logger": CSVLogger(root), "accelerator": "cpu", "log_every_n_steps": 1, **options}
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(default_root_dir=root, callbacks=list(monitors), **{**silent, **given})


def rows(root: Path, run: str = "version_0") -> pd.DataFrame:
    return read_records(root / "geometry" / run)


@pytest.fixture(scope="module")
def images() -> MeasurementImages:
    return MeasurementImages.from_dataset(TinyImages(), n=48, train=TinyImages(90), n_train=90, batch_size=16)


def everything() -> list[Measurement]:
    return [
        CKA(gram_size=8),
        Invariance(gram_size=8, views=["crop", "color"]),
        Probes(layers=["7"], logistic=True),
        Neighborhoods(k=10, settings=["crop"], copies=3),
        Spectrum(copies=2),
    ]


def test_everything_in_a_plain_module_and_its_training_is_the_same_bit_for_bit(
    tmp_path: Path, images: MeasurementImages
) -> None:
    modules = []
    for measured in (True, False):
        L.seed_everything(0)
        module = TwoViews()
        monitors = [GeometryMonitor(everything(), images=images, clean=CLEAN)] if measured else []
        trainer(tmp_path / str(measured), *monitors).fit(module, loader())
        modules.append(module)
    one, other = modules
    assert one.losses == other.losses
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    found = rows(tmp_path / "True")
    assert set(found["epoch"]) == {0, 1, 2}
    metrics = {"cka", "invariance", "class_cka", "ridge_probe", "logistic_probe", "neighbors", "purity", "rankme"}
    assert metrics <= set(found["metric"])
    assert set(found["view"].dropna()) == {"clean", "crop", "color", "semantic", "simclr"}
    assert not found["value"][found["metric"] == "cka"].isna().any()
    logged = pd.read_csv(tmp_path / "True" / "lightning_logs" / "version_0" / "metrics.csv")
    assert {"cka/to_init/7", "probes/ridge/7", "spectrum/rankme/7"} <= set(logged.columns)
    assert list((tmp_path / "True" / "geometry" / "version_0" / "figures").glob("cka_map_self.png"))


def test_live_numbers_are_those_of_a_notebook_on_the_saved_weights(tmp_path: Path, images: MeasurementImages) -> None:
    module = TwoViews()
    trainer(tmp_path, GeometryMonitor(everything(), images=images, clean=CLEAN)).fit(module, loader())
    live = rows(tmp_path).query("epoch == 2 and model_other != 'init' and metric != 'kept_since_last'")
    weights = tmp_path / "weights.pt"
    torch.save(module.backbone.state_dict(), weights)
    network = small_convnet()
    network.load_state_dict(torch.load(weights, weights_only=True))
    offline = measure(network, images, everything(), clean=CLEAN, name="version_0").rows
    key = ["metric", "layer", "layer_other", "view", "low", "value"]
    one, two = (frame.sort_values(key, ignore_index=True)[[*key, "high", "n", "protocol"]] for frame in (live, offline))
    pd.testing.assert_frame_equal(one, two, check_exact=True)


def test_student_and_teacher_under_manual_optimisation(tmp_path: Path, images: MeasurementImages) -> None:
    L.seed_everything(0)
    monitors = [
        GeometryMonitor([CKA(gram_size=8)], images, f"{name}.backbone", [f"{name}.head"], clean=CLEAN, name=name)
        for name in ("student", "teacher")
    ]
    trainer(tmp_path, *monitors, max_epochs=1).fit(StudentAndTeacher(), loader())
    found = rows(tmp_path)
    assert set(found["model"]) == {"student", "teacher"}
    assert any(layer.startswith("teacher.head") for layer in found["layer"])
    heads = found[found["layer"].str.startswith("student.head")]
    assert (heads["depth"] > 1).all()
    to_initial = found.query("epoch == 1 and model_other == 'init' and layer == layer_other and layer == '3'")
    moved = to_initial.set_index("model")["value"]
    assert moved["teacher"] > moved["student"], "the teacher follows slowly"
    logged = pd.read_csv(tmp_path / "lightning_logs" / "version_0" / "metrics.csv")
    for name in ("student", "teacher"):  # curves and figures of their own
        assert logged[f"cka/{name}/to_init/3"].dropna().tolist() == pytest.approx([1.0, moved[name]])
        assert (tmp_path / "geometry" / "version_0" / "figures" / f"cka_{name}_map_self.png").exists()


class Classifier(L.LightningModule):
    """A network under a name of its own."""

    def __init__(self, parts: Sequence[str] = ("net",)) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss()
        for name in parts:
            self.add_module(name, small_convnet())

    def forward(self, images: Tensor) -> Tensor:
        return sum(part(images) for part in self.children() if part is not self.criterion)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0][0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_the_only_part_that_learns_is_the_network(images: MeasurementImages, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it is called; of several, the whole module is measured, and one line shows how to choose."""
    monitor = GeometryMonitor([CKA()], images, clean=CLEAN)
    monitor._images = images
    one, two = Classifier(), Classifier(["left", "right"])
    assert monitor.subject(one, "run").network is one.net
    assert not caplog.messages
    assert monitor.subject(two, "run").network is two
    assert caplog.messages == [
        "the whole Classifier is measured, as it has no backbone; "
        "give network=… to measure one of its parts: left, right"
    ]
    monitor.network = ""
    assert monitor.subject(one, "run").network is one
    monitor.network = None
    with pytest.raises(UserError, match=r"^network: StudentAndTeacher has neither a backbone nor a forward; give"):
        monitor.subject(StudentAndTeacher(), "run")
    held = Classifier([])
    held.nets = nn.ModuleDict({"student": small_convnet()})
    assert monitor.subject(held, "run").network is held, "a ModuleDict has no forward"


@pytest.mark.parametrize(
    "options",
    [{"max_epochs": -1, "max_steps": 4}, {"accumulate_grad_batches": 2}, {"max_epochs": 1, "logger": False}],
    ids=["max_steps", "accumulation", "no logger"],
)
def test_other_ways_to_train(tmp_path: Path, images: MeasurementImages, options: dict[str, Any]) -> None:
    trainer(tmp_path, GeometryMonitor([CKA(gram_size=8)], images, clean=CLEAN), **options).fit(TwoViews(), loader())
    found = rows(tmp_path, "version_0" if options.get("logger", True) else "run")
    assert found["epoch"].min() == 0
    assert found["epoch"].max() == (1 if options.get("max_epochs") == 1 else 2)


def test_several_fits_have_records_of_their_own_and_a_fit_that_goes_on_continues_them(
    tmp_path: Path, images: MeasurementImages
) -> None:
    monitor = GeometryMonitor([CKA(gram_size=8)], images, clean=CLEAN)
    one = trainer(tmp_path, monitor, max_epochs=1, logger=False)
    module = TwoViews()
    one.fit(module, loader())
    one.fit_loop.max_epochs = 2
    one.fit(module, loader())
    assert set(rows(tmp_path, "run")["epoch"]) == {0, 1, 2}
    trainer(tmp_path, monitor, max_epochs=1, logger=False).fit(TwoViews(), loader())
    assert set(rows(tmp_path, "run-2")["epoch"]) == {0, 1}
    assert set(rows(tmp_path, "run")["epoch"]) == {0, 1, 2}


def test_a_resumed_training_goes_on_in_its_own_folder(tmp_path: Path, images: MeasurementImages) -> None:
    """Not in that of another one of the same name."""
    options: dict[str, Any] = {"logger": False}
    for _ in range(2):
        first = trainer(tmp_path, GeometryMonitor([CKA(gram_size=8)], images, clean=CLEAN), max_epochs=1, **options)
        first.fit(TwoViews(), loader())
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = trainer(tmp_path, GeometryMonitor([CKA(gram_size=8)], images, clean=CLEAN), **options)
    second.fit(TwoViews(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert {name: set(rows(tmp_path, name)["epoch"]) for name in ("run", "run-2")} == {
        "run": {0, 1},
        "run-2": {0, 1, 2},
    }


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_networks_of_timm(tmp_path: Path, images: MeasurementImages, name: str) -> None:
    small = {"vit": {"depth": 2, "img_size": SIDE}, "swi": {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1,) * 4, "img_size": SIDE, "window_size": 2, "patch_size": 2}, "con": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}}[name[:3]]  # fmt: skip # noqa: E501
    network = timm.create_model(name, num_classes=0, **small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant layers of an untrained network
        found = measure(network, images, [CKA(gram_size=8), Spectrum(copies=0)], clean=CLEAN).rows
    assert found.query("metric == 'cka'")["layer"].nunique() > 3
    assert found["depth"].between(0, 1).all()


def test_without_labels_what_needs_them_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = MeasurementImages.from_dataset(TinyImages(labels=False), batch_size=16)
    trainer(tmp_path, GeometryMonitor(everything(), images, clean=CLEAN), max_epochs=1).fit(TwoViews(), loader())
    metrics = set(rows(tmp_path)["metric"])
    assert {"cka", "invariance", "two_nn", "rankme", "lidar"} <= metrics
    assert not metrics & {"class_cka", "ridge_probe", "purity", "nnk_purity"}
    assert "semantic" not in set(rows(tmp_path)["view"])
    assert [line for line in caplog.messages if "left out" in line] == [
        "probes are left out: they need labelled training images (images: train=…)",
        "class CKA, semantic manifolds and purity are left out: the measurement images have no labels",
    ]


def test_figures_of_images_without_labels_are_drawn(tmp_path: Path) -> None:
    images = MeasurementImages.from_dataset(TinyImages(labels=False), batch_size=16)
    found = measure(small_convnet(), images, [Neighborhoods(k=10, settings=["crop"], copies=3)], clean=CLEAN)
    assert set(found.draw()) >= {"neighbors/neighbors", "neighbors/diameter"}


def test_a_pipeline_of_torchvision_is_a_clean_view(tmp_path: Path, images: MeasurementImages) -> None:
    clean = View("none", size=SIDE, normalize=([0.5] * 3, [0.25] * 3))
    one, two = (measure(small_convnet_of(0), images, [CKA(gram_size=8)], clean=view) for view in (clean, TO_TENSOR))
    pd.testing.assert_series_equal(one.rows["value"], two.rows["value"], rtol=1e-5)
    monitor = GeometryMonitor([Invariance(views=["crop"], gram_size=8)], images, clean=TO_TENSOR)
    with pytest.raises(UserError, match=r"^Invariance.views \[crop\]: .* size and normalisation"):
        trainer(tmp_path, monitor).fit(TwoViews(), loader())


def small_convnet_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return small_convnet()


def test_heads_are_measured_under_their_own_names(images: MeasurementImages) -> None:
    module = TwoViews(nn.Sequential(*list(torchvision.models.resnet18().children())[:-1]), 512)
    heads = {"projection_head": module.projection_head}
    subject = Subject(module.backbone, CLEAN, heads=heads)
    assert [name for name in subject.layers("head") if name.startswith("projection_head")] == [
        "projection_head.0",
        "projection_head.1",
        "projection_head.2",
    ]


def test_a_compiled_module(tmp_path: Path, images: MeasurementImages) -> None:
    module = TwoViews()
    compiled = torch.compile(module, backend="eager")
    trainer(tmp_path, GeometryMonitor([CKA(gram_size=8)], images, clean=CLEAN), max_epochs=1).fit(compiled, loader())
    assert set(rows(tmp_path)["layer"]) == {str(i) for i in range(8)}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"clean": None}, "clean: how Sequential sees an image is not known; give clean=View("),
        ({"network": "encoder"}, "network='encoder': no module of TwoViews; it has backbone, projection_head"),
        ({"heads": ["predictor"]}, "heads='predictor': no module of TwoViews"),
        ({"images": None}, "images: give images=MeasurementImages.from_dataset(…)"),
        (
            {"images": torch.zeros(4, 3, 8, 8)},
            "images is Tensor; give MeasurementImages(…) or MeasurementImages.from_dataset(…)",
        ),
        (
            {"measurements": [Spectrum()], "clean": TO_TENSOR},
            "Spectrum.copies 10: simclr: random views need the network's size and normalisation: give "
            "clean=View('none', size=…, normalize=…) in place of a transform, or leave them out: copies=0",
        ),
        (
            {"measurements": [Neighborhoods()], "clean": TO_TENSOR},
            "Neighborhoods.settings [policy]: simclr: random views",
        ),
        ({"measurements": [CKA(layers="layer9")]}, "CKA.layers='layer9' matches no layer of Sequential"),
        ({"measurements": [Neighborhoods(k=48)]}, "Neighborhoods.k 48: each of 48 measurement images has 47 others"),
    ],
)
def test_mistakes_name_the_argument(
    tmp_path: Path, images: MeasurementImages, given: dict[str, Any], words: str
) -> None:
    options = {"measurements": [CKA(gram_size=8)], "images": images, "clean": CLEAN, **given}
    with pytest.raises(UserError) as error:
        trainer(tmp_path, GeometryMonitor(**options)).fit(TwoViews(), loader())
    assert str(error.value).startswith(words)
    assert "--" not in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "options", "words"),
    [
        (TinyImages(4, TO_TENSOR), {}, "is a torch.float32 tensor (3, 32, 32), expected a PIL image or uint8: give"),
        ([np.zeros((3, 8, 9), np.uint8)], {}, "is a uint8 array (3, 8, 9), expected a PIL image or uint8: a tensor is"),
        ([{"image": 0}], {}, "is dict, expected a PIL image or uint8: give a data set whose items are images"),
        ([], {}, "list has no images"),
        (TinyImages(4), {"n": -3}, "n -3: expected a whole number of at least 1"),
        (DataLoader(TinyImages(4)), {}, "DataLoader is no map-style data set, whose items have numbers; give its"),
        ([torch.zeros(3, 8, side, dtype=torch.uint8) for side in (8, 9)], {}, "image_size: images of list differ"),
        (TinyImages(4), {"n": 5}, "n 5: TinyImages has 4 images; set at most 4, or None for as many as fit"),
        (TinyImages(4), {"train": TinyImages(4, labels=False)}, "train=TinyImages: its items have no labels"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_measured(dataset: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        MeasurementImages.from_dataset(dataset, **options)
    assert words in str(error.value)


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1), (8, 9, 3)])
def test_arrays_are_images_grey_ones_too(shape: tuple[int, ...]) -> None:
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    (batch,) = MeasurementImages.from_dataset([pixels]).loader("measure")
    expected = pixels if shape[-1] == 3 else np.repeat(pixels.reshape(8, 9, 1), 3, 2)
    assert np.array_equal(batch["image"][0].permute(1, 2, 0), expected)


def test_lists_and_arrays_are_tensors() -> None:
    images = MeasurementImages(np.zeros((2, 3, 8, 8), np.uint8), [0, 1])  # type: ignore[arg-type]
    assert images.num_classes == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"measurements": [CKA]}, "measurements: CKA is a class; write CKA()"),
        ({"measurements": ["cka"]}, "measurements: 'cka' is no measurement, such as CKA()"),
        ({"images": torch.zeros(4, 3, 8, 8)}, "images is Tensor; give MeasurementImages(…) or MeasurementImages.from"),
        ({"clean": None}, "clean: how Sequential sees an image is not known; give clean=View('none', size=…, normal"),
    ],
)
def test_mistakes_in_a_notebook_name_the_argument(images: MeasurementImages, given: dict[str, Any], words: str) -> None:
    options: Any = {"network": small_convnet(), "images": images, "measurements": [CKA()], "clean": CLEAN, **given}
    with pytest.raises(UserError) as error:
        measure(**options)
    assert str(error.value).startswith(words)


def test_a_notebook_shows_a_table_and_takes_one_measurement(images: MeasurementImages) -> None:
    found = measure(small_convnet(), images, CKA(gram_size=8), clean=CLEAN)
    assert repr(found) == "Measurements of 64 rows: cka"
    assert "<table" in found._repr_html_()


def test_one_measurement_of_two_monitors_is_refused(tmp_path: Path, images: MeasurementImages) -> None:
    """It would compare one network with the initialisation of the other."""
    shared = [CKA(gram_size=8)]
    monitors = [
        GeometryMonitor(shared, images, f"{name}.backbone", clean=CLEAN, name=name) for name in ("student", "teacher")
    ]
    with pytest.raises(UserError, match="one CKA is given to two monitors; give each its own"):
        trainer(tmp_path, *monitors).fit(StudentAndTeacher(), loader())


def test_images_of_several_sizes_come_to_one() -> None:
    items: Sequence[Any] = [(torch.zeros(3, 8, width, dtype=torch.uint8), 0) for width in (8, 12)]
    assert MeasurementImages.from_dataset(items, image_size=6).image_shape == (3, 6, 6)


def test_a_trainer_of_the_other_package(tmp_path: Path, images: MeasurementImages) -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = small_convnet()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.backbone(batch[0][0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    options = {"accelerator": "cpu", "logger": pl.loggers.CSVLogger(tmp_path), "enable_progress_bar": False}
    monitor: Any = GeometryMonitor([CKA(gram_size=8)], images, clean=CLEAN)
    pl.Trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=[monitor], **options).fit(Module(), loader())
    assert set(rows(tmp_path)["epoch"]) == {0, 1}


def test_two_networks_are_compared_by_one_call(images: MeasurementImages) -> None:
    """Each with itself and with the other, as Linear CKA is symmetric."""
    a, b = (small_convnet_of(seed) for seed in (0, 1))
    pairs = []
    for one, other in ((a, b), (b, a)):
        reference = Subject(other, CLEAN, name="other")
        found = measure(one, images, [CKA(gram_size=8)], clean=CLEAN, references=[reference]).rows
        assert set(found["model_other"]) == {"network", "other"}
        shape = {"index": "layer", "columns": "layer_other", "values": "value"}
        pairs.append(found.query("model_other == 'other'").pivot(**shape))
    pd.testing.assert_frame_equal(pairs[0], pairs[1].T, check_names=False)


def test_a_transform_of_a_network_of_one_size_only(images: MeasurementImages) -> None:
    """A vision transformer refuses images of another size than its own, also where it is found what runs."""
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1, img_size=SIDE)
    found = measure(network, images, [CKA(layers=["blocks.0"], gram_size=8)], clean=TO_TENSOR).rows
    assert set(found["layer"]) == {"blocks.0"}
    assert found["value"].notna().all()


def test_protocols_of_a_function_have_no_addresses() -> None:
    views = [Subject(nn.Identity(), lambda image: TO_TENSOR(image)).view("clean").spec for _ in range(2)]
    assert views[0] == views[1]
    assert "0x" not in str(views[0])


def test_labels_of_items_are_read_with_their_images() -> None:
    """Once each, whatever kind of integer they are; not those of all other items."""
    read: list[int] = []

    class Counting(TinyImages):
        def __getitem__(self, i: int) -> Any:
            read.append(i)
            image, label, _ = super().__getitem__(i)
            return image, np.int64(label)

    few = MeasurementImages.from_dataset(Counting(300), n=12)
    assert len(read) == len(set(read)) == 12
    labels = torch.cat([batch["label"] for batch in few.loader("measure")])
    expected = torch.cat([batch["image"] for batch in few.loader("measure")]).float().mean((2, 3)).argmax(1)
    assert torch.equal(labels, expected)
    assert few.measure_sizes is None, "a random sample, not drawn class by class"


@pytest.mark.gpu
def test_images_on_a_gpu_are_measured_as_those_on_the_host() -> None:
    pixels, labels = torch.randint(0, 256, (24, 3, SIDE, SIDE), dtype=torch.uint8), torch.arange(24) % 3
    there, here = (MeasurementImages(pixels.to(device), labels.to(device), batch_size=8) for device in ("cuda", "cpu"))
    assert there.measure_ids == here.measure_ids
    found = measure(small_convnet().cuda(), there, [Invariance(gram_size=8, views=[])], clean=CLEAN).rows
    assert set(found["metric"]) == {"class_cka"}


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, images: MeasurementImages) -> None:
    measurements = [item for item in everything() if not isinstance(item, Probes)]
    monitor = GeometryMonitor([*measurements, Probes(layers=["7"])], images, clean=CLEAN)
    trainer(tmp_path, monitor, max_epochs=1, accelerator="cuda", devices=1).fit(TwoViews(), loader())
    assert {"cka", "invariance", "ridge_probe", "neighbors", "lidar"} <= set(rows(tmp_path)["metric"])
