"""Spectral numbers against closed forms, and against second implementations in NumPy and SciPy."""

from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_geometry.geometry.spectrum import (
    alignment,
    alpha_req,
    covariance_eigenvalues,
    decay,
    lidar,
    mean_cosine,
    participation_ratio,
    rankme,
    singular_values,
    uniformity,
    view_statistics,
)
from ssl_geometry.metrics import Spectrum


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entropy_rank(values: np.ndarray, eps: float) -> float:
    p = values / values.sum() + eps
    return float(np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 100))
def test_spectra_are_numpys(n: int, width: int, seed: int) -> None:
    x = normal(n, width, seed=seed) + 3
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(x), values, rtol=1e-6, atol=1e-6 * values[0])
    assert float(rankme(x)) == pytest.approx(entropy_rank(values, 1e-7), rel=1e-5)
    assert float(rankme(x, eps=0)) == pytest.approx(entropy_rank(values, 0), rel=1e-5)
    covariance = np.cov(x.double().numpy().T, bias=True).reshape(width, width)
    eigenvalues = np.sort(np.linalg.eigvalsh(covariance))[::-1][: min(n, width)]
    np.testing.assert_allclose(covariance_eigenvalues(x), eigenvalues, atol=1e-9 * eigenvalues[0] + 1e-12)
    expected = np.trace(covariance) ** 2 / (covariance**2).sum()
    assert float(participation_ratio(x)) == pytest.approx(expected, rel=1e-6)


def test_orthonormal_features_have_full_rank_and_copies_of_one_have_rank_one() -> None:
    assert float(rankme(torch.eye(16), eps=0)) == pytest.approx(16)
    assert float(rankme(torch.ones(16, 1) @ normal(1, 8), eps=0)) == pytest.approx(1)
    two = torch.cat([torch.zeros(10, 5), torch.ones(10, 5)])
    assert float(participation_ratio(two)) == pytest.approx(1)


def test_a_gaussian_of_known_spectrum() -> None:
    scales = torch.arange(1, 65) ** -0.5  # covariance i^-1
    x = normal(60_000, 64) * scales
    alpha, fit = alpha_req(x, first=5, last=60)
    assert float(alpha) == pytest.approx(1, abs=0.03)
    assert float(fit) > 0.99
    squares = scales.square().double()
    assert float(participation_ratio(x)) == pytest.approx(float(squares.sum() ** 2 / squares.square().sum()), rel=0.03)


@settings(max_examples=20, deadline=None)
@given(st.integers(4, 30), st.integers(2, 8), st.integers(2, 20), st.integers(0, 100))
def test_lidar_is_its_definition(n: int, q: int, width: int, seed: int) -> None:
    views = (normal(n, 1, width, seed=seed) + 0.3 * normal(n, q, width, seed=seed + 1)).double()
    means, scatter = view_statistics(views)
    x = views.numpy()
    mu = x.mean(1)
    between = np.cov(mu.T, bias=True).reshape(width, width)
    within = sum((image - image.mean(0)).T @ (image - image.mean(0)) for image in x) / (n * q) + 1e-4 * np.eye(width)
    root = scipy.linalg.inv(scipy.linalg.sqrtm(within))
    eigenvalues = np.linalg.eigvalsh(root @ between @ root).clip(0)
    assert float(lidar(means, scatter, views=q)) == pytest.approx(entropy_rank(eigenvalues, 1e-8), rel=1e-9)
    halves = [view_statistics(part) for part in views.split(n // 2 + 1)]
    merged = lidar(torch.cat([m for m, _ in halves]), sum(s for _, s in halves), views=q)  # type: ignore[arg-type]
    assert float(merged) == pytest.approx(float(lidar(means, scatter, views=q)), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(1, 10), st.integers(1, 70))
def test_alignment_and_uniformity_are_their_definitions(n: int, width: int, chunk: int) -> None:
    x, y = normal(n, width, seed=1).double(), normal(n, width, seed=2).double()
    u, v = (part / part.norm(dim=1, keepdim=True) for part in (x, y))
    np.testing.assert_allclose(alignment(x, y), (u - v).square().sum(1))
    expected = np.log(np.exp(-2 * pdist(u.numpy(), "sqeuclidean")).mean())
    assert float(uniformity(x, chunk=chunk)) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert float(mean_cosine(x)) == pytest.approx(1 - pdist(u.numpy(), "cosine").mean(), rel=1e-9, abs=1e-12)


def test_a_uniform_circle_has_the_uniformity_of_a_bessel_function() -> None:
    angle = torch.arange(4000).double() * (2 * torch.pi / 4000)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    assert float(uniformity(circle)) == pytest.approx(np.log(scipy.special.ive(0, 4.0)), abs=1e-3)


def test_the_decay_of_few_images_is_of_nine_tenths_of_their_rank() -> None:
    """The smallest of 49 eigenvalues lies at the edge: cut off, or any alpha could be had."""
    values = torch.arange(1, 50).double() ** -1.2
    values[45:] *= 1e-6
    alpha, fit = decay(values)  # 11 to 44
    assert float(alpha) == pytest.approx(1.2)
    assert float(fit) == pytest.approx(1)
    steep = values.clone()
    steep[43] *= 1e-3
    assert float(decay(steep)[0]) > 1.3, "index 44 still counts"
    assert all(value.isfinite() for value in decay(values[:25]))
    assert all(value.isnan() for value in decay(values[:24])), "21 is less than twice 11"


def test_what_does_not_vary_has_no_spectrum() -> None:
    same, nothing = torch.full((20, 5), 0.3), torch.zeros(20, 5)
    assert participation_ratio(same).isnan()
    assert rankme(nothing).isnan()
    generator = torch.Generator().manual_seed(0)
    rounded = 0.3 * (1 + 1.2e-7 * torch.randint(-2, 3, (60, 4, 50), generator=generator))  # a network of one output
    for found in (participation_ratio(rounded[:, 0]), *alpha_req(rounded[:, 0]), lidar(*view_statistics(rounded), 4)):
        assert found.isnan()
    assert float(participation_ratio(1 + 3e-6 * torch.randn(60, 50, generator=generator))) > 20
    assert all(value.isnan() for value in alpha_req(same))
    means, scatter = view_statistics(same[:, None].expand(20, 3, 5))
    assert lidar(means, scatter, views=3).isnan()
    assert float(uniformity(same)) == pytest.approx(0, abs=1e-12)
    assert float(mean_cosine(same)) == pytest.approx(1, abs=1e-12)
    assert uniformity(nothing).isnan()
    assert mean_cosine(nothing).isnan()
    assert mean_cosine(same[:1]).isnan()
    assert alignment(nothing, same).isnan().all()


def test_what_is_not_finite_has_no_spectrum() -> None:
    broken = normal(20, 5)
    broken[3, 2] = torch.inf
    means, scatter = view_statistics(broken[:, None] + 0.1 * normal(20, 4, 5))
    values = [rankme(broken), participation_ratio(broken), *alpha_req(broken), lidar(means, scatter, views=4)]
    assert all(value.isnan() for value in [*values, uniformity(broken), alignment(broken, broken)[3]])


# -- the metric ------------------------------------------------------------------------------------------------------

FITTING = {
    "features": {"a": normal(6, 4), "b": normal(6, 3)},
    "views": {"a": normal(6, 5, 4), "b": normal(6, 5, 3)},
    "index": torch.arange(6),
}
MISFITS = [
    ({"features": {"a": normal(6, 4), "b": normal(7, 3)}}, r"layer b has shape \(7, 3\), expected \(6, 3\)"),
    ({"features": {"a": normal(6, 5), "b": normal(6, 3)}}, r"layer a has shape \(6, 5\), expected \(6, 4\)"),
    ({"index": torch.arange(6, 11)}, r"layer a has shape \(6, 4\), expected \(5, 4\)"),
    (
        {"views": {"a": normal(6, 5, 4), "b": normal(6, 4, 3)}},
        r"layer b has shape \(6, 4, 3\), expected \(6, 5, 3\)",
    ),
    ({"views": {"a": normal(5, 5, 4), "b": normal(6, 5, 3)}}, r"layer a has shape \(5, 5, 4\)"),
    ({"views": None}, "views=5, but none are given"),
]


@pytest.mark.parametrize(("change", "message"), MISFITS)
def test_a_batch_that_does_not_fit_is_refused_whole(change: dict, message: str) -> None:
    whole, spectrum = Spectrum({"a": 4, "b": 3}, views=5), Spectrum({"a": 4, "b": 3}, views=5)
    for metric in (whole, spectrum):
        metric.update(**FITTING)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        spectrum.update(**{**FITTING, "index": torch.arange(6, 12), **change})  # type: ignore[arg-type]
    for name, value in whole.compute().items():
        torch.testing.assert_close(spectrum.compute()[name], value, rtol=0, atol=0, equal_nan=True)


def test_each_spectrum_is_computed_once_and_is_that_of_the_functions() -> None:
    class Decompositions(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.overloadpacket.__name__ == "_linalg_eigh"
            return func(*args, **(kwargs or {}))

    features, index = {"a": normal(150, 30) + 1, "b": normal(150, 5)}, torch.arange(150)
    spectrum = Spectrum({"a": 30, "b": 5}, views=0)
    spectrum.update(features, None, index)
    with Decompositions() as decompositions:
        found = spectrum.compute()
    assert decompositions.count == 4  # of two layers, features as they are and centred
    for number, x in enumerate(features.values()):
        alpha, fit = alpha_req(x)
        expected = {
            "rankme": rankme(x),
            "effective_rank": rankme(x, eps=0),
            "participation_ratio": participation_ratio(x),
            "alpha_req": alpha,
            "alpha_req_fit": fit,
        }
        for name, value in expected.items():
            torch.testing.assert_close(found[name][number], value, rtol=1e-12, atol=0, equal_nan=True)


def test_layers_without_a_spectrum_are_named_once() -> None:
    features = {
        "fine": normal(40, 5),
        "constant": torch.ones(40, 3),
        "nan": normal(40, 4).index_fill(0, torch.tensor(3), torch.nan),
    }
    spectrum = Spectrum({"fine": 5, "constant": 3, "nan": 4}, views=0)
    spectrum.update(features, None, torch.arange(40))
    with pytest.warns(
        UserWarning, match="^Spectra are NaN for layers that do not vary, or are not finite: constant, nan$"
    ):
        assert spectrum.compute()["participation_ratio"].isnan().tolist() == [False, True, True]


def test_views_that_are_not_asked_for_and_single_views_are_refused() -> None:
    with pytest.raises(ValueError, match="views=0, but augmented views are given"):
        Spectrum({"a": 4, "b": 3}, views=0).update(**FITTING)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="views=1: expected 0, or at least 2"):
        Spectrum({"a": 4}, views=1)


def test_an_image_fed_twice_is_reported() -> None:
    spectrum = Spectrum({"a": 4}, views=0)
    spectrum.update({"a": normal(6, 4)}, None, torch.arange(6))
    spectrum.update({"a": normal(1, 4)}, None, torch.tensor([3]))
    with pytest.raises(ValueError, match="Spectrum: image 3 was fed twice"):
        spectrum.compute()
