"""``--model.compile true``: the run of an eager network, by one graph, with every monitor's hooks in it."""

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch._dynamo.utils import counters

from ssl_geometry.errors import UserError
from ssl_geometry.fit import FitCLI, fit
from ssl_geometry.methods import SimCLR, compilation
from ssl_geometry.methods.compilation import is_compiled
from ssl_geometry.models.taps import Taps
from ssl_geometry.records import read_records
from ssl_geometry.runs import read_checkpoint
from tests.integration.test_fit import losses, options

EXACT = [  # in float64 rounding hides no mistake
    "--trainer.precision=64-true",
    "--trainer.accelerator=cpu",
    "--trainer.check_val_every_n_epoch=1",
    "--data.eval_batch_size=50",  # measured in batches of two sizes
    "--invariance.every_n_epochs=1",
    "--spectrum.every_n_epochs=2",
    "--neighbors.every_n_epochs=2",
    "--neighbors.settings=[]",
    "--probes.every_n_epochs=1",
]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(
    params=[
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")),
    ]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What ``torch.compile`` compiles with: the slow parts of inductor, or all of it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
    torch.compiler.reset()
    counters.clear()
    yield request.param
    torch.compiler.reset()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints" / "last.ckpt", "")["state_dict"]


@pytest.mark.slow
def test_fit_is_the_same_run_by_one_graph(tmp_path: Path, backend: str) -> None:
    for name in ("false", "true"):
        fit(options(tmp_path, name, *EXACT, f"--model.compile={name}"))
    eager, compiled = tmp_path / "e" / "false", tmp_path / "e" / "true"
    assert counters["stats"]["unique_graphs"] == 1, "measured eagerly, never compiled again"
    assert not counters["graph_break"]
    np.testing.assert_allclose(losses(compiled), losses(eager), rtol=1e-10)
    torch.testing.assert_close(weights(compiled), weights(eager), rtol=1e-8, atol=1e-10)
    assert not any("_orig_mod" in key for key in weights(compiled))
    key = ["metric", "split", "epoch", "step", "layer", "layer_other", "view", "low"]
    frames = []
    for path in (eager, compiled):
        frame = read_records(path).replace({"model_other": {path.name: "itself"}})
        frames.append(frame.sort_values([*key, "model_other"]).set_index([*key[:-1], "model_other"])[["value", "n"]])
    assert {"cka", "invariance", "online_probe", "ridge_probe", "nnk_degree", "val/knn"} <= set(
        frames[0].index.get_level_values("metric")
    )
    pd.testing.assert_frame_equal(frames[1], frames[0], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_a_run_resumes_compiled_or_not(tmp_path: Path, backend: str) -> None:
    quiet = [*EXACT[:2], *(f"--{name}.every_n_epochs=0" for name in ("cka", "invariance", "neighbors", "spectrum"))]
    ways = {"eager": ("false", "false"), "first": ("true", "false"), "second": ("false", "true")}
    for name, (before, after) in ways.items():
        fit(options(tmp_path, name, *quiet, f"--model.compile={before}", epochs=1))
        fit(options(tmp_path, name, *quiet, f"--model.compile={after}", "--resume=auto", epochs=2))
    eager = tmp_path / "e" / "eager"
    assert len(losses(eager)) == 8
    for name in ("first", "second"):
        np.testing.assert_allclose(losses(tmp_path / "e" / name), losses(eager), rtol=1e-10)
        torch.testing.assert_close(weights(tmp_path / "e" / name), weights(eager), rtol=1e-8, atol=1e-10)
    assert counters["stats"]["unique_graphs"] == 1, "the second network takes the graph of the first"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_gradients_are_those_of_the_eager_network(backend: str, dtype: torch.dtype) -> None:
    """Beside outputs: where a forward reads a buffer that it updates, a compiler may get the gradient alone wrong."""
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        method = SimCLR(backbone="resnet10", width=0.25, image_size=16).to(dtype)
        if compiled:
            method.backbone.compile(dynamic=False)
        with Taps(method, "blocks", lambda name, x: x.mean((2, 3))) as taps:
            for _ in range(2):
                taps.captured = {}
                first, second = method(images).chunk(2)
                method.loss((first, second), {}).backward()  # type: ignore[typeddict-item]
            found.append(
                {
                    **{name: parameter.grad for name, parameter in method.named_parameters()},
                    **dict(method.named_buffers()),
                    **taps.captured,
                }
            )
    assert counters["stats"]["unique_graphs"] == 1
    largest = max(float(value.abs().max()) for value in found[0].values() if value.dtype == dtype)
    tolerance = torch.finfo(dtype).eps * 100 * largest
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("more", "expected"),
    [([], True), (["--trainer.deterministic=true"], False), (["--trainer.benchmark=false"], False)],
)
def test_cudnn_times_its_kernels_unless_bits_are_to_be_equal(tmp_path: Path, more: list[str], expected: bool) -> None:
    cli = FitCLI(options(tmp_path, "a", *more))
    try:
        assert torch.backends.cudnn.benchmark is expected
    finally:
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(False)
        cli.stop_on_signal.restore()
        cli.run.release()


# -- whether to ----------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine that has all that compiling for CUDA needs, until a test takes something away."""
    has = SimpleNamespace(triton=True, capability=(9, 0), programs={"gcc", "g++"})
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: has.triton or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has.capability)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: name if name in has.programs else None)
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    return has


@pytest.mark.parametrize(
    ("wanted", "device", "expected"),
    [
        (None, CUDA, True),
        (None, CPU, False),
        (True, CUDA, True),
        (True, CPU, True),
        (False, CUDA, False),
        (False, CPU, False),
    ],
)
def test_by_default_on_cuda(
    machine: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
    wanted: bool | None,
    device: torch.device,
    expected: bool,
) -> None:
    with caplog.at_level("INFO"):
        assert is_compiled(wanted, device) is expected
    assert len(caplog.records) == (wanted is not False), "what was decided is one line; what the user decided is known"
    assert all("--model.compile" in record.message and record.levelname == "INFO" for record in caplog.records)


def test_deterministic_training_is_eager_unless_asked_for(machine: SimpleNamespace) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert not is_compiled(None, CUDA)
        assert is_compiled(True, CUDA)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("lacks", "device", "message"),
    [
        ({"triton": False}, CUDA, "Triton is not installed"),
        ({"capability": (6, 1)}, CUDA, "Triton needs a GPU of compute capability 7.0, not 6.1"),
        ({"programs": {"g++"}}, CUDA, "no C compiler was found (gcc or clang, or one named by $CC)"),
        ({"programs": {"gcc"}}, CPU, "no C++ compiler was found (g++ or clang++, or one named by $CXX)"),
    ],
)
def test_what_is_missing(
    machine: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
    lacks: dict[str, object],
    device: torch.device,
    message: str,
) -> None:
    vars(machine).update(lacks)
    with pytest.raises(UserError) as error:
        is_compiled(True, device)
    assert str(error.value).startswith(f"--model.compile true: {message}")
    assert not is_compiled(None, device)
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [message in line for line in warned] == [True] * (device == CUDA)


def test_a_compiler_of_ones_own_is_named_by_the_environment(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.programs = {"my-cc"}
    monkeypatch.setitem(os.environ, "CC", "my-cc")
    assert is_compiled(True, CUDA)
