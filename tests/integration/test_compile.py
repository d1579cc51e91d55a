"""``--model.compile true``: the run of an eager network, by one graph, with every monitor's hooks in it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from ssl_geometry.errors import UserError
from ssl_geometry.fit import fit
from ssl_geometry.fit_cli import FitCLI
from ssl_geometry.methods import SimCLR
from ssl_geometry.methods.parts.compilation import is_compiled, try_out
from ssl_geometry.models.taps import Taps
from ssl_geometry.records import read_records
from ssl_geometry.records.catalogue import described
from ssl_geometry.runs.checkpoints import read_checkpoint
from tests.fake_cuda import FakeCuda
from tests.integration.test_fit import losses, options

EXACT = [  # in float64 rounding hides no mistake
    "--trainer.precision=64-true",
    "--trainer.accelerator=cpu",
    "--trainer.check_val_every_n_epoch=1",
    "--model.width=0.0625",
    "--data.limit_train=128",
    "--data.limit_test=64",
    "--data.measure_size=64",
    "--data.batch_size=32",
    "--data.eval_batch_size=50",  # measured in batches of two sizes
]
MONITORED = [
    "--cka.layers=blocks",
    "--invariance.every_n_epochs=1",
    "--invariance.layers=stages",
    "--spectrum.every_n_epochs=2",
    "--spectrum.layers=[pooled]",
    "--neighbors.every_n_epochs=2",
    "--neighbors.settings=[]",
    "--neighbors.layers=[pooled]",
    "--neighbors.k=10",
    "--probes.every_n_epochs=1",
    "--probes.layers=stages",
]
TRIAL = 1
"""The graph that shows whether this machine can compile."""
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(params=["aot_eager" if shutil.which("g++") is None else "inductor"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What ``torch.compile`` compiles with: inductor, or its first half, which needs no C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
    torch.compiler.reset()
    counters.clear()
    yield request.param
    torch.compiler.reset()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(run / "checkpoints" / "last.ckpt", "")["state_dict"]


@pytest.fixture
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(options(tmp_path_factory.mktemp("eager"), "a", *EXACT, *MONITORED, "--model.compile=false")).directory


@pytest.mark.slow
def test_fit_is_the_same_run_by_one_graph(tmp_path: Path, eager: Path, backend: str) -> None:
    compiled = fit(options(tmp_path, "a", *EXACT, *MONITORED, "--model.compile=true")).directory
    assert counters["stats"]["unique_graphs"] == TRIAL + 1, "measured eagerly, never compiled again"
    assert not counters["graph_break"]
    np.testing.assert_allclose(losses(compiled), losses(eager), rtol=1e-10)
    torch.testing.assert_close(weights(compiled), weights(eager), rtol=1e-8, atol=1e-10)
    assert not any("_orig_mod" in key for key in weights(compiled))
    key = ["metric", "split", "epoch", "step", "layer", "layer_other", "view", "low"]
    frames = []
    for path in (eager, compiled):
        frame = read_records(path).replace({"model_other": {path.name: "itself"}})
        frames.append(frame.sort_values([*key, "model_other"]).set_index([*key[:-1], "model_other"])[["value", "n"]])
    metrics = set(frames[0].index.get_level_values("metric"))
    assert {"cka", "invariance", "online_probe", "ridge_probe", "nnk_degree", "val/knn"} <= metrics
    assert not [name for name in metrics if described(name).section == "other"], "the catalogue knows what fit records"
    pd.testing.assert_frame_equal(frames[1], frames[0], rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_a_run_resumes_compiled_or_not(tmp_path: Path, backend: str) -> None:
    quiet = [*EXACT, "--trainer.check_val_every_n_epoch=100", "--cka.every_n_epochs=0", "--probes.every_n_epochs=0"]
    ways = {"eager": ("false", "false"), "first": ("true", "false"), "second": ("false", "true")}
    for name, (before, after) in ways.items():
        fit(options(tmp_path, name, *quiet, f"--model.compile={before}", epochs=1))
        fit(options(tmp_path, name, *quiet, f"--model.compile={after}", "--resume=auto", epochs=2))
    eager = tmp_path / "e" / "eager"
    assert len(losses(eager)) == 8
    for name in ("first", "second"):
        np.testing.assert_allclose(losses(tmp_path / "e" / name), losses(eager), rtol=1e-10)
        torch.testing.assert_close(weights(tmp_path / "e" / name), weights(eager), rtol=1e-8, atol=1e-10)
    assert counters["stats"]["unique_graphs"] == TRIAL + 1, "the second network takes the graph of the first"


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


@pytest.fixture(params=[CUDA, CPU], ids=str)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with FakeCuda() if request.param == CUDA else nullcontext():
        yield request.param


@pytest.fixture
def compiler(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine that compiles for any device, until a test breaks it."""
    state = SimpleNamespace(error=None)

    def try_out(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def compiled(x: torch.Tensor) -> torch.Tensor:
            if state.error:
                raise state.error
            return function(x)

        return compiled

    monkeypatch.setattr(torch, "compile", try_out)
    return state


@pytest.mark.parametrize("wanted", [None, True, False])
def test_by_default_on_cuda(
    compiler: SimpleNamespace, caplog: pytest.LogCaptureFixture, wanted: bool | None, device: torch.device
) -> None:
    with caplog.at_level("INFO"):
        assert is_compiled(wanted, device) is (device == CUDA if wanted is None else wanted)
    assert len(caplog.records) == (wanted is not False), "what was decided is one line; what the user decided is known"
    assert all("--model.compile" in record.message and record.levelname == "INFO" for record in caplog.records)


def test_deterministic_training_is_eager_unless_asked_for(compiler: SimpleNamespace, device: torch.device) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert not is_compiled(None, device)
        assert is_compiled(True, device)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_machine_that_cannot_compile(
    compiler: SimpleNamespace, caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    compiler.error = RuntimeError("\nCannot find a working triton installation.\nMore lines.")
    with pytest.raises(UserError, match=r"^--model.compile true: .* \(Cannot find a working triton installation\.\)"):
        is_compiled(True, device)
    assert not is_compiled(None, device)
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert ["Cannot find a working triton" in line and "\n" not in line for line in warned] == [True] * (device == CUDA)


def test_no_compiler() -> None:
    torch.compiler.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)}), fresh_cache():
        assert "compiler" in try_out(CPU).lower()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiler() -> None:
    torch.compiler.reset()
    assert try_out(CPU) == ""
