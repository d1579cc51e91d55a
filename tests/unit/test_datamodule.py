import io
import itertools
import pickle
import random
import tarfile
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import distributed, multiprocessing

from ssl_geometry.config_files import expand_bases
from ssl_geometry.data import datamodule
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.data.plan import evenly, every_nth, shares
from ssl_geometry.errors import UserError
from tests.training import quiet_trainer
from tests.unit.test_datasets import message

REAL_IMAGES = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg.tar.xz"


def digits(rank=0, world_size=1, **options):
    """The module as process ``rank`` sees it."""
    data = DataModule(**{"dataset": "digits", "batch_size": 60, "eval_batch_size": 50, "measure_size": 120} | options)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, num_devices=world_size, strategy=strategy)
    data.setup()
    return data


def indices(loader):
    return [batch["index"].tolist() for batch in loader]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def epoch(data, number):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return indices(loader)


@pytest.fixture
def folder(tmp_path):
    """Two classes; 15 images of each for training, 10 for test, of several sizes."""
    draw = np.random.default_rng(0)
    for split, n in {"train": 15, "test": 10}.items():
        for c in "ab":
            (tmp_path / split / c).mkdir(parents=True)
            for i in range(n):
                array = draw.integers(0, 256, (9 + i % 3, 10, 3), dtype=np.uint8)
                PIL.Image.fromarray(array).save(tmp_path / split / c / f"{i:02}.png")
    return tmp_path


def of_folder(folder, **options):
    options = {"image_size": 8, "batch_size": 6, "eval_batch_size": 7, "measure_size": 9, "num_workers": 1} | options
    data = DataModule(str(folder), **options)
    data.setup()
    return data


# Batches in many processes

sizes = st.integers(0, 60), st.integers(1, 20), st.integers(1, 5)


@given(*sizes)
def test_process_slices_of_a_training_batch_join_to_it(n, share, world_size):
    batch_size = share * world_size
    parts = [shares(n, batch_size, rank, world_size) for rank in range(world_size)]
    joined = [[i for part in batch for i in range(n)[part]] for batch in zip(*parts, strict=True)]
    assert joined == [list(range(n)[part]) for part in shares(n, batch_size)]
    assert joined == [list(range(b * batch_size, (b + 1) * batch_size)) for b in range(n // batch_size)]


@given(*sizes)
def test_measuring_batches_are_dealt_out_whole(n, batch_size, world_size):
    parts = [every_nth(n, batch_size, rank, world_size) for rank in range(world_size)]
    dealt = [part for turn in itertools.zip_longest(*parts) for part in turn if part is not None]
    assert dealt == every_nth(n, batch_size)
    assert [i for part in dealt for i in range(n)[part]] == list(range(n))
    assert all(len(range(n)[part]) == batch_size for part in dealt[:-1])


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5))
def test_evaluation_loops_are_of_one_length_without_repeats(n, batch_size, world_size):
    parts = [evenly(n, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(i for part in flat(parts) for i in range(n)[part]) == list(range(n))
    assert max(part.stop - part.start for part in flat(parts)) <= batch_size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"val_fraction": 0.0014}, r"DataModule\.val_fraction 0\.0014: 2 val images .* 3 processes .*, or set it to 0"),
        ({"limit_test": 2, "measure_size": 2}, r"DataModule\.limit_test 2: 2 test images .* 3 processes"),
        ({"eval_batch_size": 1}, r"DataModule\.(val_fraction|limit_test|eval_batch_size).* at most 1 leave"),
    ],
)
def test_fewer_images_than_processes_are_refused_at_the_start(options, words):
    """An empty batch is a traceback in many metrics, after the epochs before the first evaluation."""
    with pytest.raises(UserError, match=words):
        digits(2, 3, **options)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_together_see_what_one_sees(world_size):
    one, many = digits(), [digits(rank, world_size) for rank in range(world_size)]
    for number in (0, 3):
        joined = [flat(batch) for batch in zip(*(epoch(data, number) for data in many), strict=True)]
        assert joined == epoch(one, number)
    for split in ("train", "val", "test", "measure"):
        for rank, data in enumerate(many):
            assert indices(data.loader(split)) == indices(one.loader(split))[rank::world_size]
    for name in ("val_dataloader", "test_dataloader"):
        assert len({len(getattr(data, name)()) for data in many}) == 1
        found = [i for data in many for i in flat(indices(getattr(data, name)()))]
        assert sorted(found) == sorted(flat(indices(getattr(one, name)())))
    assert {data.measure_ids for data in many} == {one.measure_ids}


def test_a_batch_size_that_processes_cannot_share_is_refused():
    assert "DataModule.batch_size 64: expected a multiple of the 3 processes" in message(digits, 0, 3, batch_size=64)
    assert "at least 2 images" in message(digits, 0, 3, batch_size=3)


# Order


def test_training_order_is_a_pure_function_of_seed_and_epoch():
    data = digits()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(2)
    first = indices(loader)
    assert indices(loader) == first  # the same epoch again
    torch.manual_seed(5)
    assert epoch(data, 2) == first
    assert epoch(digits(), 2) == first
    assert epoch(data, 1) != first
    assert epoch(digits(val_fraction=0.0, seed=1), 2) != epoch(digits(val_fraction=0.0), 2)
    assert len(first) == len(loader) == data.num_train // 60
    assert len(set(flat(first))) == 60 * len(first)


@pytest.mark.parametrize("storage", ["device", "workers"])
def test_iterating_leaves_the_global_random_generators_alone(storage):
    data = digits(storage=storage, num_workers=1)
    before = torch.get_rng_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    epoch(data, 0)
    indices(data.loader("measure"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert pickle.dumps(np.random.get_state()) == before[2]  # noqa: NPY002


def test_index_is_the_place_on_disk():
    data = digits()
    images, target = load_digits().images, load_digits().target
    for split in ("train", "val", "test", "measure"):
        batch = next(iter(data.loader(split)))
        np.testing.assert_array_equal(batch["label"], target[batch["index"]])
    batch = next(iter(digits(image_size=8).train_dataloader()))
    np.testing.assert_array_equal(batch["image"][:, 1], np.rint(images[batch["index"]] * 255 / 16))


# Splits


def test_validation_is_a_stratified_part_of_training_chosen_by_seed():
    data, other = digits(), digits(seed=1)
    train, val = data.loader("train"), data.loader("val")
    ids = flat(indices(train)), flat(indices(val))
    assert not set(ids[0]) & set(ids[1])
    assert (len(ids[0]), len(ids[1])) == (data.num_train, 144)
    whole = digits(val_fraction=0.0)
    assert sorted(ids[0] + ids[1]) == sorted(flat(indices(whole.loader("train"))))
    assert whole.val_dataloader() == []
    counts = np.bincount(np.concatenate([batch["label"] for batch in val]))
    assert counts.min() >= 13
    assert counts.max() <= 16
    assert indices(other.loader("val")) != indices(val)


def test_test_and_measurement_images_are_the_same_for_every_seed():
    data, other = digits(limit_test=200), digits(limit_test=200, seed=1)
    for split in ("test", "measure"):
        assert indices(data.loader(split)) == indices(other.loader(split))
    whole = flat(indices(digits().loader("test")))
    assert flat(indices(data.loader("test"))) == whole[:200]
    assert set(flat(indices(data.loader("measure")))) == set(whole[:120])
    first = next(iter(data.loader("measure")))["label"]
    assert set(first.tolist()) == set(range(10))


def test_measurement_images_come_in_random_order_whoever_asks_for_how_many():
    data = digits()
    measured, stratified = flat(indices(data.loader("measure"))), flat(indices(data.loader("test")))
    for n in (1, 40, 119):
        assert flat(indices(data.loader("measure", n))) == [i for i in measured if i in set(stratified[:n])]
        assert flat(indices(digits(measure_size=n).loader("measure"))) == flat(indices(data.loader("measure", n)))
    labels = data.measure_labels
    assert labels.tolist() == [label for batch in data.loader("measure") for label in batch["label"].tolist()]
    # Ten classes in rounds share a class with the image before it at most where rounds meet; at random, one in ten.
    assert 5 <= int((labels[1:] == labels[:-1]).sum()) <= 25


def test_limits_keep_the_classes_in_proportion():
    data = digits(limit_train=100, limit_test=150)
    assert data.num_train == len(data.loader("train").sampler.rows) == 100
    counts = np.bincount(np.concatenate([batch["label"] for batch in data.loader("train")]))
    assert counts.min() >= 8
    assert counts.max() <= 12
    assert len(flat(indices(data.val_dataloader()))) == 144
    assert not set(flat(epoch(data, 0))) & set(flat(indices(data.loader("test"))))


def test_the_bank_is_a_stratified_part_of_what_is_trained_on(monkeypatch):
    monkeypatch.setattr(datamodule, "BANK_SIZE", 200)
    data = digits()
    bank = list(data.loader("bank"))
    counts = np.bincount(np.concatenate([batch["label"] for batch in bank]))
    assert (counts.sum(), counts.min() >= 18, counts.max() <= 22) == (200, True, True)
    assert {i for batch in bank for i in batch["index"].tolist()} <= set(flat(indices(data.loader("train"))))


def test_the_measurement_hash_follows_name_indices_and_pixels_only(folder):
    data = of_folder(folder)
    assert data.measure_ids == of_folder(folder, storage="workers", seed=3, eval_batch_size=4).measure_ids
    assert data.measure_ids != of_folder(folder, measure_size=8).measure_ids
    moved = folder.rename(folder.with_name(folder.name + "-moved"))
    assert data.measure_ids != of_folder(moved).measure_ids
    moved.rename(folder)
    index = next(iter(data.loader("measure")))["index"][0].item()
    path = sorted((folder / "test").glob("*/*"))[index]
    with PIL.Image.open(path) as image:
        array = np.array(image)
    array[4, 5] ^= 128
    PIL.Image.fromarray(array).save(path)
    assert data.measure_ids != of_folder(folder).measure_ids


# Storage


@pytest.mark.parametrize("num_workers", [0, 2])
def test_both_storages_give_the_same_bits(folder, num_workers):
    device, workers = (of_folder(folder, storage=s, num_workers=num_workers) for s in ("device", "workers"))
    for number in (0, 1):
        loaders = [data.train_dataloader() for data in (device, workers)]
        for loader in loaders:
            loader.sampler.set_epoch(number)
        for a, b in zip(*loaders, strict=True):
            assert a.keys() == b.keys() == {"image", "label", "index"}
            assert all(torch.equal(a[key], b[key]) for key in a)
    for a, b in zip(device.loader("measure"), workers.loader("measure"), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert device.image_shape == workers.image_shape == (3, 8, 8)


def test_array_data_sets_can_be_read_by_workers_too():
    assert epoch(digits(storage="workers", num_workers=1), 1) == epoch(digits(), 1)


def test_splits_share_one_copy_of_the_pixels():
    data = digits()
    address = [data.loader(split).images.source.data_ptr() for split in ("train", "val", "test", "measure")]
    assert address[0] == address[1]
    assert address[2] == address[3]
    assert data.train_dataloader().images.source.data_ptr() == address[0]


def test_auto_keeps_small_folders_in_memory_and_reads_large_ones(folder, monkeypatch):
    assert of_folder(folder)._on_device
    monkeypatch.setattr(datamodule, "AUTO_BYTES", 50 * 3 * 8 * 8 - 1)
    assert not of_folder(folder)._on_device
    assert of_folder(folder, limit_train=10)._on_device
    assert digits()._on_device


# Damaged images


@pytest.mark.parametrize("storage", ["device", "workers"])
def test_a_damaged_image_stops_with_its_name(folder, storage):
    path = folder / "train" / "b" / "03.png"
    path.write_bytes(path.read_bytes()[:-80])
    text = message(
        lambda: [list(data.loader(s)) for data in [of_folder(folder, storage=storage)] for s in ("train", "val")]
    )
    assert str(path) in text
    assert "DataModule.on_error skip" in text


@pytest.mark.parametrize("storage", ["device", "workers"])
def test_damaged_images_are_left_out_and_counted(folder, storage):
    for name in ("train/b/03.png", "train/a/00.png", "test/b/01.png"):
        (folder / name).write_bytes(b"no image")
    with pytest.warns(UserWarning, match="left out") as caught:
        data = of_folder(folder, storage=storage, on_error="skip", image_size=8)
    assert [str(warning.message) for warning in caught if warning.category is UserWarning] == [
        f"left out 2 of 30 images that cannot be read, the first is {folder / 'train/a/00.png'}",
        f"left out 1 of 20 images that cannot be read, the first is {folder / 'test/b/01.png'}",
    ]
    seen = flat(indices(data.loader("train")) + indices(data.loader("val")))
    assert sorted(seen) == [i for i in range(30) if i not in (0, 18)]
    assert all(len(batch) == 6 for batch in epoch(data, 0))


SPLITS = ("train", "val", "test", "measure", "bank")


def skip_in_a_process(rank, world_size, folder, results):
    distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world_size)
    data = DataModule(str(folder), image_size=8, batch_size=6, measure_size=9, on_error="skip")
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        num_devices=world_size,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.setup()
    results.put((data.measure_ids, {split: data.loader(split).sampler.rows.tolist() for split in SPLITS}))
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:left out")
def test_processes_share_the_search_for_damaged_images(folder):
    for name in ("train/b/03.png", "train/a/00.png", "train/a/01.png"):
        (folder / name).write_bytes(b"no image")
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=skip_in_a_process, args=(rank, 2, folder, results)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    first, second = results.get(), results.get()
    assert first == second
    sizes = {split: len(rows) for split, rows in first[1].items()}
    assert sizes == {"train": 24, "val": 3, "test": 20, "measure": 9, "bank": 24}


# Options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 1}, "DataModule.batch_size 1: expected"),
        ({"val_fraction": 1.0}, "DataModule.val_fraction 1: expected"),
        ({"limit_train": 0}, "DataModule.limit_train 0: expected"),
        ({"image_size": -8}, "DataModule.image_size -8: expected"),
        ({"seed": -1}, "DataModule.seed -1: expected"),
        ({"storage": "disk"}, "DataModule.storage disk: expected one of auto, device, workers"),
        ({"on_error": "ignore"}, "DataModule.on_error ignore: expected one of raise, skip"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options, expected):
    assert expected in message(DataModule, **options)


def test_a_measurement_set_larger_than_the_test_split_names_both_numbers():
    text = message(digits, measure_size=2048)
    assert "DataModule.measure_size 2048" in text
    assert "359" in text


def test_a_training_set_smaller_than_a_batch_is_refused():
    text = message(digits(limit_train=40).train_dataloader)
    assert "DataModule.batch_size 60" in text
    assert "40" in text


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 100), (3, 99)])
def test_a_batch_size_that_nobody_asked_for_shrinks_to_the_images(world_size, batch_size):
    data = digits(0, world_size, batch_size=None, limit_train=100)
    assert data.batch_size == batch_size
    assert len(data.train_dataloader()) == 1


@pytest.mark.parametrize(
    ("images", "batch_size", "line"),
    [
        (
            216,
            128,
            "each epoch leaves out 88 of 216 training images, others each time; a batch size of 108 leaves out 0",
        ),
        (216, 108, None),
        (219, 200, None),
    ],
)
def test_batches_that_leave_out_many_images_are_reported_in_one_line(caplog, images, batch_size, line):
    data = digits(batch_size=batch_size, limit_train=images)
    caplog.clear()
    data.train_dataloader()
    assert len(caplog.messages) == (line is not None)
    assert all(line in message and message.startswith("DataModule.batch_size 128: ") for message in caplog.messages)


def test_a_batch_size_that_nobody_gave_is_called_the_default(caplog):
    digits(batch_size=None, limit_train=400).train_dataloader()
    assert caplog.messages[-1].startswith("DataModule.batch_size 256 (default): incomplete batches are dropped")


def test_training_reports_once_how_many_images_there_are(caplog):
    caplog.set_level("INFO", "ssl_geometry")
    data = digits(limit_train=216, limit_test=150, val_fraction=0.1)
    data.setup()
    (line,) = [line for line in caplog.messages if " training, " in line]
    assert line == "216 training, 144 validation, 150 test images of 10 classes (digits)"


def test_a_folder_of_images_keeps_a_tenth_for_validation():
    configs = Path(__file__).parents[2] / "configs"
    given = [f"--config={configs / name}.yaml" for name in ("simclr_resnet18_cifar10", "image_folder")]
    files = [arg for arg in expand_bases(given) if arg.endswith(".yaml")]
    merged = {}
    for file in files:
        merged |= yaml.safe_load(Path(file).read_text()).get("data") or {}
    assert merged["val_fraction"] == 0.1


def test_images_of_mixed_sizes_name_the_option(folder):
    assert "DataModule.image_size None" in message(lambda: list(of_folder(folder, image_size=None).loader("train")))


def test_splits_have_the_images_that_were_asked_for():
    data = digits(limit_train=500)
    sizes = {split: len(data.loader(split).sampler.rows) for split in SPLITS}
    assert sizes == {"train": 500, "val": 144, "test": 359, "measure": 120, "bank": 500}
    assert data.image_shape == (3, 16, 16)


# With Lightning


class Recorder(L.LightningModule):
    """Notes what it is given; asks for an end after ``stop`` steps and saves there."""

    def __init__(self, checkpoint=None, stop=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.validated = [], []
        self.checkpoint, self.stop = checkpoint, stop

    def training_step(self, batch, i):
        self.seen.append((self.current_epoch, i, batch["index"].tolist()))
        return self.layer(batch["label"][:, None].float()).mean()

    def validation_step(self, batch, i):
        self.validated.append(batch["index"].tolist())

    def on_train_batch_end(self, *args):
        if self.global_step == self.stop:
            self.trainer.save_checkpoint(self.checkpoint)
            self.trainer.should_stop = True

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module, checkpoint=None, **options):
    trainer = quiet_trainer(max_epochs=3)
    options = {"batch_size": 256, "measure_size": 64} | options
    trainer.fit(module, datamodule=DataModule("digits", **options), ckpt_path=checkpoint)
    return module


@pytest.mark.parametrize("storage", ["device", "workers"])
@pytest.mark.parametrize("stop", [2, 5, 7])
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_sees_what_an_unbroken_one_sees(tmp_path, storage, stop):
    options = {"storage": storage, "num_workers": 0}
    whole = fit(Recorder(), **options).seen
    assert [(e, i) for e, i, _ in whole] == [(e, i) for e in range(3) for i in range(5)]
    assert whole[0][2] != whole[5][2]
    first = fit(Recorder(tmp_path / "at.ckpt", stop), **options).seen
    second = fit(Recorder(), tmp_path / "at.ckpt", **options).seen
    assert first + second == whole


@pytest.mark.filterwarnings("ignore")
def test_lightning_validates_each_image_once_and_does_without_a_validation_split():
    module = fit(Recorder(), num_workers=0)
    assert len(flat(module.validated[-1:])) == 144
    assert fit(Recorder(), val_fraction=0.0).validated == []


def test_real_images(tmp_path):
    if not REAL_IMAGES.exists():
        pytest.skip("the CIFAR-10 images (shared/data/cifar10-jpeg.tar.xz) are not beside the repository")
    counts: dict[str, int] = {}
    with tarfile.open(REAL_IMAGES, "r|xz") as archive:
        for member in archive:
            place = str(Path(member.name).parent)
            if member.isfile() and counts.setdefault(place, 0) < 20:
                counts[place] += 1
                (tmp_path / place).mkdir(parents=True, exist_ok=True)
                (tmp_path / member.name).write_bytes(archive.extractfile(member).read())
    data = DataModule(str(tmp_path), batch_size=50, measure_size=100)
    data.setup()
    assert (data.num_classes, data.class_names[0], data.class_names[9]) == (10, "airplane", "truck")
    assert data.image_shape == (3, 32, 32)
    batch = next(iter(data.loader("measure")))
    assert batch["label"].bincount().tolist() == [10] * 10
    path = sorted((tmp_path / "test").glob("*/*"))[batch["index"][0]]
    np.testing.assert_array_equal(
        batch["image"][0].permute(1, 2, 0), np.asarray(PIL.Image.open(io.BytesIO(path.read_bytes())))
    )
