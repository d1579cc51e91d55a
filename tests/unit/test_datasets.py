import os
import pickle
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import scipy.io
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.data.images import Files, resize, shuffled, stratified, to_rgb
from ssl_geometry.data.sources import load
from ssl_geometry.errors import UserError


def pixels(n, height, width, seed=0):
    """(n,height,width,3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path, **options)


def everything(images):
    return images[torch.arange(len(images))]


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def any_hash(monkeypatch):
    """Files of the right layout pass for the published ones."""
    for module in ("cifar", "svhn", "stl10", "flowers102"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: os.path.isfile(path)
        )


def write_cifar10(root):
    folder, image, label = root / "cifar-10-batches-py", pixels(12, 32, 32), np.arange(12) % 10
    folder.mkdir()
    rows = image.transpose(0, 3, 1, 2).reshape(12, -1)
    for i in range(5):
        part = slice(2 * i, 2 * i + 2)
        batch = {"data": rows[part], "labels": label[part].tolist()}
        (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(batch))
    (folder / "test_batch").write_bytes(pickle.dumps({"data": rows[10:], "labels": label[10:].tolist()}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    return image, label, 10


def write_cifar100(root):
    folder, image, label = root / "cifar-100-python", pixels(12, 32, 32), np.arange(12) + 80
    folder.mkdir()
    rows = image.transpose(0, 3, 1, 2).reshape(12, -1)
    for name, part in {"train": slice(0, 9), "test": slice(9, 12)}.items():
        batch = {"data": rows[part], "fine_labels": label[part].tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))
    return image, label, 9


def write_svhn(root):
    image, label = pixels(12, 32, 32), np.arange(12) % 10
    for name, part in {"train": slice(0, 10), "test": slice(10, 12)}.items():
        y = np.where(label[part] == 0, 10, label[part])[:, None]  # the files call the digit 0 ten
        scipy.io.savemat(root / f"{name}_32x32.mat", {"X": image[part].transpose(1, 2, 3, 0), "y": y})
    return image, label, 10


def write_stl10(root):
    folder, image, label = root / "stl10_binary", pixels(12, 96, 96), np.arange(12) % 10
    folder.mkdir()
    for name, part in {"train": slice(0, 10), "test": slice(10, 12), "unlabeled": slice(0, 0)}.items():
        image[part].transpose(0, 3, 2, 1).tofile(folder / f"{name}_X.bin")  # columns first
        (label[part] + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))
    return image, label, 10


def write_mnist(root):
    folder, image, label = root / "MNIST" / "raw", pixels(12, 28, 28)[..., 0], np.arange(12) % 10
    folder.mkdir(parents=True)
    for name, part in {"train": slice(0, 10), "t10k": slice(10, 12)}.items():
        head = lambda kind, *shape: np.array([kind, *shape], dtype=">i4").tobytes()  # noqa: E731
        n = len(label[part])
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head(2051, n, 28, 28) + image[part].tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(head(2049, n) + label[part].astype(np.uint8).tobytes())
    return np.repeat(image[..., None], 3, -1), label, 10


@pytest.mark.parametrize(
    ("name", "write", "classes"),
    [
        ("cifar10", write_cifar10, 10),
        ("cifar100", write_cifar100, 100),
        ("svhn", write_svhn, 10),
        ("stl10", write_stl10, 10),
        ("torchvision.datasets.MNIST", write_mnist, 10),
    ],
)
def test_array_data_sets_give_the_pixels_and_labels_of_their_files(tmp_path, any_hash, name, write, classes):
    image, label, n_train = write(tmp_path)
    train, test, names = load(name, str(tmp_path))
    assert train.in_memory
    assert test.in_memory
    assert len(names) == classes
    for split, part in ((train, slice(0, n_train)), (test, slice(n_train, None))):
        batch = everything(split)
        np.testing.assert_array_equal(batch["image"].permute(0, 2, 3, 1), image[part])
        np.testing.assert_array_equal(batch["label"], label[part])
        assert batch["index"].tolist() == list(range(len(split)))
        assert (batch["image"].dtype, batch["label"].dtype, batch["index"].dtype) == (
            torch.uint8, torch.int64, torch.int64,
        )  # fmt: skip


def test_stl10_trains_on_unlabelled_images_when_asked(tmp_path, any_hash):
    image, label, _ = write_stl10(tmp_path)
    image[:4].transpose(0, 3, 2, 1).tofile(tmp_path / "stl10_binary" / "unlabeled_X.bin")
    train, test, _ = load("stl10", str(tmp_path), args={"split": "train+unlabeled"})
    assert train.labels.tolist() == [*label[:10].tolist(), -1, -1, -1, -1]
    assert len(test) == 2
    data = DataModule("stl10", str(tmp_path), val_fraction=0, dataset_args={"split": "train+unlabeled"})
    data.setup()
    assert (data.num_train, data.num_unlabelled) == (14, 4)


def test_torchvision_classes_that_read_files_are_read_one_by_one(tmp_path, any_hash):
    folder, sizes = tmp_path / "flowers-102", [(20, 30), (31, 20), (24, 24), (40, 22)]
    arrays = [pixels(1, *size, seed=i)[0] for i, size in enumerate(sizes)]
    for i, array in enumerate(arrays, 1):
        save(folder / "jpg" / f"image_{i:05d}.jpg", array)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": [[1, 2, 2, 1]]})
    scipy.io.savemat(folder / "setid.mat", {"trnid": [[1, 3]], "valid": [[2]], "tstid": [[4, 2]]})
    train, test, _ = load("torchvision.datasets.Flowers102", str(tmp_path), 16)
    assert not train.in_memory
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1], [0, 1])
    with PIL.Image.open(folder / "jpg" / "image_00004.jpg") as image:
        image = image.convert("RGB").resize((16, 29), PIL.Image.Resampling.BILINEAR).crop((0, 6, 16, 22))
    np.testing.assert_array_equal(everything(test)["image"][0].permute(1, 2, 0), np.asarray(image))


def test_a_torchvision_class_with_val_alone_is_tested_on_val(tmp_path):
    for split, n in {"train": 3, "val": 2}.items():
        for i in range(n):
            save(tmp_path / "imagenette2" / split / "n01440764" / f"{i}.jpeg", pixels(1, 8, 8)[0])
    train, test, classes = load("torchvision.datasets.Imagenette", str(tmp_path), 8)
    assert (len(train), len(test), classes) == (3, 2, ["tench, Tinca tinca"])


def test_a_torchvision_class_without_splits_gives_a_fixed_fifth_for_test():
    args = {"size": 50, "image_size": (3, 8, 8), "num_classes": 2}
    train, test, classes = load("torchvision.datasets.FakeData", args=args)
    assert (len(train), len(test), classes) == (40, 10, ["0", "1"])
    assert sorted(train.index.tolist() + test.index.tolist()) == list(range(50))
    again = load("torchvision.datasets.FakeData", args=args)[1]
    assert again.index.tolist() == test.index.tolist()


def test_digits_are_scikit_learns_scaled_to_bytes():
    train, test, _ = load("digits", image_size=8)
    data = load_digits()
    for split in (train, test):
        gray = np.rint(data.images[split.index] * 255 / 16)
        np.testing.assert_array_equal(everything(split)["image"], np.repeat(gray[:, None], 3, 1))
        np.testing.assert_array_equal(split.labels, data.target[split.index])
    assert not set(train.index.tolist()) & set(test.index.tolist())
    assert np.ptp(np.bincount(test.labels)) <= 3
    bigger = load("digits")[0]
    small = everything(train)["image"][:50].float()
    expected = torch.nn.functional.interpolate(small, size=16, mode="bilinear")
    assert (everything(bigger)["image"][:50].float() - expected).abs().max() <= 1


def test_colored_digits_are_digits_of_one_contrast_on_any_background():
    train, test, classes = load("colored_digits", image_size=8)
    plain = load("digits", image_size=8)
    for split, gray in zip((train, test), plain, strict=False):
        assert split.index.equal(gray.index)
        assert split.labels.equal(gray.labels)
        pixels, ink = everything(split)["image"].float(), everything(gray)["image"].float()
        spread = [(pixels + sign * 0.25 * ink).flatten(2) for sign in (-1, 1)]  # a background is left, of one colour
        flat = [(rest.amax(2) - rest.amin(2)).amax(1) <= 1.01 for rest in spread]
        assert (flat[0] ^ flat[1]).all()
        assert 0.4 < flat[1].float().mean() < 0.6, "half are inverted"
        assert torch.where(flat[1][:, None, None], spread[1], spread[0])[..., 0].std(0).min() > 50, "of any colour"
    assert classes == [str(digit) for digit in range(10)]


# Images


def png(tmp_path, image, **options):
    image.save(tmp_path / "a.png", **options)
    return np.asarray(to_rgb(PIL.Image.open(tmp_path / "a.png")))


def test_gray_and_palette_images_become_rgb(tmp_path):
    gray = pixels(1, 5, 7)[0, ..., 0]
    np.testing.assert_array_equal(png(tmp_path, PIL.Image.fromarray(gray)), np.repeat(gray[..., None], 3, -1))
    palette = PIL.Image.fromarray(pixels(1, 5, 7)[0]).quantize(16)
    np.testing.assert_array_equal(png(tmp_path, palette), np.asarray(palette.convert("RGB")))


def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path):
    deep = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    assert png(tmp_path, PIL.Image.fromarray(deep))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(tmp_path, mode):
    rgba = np.array([[[10, 10, 10, 255], [10, 10, 10, 0]]], dtype=np.uint8)
    image = PIL.Image.fromarray(rgba)
    if mode == "P":
        image = PIL.Image.fromarray(np.array([[0, 1]], dtype=np.uint8)).convert("P")
        image.putpalette([10, 10, 10, 10, 10, 10])
        got = png(tmp_path, image, transparency=1)
    else:
        got = png(tmp_path, image.convert(mode))
    assert got.tolist() == [[[10, 10, 10], [255, 255, 255]]]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    rgba = np.array([[[0, 100, 200, 51]]], dtype=np.uint8)  # 51/255 = 0.2
    assert png(tmp_path, PIL.Image.fromarray(rgba)).tolist() == [[[204, 224, 244]]]


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    PIL.Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.jpg")  # cyan ink alone
    np.testing.assert_allclose(np.asarray(to_rgb(PIL.Image.open(tmp_path / "a.jpg")))[0, 0], [0, 255, 255], atol=2)


def test_exif_rotated_images_stand_upright(tmp_path):
    array, exif = pixels(1, 4, 6)[0], PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    PIL.Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    got = np.asarray(to_rgb(PIL.Image.open(tmp_path / "a.png")))
    np.testing.assert_array_equal(got, np.rot90(array, -1))


def test_float_images_are_refused():
    with pytest.raises(ValueError, match="no known range"):
        to_rgb(PIL.Image.new("F", (2, 2)))


@given(st.integers(9, 50), st.integers(9, 50), st.integers(4, 40))
def test_arrays_are_resized_as_files_are(height, width, size):
    array = np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)
    image = PIL.Image.fromarray(array)
    got = np.asarray(resize(image, size))
    assert got.shape == (size, size, 3)
    short = min(height, width)
    scaled = image.resize((int(size * width / short), int(size * height / short)), PIL.Image.Resampling.BILINEAR)
    left, top = round((scaled.width - size) / 2), round((scaled.height - size) / 2)
    np.testing.assert_array_equal(got, np.asarray(scaled.crop((left, top, left + size, top + size))))
    as_array = resize(torch.from_numpy(array).permute(2, 0, 1)[None], size)[0].permute(1, 2, 0)
    np.testing.assert_allclose(as_array.numpy().astype(int), got.astype(int), atol=1)


# Image folders


@pytest.fixture
def folder(tmp_path):
    """Classes b and a; train has 4 images of each, test has 2."""
    for split, n in {"train": 4, "test": 2}.items():
        for c in "ba":
            for i in range(n):
                save(tmp_path / split / c / f"{i}.png", pixels(1, 6, 6, seed=i + 10 * ord(c))[0])
    return tmp_path


def test_folder_classes_and_files_are_sorted(folder):
    train, test, classes = load(str(folder))
    assert classes == ["a", "b"]
    assert (train.labels.tolist(), test.labels.tolist()) == ([0] * 4 + [1] * 4, [0, 0, 1, 1])
    np.testing.assert_array_equal(
        everything(train)["image"][5].permute(1, 2, 0), pixels(1, 6, 6, seed=1 + 10 * ord("b"))[0]
    )
    assert torch.equal(everything(train.decode(2))["image"], everything(train)["image"])


def test_val_is_the_test_split_where_there_is_no_test(folder):
    (folder / "test").rename(folder / "val")
    assert len(load(str(folder))[1]) == 4
    assert load("imagenet", str(folder))[1].shape == (3, 256, 256)


@pytest.mark.parametrize("path", [".", "train"])
def test_a_folder_without_test_gives_a_fixed_stratified_fifth(folder, path):
    shutil.rmtree(folder / "test")
    for i in range(4, 10):
        for c in "ab":
            save(folder / "train" / c / f"{i}.png", pixels(1, 6, 6)[0])
    train, test, _ = load(str(folder / path))
    assert np.bincount(test.labels).tolist() == [2, 2]
    assert sorted(train.index.tolist() + test.index.tolist()) == list(range(20))


def test_hidden_and_other_files_are_no_images(folder):
    for name in (".DS_Store", "._0.png", "notes.txt"):
        (folder / "train" / "a" / name).write_text("x")
    (folder / "train" / ".cache").mkdir()
    train, _, classes = load(str(folder))
    assert (len(train), classes) == (8, ["a", "b"])


def test_files_of_other_types_are_counted_in_one_line(folder, caplog):
    for name in ("a.gif", "b.GIF", "notes.txt", "README", ".DS_Store"):
        (folder / "train" / "a" / name).write_text("x")
    train, _, _ = load(str(folder))
    assert len(train) == 8
    (line,) = caplog.messages
    assert f"DataModule.dataset {folder / 'train'}: left out 4 files of other types (2 .gif, 1 " in line
    assert ".txt" in line
    assert "1 without a suffix" in line
    assert "\n" not in line


def test_images_of_mixed_sizes_need_an_image_size(folder):
    save(folder / "train" / "a" / "0.png", pixels(1, 9, 6)[0])
    save(folder / "train" / "b" / "x.png", pixels(1, 9, 6)[0])
    text = message(load(str(folder))[0].decode, 2)
    assert "DataModule.image_size" in text
    assert "6×9" in text
    assert "6×6" in text
    assert load(str(folder), image_size=5)[0].decode(2).shape == (3, 5, 5)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_file_is_named(folder, damage):
    path = folder / "train" / "b" / "2.png"
    path.write_bytes({"truncated": path.read_bytes()[:-60], "text": b"no image", "empty": b""}[damage])
    train = load(str(folder))[0]
    text = message(train.decode, 2)
    assert str(path) in text
    assert "DataModule.on_error skip" in text
    assert train.unreadable(range(8), 2) == [(6, str(path))]


def break_folder(folder, how):
    if how == "missing":
        return folder / "nowhere"
    if how == "empty":
        (folder / "new").mkdir()
        return folder / "new"
    if how == "no classes":
        for split in ("train", "test"):
            for c in "ab":
                shutil.rmtree(folder / split / c)
    if how == "no images":
        (folder / "train" / "c").mkdir()
    if how == "no test images":
        for file in (folder / "test" / "b").iterdir():
            file.unlink()
    if how == "unknown class":
        (folder / "test" / "b").rename(folder / "test" / "zebra")
    return folder


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("missing", "no such folder"),
        ("empty", "no folders of classes"),
        ("no classes", "no folders of classes"),
        ("no images", "no images in c/"),
        ("no test images", "no images in b/"),
        ("unknown class", "test/zebra"),
    ],
)
def test_a_wrong_folder_is_reported_in_one_line(folder, how, expected):
    path = break_folder(folder, how)
    text = message(load, str(path))
    assert expected in text
    assert f"DataModule.dataset {path}" in text


# Names and downloads


def test_a_misspelt_name_is_answered_with_the_nearest():
    assert "'cifar10'" in message(load, "cifra10")
    assert "'Flowers102'" in message(load, "torchvision.datasets.Flower102")


def test_missing_files_name_the_folder_and_the_option(tmp_path):
    text = message(load, "cifar10", str(tmp_path))
    assert f"DataModule.root {tmp_path}" in text
    assert str(tmp_path / "cifar-10-batches-py") in text
    assert "DataModule.download true" in text


def test_a_failing_download_reports_where_the_files_belong(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    text = message(load, "cifar10", str(tmp_path), download=True)
    assert str(tmp_path / "cifar-10-batches-py") in text
    assert "no network" in text


def test_wrong_arguments_of_a_class_name_the_option(tmp_path):
    assert "DataModule.dataset_args" in message(load, "stl10", str(tmp_path), args={"split": "training"})
    assert "DataModule.dataset_args" in message(load, "torchvision.datasets.FakeData", args={"colour": 1})


def test_a_data_set_without_class_labels_is_refused(monkeypatch):
    class Boxes(torchvision.datasets.FakeData):
        def __getitem__(self, i):
            return super().__getitem__(i)[0], {"boxes": []}

    monkeypatch.setattr(torchvision.datasets, "FakeData", Boxes)
    text = message(load, "torchvision.datasets.FakeData", args={"size": 3, "image_size": (3, 8, 8)})
    assert "no single class label" in text


# Stratified order

labels = st.lists(st.integers(-1, 6), min_size=1, max_size=120).map(lambda values: torch.tensor(values))


@given(labels, st.integers(0, 2**40))
def test_every_beginning_of_a_stratified_order_holds_the_classes_in_proportion(labels, seed):
    order = stratified(labels, seed)
    assert sorted(order.tolist()) == list(range(len(labels)))
    seen = torch.nn.functional.one_hot(labels[order] + 1).cumsum(0).double()
    k = torch.arange(1, len(labels) + 1)[:, None]
    share = seen[-1] / len(labels)
    n_classes = int((share > 0).sum())
    assert ((seen - k * share).abs() <= 1 + n_classes * share + 1e-9).all()


@given(st.integers(1, 8), st.integers(1, 10), st.integers(0, 9))
def test_classes_of_one_size_are_shared_exactly(n_classes, size, seed):
    labels = torch.arange(n_classes).repeat(size)
    drawn = labels[stratified(labels, seed)].reshape(size, n_classes)
    assert torch.equal(drawn.sort(1).values, torch.arange(n_classes).expand(size, -1))


def test_a_stratified_order_depends_on_its_seed_alone():
    labels = torch.arange(50) % 3
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = stratified(labels, 1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    torch.manual_seed(1)
    assert torch.equal(stratified(labels, 1), first)
    assert not torch.equal(stratified(labels, 2), first)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 2**40))
def test_a_shuffled_order_of_fewer_is_that_of_more_with_the_others_left_out(n, fewer, seed):
    order = shuffled(n, seed)
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(order[order < fewer], shuffled(min(n, fewer), seed))


@pytest.mark.parametrize("n_classes", [2, 10, 100, 1000])
def test_a_shuffled_stratified_order_pairs_images_of_a_class_as_chance_does(n_classes):
    n, size = 2048, 64
    labels = torch.arange(n_classes).repeat(-(-10_000 // n_classes))
    order = stratified(labels, 2101)[:n]
    groups = labels[order[shuffled(n, 2101, 1)]].view(-1, size)
    pairs = int((groups[:, :, None] == groups[:, None]).sum() - n) // 2
    counts = labels[order].bincount().double()
    chance = float((counts * (counts - 1)).sum()) / 2 * (size - 1) / (n - 1)
    assert abs(pairs - chance) < 4 * chance**0.5
    in_rounds = labels[order].view(-1, size)
    rounds = int((in_rounds[:, :, None] == in_rounds[:, None]).sum() - n) // 2
    assert rounds < chance - 4 * chance**0.5 or n_classes == 2


def test_paths_are_kept_as_one_array_and_in_any_script(tmp_path):
    names = ["straße.png", "猫.png"]
    files = Files([str(tmp_path / name) for name in names])
    assert [Path(files.origin(i)).name for i in range(2)] == names
    assert files.paths.dtype.kind == "S"


@pytest.fixture
def several(tmp_path):
    """Two splits of images that show several classes."""
    for split, n in (("train", 12), ("test", 6)):
        for i in range(n):
            save(tmp_path / split / f"{i}.png", pixels(1, 8, 8, seed=i)[0])
        rows = "\n".join(f"{i}.png,{i % 2},{int(i % 3 == 0)}" for i in range(n))
        (tmp_path / split / "labels.csv").write_text(f"file,cat,dog\n{rows}\n")
    return tmp_path


def test_images_of_several_classes_are_listed(several):
    train, test, classes = load(str(several))
    assert classes == ["cat", "dog"]
    assert (len(train), len(test)) == (12, 6)
    assert train[torch.tensor([3, 4])]["label"].tolist() == [[1, 1], [0, 0]]
    data = DataModule(str(several), val_fraction=0.25, measure_size=4, batch_size=4)
    data.setup()
    assert data.multi_label
    assert {tuple(batch["label"].shape) for batch in data.train_dataloader()} == {(4, 2)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("image,cat\n0.png,1\n", "column `file`"),
        ("file,cat\n0.png,2\n", "0 and 1"),
        ("file,cat\nno.png,1\n", "no.png"),
        ("file,bird,dog\n0.png,1,0\n", "columns"),
        ("file,cat,cat\n0.png,1,0\n", "the column 'cat' is there twice"),
        ("file,cat,dog\n../train/0.png,1,0\n", "../train/0.png lies outside"),
        ("file,cat,dog\nsub/../../train/0.png,1,0\n", "sub/../../train/0.png lies outside"),
        ("file,cat,dog\n/etc/hostname,1,0\n", "/etc/hostname lies outside"),
        ("file,cat,dog\n0.png,1,0\n0.png,0,1\n", "0.png is there twice"),
        ("file,cat,dog\n0.png,1,0\n./0.png,0,1\n", "0.png is there twice"),
        ("file,cat,dog\n0.png,1,0\n0.png/,0,1\n", "0.png is there twice"),
        (
            f"file,cat,dog\n{'x' * 5_000},1,0\n",
            f"DataModule.dataset {{}}/test/labels.csv: 1 of 1 images are not there: ['{'x' * 60}…']",
        ),
        ("", "cannot be read as a table"),
    ],
)
def test_a_list_that_does_not_fit_is_reported(several, content, words):
    (several / "test" / "labels.csv").write_text(content)
    assert words.replace("{}", str(several)) in message(load, str(several))
