"""CKA against the textbook formula in float64, closed forms, and the traps that other implementations fall into."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssl_geometry.geometry.cka import cka_matrix, gram_vector, u_center
from ssl_geometry.metrics import LayerwiseCKA


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


def cka(x: torch.Tensor, y: torch.Tensor, size: int = 64) -> float:
    v, w = gram_vector(x, size).double(), gram_vector(y, size).double()
    return float(cka_matrix((v @ w).view(1, 1), (v @ v).view(1), (w @ w).view(1)))


def test_golden_debiased_value() -> None:
    np.random.seed(1337)  # noqa: NPY002  the published values were made with this generator
    x = np.random.randn(100, 10)  # noqa: NPY002
    y = np.random.randn(100, 10) + x  # noqa: NPY002
    assert cka(torch.from_numpy(x), torch.from_numpy(y), size=100) == pytest.approx(0.51346, abs=5e-6)


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
    got = cka(torch.from_numpy(x), torch.from_numpy(y), size)
    # Small groups can have a self-HSIC near 0 or below; there both are undefined or ill-conditioned.
    if np.isfinite(expected) and abs(expected) < 2:
        assert got == pytest.approx(expected, abs=1e-8)
    in_float32 = cka(torch.from_numpy(x).float(), torch.from_numpy(y).float(), size)
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
    assert cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(centred, abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-4, 1e4), seed=st.integers(0, 10**6))
def test_invariant_to_scale_rotation_and_the_order_of_features(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 96, 24, generator=generator)
    y = y + x
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    expected = cka(x, y)
    assert cka(x * scale, y) == pytest.approx(expected, abs=1e-5)
    assert cka(x @ rotation, y) == pytest.approx(expected, abs=1e-5)
    assert cka(x[:, torch.randperm(24, generator=generator)], y) == pytest.approx(expected, abs=1e-5)


def test_independent_gaussians_are_near_zero_where_the_biased_estimate_says_one() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [cka(*torch.randn(2, 256, 4096, generator=generator)) for _ in range(8)]
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


def test_nearly_collapsed_features_still_give_a_number() -> None:
    x = torch.randn(64, 50, dtype=torch.float64)
    nearly = 1 + 1e-4 * x.float()
    assert cka(nearly.double(), x) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("rest", [1, 2, 3])
def test_a_last_group_of_fewer_than_four_is_left_out(rest: int) -> None:
    x, y = torch.randn(2, 64 + rest, 9)
    assert cka(x, y) == cka(x[:64], y[:64])


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
