"""Strategies that split the network, more GPUs than training is worth, and full memory."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import StrategyRegistry

from ssl_geometry.compare import compare
from ssl_geometry.config_files import expand_bases
from ssl_geometry.devices import (
    FEW_IMAGES,
    FEW_PIXELS,
    ManyDevices,
    check_devices,
    check_strategy,
    check_torchrun,
    memory_for_measuring,
    out_of_memory,
    too_many,
)
from ssl_geometry.errors import UserError
from ssl_geometry.fit import fit, main
from ssl_geometry.probe import probe
from ssl_geometry.survey import survey

PLACE = "lightning.pytorch.strategies"
SHARDED = [
    "fsdp",
    "FSDP",
    "fsdp_cpu_offload",
    *(name for name in StrategyRegistry.available_strategies() if name.startswith("deepspeed")),
    {"class_path": f"{PLACE}.FSDPStrategy", "init_args": {"cpu_offload": True}},
    {"class_path": f"{PLACE}.DeepSpeedStrategy"},
    {"class_path": f"{PLACE}.ModelParallelStrategy", "init_args": {"tensor_parallel_size": 2}},
    {"class_path": f"{PLACE}.fsdp.FSDPStrategy"},
]
WHOLE = [
    None,
    "auto",
    "ddp",
    "DDP",
    "ddp_find_unused_parameters_true",
    "single_device",
    {"class_path": f"{PLACE}.DDPStrategy", "init_args": {"static_graph": True}},
]


def name_of(strategy: Any) -> str:
    return strategy["class_path"].rpartition(".")[2] if isinstance(strategy, dict) else str(strategy)


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp_spawn",
        "ddp_fork",
        "ddp_notebook",
        {"class_path": f"{PLACE}.DDPStrategy", "init_args": {"start_method": "spawn"}},
    ],
    ids=name_of,
)
def test_strategies_that_copy_a_run_into_processes_are_refused(strategy: Any) -> None:
    with pytest.raises(UserError, match=r"^--trainer\.strategy .*starts the processes by .*expected auto or ddp$"):
        check_strategy(strategy)


@pytest.mark.parametrize("devices", ["auto", -1, "-1", 1, 2, "2", [0, 1], [1], "0,1", "1,"])
def test_devices_that_a_machine_with_two_gpus_has(monkeypatch: pytest.MonkeyPatch, devices: Any) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for accelerator in ("auto", "gpu", "cuda"):
        check_devices(accelerator, devices)


@pytest.mark.parametrize("devices", [0, -2, 3, [0, 0], [2], [], [-1], "abc", "[", "0,0", "1.5", 1.5, "nan", {"a": 1}])
def test_devices_that_it_does_not_have(monkeypatch: pytest.MonkeyPatch, devices: Any) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"^--trainer\.devices .*(expected auto|this machine has 2 GPUs)"):
        check_devices("gpu", devices)


BY_SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}
BY_TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("accelerator", "devices", "nodes", "fits"),
    [
        ("cpu", 2, 2, True),
        ("cpu", "2", 2, True),
        ("auto", "auto", 2, True),
        ("gpu", -1, 2, True),
        ("gpu", [0, 1], 2, True),
        ("gpu", "0,1", 2, True),
        ("cpu", "auto", 2, False),
        ("cpu", 1, 1, False),
        ("gpu", "1,", 2, False),
        ("gpu", 2, 1, False),
        ("cpu", 4, 1, False),
    ],
)
def test_torchrun_starts_as_many_processes_as_the_options_say(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, devices: Any, nodes: int, fits: bool
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_torchrun(accelerator, devices, nodes, "--")
    for name, value in BY_TORCHRUN.items():
        monkeypatch.setenv(name, value)
    if fits:
        check_torchrun(accelerator, devices, nodes, "--trainer.")
        return
    with pytest.raises(UserError, match=r"torchrun has started 2 .*; set --trainer.devices 2 --trainer.num_nodes 2$"):
        check_torchrun(accelerator, devices, nodes, "--trainer.")


def test_commands_of_several_processes_ask_how_many_torchrun_has_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in (BY_TORCHRUN | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    args = ["--model=ssl_geometry.methods.SimCLR", "--trainer.accelerator=cpu", f"--runs={tmp_path / 'runs'}"]
    with pytest.raises(UserError, match=r"set --trainer\.devices 2 --trainer\.num_nodes 1$"):
        fit(args)
    assert not (tmp_path / "runs").exists()
    for command in (compare, probe, survey):
        with pytest.raises(UserError, match=r"set --devices 2 --num_nodes 1$"):
            command(["--models=random:resnet10", f"--out={tmp_path / 'out'}"])


@pytest.mark.parametrize(
    ("command", "asked", "words"),
    [
        (compare, ["--device=cuda:1"], r"^--device cuda:1: this machine has 1 GPU, numbered from 0"),
        (probe, ["--device=cuda:1"], r"^--device cuda:1: this machine has 1 GPU, numbered from 0"),
        (survey, ["--device=cuda:1"], r"^--device cuda:1: this machine has 1 GPU, numbered from 0"),
        (survey, ["--device=cuda", "--devices=2"], r"^--devices 2: this machine has 1 GPU$"),
    ],
)
def test_gpus_that_are_not_there_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: Any, asked: list[str], words: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=words):
        command(["--models=random:resnet10", f"--out={tmp_path / 'out'}", *asked])


@pytest.mark.parametrize("command", [compare, probe, survey])
def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: Any
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--out .*/file/x: .*/file is a file"):
        command(["--models=random:resnet10", f"--out={tmp_path / 'file' / 'x'}"])
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match=rf"^--out .*/a/b: {tmp_path} cannot be written to; choose another folder"):
        command(["--models=random:resnet10", f"--out={tmp_path / 'a' / 'b'}"])


@pytest.mark.parametrize("strategy", SHARDED, ids=name_of)
def test_strategies_that_split_the_network_are_refused(strategy: Any) -> None:
    with pytest.raises(UserError) as error:
        check_strategy(strategy)
    said = str(error.value)
    assert said.startswith(f"--trainer.strategy {strategy['class_path'] if isinstance(strategy, dict) else strategy}: ")
    assert "expected auto or ddp" in said
    assert "\n" not in said


@pytest.mark.parametrize("strategy", WHOLE, ids=name_of)
def test_strategies_that_leave_it_whole_are_not(strategy: Any) -> None:
    check_strategy(strategy)


@pytest.mark.parametrize(
    "value", ["fsdp", "deepspeed_stage_3", "fdsp", f"{PLACE}.FSDPStrategy", f"{PLACE}.ModelParallelStrategy"]
)
def test_fit_refuses_them_before_it_makes_a_folder(
    tmp_path: Any, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    more = ["--data.dataset=digits", f"--runs={tmp_path / 'runs'}", f"--trainer.strategy={value}"]
    with pytest.raises(SystemExit) as stop:
        main(["--model=ssl_geometry.methods.SimCLR", *more])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"--trainer.strategy {value}: " in line
    assert not (tmp_path / "runs").exists()


@given(nodes=st.integers(1, 4), each=st.integers(1, 16), share=st.integers(1, 200), images=st.integers(1, 10**6))
def test_fewer_devices_are_recommended_only_where_they_serve(nodes: int, each: int, share: int, images: int) -> None:
    batch = nodes * each * share
    line = too_many(nodes * each, nodes, batch, images, images * 1024)
    small = images * 1024 < FEW_PIXELS
    assert bool(line) == (each > 1 and (small or share < FEW_IMAGES))
    if line and not small:
        better = int(line.rpartition("--trainer.devices ")[2].split()[0])
        assert 1 <= better < each
        assert batch % (better * nodes) == 0 or better == 1
        assert better == 1 or batch // (better * nodes) >= FEW_IMAGES
        for more in range(better + 1, each):
            assert batch % (more * nodes) or batch // (more * nodes) < FEW_IMAGES, "the most that still serve"


def test_eight_gpus_for_digits_are_not_taken_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    data = SimpleNamespace(num_train=1_617, image_shape=(3, 16, 16), batch_size=128)
    for processes, said in ((8, 1), (1, 0)):
        caplog.clear()
        trainer: Any = SimpleNamespace(world_size=processes, num_nodes=1, datamodule=data)
        ManyDevices().setup(trainer, None, "fit")  # type: ignore[arg-type]
        ManyDevices().setup(trainer, None, "test")  # type: ignore[arg-type]
        assert len(caplog.messages) == said
    assert not caplog.messages or "--trainer.devices 1" in caplog.messages[0]


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    "config",
    [*CONFIGS.glob("*_cifar10.yaml"), *CONFIGS.glob("*_imagenet.yaml"), *CONFIGS.glob("quickstart/s*.yaml")],
    ids=lambda path: path.stem,
)
def test_configs_name_their_batch_memory_and_gpus(config: Path) -> None:
    comment = " ".join(line for line in config.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"\d GB \(estimate\)", comment)
    assert "GPU" in comment
    files = [Path(arg) for arg in expand_bases(["--config", str(config)]) if arg != "--config"]
    (batch,) = {yaml.safe_load(file.read_text()).get("data", {}).get("batch_size") for file in files} - {None}
    assert f"atch {batch:,}" in comment
    devices = [yaml.safe_load(file.read_text()).get("trainer", {}).get("devices") for file in files]
    assert (1 in devices) == ("quickstart" in config.parts)


FULL = [
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139 GiB\nmore"
    ),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("Error in virtual void* faiss::gpu::StandardGpuResourcesImpl::allocMemory: alloc fail type"),
    MemoryError(),
    MemoryError("std::bad_alloc"),
]
OTHER = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 4x3)"),
    RuntimeError("CUDA error: device-side assert triggered"),
    ValueError("out of memory"),
    KeyError("batch"),
]


def test_full_memory_is_known_by_what_allocators_raise() -> None:
    for error in FULL:
        said = out_of_memory(error)
        assert said
        assert "\n" not in said
    assert [out_of_memory(error) for error in OTHER] == [""] * len(OTHER)


@pytest.mark.parametrize("error", [*FULL, *OTHER], ids=lambda error: str(error)[:30])
def test_commands_that_measure_say_what_to_lower(error: Exception) -> None:
    data = SimpleNamespace(eval_batch_size=256)
    options = SimpleNamespace(device="cuda", data=data, layers_option="--cka.layers")
    expected = UserError if error in FULL else type(error)
    with pytest.raises(expected) as raised, memory_for_measuring(options):
        raise error
    if error in FULL:
        assert "lower --data.eval_batch_size 256" in str(raised.value)
        assert "fewer --cka.layers, or measure on --device cpu" in str(raised.value)
