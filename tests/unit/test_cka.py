"""CKA against the textbook formula in float64, closed forms, and the traps that other implementations fall into."""

import json
import re
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl_geometry.geometry.cka import Estimator, cka, cka_matrix, feature_cka, hsic
from ssl_geometry.geometry.gram import Kernel, class_vector, class_weights, gram_vector, pool, project, u_center
from ssl_geometry.geometry.gram import same_class_pairs as pairs_of_a_class
from ssl_geometry.geometry.jackknife import interval, jackknife
from ssl_geometry.metrics import ClassCKA, InvarianceCKA, LayerwiseCKA
from tests.fake_cuda import FakeCuda


def hsic1(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Song et al. 2012, eq. 5, written out in float64."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    one = np.ones(n)
    total = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return float(((k * l).sum() + total - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3)))


def reference(x: np.ndarray, y: np.ndarray, size: int) -> float:
    """Minibatch CKA: ratio of the averages of the unbiased HSIC over groups of ``size``, weighted by n(n-3)."""
    sums = np.zeros(3)
    for start in range(0, len(x), size):
        a, b = x[start : start + size].astype(np.float64), y[start : start + size].astype(np.float64)
        n = len(a)
        if n >= 4:
            k, l = a @ a.T, b @ b.T  # noqa: E741
            sums += n * (n - 3) * np.array([hsic1(k, l), hsic1(k, k), hsic1(l, l)])
    return sums[0] / np.sqrt(sums[1] * sums[2])


def minibatch(x: torch.Tensor, y: torch.Tensor, size: int = 64) -> float:
    v, w = gram_vector(x, size).double(), gram_vector(y, size).double()
    return float(cka_matrix((v @ w).view(1, 1), (v @ v).view(1), (w @ w).view(1)))


@pytest.mark.parametrize(
    ("kernel", "estimator", "golden"),
    [("linear", "biased", 0.55761), ("linear", "unbiased", 0.51346), ("rbf", "biased", 0.65483)],
)
def test_golden_values(kernel: Kernel, estimator: Estimator, golden: float) -> None:
    np.random.seed(1337)  # noqa: NPY002  the published values were made with this generator
    x = torch.from_numpy(np.random.randn(100, 10))  # noqa: NPY002
    y = torch.from_numpy(np.random.randn(100, 10)) + x  # noqa: NPY002
    assert float(cka(x, y, kernel=kernel, estimator=estimator)) == pytest.approx(golden, abs=5e-6)
    if estimator == "unbiased":
        assert minibatch(x, y, size=100) == pytest.approx(golden, abs=5e-6)
        assert float(feature_cka(x, y)) == pytest.approx(golden, abs=5e-6)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(4, 150),
    d=st.integers(1, 40),
    e=st.integers(1, 40),
    size=st.integers(4, 80),
    seed=st.integers(0, 10**6),
)
def test_agrees_with_the_textbook_formula(n: int, d: int, e: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) + 3
    y = np.tanh(x @ rng.standard_normal((d, e))) + 0.3 * rng.standard_normal((n, e))
    expected = reference(x, y, size)
    got = minibatch(torch.from_numpy(x), torch.from_numpy(y), size)
    # Small groups can have a self-HSIC near 0 or below; there both are undefined or ill-conditioned.
    if np.isfinite(expected) and abs(expected) < 2:
        assert got == pytest.approx(expected, abs=1e-8)
    in_float32 = minibatch(torch.from_numpy(x).float(), torch.from_numpy(y).float(), size)
    if np.isfinite(expected) and abs(expected) < 2 and size >= 16 and n >= 32 and min(d, e) >= 4:
        assert in_float32 == pytest.approx(expected, abs=1e-4)


def test_u_centred_rows_sum_to_zero_and_the_inner_product_is_hsic1() -> None:
    x, y = torch.randn(2, 37, 5, dtype=torch.float64)
    k, l = u_center(x @ x.T), u_center(y @ y.T)  # noqa: E741
    assert k.sum(0).abs().max() < 1e-12
    assert k.diagonal().abs().max() == 0
    expected = 37 * 34 * hsic1((x @ x.T).numpy(), (y @ y.T).numpy())
    assert float((k * l).sum()) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("offset", [0, 10, 100, 1000])
def test_a_large_mean_in_float32_costs_nothing(offset: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((128, 8)) @ rng.standard_normal((8, 500)) + offset
    y = rng.standard_normal((128, 500)) * 0.1 + x
    # The reference sees the same float32 numbers, so this measures the algorithm and not the rounding of its input.
    x, y = x.astype(np.float32), y.astype(np.float32)
    centred = reference(x - x.astype(np.float64).mean(0), y - y.astype(np.float64).mean(0), 64)
    assert minibatch(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(centred, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-4, 1e4), seed=st.integers(0, 10**6))
def test_invariant_to_scale_rotation_and_the_order_of_features(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 96, 24, generator=generator)
    y = y + x
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    expected = minibatch(x, y)
    assert minibatch(x * scale, y) == pytest.approx(expected, abs=1e-5)
    assert minibatch(x @ rotation, y) == pytest.approx(expected, abs=1e-5)
    assert minibatch(x[:, torch.randperm(24, generator=generator)], y) == pytest.approx(expected, abs=1e-5)


def test_independent_gaussians_are_near_zero_where_the_biased_estimate_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [minibatch(*torch.randn(2, 256, 4096, generator=generator)) for _ in range(8)]
    assert abs(np.mean(values)) < 0.02
    assert min(values) < 0, "an unbiased estimate of 0 is sometimes below it: nothing may be clamped"


@pytest.mark.parametrize("level", [0.0, 1.0, 0.1, -3e4])
def test_a_constant_layer_is_nan_and_named(level: float) -> None:
    metric = LayerwiseCKA(["varies", "collapsed"])
    metric.update({"varies": gram_vector(torch.randn(64, 7)), "collapsed": gram_vector(torch.full((64, 333), level))})
    with pytest.warns(UserWarning, match="collapsed"):
        matrix = metric.compute()
    assert matrix[0, 0] == pytest.approx(1)
    assert torch.isnan(matrix[1]).all()
    assert torch.isnan(matrix[:, 1]).all()


def one_active(size: int, width: int, groups: int = 4) -> torch.Tensor:
    """Zero but for one image of each group: what a dead ReLU leaves."""
    x = torch.zeros(groups, size, width)
    x[torch.arange(groups), torch.randint(size, (groups,))] = torch.randn(groups, width)
    return x.flatten(0, 1)


@pytest.mark.parametrize("width", [1, 16, 512, 32768])
@pytest.mark.parametrize("size", [4, 7, 64])
def test_a_layer_with_one_active_image_is_nan_and_not_what_rounding_leaves(size: int, width: int) -> None:
    torch.manual_seed(0)
    x, y = one_active(size, width), one_active(size, width)
    k = x[:size].double() @ x[:size].double().T
    assert hsic1(k.numpy(), k.numpy()) == pytest.approx(0, abs=1e-12 * float(k.max()) ** 2), "it is 0 exactly"
    metric = LayerwiseCKA(["x", "y", "fine"], gram_size=size)
    metric.update(
        {"x": gram_vector(x, size), "y": gram_vector(y, size), "fine": gram_vector(torch.randn(len(x), 3), size)}
    )
    with pytest.warns(UserWarning, match="one image of each.*: x, y$"):
        matrix = metric.compute()
    assert matrix.isnan().tolist() == [[True] * 3, [True] * 3, [True, True, False]]
    for one, other in ((x, x), (x, y), (x.double(), y.double())):
        assert cka(one[:size], other[:size]).isnan()
        if width <= 512:  # D x D
            assert feature_cka(one[:size], other[:size]).isnan()


@pytest.mark.parametrize("size", [5, 48, 64, 100])
def test_a_gram_matrix_without_two_images_of_a_class_has_no_class_cka(size: int) -> None:
    assert not class_vector(torch.arange(size), size, size).any()
    assert class_vector(torch.arange(size) % (size - 1), size, size).any()


def test_a_second_active_image_and_one_far_away_are_no_dust() -> None:
    x = one_active(64, 512, groups=1)
    x[int((x == 0).all(1).nonzero()[0])] = torch.randn(512)
    assert float(cka(x, x)) == pytest.approx(1)
    assert gram_vector(x).any()
    far = torch.randn(64, 512)
    far[3] *= 1e4
    exact, got = gram_vector(far.double()), gram_vector(far).double()
    assert float(exact @ got / (exact.norm() * got.norm())) == pytest.approx(1, abs=1e-2)


def test_what_float32_cannot_square_is_named_with_its_reason() -> None:
    x = torch.randn(64, 9)
    vectors = {"fine": x, "large": 1e20 * x, "small": 1e-25 * x, "infinite": x / 0}
    metric = LayerwiseCKA(list(vectors))
    metric.update({name: gram_vector(value) for name, value in vectors.items()})
    with pytest.warns(UserWarning, match="less than 1e-19.*: small$"), pytest.warns(match="1e19.*: large, infinite$"):
        assert metric.compute().isfinite().sum() == 1
    assert float(cka(1e-25 * x.double(), x.double())) == pytest.approx(1), "float64 can"


def test_nearly_collapsed_features_still_give_a_number() -> None:
    x = torch.randn(64, 50, dtype=torch.float64)
    nearly = 1 + 1e-4 * x.float()
    assert minibatch(nearly.double(), x) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("rest", [1, 2, 3])
def test_a_last_group_of_fewer_than_four_is_left_out(rest: int) -> None:
    x, y = torch.randn(2, 64 + rest, 9)
    assert minibatch(x, y) == minibatch(x[:64], y[:64])


def test_a_batch_of_fewer_than_four_adds_nothing() -> None:
    metric = LayerwiseCKA(["a"])
    metric.update({"a": gram_vector(torch.randn(64, 3))})
    before = metric.cross.clone()
    metric.update({"a": gram_vector(torch.randn(3, 3))})
    assert torch.equal(metric.cross, before)


def test_how_images_fall_into_batches_does_not_matter_as_long_as_groups_stay() -> None:
    x = {"a": torch.randn(192, 5), "b": torch.randn(192, 8)}
    whole, parts = LayerwiseCKA(["a", "b"]), LayerwiseCKA(["a", "b"])
    whole.update({name: gram_vector(value) for name, value in x.items()})
    for start in (0, 64):
        stop = 64 if start == 0 else 192
        parts.update({name: gram_vector(value[start:stop]) for name, value in x.items()})
    torch.testing.assert_close(whole.compute(), parts.compute(), rtol=0, atol=1e-12)


def test_rows_and_columns_may_be_different_networks() -> None:
    rows = {f"a{i}": torch.randn(128, 6) for i in range(3)}
    cols = {f"b{i}": rows["a1"] + 0.5 * torch.randn(128, 6) for i in range(4)}
    metric = LayerwiseCKA(list(rows), list(cols))
    metric.update(
        {name: gram_vector(value) for name, value in rows.items()},
        {name: gram_vector(value) for name, value in cols.items()},
    )
    expected = [[reference(a.numpy(), b.numpy(), 64) for b in cols.values()] for a in rows.values()]
    np.testing.assert_allclose(metric.compute().numpy(), expected, atol=1e-6)


def test_autocast_does_not_reach_the_gram_matrix() -> None:
    x = torch.randn(64, 100) + 10
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gram_vector(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, gram_vector(x))


def test_an_untrained_network_gives_finite_values_that_match_float64() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    x, outputs = torch.rand(128, 64), []
    for layer in layers:
        x = layer(x).detach()
        outputs.append(x)
    metric = LayerwiseCKA([str(i) for i in range(len(outputs))])
    metric.update({str(i): gram_vector(value) for i, value in enumerate(outputs)})
    # The textbook formula needs the mean taken off first, even in float64: these features hardly vary beside their
    # mean.
    centred = [(value.double() - value.double().mean(0)).numpy() for value in outputs]
    expected = [[reference(a, b, 64) for b in centred] for a in centred]
    np.testing.assert_allclose(metric.compute().numpy(), expected, atol=2e-5)


def test_gram_matrices_of_fewer_than_four_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        gram_vector(torch.randn(8, 2), gram_size=3)
    with pytest.raises(ValueError, match="at least 4"):
        u_center(torch.eye(3))


# -- full batch, kernels ---------------------------------------------------------------------------------------------


def numpy_cka(x: np.ndarray, y: np.ndarray, kernel: str, bandwidth: float, drop_top: int, estimator: str) -> float:
    """CKA from features, step by step: principal components by SVD, distances by differences, the formulas of HSIC."""

    def gram(z: np.ndarray) -> np.ndarray:
        u, s, vt = np.linalg.svd(z - z.mean(0), full_matrices=False)
        z = (u[:, drop_top:] * s[drop_top:]) @ vt[drop_top:]
        if kernel == "linear":
            return z @ z.T
        d = np.linalg.norm(z[:, None] - z[None], axis=2)
        return np.exp(-(d**2) / (2 * bandwidth**2 * np.median(d**2)))

    def h(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
        if estimator == "unbiased":
            return hsic1(k, l)
        centre = np.eye(len(k)) - 1 / len(k)
        return float(np.trace(k @ centre @ l @ centre)) / (len(k) - 1) ** 2

    k, l = gram(x), gram(y)  # noqa: E741
    return h(k, l) / np.sqrt(h(k, k) * h(l, l))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(8, 60),
    d=st.integers(4, 30),
    e=st.integers(4, 30),
    kernel=st.sampled_from(["linear", "rbf"]),
    estimator=st.sampled_from(["unbiased", "biased"]),
    bandwidth=st.floats(0.3, 3),
    drop_top=st.integers(0, 2),
    seed=st.integers(0, 10**6),
)
def test_full_batch_cka_agrees_with_numpy(
    n: int, d: int, e: int, kernel: Kernel, estimator: Estimator, bandwidth: float, drop_top: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) + 3
    y = np.tanh(x @ rng.standard_normal((d, e))) + 0.3 * rng.standard_normal((n, e))
    expected = numpy_cka(x, y, kernel, bandwidth, drop_top, estimator)
    options: dict[str, Any] = {"kernel": kernel, "bandwidth": bandwidth, "drop_top": drop_top}
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    assert float(cka(*tensors, estimator=estimator, **options)) == pytest.approx(expected, abs=1e-7)
    if estimator == "unbiased":  # the vectors of one Gram matrix over all images hold the same number
        v, w = (gram_vector(part, n, **options) for part in tensors)
        assert float(v @ w / (v.norm() * w.norm())) == pytest.approx(expected, abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(8, 200), d=st.integers(2, 20), e=st.integers(2, 20), seed=st.integers(0, 10**6))
def test_feature_space_form_equals_the_gram_form(n: int, d: int, e: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) + 5
    y = torch.randn(n, e, generator=generator, dtype=torch.float64) + x[:, :1]
    torch.testing.assert_close(feature_cka(x, y), cka(x, y), rtol=1e-9, atol=1e-9)


def test_biased_hsic_of_a_kernel_with_itself_in_closed_form() -> None:
    n = 30  # the identity: HKH = H, and |H|_F² = n - 1
    assert float(hsic(torch.eye(n), torch.eye(n), "biased")) == pytest.approx(1 / (n - 1))


def test_the_biased_estimate_of_independent_gaussians_is_what_the_dimensions_say() -> None:
    x, y = torch.randn(2, 128, 2048, generator=torch.Generator().manual_seed(0))
    assert float(cka(x, y, estimator="biased")) == pytest.approx(2048 / (128 + 2048), abs=0.01)
    assert abs(float(cka(x, y))) < 0.05


@pytest.mark.parametrize("far", [0.1, 0.3, 0.5])
def test_a_far_subset_drives_linear_cka_to_its_closed_form(far: float) -> None:
    # Davari et al. 2022: translate a share of the images to infinity, and CKA with the untouched features tends to
    # rho / (1 - rho) * |mean of the subset|² / E|x|² * sqrt(participation ratio), whatever the features were.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator, dtype=torch.float64) * torch.arange(1, 9)
    x = x - x.mean(0)
    subset = torch.zeros(200, dtype=torch.bool)
    subset[: int(200 * far)] = True
    moved = x + 1e9 * subset[:, None] * torch.randn(8, generator=generator, dtype=torch.float64)
    spectrum = torch.linalg.eigvalsh(x.T @ x)
    participation = spectrum.sum() ** 2 / spectrum.square().sum()
    limit = far / (1 - far) * x[subset].mean(0).square().sum() / x.square().sum(1).mean() * participation.sqrt()
    assert float(cka(x, moved, estimator="biased")) == pytest.approx(float(limit), rel=1e-6)


def test_leaving_out_the_top_component_undoes_a_far_subset() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator)
    moved = x + 100 * (torch.arange(256) % 64 < 8)[:, None] * torch.eye(16)[0]
    v, w = gram_vector(x), gram_vector(moved, drop_top=1)
    assert minibatch(x, moved) < 0.4
    assert float(v @ w / (v.norm() * w.norm())) > 0.8


@pytest.mark.parametrize("options", [{"kernel": "rbf"}, {"drop_top": 1}, {"features": "project"}])
@pytest.mark.parametrize("level", [0.0, 0.1, -3e4])
def test_every_option_gives_zeros_for_a_constant_layer(options: dict[str, Any], level: float) -> None:
    assert not gram_vector(torch.full((70, 3000), level), **options).any()
    assert torch.isnan(cka(torch.full((70, 30), level), torch.randn(70, 3), drop_top=options.get("drop_top", 0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("drop_top", [3, 5, 100])
def test_nothing_is_left_without_all_components(drop_top: int, dtype: torch.dtype) -> None:
    x = torch.randn(70, 3, dtype=dtype) @ torch.randn(3, 200, dtype=dtype)
    assert gram_vector(x, drop_top=2).any()
    assert not gram_vector(x, drop_top=drop_top).any()


def test_an_rbf_kernel_without_a_bandwidth_is_nan() -> None:
    x = torch.cat([torch.zeros(60, 3), torch.randn(4, 3)])  # most pairs coincide: the median distance is 0
    assert gram_vector(x, kernel="rbf").isnan().all()


def test_a_wide_rbf_kernel_tends_to_the_linear_one() -> None:
    x, y = torch.randn(2, 128, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = y + x
    assert float(cka(x, y, kernel="rbf", bandwidth=100)) == pytest.approx(float(cka(x, y)), abs=1e-3)
    assert float(cka(x, y, kernel="rbf")) != pytest.approx(float(cka(x, y)), abs=1e-2)


def test_wrong_options_are_reported() -> None:
    x = torch.randn(8, 4)
    for call, message in (
        (lambda: gram_vector(x, features="mean"), "features must be .* got 'mean'"),  # type: ignore[arg-type]
        (lambda: gram_vector(x, kernel="cosine"), "kernel must be .* got 'cosine'"),  # type: ignore[arg-type]
        (lambda: gram_vector(x, drop_top=-1), "drop_top must be at least 0, got -1"),
        (lambda: cka(x, x, estimator="debiased"), "estimator must be .* got 'debiased'"),  # type: ignore[arg-type]
        (lambda: feature_cka(x[:3], x[:3]), "at least 4"),
        (lambda: cka(x[:1], x[:1], estimator="biased"), "at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# -- features --------------------------------------------------------------------------------------------------------


def test_pooling_averages_positions_of_maps_and_of_tokens() -> None:
    maps, tokens = torch.randn(64, 5, 7, 3), torch.randn(64, 9, 6)
    torch.testing.assert_close(pool(maps), torch.einsum("bchw->bc", maps) / 21)
    torch.testing.assert_close(pool(tokens), torch.einsum("btd->bd", tokens) / 9)
    assert torch.equal(gram_vector(maps, features="pool"), gram_vector(pool(maps)))
    last = maps.to(memory_format=torch.channels_last)
    torch.testing.assert_close(gram_vector(last, features="pool"), gram_vector(pool(maps)))


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 3000), dims=st.integers(1, 300))
def test_a_projection_adds_each_coordinate_to_one_sum_with_a_sign(width: int, dims: int) -> None:
    matrix = project(torch.eye(width), dims)
    if width <= dims:
        assert torch.equal(matrix, torch.eye(width))
    else:
        assert matrix.shape == (width, dims)
        assert (matrix.abs().sum(1) == 1).all()
        assert matrix.abs().sum(0).max() <= -(-width // dims)


@pytest.mark.slow
def test_a_projection_is_the_same_in_every_process() -> None:
    first = project(torch.arange(5000.0)[None], 4)
    code = "import torch; from ssl_geometry.geometry.gram import project; torch.manual_seed(7); "
    code += "print(project(torch.arange(5000.0)[None], 4).tolist())"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert first.tolist() == json.loads(other)


def test_projected_cka_is_near_the_flattened_one_whatever_the_memory_format() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 12, generator=generator)
    x, y = (hidden[:, part] @ torch.randn(8, 20 * 32 * 32, generator=generator) for part in (slice(8), slice(4, 12)))
    x, y = x.view(256, 20, 32, 32), y.view(256, 20, 32, 32)
    v, w = (gram_vector(part, features="project") for part in (x, y))
    projected = float(v @ w / (v.norm() * w.norm()))
    assert projected == pytest.approx(minibatch(x, y), abs=0.02)
    assert torch.equal(v, gram_vector(x.to(memory_format=torch.channels_last), features="project"))


# -- classes and views -----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(classes=st.integers(2, 8), each=st.integers(2, 12), d=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_class_cka_of_balanced_classes_in_closed_form(classes: int, each: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(each)
    x = torch.randn(classes * each, d, generator=generator, dtype=torch.float64) + labels[:, None]
    x = x - x.mean(0)
    means = torch.stack([x[labels == c].mean(0) for c in range(classes)])
    norm = torch.linalg.matrix_norm(x.T @ x)
    expected = each * means.square().sum() / ((classes - 1) ** 0.5 * norm)
    got = cka(x, torch.eye(classes, dtype=torch.float64)[labels], estimator="biased")
    assert float(got) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_class_cka_is_one_exactly_where_class_means_collapse_to_a_simplex(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (256,), generator=generator)
    corners = 3 * torch.linalg.qr(torch.randn(32, classes, generator=generator))[0].T + 7
    metric = ClassCKA(["simplex", "line"], classes)
    metric.update({"simplex": gram_vector(corners[labels]), "line": gram_vector(labels[:, None].float())}, labels)
    simplex, line = metric.compute().tolist()
    assert simplex == pytest.approx(1, abs=1e-6)
    assert line == pytest.approx(1, abs=1e-6) if classes == 2 else line < 0.9


def test_class_cka_is_layerwise_cka_with_the_one_hot_classes() -> None:
    x, labels = {"a": torch.randn(200, 6), "b": torch.randn(200, 9)}, torch.randint(4, (200,))
    x["b"][:, 0] += labels
    vectors = {name: gram_vector(value, 32) for name, value in x.items()}
    metric = ClassCKA(["a", "b"], num_classes=4, gram_size=32)
    metric.update(vectors, labels)
    expected = [reference(value.numpy(), np.eye(4)[labels], 32) for value in x.values()]
    np.testing.assert_allclose(metric.compute().numpy(), expected, atol=1e-6)
    assert torch.equal(class_vector(labels, 4, 32), gram_vector(torch.eye(4)[labels], 32))


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(2, 6), min_size=2, max_size=5), seed=st.integers(0, 10**6))
def test_weights_give_images_drawn_class_by_class_the_pairs_of_a_random_sample(sizes: list[int], seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    weights = class_weights(labels[order], torch.tensor(sizes), len(labels)).square()
    same = (labels[order][:, None] == labels[order])[tuple(torch.triu_indices(len(labels), len(labels), 1))]
    n = len(labels)
    share = float(weights[same].sum()) / (n * (n - 1) / 2)
    # Of two images drawn at random from all that there are, n_c/N of each class, so many are of one class.
    assert share * (n - 1) / n == pytest.approx(sum((size / n) ** 2 for size in sizes))
    assert (weights[~same] == 1).all()
    assert int(pairs_of_a_class(labels[order], len(sizes), n).sum()) == int(same.sum())


def test_weights_follow_the_groups_of_the_gram_vector() -> None:
    labels = torch.randint(3, (150,))
    weights = class_weights(labels, torch.tensor([2, 3, 40]))
    one_by_one = [class_weights(part, torch.tensor([2, 3, 40])) for part in labels.split(64)]
    assert torch.equal(weights, torch.cat(one_by_one))
    assert weights.shape == class_vector(labels, 3).shape
    multi = torch.eye(3, dtype=torch.long)[labels]
    assert pairs_of_a_class(multi, 3).tolist() == pairs_of_a_class(labels, 3).tolist()


def test_labels_of_several_classes_an_image_are_taken_as_they_are() -> None:
    labels = torch.arange(64) % 3
    one, several = (ClassCKA(["a"], num_classes=3) for _ in range(2))
    for metric, shown in ((one, labels), (several, torch.eye(3, dtype=torch.long)[labels])):
        metric.update({"a": gram_vector(torch.eye(3)[labels].cumsum(1))}, shown)
    torch.testing.assert_close(several.compute(), one.compute())


@pytest.mark.parametrize("order", [0, 1])
def test_classes_collapsed_to_a_simplex_have_class_cka_one_whatever_their_sizes(order: int) -> None:
    sizes = torch.tensor([2, 3, 90, 33])
    labels = torch.repeat_interleave(torch.arange(4), sizes)
    labels = labels[torch.randperm(128, generator=torch.Generator().manual_seed(order))]
    metric = ClassCKA(["a"], num_classes=4, gram_size=32, sizes=sizes)
    for part in labels.split(64):
        metric.update({"a": gram_vector(3 * torch.eye(4)[part] + 7, 32)}, part)
    assert float(metric.compute()) == pytest.approx(1, abs=1e-6)


def test_class_cka_names_how_few_pairs_it_rests_on() -> None:
    metric = ClassCKA(["a"], num_classes=40, gram_size=32, sizes=torch.full((40,), 2))
    for part in torch.arange(80).div(2, rounding_mode="floor").flip(0).split(40):
        metric.update({"a": gram_vector(torch.randn(40, 3), 32)}, part)
    with pytest.warns(UserWarning, match=r"rests on 40 pairs .*; more images, or more .* \(gram_size 32\), would give"):
        assert metric.compute().isfinite().all()


def test_class_cka_of_classes_of_one_image_is_nan_with_its_reason() -> None:
    sizes = torch.tensor([2] + 30 * [1])
    metric = ClassCKA(["a"], num_classes=31, gram_size=32, sizes=sizes)
    for _ in range(2):
        metric.update({"a": gram_vector(torch.randn(32, 3), 32)}, torch.repeat_interleave(torch.arange(31), sizes))
    with pytest.warns(UserWarning, match="30 of 31 classes have a single image$"):
        assert metric.compute().isnan().all()
    assert torch.stack(metric.interval()).isnan().all()


def test_groups_of_one_class_alone_are_nan_and_named() -> None:
    metric = ClassCKA(["a"], num_classes=3)
    metric.update({"a": gram_vector(torch.randn(64, 3))}, torch.ones(64, dtype=torch.long))
    with pytest.warns(UserWarning, match="NaN, because .* all 64 images are of class 1; more images would give more"):
        assert metric.compute().isnan().all()


def test_gram_matrices_of_one_class_each_are_nan_and_named() -> None:
    metric = ClassCKA(["a"], num_classes=2)
    for label in (0, 1):
        metric.update({"a": gram_vector(torch.randn(64, 3))}, torch.full((64,), label))
    with pytest.warns(UserWarning, match="NaN, because all images of a Gram matrix are of one class; shuffle"):
        assert metric.compute().isnan().all()


@pytest.mark.parametrize(
    ("group", "groups", "few"),
    [  # which classes the 64 images of a Gram matrix have, how many of these, and what is said
        ({0: 63, 1: 1}, 8, "is NaN, because it rests on 0 pairs .* class 1 \\(8 of 512 images\\)"),
        ({0: 64}, 8, "is NaN, because it rests on 0 pairs .* all 512 images are of class 0"),
        ({0: 62, 1: 1, 2: 1}, 8, "class CKA rests on 0 pairs .* class 1 \\(8 of 512 images\\)"),
        ({0: 62, 1: 2}, 8, "rests on 8 pairs .* class 1 \\(16 of 512 images\\)"),
        ({0: 61, 1: 2, 2: 1}, 1, "rests on 1 pair of .* class 2 \\(1 of 64 images\\), class 1 \\(2 of 64 images\\)"),
        ({0: 32, 1: 31, 2: 1}, 1, None),  # the rare class carries next to nothing of the number
        ({0: 49, 1: 15}, 1, None),
    ],
)
def test_class_cka_next_to_a_dominant_class_names_the_rare_ones(
    group: dict[int, int], groups: int, few: str | None
) -> None:
    labels = torch.cat([torch.full((images,), label) for label, images in group.items()])
    metric = ClassCKA(["a"], num_classes=3, sizes=groups * labels.bincount(minlength=3))
    for _ in range(groups):
        metric.update({"a": gram_vector(torch.randn(64, 3))}, labels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = metric.compute()
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (few is not None)
    assert few is None or re.search(few, messages[0])
    assert bool(value.isnan()) == any("NaN" in message for message in messages)


def test_invariance_is_the_diagonal_of_the_two_views() -> None:
    x = {"a": torch.randn(128, 6), "b": torch.randn(128, 9)}
    y = {name: value + torch.randn(value.shape) for name, value in x.items()}
    metric, both = InvarianceCKA(["a", "b"]), LayerwiseCKA(["a", "b"], ["a", "b"])
    for part in torch.arange(128).split(64):
        one, other = ({name: gram_vector(value[part]) for name, value in view.items()} for view in (x, y))
        metric.update(one, other)
        both.update(one, other)
    expected = [reference(x[name].numpy(), y[name].numpy(), 64) for name in x]
    np.testing.assert_allclose(metric.compute().numpy(), expected, atol=1e-6)
    assert torch.equal(metric.standard_error(), both.standard_error().diagonal())


def test_a_collapsed_layer_is_named_once_in_the_warning_on_invariance() -> None:
    metric = InvarianceCKA(["fine", "collapsed"])
    vectors = {"fine": gram_vector(torch.randn(64, 3)), "collapsed": gram_vector(torch.ones(64, 3))}
    metric.update(vectors, vectors)
    with pytest.warns(UserWarning, match=r"one image of each.*: collapsed$"):
        assert metric.compute().isnan().tolist() == [False, True]


# -- error bars ------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(blocks=st.integers(2, 12), empty=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_the_jackknife_agrees_with_leaving_blocks_out_one_by_one(blocks: int, empty: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(blocks, 40, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(blocks, 40, 2, generator=generator, dtype=torch.float64) + x[..., :1]
    metric = LayerwiseCKA(["x"], ["y"], gram_size=40, blocks=blocks + empty)
    for a, b in zip(x, y, strict=True):
        metric.update({"x": gram_vector(a, 40)}, {"y": gram_vector(b, 40)})
    without = []
    for left_out in range(blocks):
        keep = [block for block in range(blocks) if block != left_out]
        without.append(reference(x[keep].flatten(0, 1).numpy(), y[keep].flatten(0, 1).numpy(), 40))
    expected = np.sqrt((blocks - 1) * np.var(without))
    assert float(metric.standard_error()) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    value, _ = jackknife(metric.cross, metric.rows_self, metric.cols_self, metric.weights)
    torch.testing.assert_close(value.squeeze(), metric.compute())


def test_the_standard_error_is_the_standard_deviation_over_repetitions() -> None:
    generator = torch.Generator().manual_seed(0)
    repetitions, blocks, n = 400, 16, 32
    x = torch.randn(repetitions * blocks * n, 6, generator=generator)
    y = torch.randn(x.shape, generator=generator) + x
    v, w = (gram_vector(part, n).view(repetitions, blocks, -1).double() for part in (x, y))
    cross, rows, cols = ((a * b).sum(2).T.unsqueeze(2) for a, b in ((v, w), (v, v), (w, w)))
    values, errors = (part.flatten() for part in jackknife(cross.unsqueeze(3), rows, cols, torch.ones(blocks)))
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.25)
    covered = ((values - values.mean()).abs() < 2.13 * errors).double().mean()  # Student's t with 15 degrees of freedom
    assert 0.90 < float(covered) < 0.99


@settings(max_examples=20, deadline=None)
@given(groups=st.integers(3, 9), rest=st.sampled_from([0, 1, 4, 19]), seed=st.integers(0, 10**6))
def test_uneven_blocks_count_by_their_gram_matrices(groups: int, rest: int, seed: int) -> None:
    blocks, size = 3, 20
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups * size + rest, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(len(x), 2, generator=generator, dtype=torch.float64) + x[:, :1]
    metric = LayerwiseCKA(["x"], ["y"], gram_size=size, blocks=blocks)
    metric.update({"x": gram_vector(x, size)}, {"y": gram_vector(y, size)})
    parts = [slice(start, start + size) for start in range(0, len(x) - 3, size)]
    # Busing et al. 1999, written out: a block of share 1/h has the pseudo-value h CKA - (h - 1) CKA without it.
    sums = np.zeros((blocks, 4))
    for number, part in enumerate(parts):
        k, l = (feature[part].numpy() @ feature[part].numpy().T for feature in (x, y))  # noqa: E741
        weight = len(k) * (len(k) - 3)
        sums[number % blocks] += weight * np.array([hsic1(k, l), hsic1(k, k), hsic1(l, l), 1])
    whole = sums.sum(0)
    value = whole[0] / np.sqrt(whole[1] * whole[2])
    left = whole - sums
    without = left[:, 0] / np.sqrt(left[:, 1] * left[:, 2])
    h = whole[3] / sums[:, 3]
    estimate = blocks * value - ((1 - 1 / h) * without).sum()
    error = np.sqrt(np.mean((h * value - (h - 1) * without - estimate) ** 2 / (h - 1)))
    assert float(metric.standard_error()) == pytest.approx(error, rel=1e-6)
    low, high = (float(end) for end in metric.interval())
    assert (low, high) == pytest.approx((value - 4.302653 * error, value + 4.302653 * error), abs=1e-6)


def test_the_error_bar_is_students_t() -> None:
    value, error = torch.tensor([0.5, 0.1]), torch.tensor([0.1, 0.0])
    for blocks, quantile in ((2, 12.7062), (4, 3.1824), (16, 2.1314), (10**6, 1.96)):
        low, high = interval(value, error, blocks)
        torch.testing.assert_close(high - value, quantile * error, rtol=1e-4, atol=0)
        torch.testing.assert_close(value - low, quantile * error, rtol=1e-4, atol=0)
    assert float(interval(value, error, 10**6, level=0.5)[1][0]) == pytest.approx(0.5 + 0.067449, rel=1e-4)
    assert interval(value, error, 1)[0].isnan().all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("batches", [0, 1])
def test_fewer_than_two_batches_have_no_standard_error(batches: int) -> None:
    metric = LayerwiseCKA(["a", "b"])
    for _ in range(batches):
        metric.update({name: gram_vector(torch.randn(64, 3)) for name in ("a", "b")})
    assert metric.standard_error().isnan().all()
    assert torch.stack(metric.interval()).isnan().all()


def test_blocks_do_not_change_the_value_and_forward_counts_like_update() -> None:
    batches = [{name: gram_vector(torch.randn(64, 3)) for name in ("a", "b")} for _ in range(6)]
    fed, called, coarse = LayerwiseCKA(["a", "b"]), LayerwiseCKA(["a", "b"]), LayerwiseCKA(["a", "b"], blocks=2)
    for number, batch in enumerate(batches):
        fed.update(batch, first_gram=number)
        called(batch)
        coarse.update(batch)
    torch.testing.assert_close(coarse.compute(), fed.compute(), rtol=0, atol=1e-12)
    assert torch.equal(fed.standard_error(), called.standard_error())
    assert not torch.equal(fed.standard_error(), coarse.standard_error())


def test_gram_vectors_of_different_images_are_refused() -> None:
    metric = LayerwiseCKA(["a"], ["b"])
    with pytest.raises(ValueError, match="same images with the same gram_size"):
        metric.update({"a": gram_vector(torch.randn(64, 3))}, {"b": gram_vector(torch.randn(64, 3), 32)})
    with pytest.raises(ValueError, match="not made with gram_size=64"):
        metric.update(*({name: gram_vector(torch.randn(96, 3), 32)} for name in ("a", "b")))


@pytest.mark.parametrize(("rest", "blocks"), [(0, 6), (1, 6), (4, 6), (32, 6), (40, 7)])
def test_error_bars_are_over_gram_matrices_however_they_come_in_batches(rest: int, blocks: int) -> None:
    """A short last Gram matrix of 40 images is a block; one of 32 or fewer would narrow the bar, and joins another."""
    x = {name: torch.randn(64 * 6 + rest, 4) for name in ("a", "b")}
    ends = []
    for size in (64 * 7, 64, 128, 256):
        metric = LayerwiseCKA(["a"], ["b"])
        for start in range(0, len(x["a"]), size):
            metric.update({name: gram_vector(value[start : start + size]) for name, value in x.items()})
        assert len(metric.deviations()) == blocks
        ends.append(torch.stack(metric.interval()))
    for _ in range(2):  # wherever the dealing begins
        metric.reset()
        metric.update({name: gram_vector(value) for name, value in x.items()})
        ends.append(torch.stack(metric.interval()))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-12)


def test_deviations_of_a_difference_are_the_differences_of_deviations() -> None:
    """Two comparisons of the same images: the error of their difference, what they share included."""
    x = torch.randn(480, 6, generator=torch.Generator().manual_seed(0))  # the last Gram matrix is half a one
    y, labels = x + 0.5 * torch.randn(480, 6, generator=torch.Generator().manual_seed(1)), (x[:, 0] > 0).long()
    pair, classes = InvarianceCKA(["a"], blocks=8), ClassCKA(["a"], num_classes=2, blocks=8)
    for number, (a, b, label) in enumerate(zip(x.split(64), y.split(64), labels.split(64), strict=True)):
        pair.update({"a": gram_vector(a)}, {"a": gram_vector(b)}, first_gram=number)
        classes.update({"a": gram_vector(a)}, label, first_gram=number)
    for metric in (pair, classes):
        torch.testing.assert_close(metric.deviations().square().sum(0).sqrt(), metric.standard_error().reshape(1))
    both = LayerwiseCKA(["a", "b"], ["a", "b"], blocks=8)
    for number, (a, b) in enumerate(zip(x.split(64), y.split(64), strict=True)):
        both.update({"a": gram_vector(a), "b": gram_vector(b)}, first_gram=number)
    nothing = (both.deviations()[:, 0, 1] - pair.deviations()[:, 0]).norm()
    assert float(nothing) < 1e-12, "the same number twice has no error of its difference"
    assert float((pair.deviations() - classes.deviations()).norm()) > 1e-3


def test_on_a_gpu_a_batch_waits_for_nothing() -> None:
    found = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        batches = [(torch.randn(200, 9, generator=generator), torch.arange(200) % 7) for _ in range(2)]
        with FakeCuda() as gpu:
            layers = LayerwiseCKA(["a"]).to(device)
            classes = ClassCKA(["a"], 7, sizes=torch.full((7,), 57)).to(device)
            for number, (features, labels) in enumerate(batches):
                features, labels = features.to(device), labels.to(device)
                with gpu.scope(f"batch {number}"):
                    vectors = {"a": gram_vector(features)}
                    layers.update(vectors)
                    classes.update(vectors, labels)
            found.append(
                [float(part) for metric in (layers, classes) for part in (metric.compute(), *metric.interval())]
            )
        assert not gpu.faults, gpu.report()
        assert not [note for note in gpu.waits if note.scope == "batch 1"], gpu.report()
    assert found[0] == found[1]
