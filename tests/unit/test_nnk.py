"""NNK against SciPy's non-negative least squares, closed forms, and loops written out in NumPy."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor

from ssl_geometry.geometry import nnk as module
from ssl_geometry.geometry import nnk_solver as solver
from ssl_geometry.geometry.chunks import over_chunks
from ssl_geometry.geometry.neighbors import nearest as neighbors_of
from ssl_geometry.geometry.nnk import nnk, nnk_graph
from ssl_geometry.geometry.nnk_solver import solve, solve_cosine

KINDS = ["isotropic", "correlated", "positive", "duplicates", "near duplicates", "ties", "tight"]


def cloud(kind: str, n: int, k: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """n problems: a query and then its k candidates, (n, 1 + k, d)."""
    x = rng.standard_normal((n, 1 + k, d))
    half = k // 2
    if kind == "correlated":
        x = x * np.exp(-np.arange(d) / 3) + 2
    elif kind == "positive":
        x = np.abs(x)
    elif kind == "duplicates":
        x[:, 1 : 1 + half] = x[:, 1 + half : 1 + 2 * half]
    elif kind == "near duplicates":
        x[:, 1 : 1 + half] = x[:, 1 + half : 1 + 2 * half] + 1e-5 * rng.standard_normal((n, half, d))
    elif kind == "ties":
        x = np.round(2 * x) + 0.5
    elif kind == "tight":
        x = 3 + 0.1 * x
    return x


def least_squares(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cosine kernel's problem in feature space, where it is |side - matrix theta|², and SciPy's solution."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    matrix = np.vstack([unit.T, np.ones(len(x))]) / np.sqrt(2)
    return matrix, nnls(matrix[:, 1:], matrix[:, 0], maxiter=100 * len(x))[0]


def as_tensors(x: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Features, candidates and queries of n problems."""
    n, width, d = x.shape
    features = torch.from_numpy(x.reshape(-1, d))
    rows = torch.arange(n * width).view(n, width)
    return features, rows[:, 1:], features[rows[:, 0]]


def on_circle(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_nnls(kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    unique = 0
    for _ in range(60):
        k, d = int(rng.integers(5, 101)), int(rng.choice([2, 3, 5, 10, 30, 100, 512, 2048]))
        x = cloud(kind, 5, k, d, rng)
        weights, active, error, residual = (field.numpy() for field in nnk(*as_tensors(x)))
        for i in range(len(x)):
            matrix, expected = least_squares(x[i])
            gram, target = matrix[:, 1:].T @ matrix[:, 1:], matrix[:, 1:].T @ matrix[:, 0]
            slope = gram @ weights[i] - target
            violation = max(-slope.min(), np.abs(slope[weights[i] > 0]).max(initial=0), 0) / np.abs(target).max()
            assert (weights[i] >= 0).all()
            assert violation <= 1e-9
            assert residual[i] <= 1e-9
            best = np.square(matrix[:, 1:] @ expected - matrix[:, 0]).sum()
            assert np.square(matrix[:, 1:] @ weights[i] - matrix[:, 0]).sum() <= best + 1e-9
            assert error[i] == pytest.approx(best, abs=1e-9)
            support = expected > 1e-6 * expected.max()
            # No tie: the neighbours are independent and weigh enough, and no other candidate is nearly one.
            rank = np.linalg.matrix_rank(matrix[:, 1:][:, support], tol=1e-6) == support.sum()
            slack = (gram @ expected - target)[~support].min(initial=1)
            if rank and slack > 1e-8 and expected[support].min() > 1e-4 * expected.max():
                unique += 1
                np.testing.assert_array_equal(active[i], support)
    assert unique > 100 or kind == "duplicates"


@pytest.mark.parametrize(("d", "k"), [(2048, 50), (512, 100), (128, 20)])
def test_float32_features_on_a_manifold_find_the_neighbours_of_float64(d: int, k: int) -> None:
    rng = np.random.default_rng(d)
    latent = rng.standard_normal((30, 1, 6)) + rng.standard_normal((30, 1 + k, 6))
    x = np.maximum(latent @ rng.standard_normal((6, d)) + rng.standard_normal(d), 0).astype(np.float32)
    result = nnk(*as_tensors(x))
    same = 0
    for i in range(len(x)):
        matrix, expected = least_squares(x[i].astype(np.float64))
        best = np.square(matrix[:, 1:] @ expected - matrix[:, 0]).sum()
        assert float(result.error[i]) == pytest.approx(best, abs=1e-7)
        target = matrix[:, 1:].T @ matrix[:, 0]  # the violation of the features' own problem, rounding included
        weights = result.weights[i].numpy()
        slope = matrix[:, 1:].T @ (matrix[:, 1:] @ weights) - target
        assert max(-slope.min(), np.abs(slope[weights > 0]).max()) <= 1e-6 * target.max()
        same += int((result.active[i].numpy() == (expected > 1e-6 * expected.max())).all())
    assert same >= 29


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_directions_whose_cosines_round_to_one_are_distinguished(spread: float) -> None:
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((40 * 31, 6)) @ rng.standard_normal((6, 64)) + 0.1 * rng.standard_normal((40 * 31, 64))
    x = (1 + spread * latent).astype(np.float32).reshape(40, 31, 64)
    result = nnk(*as_tensors(x))
    for i in range(len(x)):
        unit = x[i].astype(np.longdouble)
        unit /= np.sqrt(np.square(unit).sum(1, keepdims=True))
        _, expected = least_squares(x[i].astype(np.float64))

        def objective(theta: np.ndarray, unit: np.ndarray = unit) -> float:
            theta = theta.astype(np.longdouble)
            return float(np.square(unit[0] - theta @ unit[1:]).sum() + (1 - theta.sum()) ** 2)

        assert objective(result.weights[i].numpy()) <= 1.0001 * objective(expected)


def in_differences(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cosine kernel's problem for vectors that are close together, SciPy's solution and its neighbours.

    |x_i - X theta|² + (1 - sum theta)², where x_i - X theta is split into its parts across x_i and along it.
    """
    unit = x.astype(np.longdouble)
    unit /= np.sqrt(np.square(unit).sum(1, keepdims=True))
    apart = (unit[1:] - unit[0]).astype(np.float64)
    near = np.square(apart).sum(1)
    across = apart + np.outer(near / 2, unit[0].astype(np.float64))
    radius = np.sqrt(near.max())
    matrix = np.vstack([across.T, 1 - near / 2, np.ones(len(near))]) / radius
    side = np.append(np.zeros(x.shape[1]), [1, 1]) / radius
    theta = nnls(matrix, side, maxiter=100 * len(x))[0]
    return theta, theta > 1e-6 * theta.max()


def close_together(spread: float, center: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(300, 6, generator=generator) @ torch.randn(6, 64, generator=generator)
    return center + spread * (latent + 0.1 * torch.randn(300, 64, generator=generator))


@pytest.mark.parametrize("kind", ["nnk", "differences"])
@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-5, 1e-6])
def test_neighbours_are_right_however_close_all_are(spread: float, kind: str) -> None:
    features = close_together(spread, torch.ones(64))
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    ids = (torch.cdist(unit, unit) + 9 * torch.eye(300)).topk(50, largest=False).indices[::10]
    if kind == "nnk":
        result = nnk(features, ids, features[::10])
    else:
        apart = unit[ids] - unit[::10].unsqueeze(1)
        result = solve_cosine(apart @ apart.mT)
    for i, row in enumerate(ids.tolist()):
        weights, support = in_differences(features[[10 * i, *row]].numpy())
        np.testing.assert_array_equal(result.active[i], support)
        np.testing.assert_allclose(result.weights[i], weights, atol=1e-4 if kind == "nnk" else 1e-9)
    assert float(result.residual.max()) < 1e-9


def test_small_clusters_far_apart_are_solved_in_float64() -> None:
    centers = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    features = torch.cat([close_together(1e-5, center)[:100] for center in centers])
    groups = torch.arange(300).view(3, 1, 100).expand(3, 100, 100).reshape(300, 100)
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    distance = torch.cdist(unit, unit) + 9 * torch.eye(300)
    ids = groups.gather(1, distance.gather(1, groups).topk(30, largest=False).indices)
    result = nnk(features, ids)
    for i in range(0, 300, 10):
        weights, support = in_differences(features[[i, *ids[i].tolist()]].numpy())
        np.testing.assert_array_equal(result.active[i], support)
        np.testing.assert_allclose(result.weights[i], weights, atol=1e-6)


def test_what_rounding_alone_distinguishes_is_unknown_and_warned_of() -> None:
    features = torch.cat([close_together(1e-7, torch.ones(64))[:40], torch.randn(60, 64)])
    distance = torch.cdist(*(2 * [torch.nn.functional.normalize(features.double(), dim=1)])) + 9 * torch.eye(100)
    with pytest.warns(
        UserWarning, match="40 of 100 NNK problems are NaN: candidates differ from queries by rounding alone"
    ):
        result = nnk(features, distance.topk(10, largest=False).indices)
    assert result.weights[:40].isnan().all()
    assert result.error[:40].isnan().all()
    assert result.residual.isnan().tolist() == [True] * 40 + [False] * 60
    assert result.active.any(1).tolist() == [False] * 40 + [True] * 60


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
def test_near_candidates_next_to_far_ones_are_distinguished(spread: float) -> None:
    """Classes that collapse onto their means, and lists that hold images of several."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 6
    means = torch.randn(6, 24, generator=generator)
    features = means[labels] + spread * torch.randn(120, 24, generator=generator)
    ids = neighbors_of(features, k=40).ids
    assert (labels[ids] != labels[:, None]).any(1).all()
    found, right = nnk(features, ids), nnk(features.double(), ids)
    assert torch.equal(found.active, right.active)
    torch.testing.assert_close(found.weights, right.weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spread", [1.0, 1e-6])
def test_the_certificate_is_relative_to_the_spread(spread: float) -> None:
    """The nearest candidate alone is far from an optimum: however close all are, the residual says so."""
    features = close_together(spread, torch.ones(64)).double()
    unit = torch.nn.functional.normalize(features, dim=1)
    apart = unit[1:51] - unit[0]
    problem = solver.CosineProblem.of((apart @ apart.T)[None], torch.ones(1, 50, dtype=torch.bool))
    nearest = torch.zeros(1, 50, dtype=torch.float64)
    nearest[0, problem.near.argmin()] = 1 - problem.near.min() / 4
    assert float(problem.certified(nearest).residual) > 1e-3
    best = solve_cosine((apart @ apart.T)[None]).weights
    assert float(problem.certified(best).residual) < 1e-9
    assert float(problem.certified(best * 1.001).residual) == pytest.approx(1e-3, rel=0.01)


@settings(max_examples=100, deadline=None)
@given(ij=st.floats(0.3, 0.99), ik=st.floats(0.3, 0.99), jk=st.floats(0.0, 0.99))
def test_of_two_candidates_both_stay_when_neither_lies_behind_the_other(ij: float, ik: float, jk: float) -> None:
    if min(abs(jk - ij / ik), abs(jk - ik / ij)) < 1e-6:
        return
    gram = torch.tensor([[[1, jk], [jk, 1]]], dtype=torch.float64)
    active = solve(gram, torch.tensor([[ij, ik]], dtype=torch.float64)).active[0]
    assert bool(active.all()) == (jk < ij / ik < 1 / jk if jk else True)
    assert bool(active[0 if ij >= ik else 1])


def test_on_a_circle_the_nearest_on_each_side_are_the_neighbours() -> None:
    angles = torch.arange(-10, 11, dtype=torch.float64) * 0.05
    ids = torch.cat([torch.arange(0, 10), torch.arange(11, 21)]).unsqueeze(0)
    result = nnk(on_circle(angles), ids, on_circle(angles)[10:11])
    assert ids[result.active].tolist() == [9, 11]
    np.testing.assert_allclose(*result.weights[result.active].split(1))


def test_the_corners_of_a_simplex_weigh_the_same_at_its_centre() -> None:
    n = 7
    result = nnk(torch.eye(n), torch.arange(n).unsqueeze(0), torch.ones(1, n))
    assert bool(result.active.all())
    # w (1 + (n-1)/2) = (1 + 1/sqrt(n)) / 2 for each of the equal weights w
    np.testing.assert_allclose(result.weights.numpy(), (1 + n**-0.5) / (n + 1), rtol=1e-6)


@pytest.mark.parametrize("kernel", ["gaussian", "laplace"])
def test_other_kernels_are_solved_as_exactly(kernel: str) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((40, 31, 4))

    def laplace(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-0.3 * torch.cdist(a, b, p=1))

    result = nnk(*as_tensors(x), kernel="gaussian" if kernel == "gaussian" else laplace)
    for i in range(len(x)):
        apart = x[i][:, None] - x[i][None]
        if kernel == "gaussian":
            squares = np.square(apart).sum(2)
            full = np.exp(-squares / (2 * squares[0].max() / 9))
        else:
            full = np.exp(-0.3 * np.abs(apart).sum(2))
        lower = np.linalg.cholesky(full[1:, 1:])
        expected = nnls(lower.T, np.linalg.solve(lower, full[1:, 0]))[0]
        np.testing.assert_allclose(result.weights[i].numpy(), expected, atol=1e-9)
        assert float(result.error[i]) == pytest.approx(1 - expected @ full[1:, 0], abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-8, 1e8), aim=st.floats(1e-6, 1e6), seed=st.integers(0, 99))
def test_kernels_of_any_scale_are_solved_equally(scale: float, aim: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 20, 30, dtype=torch.float64, generator=generator)
    y = torch.rand(3, 30, 1, dtype=torch.float64, generator=generator)
    gram, target = x @ x.mT, (x @ y).squeeze(2)
    plain, scaled = solve(gram, target), solve(gram * scale, target * aim)
    torch.testing.assert_close(scaled.weights * scale / aim, plain.weights, rtol=1e-6, atol=1e-9)
    assert float(scaled.residual.max()) < 1e-9


def test_kept_cosines_give_what_the_features_give(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(200, 1, 16, generator=generator)
    # In the second half, candidates are closer than float32 cosines can tell.
    features = torch.cat([spread + 0.3 * torch.randn(200, 1, 16, generator=generator), 5 + 1e-3 * spread]).flatten(0, 1)
    unit = torch.nn.functional.normalize(features, dim=1)
    similarity = unit @ unit.T
    ids = (similarity - 3 * torch.eye(400)).topk(20).indices
    asked = []
    centered = module.centered
    monkeypatch.setattr(module, "centered", lambda x, queries, unit: asked.append(len(queries)) or centered(x, queries))
    kept = nnk(features, ids, similarity=similarity)
    assert asked == [200]  # the features are asked about the close ones alone
    monkeypatch.setattr(module, "centered", centered)
    torch.testing.assert_close(kept.weights, nnk(features, ids).weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tightness", [1e-2, 1e-3])
def test_kept_cosines_do_not_decide_among_near_candidates_for_a_far_one(tightness: float) -> None:
    generator = torch.Generator().manual_seed(3)
    tight = torch.randn(30, 1, 16, generator=generator) + tightness * torch.randn(30, 25, 16, generator=generator)
    features = torch.cat([tight, torch.randn(30, 6, 16, generator=generator)], 1).flatten(0, 1)  # six far away
    unit = torch.nn.functional.normalize(features, dim=1)
    groups = torch.arange(len(features)).view(30, 31)
    ids = groups.repeat_interleave(31, 0)
    kept, fresh = nnk(features, ids, similarity=unit @ unit.T), nnk(features, ids)
    queries = groups[:, :25].flatten()
    assert (kept.active == fresh.active)[queries].all(1).double().mean() > 0.99


def test_padding_and_the_query_itself_are_no_candidates() -> None:
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    ids = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(i))[:8] for i in range(12)])
    padded = torch.cat([ids, torch.arange(12).unsqueeze(1), torch.full((12, 2), -1)], 1)
    clean = nnk(features, ids.where(ids != torch.arange(12).unsqueeze(1), -1))
    got = nnk(features, padded)
    torch.testing.assert_close(got.weights[:, :8], clean.weights)
    assert not bool(got.active[:, 8:].any())
    own = ids == torch.arange(12).unsqueeze(1)
    assert bool(own.any())
    assert not bool(clean.active[own].any())


def test_what_padding_holds_does_not_matter() -> None:
    rng = torch.Generator().manual_seed(2)
    features = torch.randn(20, 9, 30, generator=rng)
    gram, target = features @ features.mT, (features @ features[:, :1].mT).squeeze(2)
    valid = torch.rand(20, 9, generator=rng) > 0.3
    valid[:, 1] = True
    expected = solve(gram, target, valid=valid).weights
    gram.masked_fill_(~(valid.unsqueeze(2) & valid.unsqueeze(1)), torch.nan)
    torch.testing.assert_close(solve(gram, target.where(valid, torch.nan), valid=valid).weights, expected)


def test_a_query_without_candidates_has_no_neighbours() -> None:
    result = nnk(torch.eye(3), torch.tensor([[1, 2], [-1, -1], [1, -1]]))
    assert result.active.sum(1).tolist() == [2, 0, 1]
    assert float(result.error[1]) == 1
    assert float(result.residual[1]) == 0


def test_equal_points_explain_each_other_without_error() -> None:
    ids = torch.tensor([[j for j in range(6) if j != i] for i in range(6)])
    for kernel in ("cosine", "gaussian"):
        result = nnk(torch.full((6, 4), 0.3), ids, kernel=kernel)
        np.testing.assert_allclose(result.weights.sum(1).numpy(), 1, rtol=1e-6)
        np.testing.assert_allclose(result.error.numpy(), 0, atol=1e-7)
        assert float(result.residual.max()) < 1e-9


def test_no_more_than_a_chunk_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    sweep = solver._lawson_hanson
    monkeypatch.setattr(solver, "_lawson_hanson", lambda a, b: sizes.append(len(b)) or sweep(a, b))
    features = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(1000, (1000, 10), generator=torch.Generator().manual_seed(1))
    for chunk, most in ((64, 64), (None, 256)):
        sizes.clear()
        nnk(features, ids, chunk=chunk)
        assert max(sizes) <= most
        assert sum(sizes) == 1000
    sizes.clear()
    nnk(features, torch.randint(1000, (1000, 200), generator=torch.Generator().manual_seed(1)))
    assert max(sizes) * 200**2 <= 256 * 64**2, "fewer queries where each has more candidates"


def test_neither_chunks_nor_threads_change_the_answer() -> None:
    features = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.rand(300, 300, generator=torch.Generator().manual_seed(1)).topk(30).indices
    expected = nnk(features, ids)
    before = torch.get_num_threads()
    for chunk, threads in itertools.product([1, 7, 1000], [1, 3]):
        torch.set_num_threads(threads)
        try:
            got = nnk(features, ids, chunk=chunk)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        torch.testing.assert_close(got.weights, expected.weights)
        assert torch.equal(got.active, expected.active)


def test_work_in_threads_keeps_order_modes_and_errors() -> None:
    x = torch.ones(1000, requires_grad=True)
    with torch.inference_mode():
        parts = over_chunks(lambda r: (r.start, torch.is_inference_mode_enabled()), 1000, x.device, 10)
    assert parts == [(start, True) for start in range(0, 1000, 10)]
    with torch.autocast("cpu"):
        assert not any(over_chunks(lambda r: (x[r] * 2).requires_grad, 1000, x.device))
        dtypes = over_chunks(lambda r: (x[r, None] @ x[None, r]).dtype, 1000, x.device)
    assert set(dtypes) == {torch.float32}
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        over_chunks(lambda r: 1 / r.start, 1000, x.device)
    assert torch.get_num_threads() == before


def test_features_are_left_as_they_are() -> None:
    features = torch.randn(10, 3, dtype=torch.float64)
    before = features.clone()
    nnk(features, torch.tensor([[(i + 1) % 10] for i in range(10)]))
    assert torch.equal(features, before)


def test_features_may_come_from_inference_mode_and_carry_gradients() -> None:
    ids = torch.tensor([[1, 2], [0, 2], [0, 1]])
    with torch.inference_mode():
        inside = nnk(torch.eye(3), ids)
    outside = nnk(torch.eye(3).requires_grad_(), ids)
    assert torch.equal(inside.weights, outside.weights)
    assert not outside.weights.requires_grad


def test_a_spoilt_answer_is_sought_again_and_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    x = cloud("correlated", 20, 30, 10, np.random.default_rng(0))
    expected = nnk(*as_tensors(x))
    wrong = lambda table, inside: torch.full(inside.shape, 0.1, dtype=torch.float64)  # noqa: E731
    monkeypatch.setattr(solver, "_lawson_hanson", wrong)
    again = nnk(*as_tensors(x))  # a warning would be an error here
    torch.testing.assert_close(again.weights, expected.weights, rtol=1e-6, atol=1e-8)
    monkeypatch.setattr(solver, "_scipy", lambda matrix, side: torch.zeros_like(matrix[0]))
    with pytest.warns(UserWarning, match=r"20 of 20 NNK problems miss the tolerance of 1e-06"):
        assert float(nnk(*as_tensors(x)).residual.min()) > 1e-6


def test_a_kernel_that_is_not_positive_semi_definite_is_warned_of() -> None:
    gram = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]).repeat(3, 1, 1)
    with pytest.warns(UserWarning, match="is the kernel positive semi-definite"):
        result = solve(gram, torch.tensor([[1.0, 1.0], [1.0, 0.1], [1.0, 2.0]]))
    assert float(result.residual.max()) > 1e-6


def pruned(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """What the public solver does, for one query."""
    kept = np.arange(len(target))
    while True:
        weights = np.linalg.solve(gram[np.ix_(kept, kept)], target[kept])
        if (weights > 1e-10).all():
            return np.bincount(kept, weights, len(target))
        kept = kept[weights > 1e-10]


def test_it_explains_better_than_the_public_algorithm() -> None:
    """Which drops a candidate of negative weight at once and readmits none."""
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((50, 31, 5))
    x = np.maximum(latent @ rng.standard_normal((5, 64)) + 1, 0) + 0.05 * rng.standard_normal((50, 31, 64))
    exact = nnk(*as_tensors(x))
    counts, errors = [], []
    for images in x:
        matrix, _ = least_squares(images)
        gram, target = matrix[:, 1:].T @ matrix[:, 1:], matrix[:, 1:].T @ matrix[:, 0]
        weights = pruned(gram, target)
        counts.append((weights > 0).sum())
        errors.append(1 - 2 * weights @ target + weights @ gram @ weights)
    assert (exact.error.numpy() <= np.array(errors) + 1e-6).all()
    assert (exact.error.numpy() < np.array(errors) - 1e-5).mean() > 0.3
    assert int(exact.active.sum()) > sum(counts)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(3, 25), k=st.integers(1, 8), seed=st.integers(0, 99))
def test_the_graph_takes_each_edge_from_the_end_that_is_explained_better(n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 4, generator=generator)
    scores = torch.rand(n, n, generator=generator).fill_diagonal_(-1)
    ids = scores.topk(min(k, n - 1)).indices
    ids = ids.where(torch.rand(ids.shape, generator=generator) < 0.9, -1)
    result = nnk(features, ids)
    expected = np.zeros((n, n))
    weight = [dict(zip(a, b, strict=True)) for a, b in zip(ids.tolist(), result.weights.tolist(), strict=True)]
    for i, j in itertools.combinations(range(n), 2):
        ends = [(float(result.error[a]), a, weight[a][b]) for a, b in ((i, j), (j, i)) if b in weight[a]]
        if ends:
            expected[i, j] = expected[j, i] = min(ends)[2]
    graph = nnk_graph(ids, result)
    np.testing.assert_allclose(graph.to_dense().numpy(), expected, atol=1e-12)
    assert graph._nnz() == np.count_nonzero(expected)


NONE = torch.zeros(3, 0, dtype=torch.long)
FIRST = torch.ones(3, 1, dtype=torch.long)
BAD = [
    (
        lambda: nnk(torch.eye(3), FIRST[:2]),
        r"ids must hold candidates of 3 queries.*\(2, 1\)",
    ),
    (
        lambda: nnk(torch.eye(3), NONE),
        r"ids must hold candidates of 3 queries.*\(3, 0\)",
    ),
    (lambda: nnk(torch.eye(3), torch.full((3, 2), 3)), r"ids must lie between -1 \(none\) and 2, got 3 to 3"),
    (lambda: nnk(torch.eye(3), torch.full((3, 2), -2)), r"ids must lie between -1 \(none\) and 2, got -2 to -2"),
    (lambda: nnk(torch.zeros(3, 2), FIRST), r"3 of 3 images are zero vectors"),
    (lambda: nnk(torch.tensor([[1.0], [torch.nan]]), FIRST[:2]), r"1 of 2 images have NaN"),
    (
        lambda: nnk(torch.tensor([[1.0], [torch.inf]]), FIRST[:2], kernel=torch.cdist),
        r"1 of 2 images have",
    ),
    (lambda: nnk(torch.eye(3), FIRST, kernel="rbf"), r"kernel must be .* got 'rbf'"),
    (lambda: nnk(torch.eye(3), FIRST, similarity=torch.eye(2)), r"similarity must hold .*\(2, 2\)"),
    (lambda: solve(torch.ones(0, 2, 2), torch.ones(0, 2)), r"at least one query and one candidate.*\(0, 2\)"),
    (lambda: solve(torch.full((1, 2, 2), torch.nan), torch.ones(1, 2)), r"kernel values must be finite"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_what_cannot_be_solved_is_refused_in_one_line(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
