"""Exact search: all backends against float64, the rule that chooses among them, and FAISS's kernels."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_geometry.geometry import exact_search as exact
from ssl_geometry.geometry.exact_search import backend, exact_search, kernels
from ssl_geometry.geometry.neighbors import nearest
from tests.fake_cuda import FakeCuda

CPU = ("faiss", "torch")


@pytest.fixture(scope="module", autouse=True)
def products() -> Iterator[None]:
    """FAISS takes differences of few points, and products |x|² + |y|² - 2xy of many: test these on few."""
    before = exact.faiss().cvar.distance_compute_blas_threshold
    exact.faiss().cvar.distance_compute_blas_threshold = 1
    yield
    exact.faiss().cvar.distance_compute_blas_threshold = before


def cloud(kind: str, n: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(n, width, generator=generator)
    return {
        "normal": lambda: points,
        "positive": lambda: points.abs(),
        "heavy": lambda: points**3,
        "grid": lambda: points.round(),  # many equal distances
        "classes": lambda: points[:5][torch.arange(n) % 5] + 1e-4 * torch.randn(n, width, generator=generator),
    }[kind]()


def reference(queries: Tensor, points: Tensor, k: int, inner: bool) -> Tensor:
    """Ids by float64 differences, the smaller of equally near ones first."""
    x, y = queries.double(), points.double()
    far = -(x @ y.T) if inner else torch.stack([(row - y).square().sum(1) for row in x])
    return far.sort(dim=1, stable=True).indices[:, :k]


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("kind", ["normal", "positive", "heavy", "grid", "classes"])
@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 40), m=st.integers(1, 300), width=st.sampled_from([1, 3, 16, 600]), data=st.data())
def test_every_backend_orders_as_float64_does(kind: str, inner: bool, n: int, m: int, width: int, data: Any) -> None:
    queries, points = cloud(kind, n, width, 0), cloud(kind, m, width, data.draw(st.integers(0, 99)))
    k = data.draw(st.integers(1, m))
    expected = reference(queries, points, k, inner)
    with pytest.MonkeyPatch.context() as patch:
        for name in CPU:
            patch.setattr(exact, "backend", lambda *_, name=name: name)
            values, ids = exact_search(queries, points, k, inner=inner)
            assert torch.equal(ids, expected), name
            pairs = queries.double()[:, None], points.double()[ids]
            true = (pairs[0] * pairs[1]).sum(2) if inner else (pairs[0] - pairs[1]).square().sum(2)
            size = pairs[0].square().sum(2) + pairs[1].square().sum(2)
            assert bool(((values - true).abs() <= 1e-6 * size + 1e-30).all())


@pytest.mark.parametrize("metric", ["cosine", "l2", "inner"])
@pytest.mark.parametrize("kind", ["normal", "positive", "classes"])
def test_the_backend_changes_no_neighbour(kind: str, metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of points, where some neighbours are nearer to each other than float32 can tell."""
    points = cloud(kind, 3000, 64, 1)
    found = []
    for name in CPU:
        monkeypatch.setattr(exact, "backend", lambda *_, name=name: name)
        found.append(nearest(points, k=50, metric=metric))
    assert torch.equal(found[0].ids, found[1].ids)
    torch.testing.assert_close(
        found[0].values, found[1].values, rtol=1e-3, atol=1e-6 * float(points.square().sum(1).max())
    )


@pytest.mark.parametrize("width", [2, 64, 1024, 4096])
@pytest.mark.parametrize("kind", ["normal", "positive", "heavy"])
def test_float32_errs_by_less_than_is_allowed_for(kind: str, width: int) -> None:
    queries, points = cloud(kind, 30, width, 0), cloud(kind, 300, width, 1)
    for search in (exact._by_faiss, exact._by_torch):
        values, ids = search(queries, points, len(points), False)
        pairs = queries.double()[:, None], points.double()[ids]
        error = ((pairs[0] - pairs[1]).square().sum(2) - values).abs()
        size = pairs[0].square().sum(2) + pairs[1].square().sum(2)
        assert float((error / size).max()) < exact.ERROR["cpu"] * torch.finfo(torch.float32).eps


def test_torch_works_in_blocks_and_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, points = cloud("normal", 100, 8, 0), cloud("normal", 50, 8, 1)
    whole, shapes, seen = exact._by_torch(queries, points, 5, False), [], []
    addmm = torch.addmm

    def watched(*args: Any, **options: Any) -> Tensor:
        found = addmm(*args, **options)
        shapes.append(found.shape)
        seen.append((torch.backends.cuda.matmul.fp32_precision, found.dtype))
        return found

    monkeypatch.setattr(torch, "addmm", watched)
    monkeypatch.setitem(exact.PRODUCTS, "cpu", 7 * 50 + 1)
    before, torch.backends.cuda.matmul.fp32_precision = torch.backends.cuda.matmul.fp32_precision, "tf32"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            blocks = exact._by_torch(queries, points, 5, False)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert shapes == 14 * [(7, 50)] + [(2, 50)]
    assert set(seen) == {("ieee", torch.float32)}
    assert torch.equal(blocks[1], whole[1])


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(exact, "faiss_blas", lambda: ("0.3.15", "SkylakeX"))
    monkeypatch.setattr(exact.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(exact, "has_gpu", lambda: True)
    assert [backend(cpu, 50), backend(cuda, 49), backend(cuda, 50)] == ["faiss", "faiss-gpu", "torch"]
    monkeypatch.setattr(exact, "has_gpu", lambda: False)
    assert backend(cuda, 10) == "torch"
    monkeypatch.setattr(exact, "faiss_blas", lambda: None)
    assert backend(cpu, 10) == "faiss", "MKL, say"
    for machine, core, expected in (
        ("x86_64", "Prescott", "torch"),
        ("x86_64", "Barcelona", "torch"),
        ("x86_64", "Zen", "faiss"),
        ("aarch64", "armv8", "torch"),
        ("aarch64", "neoversen1", "faiss"),
    ):
        monkeypatch.setattr(exact.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(exact, "faiss_blas", lambda core=core: ("0.3.15", core))
        assert backend(cpu, 10) == expected


INTEL, AMD = "vendor_id\t: GenuineIntel\n", "vendor_id\t: AuthenticAMD\n"
AVX512 = "flags\t\t: fma avx2 avx512f avx512dq avx512cd avx512bw avx512vl\n"


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "expected"),
    [
        ("x86_64", INTEL + AVX512, "SkylakeX"),
        ("x86_64", AMD + AVX512, "SkylakeX"),
        ("x86_64", INTEL + AVX512.replace(" avx512vl", ""), "Haswell"),
        ("x86_64", INTEL + "flags\t\t: fma avx2\n", "Haswell"),
        ("AMD64", AMD + "flags\t\t: fma avx2\n", "Zen"),
        ("x86_64", INTEL + "flags\t\t: sse4_2 avx\n", None),
        ("aarch64", "Features\t: fp asimd\n", None),
        ("x86_64", "", None),
    ],
)
def test_kernels_by_the_flags_of_the_cpu(machine: str, cpuinfo: str, expected: str | None) -> None:
    assert kernels(machine, cpuinfo) == expected


REPORT = """
import os, sys
import ssl_geometry.geometry.exact_search as exact
exact.faiss()
import scipy.linalg
from threadpoolctl import threadpool_info
found = {part.split('/')[-2]: library['architecture'] for library in threadpool_info()
         if library['user_api'] == 'blas' for part in [library['filepath']]}
print(exact.faiss_blas(), os.environ.get('OPENBLAS_CORETYPE'))
print(sorted((key, value) for key, value in found.items() if 'faiss' not in key))
"""


def libraries(before: str = "", **environment: str) -> list[str]:
    kept = {key: value for key, value in os.environ.items() if key != "OPENBLAS_CORETYPE"}
    code = before + REPORT
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=kept | environment
    )
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_choice_reaches_faiss_alone() -> None:
    own, others = libraries()
    if own.startswith("None"):
        pytest.skip("this FAISS brings no OpenBLAS")
    chosen = exact.kernels(exact.platform.machine(), exact.Path("/proc/cpuinfo").read_text())
    if chosen is not None:
        assert f"'{chosen}') None" in own
    _, untouched = libraries("import numpy, scipy.linalg\n")
    assert others == untouched, "NumPy and SciPy keep the kernels that they choose themselves"


@pytest.mark.slow
def test_what_the_user_chose_stands() -> None:
    own, _ = libraries(OPENBLAS_CORETYPE="Nehalem")
    if own.startswith("None"):
        pytest.skip("this FAISS brings no OpenBLAS")
    assert own.endswith("'Nehalem') Nehalem")


@pytest.mark.parametrize("k", [5, 60])
@pytest.mark.parametrize("metric", ["cosine", "l2", "inner"])
@pytest.mark.parametrize("gpu_support", [True, False])
def test_a_pretended_gpu(gpu_support: bool, metric: Any, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAISS with and without GPU support (faiss-cpu on a CUDA machine, as on aarch64)."""
    points = torch.cat([cloud("normal", 150, 8, 0), cloud("classes", 150, 8, 1), cloud("normal", 20, 8, 0)])
    here = nearest(points, k=k, metric=metric)
    with FakeCuda() as gpu:
        if not gpu_support:
            monkeypatch.delattr(exact.faiss(), "StandardGpuResources")
            monkeypatch.delattr(exact.faiss(), "knn_gpu")
        exact.gpu_resources.cache_clear()
        torch.use_deterministic_algorithms(True)
        try:
            there = nearest(points.to("cuda"), k=k, metric=metric)
        finally:
            torch.use_deterministic_algorithms(False)
            exact.gpu_resources.cache_clear()
        assert there.ids.is_cuda
        assert there.values.is_cuda
        ids, values = there.ids.cpu(), there.values.cpu()
        monkeypatch.undo()
    assert not gpu.faults, gpu.report()
    assert torch.equal(ids, here.ids)
    torch.testing.assert_close(values, here.values, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    ("free", "failures", "emptied", "where"),
    [
        ([2**30, 2**30], 0, 0, "GPU"),
        ([2**20, 2**30], 0, 1, "GPU"),  # torch's cache gives it back
        ([2**30] * 4, 1, 1, "GPU"),  # what the search itself allocates
        ([2**30] * 4, 2, 2, "CPU"),
        ([2**20] * 4, 0, 4, "CPU"),  # FAISS is not started: where cuBLAS has no memory, it aborts the process
    ],
)
def test_a_gpu_whose_memory_is_full(
    free: list[int], failures: int, emptied: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    points, told, room = cloud("normal", 60, 4, 0), [], iter(free)
    here = nearest(points, k=3)
    with FakeCuda() as gpu, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library, calls = exact.faiss(), []
        search: Callable[..., Any] = library.knn_gpu

        def knn_gpu(*args: Any, **options: Any) -> Any:
            calls.append(args[0])
            if len(calls) <= failures:
                raise RuntimeError(
                    "Error in allocMemory at x.cpp:1: Error: 'err == cudaSuccess' failed: alloc fail type"
                )
            return search(*args, **options)

        monkeypatch.setattr(library, "knn_gpu", knn_gpu)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("empty"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(room), 2**34))
        exact.gpu_resources.cache_clear()
        there = nearest(points.to("cuda"), k=3)
        assert there.ids.is_cuda
        ids = there.ids.cpu()
        monkeypatch.undo()
    exact.gpu_resources.cache_clear()
    assert not gpu.faults, gpu.report()
    assert torch.equal(ids, here.ids)
    assert len(told) == emptied
    assert len({id(resources) for resources in calls}) == len(calls), "made anew after a failure"
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (where == "CPU")
    assert all("on the CPU" in message and "\n" not in message for message in messages)


def test_other_errors_of_a_search_on_a_gpu_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    def knn_gpu(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with FakeCuda():
        monkeypatch.setattr(exact.faiss(), "knn_gpu", knn_gpu)
        with pytest.raises(RuntimeError, match="assert"):
            nearest(cloud("normal", 30, 4, 0).to("cuda"), k=3)
        monkeypatch.undo()
    exact.gpu_resources.cache_clear()


def test_resources_of_a_gpu_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    with FakeCuda():
        resources: Callable[[], Any] = exact.faiss().StandardGpuResources
        monkeypatch.setattr(exact.faiss(), "StandardGpuResources", lambda: made.append(resources()) or made[-1])
        exact.gpu_resources.cache_clear()
        points = cloud("normal", 30, 4, 0).to("cuda")
        for _ in range(3):
            nearest(points, k=3)
        monkeypatch.undo()
    exact.gpu_resources.cache_clear()
    assert len(made) == 1
