"""Manifold graph metrics against closed forms on circles and spheres, and against SciPy's subspace angles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles
from scipy.optimize import nnls
from torch import Tensor

from ssl_geometry.geometry import manifold as module
from ssl_geometry.geometry.manifold import augmentation_metrics, manifold_metrics, same_class_ids
from ssl_geometry.geometry.neighbors import nearest
from ssl_geometry.geometry.nnk import nnk
from ssl_geometry.geometry.nnk_solver import NNK

NAMES = ["neighbors", "diameter", "affinity", "affinity_random", "angle", "angle_random"]


def neighborhoods(active: Tensor) -> NNK:
    """A result with these neighbours, whatever its weights."""
    nothing = torch.zeros(len(active), dtype=torch.float64)
    return NNK(active.double(), active, nothing, nothing)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def directions(x: np.ndarray, i: int, neighbors: list[int]) -> np.ndarray:
    """Orthonormal columns that span the directions from i to its neighbours, but for those that are weak."""
    left, values, _ = np.linalg.svd((x[neighbors] - x[i]).T, full_matrices=False)
    return left[:, values**2 >= 0.1 * values[0] ** 2]


def expected_metrics(x: np.ndarray, neighbors: list[list[int]], random: list[int]) -> dict[str, np.ndarray]:
    """The metrics written out for unit vectors, one image at a time."""
    rows = []
    for i, own in enumerate(neighbors):
        row = [len(own) or np.nan] + 5 * [np.nan]
        if own:
            row[1] = max(np.linalg.norm(x[a] - x[b]) for a in own for b in own)
        if len(own) >= 2:
            near = min(own, key=lambda a: np.linalg.norm(x[a] - x[i]))
            for place, partner in ((2, near), (3, random[i])):
                if len(neighbors[partner]) >= 2:
                    a, b = directions(x, i, own), directions(x, partner, neighbors[partner])
                    fewer = min(a.shape[1], b.shape[1])
                    row[place] = np.linalg.norm(a.T @ b) / np.sqrt(fewer)
                    row[place + 2] = np.rad2deg(np.sort(subspace_angles(a, b))[:fewer].mean())
        rows.append(row)
    return dict(zip(NAMES, np.array(rows).T, strict=True))


def check(got: dict[str, Tensor], expected: dict[str, np.ndarray], atol: float = 1e-5) -> None:
    assert list(got) == NAMES
    for name in NAMES:
        assert got[name].dtype == torch.float64
        np.testing.assert_allclose(got[name].numpy(), expected[name], atol=atol, err_msg=name)


@pytest.mark.parametrize("points", [12, 40, 360])
def test_on_a_circle_neighbours_enclose_the_angle_of_a_step(points: int) -> None:
    step = 2 * np.pi / points
    angles = torch.arange(points, dtype=torch.float64) * step
    circle = 5 * torch.stack([angles.cos(), angles.sin()], 1)
    ids = (torch.arange(points).unsqueeze(1) + torch.tensor([1, -1, 2, -2, 3, -3])) % points
    metrics = manifold_metrics(circle, ids, nnk(circle, ids))
    np.testing.assert_array_equal(metrics["neighbors"], 2)
    np.testing.assert_allclose(metrics["diameter"], 2 * np.sin(step), rtol=1e-9)
    np.testing.assert_allclose(metrics["affinity"], np.cos(step), rtol=1e-9)
    np.testing.assert_allclose(metrics["angle"], np.rad2deg(step), rtol=1e-5)
    # A random other point lies anywhere on the circle: the mean of |cos| is 2/pi.
    assert float(metrics["affinity_random"].mean()) == pytest.approx(2 / np.pi, abs=0.2)


@pytest.mark.parametrize("step", [0.05, 0.3])
def test_on_a_sphere_tangent_planes_share_one_of_two_directions(step: float) -> None:
    def ring(pole: np.ndarray) -> np.ndarray:
        """Four points around the pole, at the angle of a step."""
        a = unit(np.cross(pole, [0.3, 0.5, 0.8]))
        b = np.cross(pole, a)
        return np.stack([np.cos(step) * pole + np.sin(step) * side for side in (a, b, -a, -b)])

    pole = np.array([0.0, 0.0, 1.0])
    first = ring(pole)
    x = np.concatenate([[pole], first, *map(ring, first)])
    ids = torch.full((21, 4), -1)
    ids[:5] = torch.arange(1, 21).view(5, 4)
    metrics = manifold_metrics(torch.from_numpy(x), ids, neighborhoods(ids >= 0))
    assert float(metrics["diameter"][0]) == pytest.approx(2 * np.sin(step))
    assert float(metrics["affinity"][0]) == pytest.approx(np.sqrt((1 + np.cos(step) ** 2) / 2))
    assert float(metrics["angle"][0]) == pytest.approx(np.rad2deg(step) / 2, rel=1e-5)
    assert bool(metrics["affinity"][1:].isnan().all())  # those whose neighbours have none are not comparable
    assert bool(metrics["neighbors"][5:].isnan().all())


def test_a_flat_patch_has_affinity_one() -> None:
    generator = torch.Generator().manual_seed(0)
    frame = torch.randn(4, 64, generator=generator)
    plane = torch.cat([torch.ones(200, 1), 1e-2 * torch.randn(200, 3, generator=generator)], 1) @ frame
    ids = torch.cdist(plane, plane).topk(21, largest=False).indices[:, 1:]
    metrics = manifold_metrics(plane, ids, nnk(plane, ids))
    full = metrics["affinity"] > 0.999  # where all three directions are kept on one side
    assert float(full.double().mean()) > 0.5
    sphere = torch.randn(200, 4, generator=generator) @ frame
    curved = manifold_metrics(sphere, ids, nnk(sphere, ids))
    assert float(curved["affinity"].nanmean()) < float(metrics["affinity"].nanmean())


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(3, 40), k=st.integers(1, 10), d=st.integers(2, 30), chunk=st.integers(1, 50), seed=st.integers(0, 99)
)
def test_metrics_are_those_of_numpy_and_scipy(n: int, k: int, d: int, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = 1 + torch.randn(n, d, dtype=torch.float64, generator=generator)
    ids = (torch.rand(n, n, generator=generator) - 2 * torch.eye(n)).topk(min(k, n - 1)).indices
    active = torch.rand(ids.shape, generator=generator) < 0.6
    partners = torch.randint(n, (1, n), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_others", lambda *_: partners)
        got = manifold_metrics(features, ids, neighborhoods(active), chunk=chunk)
    neighbors = [row[keep].tolist() for row, keep in zip(ids, active, strict=True)]
    check(got, expected_metrics(unit(features.numpy()), neighbors, partners[0].tolist()))


@settings(max_examples=15, deadline=None)
@given(images=st.integers(1, 5), m=st.integers(3, 9), d=st.integers(2, 40), seed=st.integers(0, 99))
def test_augmentation_metrics_are_averages_over_the_views_of_an_image(images: int, m: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(images, 1, d, generator=generator).double() + 2
    views = views + 0.3 * torch.randn(images, m, d, dtype=torch.float64, generator=generator)
    partners = torch.randint(m, (images, m), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_others", lambda *_: partners)
        got = augmentation_metrics(views)
    rows = []
    for x, random in zip(unit(views.numpy()), partners.tolist(), strict=True):
        neighbors = []
        for i in range(m):
            others = [j for j in range(m) if j != i]
            weights = nnls(np.vstack([x[others].T, np.ones(m - 1)]), np.append(x[i], 1))[0]
            neighbors.append([j for j, w in zip(others, weights, strict=True) if w > 1e-6 * weights.max()])
        each = expected_metrics(x, neighbors, random)
        rows.append([np.nan if np.isnan(each[name]).all() else np.nanmean(each[name]) for name in NAMES])
    check(got, dict(zip(NAMES, np.array(rows).T, strict=True)), atol=1e-4)


def test_augmentation_metrics_do_not_depend_on_length_rotation_or_other_images() -> None:
    generator = torch.Generator().manual_seed(0)
    views = 1 + torch.randn(6, 10, 16, dtype=torch.float64, generator=generator)
    expected = augmentation_metrics(views)
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=generator)).Q
    lengths = torch.rand(6, 10, 1, generator=generator).double() + 0.1
    turned = augmentation_metrics(lengths * views @ rotation)
    for name in NAMES:
        torch.testing.assert_close(turned[name], expected[name])
    alone = augmentation_metrics(views[2:3])
    for name in ("neighbors", "diameter", "affinity", "angle"):
        torch.testing.assert_close(alone[name], expected[name][2:3])


def test_invariant_networks_have_small_augmentation_diameters_whatever_their_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(20, 1, 64, generator=generator), torch.randn(20, 10, 64, generator=generator)
    wide, tight = (augmentation_metrics(images + spread * noise) for spread in (1e-1, 1e-4))
    assert float(wide["diameter"].mean()) == pytest.approx(1e3 * float(tight["diameter"].mean()), rel=0.05)
    torch.testing.assert_close(tight["neighbors"], wide["neighbors"], rtol=0.1, atol=0)


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 3e-6])
def test_views_of_a_nearly_invariant_network_have_the_neighbours_of_float64(spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    views = 1 + torch.randn(20, 1, 32, generator=generator) + spread * torch.randn(20, 12, 32, generator=generator)
    others = torch.tensor([[other for other in range(12) if other != query] for query in range(12)])
    expected = [nnk(image.double(), others).active.sum(1).double().mean() for image in views]
    got = augmentation_metrics(views)["neighbors"]
    assert (got == torch.stack(expected)).double().mean() > 0.9


def test_views_that_are_equal_are_no_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(3, 6, 8, generator=generator)
    views[0] = views[0, 0]  # all equal
    views[1, 1] = views[1, 0]  # two are
    metrics = augmentation_metrics(views)
    assert float(metrics.pop("diameter")[0]) == 0, "a point"
    assert all(bool(values[0].isnan()) for values in metrics.values())
    assert all(bool(values[1:].isfinite().all()) for values in metrics.values())
    # Without the second, the first has the neighbours that it had: the copy never was one of them.
    x = views[1, [0, 2, 3, 4, 5]]
    ids = torch.tensor([[j for j in range(5) if j != i] for i in range(5)])
    first = float(nnk(x, ids).active[0].sum())
    assert first >= 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "nanmean", lambda self, dim: self[:, 0])
        assert float(augmentation_metrics(views)["neighbors"][1]) == first


def moved(views: Tensor) -> Tensor:
    """All views of an image are equal, but for the first of them, in its last digit."""
    views = views[:, :1].expand_as(views).contiguous()
    views[:, 0, 0] = views[:, 0, 0].nextafter(torch.tensor(torch.inf))
    return views


def two_groups(views: Tensor) -> Tensor:
    """Copies of two kinds, equal in each."""
    return views[:, [0, 0, 0, 1, 1, 1]]


def tight_groups(views: Tensor) -> Tensor:
    return two_groups(views) + 1e-6 * views


def other_lengths(views: Tensor) -> Tensor:
    """The same direction, but for rounding."""
    return views[:, :1] * (1 + torch.arange(6)).unsqueeze(1)


@pytest.mark.parametrize(
    ("make", "largest"), [(moved, 1e-6), (two_groups, 0), (tight_groups, 1e-3), (other_lengths, 1e-6)]
)
def test_nearly_invariant_images_have_a_diameter_of_about_0_and_count_in_the_mean(make, largest: float) -> None:
    views = torch.randn(8, 6, 16, generator=torch.Generator().manual_seed(0))
    varied = augmentation_metrics(views)["diameter"]
    invariant = augmentation_metrics(make(views))["diameter"]
    assert 0 <= float(invariant.min()) <= float(invariant.max()) <= largest
    half = augmentation_metrics(torch.cat([views[:4], make(views[4:])]))["diameter"]
    assert float(half.nanmean()) == pytest.approx(float(varied[:4].mean()) / 2, rel=1e-3)


def test_a_polytope_of_one_neighbour_has_diameter_0_and_one_of_none_has_none() -> None:
    ids = torch.tensor([[1, 2], [0, 2], [0, 1]])
    active = torch.tensor([[True, True], [True, False], [False, False]])
    metrics = manifold_metrics(torch.eye(3), ids, neighborhoods(active))
    np.testing.assert_allclose(metrics["diameter"], [np.sqrt(2), 0, np.nan], rtol=1e-6)
    np.testing.assert_array_equal(metrics["neighbors"], [2, 1, np.nan])
    assert bool(metrics["affinity"].isnan().all()), "one point has no direction"


def test_of_equal_views_the_first_stands_for_all() -> None:
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(4, 5, 8, generator=generator)
    twice = views[:, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    for name in ("neighbors", "diameter", "affinity", "angle"):
        torch.testing.assert_close(augmentation_metrics(twice)[name], augmentation_metrics(views)[name])


def test_memory_is_bounded_and_the_parts_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    views = torch.randn(50, 6, 8, generator=torch.Generator().manual_seed(0))
    whole, sizes = augmentation_metrics(views), []

    def solve(local: Tensor, **options: Tensor) -> NNK:
        sizes.append(local.numel())
        return exact(local, **options)

    exact = module.solve_cosine
    monkeypatch.setattr(module, "solve_cosine", solve)
    monkeypatch.setattr(module, "DISTANCES", 7 * 6**3 + 1)
    parts = augmentation_metrics(views)
    assert sizes == 7 * [7 * 6**3] + [6**3]
    for name in NAMES:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=1e-6)


def test_a_collapsed_network_has_no_diameter() -> None:
    features = torch.full((8, 4), 0.7)
    ids = torch.tensor([[j for j in range(8) if j != i] for i in range(8)])
    metrics = manifold_metrics(features, ids, nnk(features, ids))
    assert bool((metrics["neighbors"] >= 1).all())
    assert bool(metrics["affinity"].isnan().all())
    assert not bool((metrics["diameter"] > 1e-6).any())


def test_two_clusters_are_as_wide_as_a_cluster_and_not_as_their_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    features = torch.eye(16)[labels] + 0.02 * torch.randn(80, 16, generator=generator)
    ids = same_class_ids(features, labels, 10)
    metrics = manifold_metrics(features, ids, nnk(features, ids))
    assert 0.02 < float(metrics["diameter"].min()) < float(metrics["diameter"].max()) < 0.3  # clusters are 1.4 apart


def test_the_random_baseline_is_another_image_and_depends_on_the_seed_alone() -> None:
    assert bool((module._others(1, 2, 0, torch.device("cpu")) == torch.tensor([[1, 0]])).all())
    others = module._others(50, 10, 0, torch.device("cpu"))
    assert not bool((others == torch.arange(10)).any())
    assert len(others.unique()) == 10
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    ids = (torch.arange(30).unsqueeze(1) + torch.arange(1, 9)) % 30
    result = nnk(features, ids)
    a, b, c = (manifold_metrics(features, ids, result, seed=seed)["affinity_random"] for seed in (0, 0, 1))
    assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert not torch.equal(a.nan_to_num(), c.nan_to_num())


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 60), k=st.integers(1, 12), classes=st.integers(1, 6), seed=st.integers(0, 99))
def test_same_class_candidates_are_the_nearest_of_their_class(n: int, k: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, labels = rng.standard_normal((n, 5)), rng.integers(0, classes, n)
    ids = same_class_ids(torch.from_numpy(x), torch.from_numpy(labels), k).numpy()
    cosines = unit(x) @ unit(x).T
    for i in range(n):
        others = [j for j in np.argsort(-cosines[i]) if labels[j] == labels[i] and j != i][:k]
        np.testing.assert_array_equal(ids[i], others + (k - len(others)) * [-1])


def test_of_equal_images_the_first_stands_for_all_and_is_no_candidate_of_its_duplicates() -> None:
    features = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    features[0, 0] = 0.0
    features[10, 0] = -0.0  # equal, though of other bits
    ids = same_class_ids(features, torch.zeros(20, dtype=torch.long), 19)
    for i, row in enumerate(ids.tolist()):
        assert sorted(row[:9]) == [j for j in range(10) if j != i % 10]
        assert row[9:] == 10 * [-1]
    features[:] = features[0]
    assert bool((same_class_ids(features, torch.arange(20) % 2, 3) == -1).all())


def test_same_class_candidates_are_distinguished_where_cosines_round_to_one() -> None:
    x = (1 + 1e-5 * np.random.default_rng(0).standard_normal((200, 64))).astype(np.float32)
    ids = same_class_ids(torch.from_numpy(x), torch.zeros(200, dtype=torch.long), 5).numpy()
    apart = np.square(unit(x.astype(np.float64))[:, None] - unit(x.astype(np.float64))).sum(2)
    np.fill_diagonal(apart, np.inf)
    assert (ids == np.argsort(apart, axis=1)[:, :5]).all()


def test_same_class_candidates_are_ranked_as_all_neighbours_are() -> None:
    """Ties too: the smaller number first."""
    few = torch.eye(30)[torch.arange(40) % 30], torch.zeros(40, dtype=torch.long)
    assert torch.equal(same_class_ids(*few, 4), nearest(few[0], k=4).ids)
    assert same_class_ids(*few, 4)[[0, 2, 39]].tolist() == [[1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3]]


IDS = torch.tensor([[1, 2], [0, 2], [0, 1]])
RESULT = neighborhoods(IDS >= 0)
BAD = [
    (lambda: manifold_metrics(torch.eye(4), IDS, RESULT), r"belong to the 4 features, got \(3, 2\) and \(3, 2\)"),
    (lambda: manifold_metrics(torch.eye(3), IDS[:, :1], RESULT), r"the 3 features, got \(3, 1\) and \(3, 2\)"),
    (lambda: manifold_metrics(torch.zeros(3, 2), IDS, RESULT), r"3 of 3 images are zero vectors"),
    (lambda: manifold_metrics(torch.full((3, 2), torch.nan), IDS, RESULT), r"3 of 3 images have NaN"),
    (lambda: augmentation_metrics(torch.ones(4, 2, 8)), r"at least 3 views of each image, got 4 images, 2 views"),
    (lambda: augmentation_metrics(torch.ones(0, 5, 8)), r"at least 3 views of each image, got 0 images, 5 views"),
    (lambda: same_class_ids(torch.eye(3), torch.zeros(3), 0), r"got k=0, 3 of 3"),
    (lambda: same_class_ids(torch.eye(3), torch.zeros(2), 1), r"got k=1, 2 of 3"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_what_cannot_be_measured_is_refused_in_one_line(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# -- standard errors ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 25), st.integers(1, 3), st.integers(0, 100))
def test_errors_are_sums_over_pairs_that_share_an_image(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, shared, labels = rng.standard_normal(n), rng.integers(n, size=(n, m)), rng.integers(3, size=n)
    values[rng.random(n) < 0.2] = np.nan
    known = np.flatnonzero(~np.isnan(values))
    for groups in (None, labels):
        apart = values - np.nanmean(values) if len(known) else values
        total = np.square(apart[known]).sum()
        center = {c: np.mean([values[i] for i in known if groups is None or groups[i] == c]) for c in labels[known]}
        for i in known:
            for j in known:
                if i == j or not set(shared[i]) & set(shared[j]):
                    continue
                if groups is None:
                    total += apart[i] * apart[j]
                    continue
                own = [k for k in known if labels[k] == labels[i]]
                squares = sum((values[k] - center[labels[i]]) ** 2 for k in own)
                total += (values[i] - center[labels[i]]) * (values[j] - center[labels[j]])
                total += squares / max(len(own) * (len(own) - 1), 1)
        expected = np.sqrt(max(total, 0)) / len(known) if len(known) > 1 else np.nan
        tensors = [None if part is None else torch.from_numpy(part) for part in (values, shared, groups)]
        # Sums that cancel leave rounding, whose root is 1e-8.
        np.testing.assert_allclose(module._standard_error(*tensors), expected, rtol=1e-6, atol=1e-7)  # type: ignore[arg-type]


def test_pairs_that_have_one_number_between_them_count_once() -> None:
    each = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = torch.arange(500).unsqueeze(1) * 2 + torch.tensor([0, 1])
    error = module._standard_error(each.repeat_interleave(2), pairs.repeat_interleave(2, 0), None)
    assert float(error) == pytest.approx(float(each.std(correction=0)) / 500**0.5)


@pytest.mark.slow
def test_errors_of_semantic_manifolds_are_those_of_other_samples() -> None:
    """256 images of ten classes, drawn 60 times; as if independent, affinities would be covered 4 times in 5."""
    fixed = torch.Generator().manual_seed(1)
    centers, maps = torch.randn(10, 24, generator=fixed), torch.randn(10, 6, 24, generator=fixed) / 6**0.5
    means, errors = [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(10, (256,), generator=generator)
        latent = torch.randn(256, 1, 6, generator=generator)
        x = centers[labels] + (latent @ maps[labels]).squeeze(1) + 0.1 * torch.randn(256, 24, generator=generator)
        ids = same_class_ids(x, labels, 50)
        values, error = module.manifold_metrics_and_errors(x, ids, nnk(x, ids), labels)
        means.append(torch.stack([value.nanmean() for value in values.values()]))
        errors.append(torch.stack(list(error.values())))
    mean, error = torch.stack(means), torch.stack(errors)
    covered = ((mean - mean.mean(0)).abs() < 1.97 * error).double().mean(0)
    share = dict(zip(NAMES, covered.tolist(), strict=True))
    assert min(share.values()) >= 0.86, share  # 0.95 but for three standard errors of 60 samples
    variance = error.square().mean(0) / mean.var(0)
    assert bool(((variance > 0.6) & (variance < 2)).all()), variance
