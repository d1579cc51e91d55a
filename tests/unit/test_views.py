"""Views: the right images (torchvision as reference), the right distributions, the same for any batch and device."""

import hashlib
import pickle
import shutil

import numpy as np
import pytest
import scipy.stats
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from ssl_geometry.data import views
from ssl_geometry.data.augmentations import OPS
from ssl_geometry.data.random_numbers import uniform
from ssl_geometry.data.views import View
from ssl_geometry.errors import UserError
from tests.fake_cuda import FakeCuda

AT = {"seed": 3, "epoch": 5, "view": 1}
EVERYTHING = [{"simclr": {"blur": True, "solarize": 0.5}}, "rotate", "translate", "pad_crop"]

few = settings(max_examples=40, deadline=None)
sides = st.integers(5, 40)
seeds = st.integers(0, 10**6)


def random_images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth gradients plus noise, with black, white, grey and equal channels among them."""
    rng = np.random.default_rng(seed)
    ramps = np.linspace(0, 255, height)[:, None] * rng.random((batch, 3, 1, 1)) + rng.normal(
        60, 60, (batch, 3, height, width)
    )
    images = torch.from_numpy(ramps.clip(0, 255).astype(np.uint8))
    images[0, :, : height // 2] = images[0, :1, : height // 2]
    return images


def draw(name: str, options: dict, batch: int, size: int, seed: int) -> tuple:
    """An operation with parameters of its own."""
    op = OPS[name](size, **options)
    index = torch.arange(batch)
    return op, op.sample(uniform(index, seed=seed, epoch=0, view=0, stream=name, n=op.n))


def agree(op, params, images, reference, tolerance: float = 1e-5) -> None:
    """The operation on the batch equals a torchvision function of (image, parameters of the image), image for image."""
    images = images / 255
    rows = [{name: values[i].tolist() for name, values in params.items()} for i in range(len(images))]
    expected = torch.stack([reference(image, row) for image, row in zip(images, rows, strict=True)])
    torch.testing.assert_close(op.apply(images, params), expected, rtol=0, atol=tolerance)


# --- each operation against torchvision ---------------------------------------------------------------------------


@few
@given(sides, sides, sides, seeds)
def test_crop_agrees_with_resized_crop(height, width, size, seed):
    op, params = draw("crop", {}, 8, size, seed)
    images = random_images(8, height, width, seed)
    top, left, h, w = op.box(params, height, width)
    boxed = {"top": top, "left": left, "height": h, "width": w}
    expected = [
        tv.resized_crop(image / 255, **{k: v[i].item() for k, v in boxed.items()}, size=[size, size], antialias=True)
        for i, image in enumerate(images)
    ]
    torch.testing.assert_close(op.apply(images / 255, params), torch.stack(expected), rtol=0, atol=1e-5)


def test_crop_agrees_at_imagenet_size():
    op, params = draw("crop", {"scale": (0.3, 1.0)}, 4, 224, 0)
    images = random_images(4, 375, 500)
    boxes = torch.stack(op.box(params, 375, 500), dim=1).tolist()
    expected = [
        tv.resized_crop(image / 255, *box, size=[224, 224], antialias=True)
        for image, box in zip(images, boxes, strict=True)
    ]
    torch.testing.assert_close(op.apply(images / 255, params), torch.stack(expected), rtol=0, atol=5e-5)


@few
@given(sides, sides, seeds)
def test_crop_boxes_lie_inside(height, width, seed):
    op, params = draw("crop", {"scale": (0.2, 0.9)}, 64, 32, seed)
    top, left, h, w = op.box(params, height, width)
    assert bool(((top >= 0) & (left >= 0) & (h > 0) & (w > 0) & (top + h <= height) & (left + w <= width)).all())


@pytest.mark.parametrize(("height", "width"), [(40, 8), (8, 40)])
def test_crop_that_never_fits_is_the_largest_centred_box(height, width):
    op, params = draw("crop", {"scale": (1.0, 1.0)}, 5, 32, 0)
    top, left, h, w = (value.unique().item() for value in op.box(params, height, width))
    assert (top, left, h, w) == ((14, 0, 11, 8) if height > width else (0, 14, 8, 11))


@few
@given(sides, st.integers(0, 6), seeds)
def test_pad_crop_agrees_with_pad_then_crop(size, padding, seed):
    op, params = draw("pad_crop", {"padding": padding}, 8, size, seed)
    agree(
        op,
        params,
        random_images(8, size, size, seed),
        lambda image, p: tv.crop(tv.pad(image, [padding] * 4), p["top"], p["left"], size, size),
        tolerance=0,
    )


@few
@given(sides, sides, seeds)
def test_flip_gray_and_solarize_agree(height, width, seed):
    images = random_images(8, height, width, seed)
    for name, reference in {
        "flip": tv.horizontal_flip,
        "gray": lambda image: tv.rgb_to_grayscale(image, 3),
        "solarize": lambda image: tv.solarize(image, 0.5),
    }.items():
        op, params = draw(name, {"p": 0.5}, 8, height, seed)
        agree(op, params, images, lambda x, p, name=name, to=reference: to(x) if p[name] else x, tolerance=2e-7)


@few
@given(sides, sides, st.floats(0, 2), st.floats(0, 0.5), seeds)
def test_color_agrees_in_the_order_of_each_image(height, width, strength, hue, seed):
    options = {"brightness": strength, "contrast": strength, "saturation": strength, "hue": hue}
    op, params = draw("color", options, 24, height, seed)

    def reference(image, p):
        steps = [
            lambda x: tv.adjust_brightness(x, p["brightness"]),
            lambda x: tv.adjust_contrast(x, p["contrast"]),
            lambda x: tv.adjust_saturation(x, p["saturation"]),
            lambda x: tv.adjust_hue(x, p["hue"]),
        ]
        for step in p["order"]:
            image = steps[step](image)
        return image

    agree(op, params, random_images(24, height, width, seed), reference, tolerance=3e-5)


def test_hue_of_all_corners_edges_and_greys_of_the_color_cube():
    levels = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)
    cube = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 5, 25).expand(21, -1, -1, -1)
    op, params = draw("color", {}, 21, 25, 0)
    one = torch.ones(21)
    params |= {"brightness": one, "contrast": one, "saturation": one, "hue": torch.linspace(-0.5, 0.5, 21)}
    agree(op, params, cube, lambda image, p: tv.adjust_hue(image, p["hue"]))


@few
@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 7), seeds)
def test_blur_agrees_with_gaussian_blur(height, width, radius, seed):
    kernel = 2 * radius + 1
    op, params = draw("blur", {"kernel": kernel}, 8, 32, seed)
    agree(
        op,
        params,
        random_images(8, height, width, seed),
        lambda image, p: tv.gaussian_blur(image, [kernel] * 2, [p["sigma"]] * 2) if p["sigma"] else image,
    )


@pytest.mark.parametrize(("size", "kernel"), [(8, 3), (32, 3), (64, 7), (96, 9), (224, 23)])
def test_blur_kernel_is_a_tenth_of_the_side(size, kernel):
    op, params = draw("blur", {"p": 1.0}, 2, size, 0)
    images = random_images(2, size, size)
    agree(op, params, images, lambda image, p: tv.gaussian_blur(image, [kernel] * 2, [p["sigma"]] * 2))


@few
@given(sides, sides, seeds)
def test_rotate_agrees(height, width, seed):
    op, params = draw("rotate", {"degrees": 180, "p": 0.8}, 8, height, seed)
    images = random_images(8, height, width, seed)
    agree(op, params, images, lambda image, p: tv.rotate(image, p["angle"], v2.InterpolationMode.BILINEAR), 5e-5)


@few
@given(sides, sides, seeds)
def test_translate_agrees_with_affine(height, width, seed):
    op, params = draw("translate", {"fraction": 0.5, "p": 0.8}, 8, height, seed)

    def reference(image, p):
        shift = [round(p["right"] * width), round(p["down"] * height)]
        return tv.affine(image, angle=0, translate=shift, scale=1, shear=[0, 0])

    agree(op, params, random_images(8, height, width, seed), reference, tolerance=0)


@few
@given(sides, sides, sides, st.floats(0.3, 1.0))
def test_clean_view_is_the_resized_centre(height, width, size, share):
    images = random_images(3, height, width)
    side = max(1, round(share * min(height, width)))
    expected = tv.resize(tv.center_crop(images / 255, [side, side]), [size, size], antialias=True)
    view = View(size=size, center_crop=share)
    torch.testing.assert_close(view(images, torch.arange(3), **AT), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(OPS))
def test_operation_that_skips_every_image_changes_nothing(name):
    options = {"padding": 0} if name == "pad_crop" else {"scale": (1.0, 1.0)} if name == "crop" else {"p": 0.0}
    images = random_images(6, 16, 16)
    options |= {"ratio": (1.0, 1.0)} if name == "crop" else {}
    out = View({name: options}, size=16)(images, torch.arange(6), **AT)
    torch.testing.assert_close(out, images / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "half", [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]])
def test_normalisation_comes_last_and_agrees(name):
    images, index = random_images(4, 12, 12), torch.arange(4)
    view = View("simclr", size=12, normalize=name)
    plain = View("simclr", size=12)(images, index, **AT)
    torch.testing.assert_close(view(images, index, **AT), tv.normalize(plain, view.mean, view.std), rtol=0, atol=1e-6)


# --- random numbers and distributions -----------------------------------------------------------------------------


def numbers(n: int = 1, count: int = 20_000, **at) -> np.ndarray:
    return uniform(torch.arange(count), **(AT | {"stream": "crop"} | at), n=n).double().numpy()


def test_hash_agrees_with_plain_integers():
    """The stated formula, in Python's unbounded integers."""
    key = int.from_bytes(hashlib.blake2b(b"3/5/1/crop", digest_size=8).digest(), "little")
    for index in (0, 1, 7, 2**40 + 3):
        for number in range(3):
            z = (index * 0x9E3779B97F4A7C15 + number * 0xC4CEB9FE1A85EC53 + key) % 2**64
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            z ^= z >> 31
            assert uniform(torch.tensor([index]), **AT, stream="crop", n=3)[0, number].item() == (z >> 40) / 2**24


def test_numbers_are_uniform():
    for column in numbers(n=4).T:
        assert scipy.stats.kstest(column, "uniform").pvalue > 1e-3
    bits = (numbers()[:, 0] * 2**24).astype(np.int64)
    assert bits.min() >= 0
    assert bits.max() < 2**24
    ones = [(bits >> bit & 1).sum() for bit in range(24)]
    assert min(scipy.stats.binomtest(int(one), 20_000).pvalue for one in ones) > 1e-4


def test_numbers_of_neighbours_views_epochs_seeds_and_operations_are_independent():
    base = numbers(n=2)
    others = {
        "next index": (base[:-1, 0], base[1:, 0]),
        "next number": (base[:, 0], base[:, 1]),
        "view": (base[:, 0], numbers(view=2)[:, 0]),
        "epoch": (base[:, 0], numbers(epoch=6)[:, 0]),
        "seed": (base[:, 0], numbers(seed=4)[:, 0]),
        "operation": (base[:, 0], numbers(stream="flip")[:, 0]),
        "second of its kind": (base[:, 0], numbers(stream="crop#1")[:, 0]),
    }
    for name, (a, b) in others.items():
        table = np.histogram2d(a, b, bins=8, range=[[0, 1]] * 2)[0]
        assert scipy.stats.chisquare(table.ravel()).pvalue > 1e-3, name
        assert scipy.stats.spearmanr(a, b).pvalue > 1e-3, name


def test_one_bit_of_the_index_changes_half_of_the_bits():
    index = torch.randint(2**40, (500,), generator=torch.Generator().manual_seed(0))
    before = (uniform(index, **AT, stream="crop", n=1) * 2**24).long()
    for bit in range(40):
        after = (uniform(index ^ 1 << bit, **AT, stream="crop", n=1) * 2**24).long()
        changed = sum((before ^ after) >> place & 1 for place in range(24)).double().mean().item() / 24
        assert abs(changed - 0.5) < 0.03, bit


def sampled(name: str, options: dict | None = None, count: int = 20_000) -> dict[str, np.ndarray]:
    _, params = draw(name, options or {}, count, 32, seed=1)
    return {name: values.numpy() for name, values in params.items()}


def test_crops_are_distributed_as_torchvision_draws_them():
    op, params = draw("crop", {}, 4000, 32, seed=0)
    ours = torch.stack(op.box(params, 32, 48), dim=1).double().numpy()
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(32)
    image = torch.zeros(3, 32, 48)
    drawn = [reference.make_params([image]) for _ in range(4000)]
    theirs = np.array([[d["top"], d["left"], d["height"], d["width"]] for d in drawn], dtype=float)
    for column in range(4):
        assert scipy.stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    area, shape = ours[:, 2] * ours[:, 3], ours[:, 3] / ours[:, 2]
    assert scipy.stats.ks_2samp(area, theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3
    assert scipy.stats.ks_2samp(shape, theirs[:, 3] / theirs[:, 2]).pvalue > 1e-3


def test_color_factors_are_uniform_where_they_act():
    drawn = sampled("color", {"brightness": 0.4, "contrast": 1.5, "saturation": 0.2, "hue": 0.1})
    acts = drawn["hue"] != 0
    assert scipy.stats.binomtest(int(acts.sum()), len(acts), 0.8).pvalue > 1e-3
    for name, low, high in [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.0, 2.5),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ]:
        assert scipy.stats.kstest(drawn[name][acts], "uniform", (low, high - low)).pvalue > 1e-3
        assert np.all(drawn[name][~acts] == (0 if name == "hue" else 1))
    orders = np.unique(drawn["order"], axis=0, return_counts=True)[1]
    assert len(orders) == 24
    assert scipy.stats.chisquare(orders).pvalue > 1e-3


def test_the_other_parameters_have_their_distributions():
    for name in ("flip", "gray", "solarize"):
        acts = sampled(name, {"p": 0.3})[name]
        assert scipy.stats.binomtest(int(acts.sum()), len(acts), 0.3).pvalue > 1e-3
    for corner in sampled("pad_crop", {"padding": 3}).values():
        assert scipy.stats.chisquare(np.bincount(corner, minlength=7)).pvalue > 1e-3
    for name, parameter, options, low, high in [
        ("blur", "sigma", {"sigma": (0.5, 1.5)}, 0.5, 1.5),
        ("rotate", "angle", {"degrees": 20}, -20, 20),
        ("translate", "down", {"fraction": 0.3}, -0.3, 0.3),
        ("translate", "right", {"fraction": 0.3}, -0.3, 0.3),
    ]:
        values = sampled(name, {"p": 0.6, **options})[parameter]
        acts = values != 0
        assert scipy.stats.binomtest(int(acts.sum()), len(acts), 0.6).pvalue > 1e-3
        assert scipy.stats.kstest(values[acts], "uniform", (low, high - low)).pvalue > 1e-3


# --- the same view whatever is around it -----------------------------------------------------------------------


@few
@given(st.integers(1, 90), sides, sides, seeds)
def test_a_view_does_not_depend_on_batch_and_order(batch, side, size, seed):
    images, view = random_images(batch, side, side + 3, seed), View(EVERYTHING, size=size)
    rng = np.random.default_rng(seed)
    index = torch.from_numpy(rng.permutation(10**6)[:batch])
    whole = view(images, index, **AT)
    order = torch.from_numpy(rng.permutation(batch))
    assert torch.equal(view(images[order], index[order], **AT), whole[order])
    assert torch.equal(view(images[-1:], index[-1:], **AT), whole[-1:])


@pytest.mark.parametrize(("batch", "size"), [(150, 32), (9, 224)])
def test_a_view_does_not_depend_on_the_chunks_of_a_cpu_nor_on_threads(batch, size, monkeypatch):
    images, index, view = random_images(batch, size + 8, size), torch.arange(batch), View(EVERYTHING, size=size)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        chunked = view(images, index, **AT)
        single = torch.cat([view(images[i : i + 1], index[i : i + 1], **AT) for i in range(0, batch, 8)])
        assert torch.equal(single, chunked[::8])
        torch.set_num_threads(1)
        monkeypatch.setattr(views, "CPU_CHUNK", 2**40)
        assert torch.equal(view(images, index, **AT), chunked)
    finally:
        torch.set_num_threads(threads)


def test_views_ignore_and_leave_alone_the_global_generator_and_the_images():
    images, index, view = random_images(4, 16, 16), torch.arange(4), View(EVERYTHING, size=16)
    before, kept = torch.get_rng_state(), images.clone()
    first = view(images, index, **AT)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, kept)
    torch.manual_seed(1234)
    assert torch.equal(view(images, index, **AT), first)


def test_views_are_float32_under_autocast_and_low_matmul_precision():
    images, index, view = random_images(4, 24, 24), torch.arange(4), View(EVERYTHING, size=16)
    expected = view(images, index, **AT)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert torch.equal(view(images, index, **AT), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.gpu
def test_a_view_does_not_depend_on_the_device():
    images, index, view = random_images(64, 40, 40), torch.arange(64), View(EVERYTHING, size=32)
    on_gpu = view(images.cuda(), index.cuda(), **AT)
    torch.testing.assert_close(on_gpu.cpu(), view(images, index, **AT), rtol=0, atol=2e-5)


@pytest.mark.gpu
def test_views_never_wait_for_the_device():
    images, index = random_images(64, 40, 40).cuda(), torch.arange(64).cuda()
    views = [View(EVERYTHING, size=32, normalize="half"), View(size=32, center_crop=0.9)]
    for view in views:
        view(images, index, **AT)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for view in views:
            view(images, index, **AT)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- the view as an object ----------------------------------------------------------------------------------------


def test_single_operations_draw_what_they_draw_in_the_policy():
    view, index = View([*EVERYTHING, "rotate"], size=16), torch.arange(50)
    whole = view.params(index, **AT)
    assert {"rotate", "rotate#1"} <= whole.keys()
    assert not torch.equal(whole["rotate"]["angle"], whole["rotate#1"]["angle"])
    assert {stream.split("#")[0] for stream in whole} == set(OPS)
    for op in view.ops.values():
        (part,) = View([{op.name: op.options}], size=16).params(index, **AT).values()
        assert all(torch.equal(part[name], whole[op.name][name]) for name in part)
    alone = View("flip", size=8).params(index, **AT)
    assert torch.equal(alone["flip"]["flip"], whole["flip"]["flip"])


def test_replay_of_parameters_gives_the_view_and_another_epoch_another():
    images, index, view = random_images(8, 20, 20), torch.arange(8), View(EVERYTHING, size=16)
    first = view(images, index, **AT)
    assert torch.equal(view.replay(images, view.params(index, **AT)), first)
    for change in ({"seed": 4}, {"epoch": 6}, {"view": 0}):
        assert not torch.allclose(view(images, index, **(AT | change)), first)


def test_several_views_at_once_are_the_views_one_by_one():
    images, index, view = random_images(9, 20, 20), torch.arange(9) * 5, View([*EVERYTHING, "rotate"], size=16)
    at = {"seed": 3, "epoch": 5}
    alone = torch.cat([view(images, index, **at, view=number) for number in (1, 0, 7)])
    assert torch.equal(view(images, index, **at, view=(1, 0, 7)), alone)
    params = view.params(index, **at, view=7)
    for (stream, op), got in zip(view.ops.items(), params.values(), strict=True):
        drawn = op.sample(uniform(index, **at, view=7, stream=stream, n=op.n))
        assert all(torch.equal(got[name], drawn[name]) for name in drawn)
    assert View(size=16).params(index, **at, view=0) == {}


def test_two_views_take_hardly_more_launches_than_one():
    with FakeCuda() as gpu:
        images, index, view = random_images(8, 32, 32).to("cuda"), torch.arange(8).to("cuda"), View("simclr", size=32)
        for number in (0, (0, 1)):
            with gpu.scope(str(number)):
                view(images, index, seed=3, epoch=5, view=number)
    assert not gpu.faults, gpu.report()
    assert {note.scope for note in gpu.waits}.isdisjoint({"0", "(0, 1)"}), gpu.report()
    assert gpu.launches["0"] <= gpu.launches["(0, 1)"] < 300
    assert gpu.launches["(0, 1)"] - gpu.launches["0"] < 10


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_views_differ_by_rounding_alone_and_are_two_graphs_around_the_blur():
    images, index = random_images(16, 20, 20), torch.arange(16)
    images[1] = 0
    view = View({"simclr": {"blur": True, "solarize": 0.5}}, size=16, normalize="imagenet")
    compiled = view.compiled()
    torch.compiler.reset()
    counters.clear()
    for epoch in range(3):
        for numbers in ((0, 1), (2, 3)):
            at = {"seed": 3, "epoch": epoch, "view": numbers}
            difference = (compiled(images, index, **at) - view(images, index, **at)).abs().max()
            assert 0 < difference < 5e-5, "of values up to 2.6, in units of the standard deviation"
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert compiled.spec == view.spec


def test_spec_is_plain_and_makes_the_same_view():
    view = View([*EVERYTHING, "rotate"], size=16, normalize="imagenet", center_crop=0.875)
    again = View(**yaml.safe_load(yaml.safe_dump(view.spec)))
    images, index = random_images(4, 20, 20), torch.arange(4)
    assert again.spec == view.spec
    assert torch.equal(again(images, index, **AT), view(images, index, **AT))
    assert torch.equal(pickle.loads(pickle.dumps(view))(images, index, **AT), view(images, index, **AT))
    assert View("simclr", size=16).spec != View({"simclr": {"gray": 0.1}}, size=16).spec


@pytest.mark.parametrize(
    ("augment", "names"),
    [
        ("none", []),
        ([], []),
        ("supervised", ["pad_crop", "flip"]),
        (["crop", "flip"], ["crop", "flip"]),
        ({"crop": None}, ["crop"]),
        ("simclr", ["crop", "flip", "color", "gray"]),
        ({"simclr": {"blur": True, "solarize": 0.2}}, ["crop", "flip", "color", "gray", "blur", "solarize"]),
        (["supervised", ["gray", [{"rotate": {"degrees": 5}}]]], ["pad_crop", "flip", "gray", "rotate"]),
    ],
)
def test_grammar(augment, names):
    assert list(View(augment, size=32).ops) == names


def test_simclr_strength_scales_the_jitter():
    options = View({"simclr": {"strength": 1.0}}, size=32).ops["color"].options
    assert options == {"p": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"augment": "simclrr"}, "no operation or policy is called 'simclrr'; did you mean 'simclr'"),
        ({"augment": ["flip", "colour"]}, "'colour'; did you mean 'color'"),
        ({"augment": {"crop": {"scal": [0, 1]}}}, "crop has no option 'scal'; did you mean 'scale'"),
        ({"augment": {"crop": {"size": 8}}}, "crop has no option 'size'"),
        ({"augment": {"simclr": {"blurr": True}}}, "simclr has no option 'blurr'; did you mean 'blur'"),
        ({"augment": {"simclr": {"strength": "high"}}}, "simclr cannot work with {'strength': 'high'}"),
        ({"augment": {"simclr": {"strength": -1}}}, "color.brightness is -0.8, expected a number in [0, inf]"),
        ({"augment": {"crop": 0.5}}, "crop has 0.5, expected {option: value}"),
        ({"augment": {"crop": {"scale": 0.5}}}, "crop.scale is 0.5, expected [low, high] in (0, 1]"),
        ({"augment": {"crop": {"scale": [0.5, 0.2]}}}, "crop.scale is [0.5, 0.2]"),
        ({"augment": {"crop": {"ratio": [0, 1]}}}, "crop.ratio is [0, 1]"),
        ({"augment": {"flip": {"p": 1.5}}}, "flip.p is 1.5, expected a number in [0, 1]"),
        ({"augment": {"color": {"hue": 0.6}}}, "color.hue is 0.6, expected a number in [0, 0.5]"),
        ({"augment": {"blur": {"kernel": 4}}}, "blur.kernel is 4, expected an odd number"),
        ({"augment": {"blur": {"sigma": [0, 1]}}}, "blur.sigma is [0, 1]"),
        ({"augment": {"pad_crop": {"padding": 1.5}}}, "pad_crop.padding is 1.5"),
        ({"augment": {"rotate": {"degrees": "90"}}}, "rotate.degrees is '90'"),
        ({"augment": {"translate": {"fraction": 2}}}, "translate.fraction is 2"),
        ({"augment": {"solarize": {"threshold": 128}}}, "solarize.threshold is 128, expected a number in [0, 1]"),
        ({"augment": 3}, "3 is neither a name"),
        ({"size": 0}, "size is 0, expected a number of pixels"),
        ({"normalize": "imagenett"}, "normalize is 'imagenett'; did you mean 'imagenet'"),
        ({"normalize": [0.5, 0.5]}, "normalize is [0.5, 0.5], expected a name or"),
        ({"normalize": [[0.5] * 3, [0, 1, 1]]}, "std > 0"),
        ({"center_crop": 1.2}, "center_crop is 1.2, expected a share of the side"),
    ],
)
def test_mistakes_are_reported_in_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        View(**({"size": 16} | arguments))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_images_are_reported():
    view = View("supervised", size=8)
    with pytest.raises(UserError, match="images are float32, expected uint8"):
        view(torch.zeros(1, 3, 8, 8), torch.arange(1), **AT)
