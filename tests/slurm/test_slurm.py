"""On a real SLURM of two nodes: time limit, requeue, arrays, a cancelled job, a node that dies.

The cluster runs on this machine (``slurm/local_cluster.sh``): Debian's slurm-wlm and munge, as root. Where nothing but
what SLURM gives to a command matters, a stand-in for Python notes it, and the command is started from what is noted in
a process that has everything imported (``tests/processes.py``).
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import pandas as pd
import pytest

from ssl_geometry.callbacks.interruption import StopOnSignal
from ssl_geometry.compare import compare
from ssl_geometry.probe import probe
from ssl_geometry.records import read_records
from ssl_geometry.runs.checkpoints import read_checkpoint
from ssl_geometry.survey import survey
from tests.integration.test_fit import SMALL, losses
from tests.processes import HANG_SECONDS, finish, start, start_ranks

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
READY = os.geteuid() == 0 and all(shutil.which(name, path=PATH) for name in ("slurmctld", "slurmd", "munged"))
pytestmark = pytest.mark.skipif(not READY, reason="needs root and Debian's slurm-wlm and munge")


class Hold(L.Callback):
    """Waits before a step until a signal has come, whenever that is.

    Args:
        step: the step.
        rank: of the process that waits, -1 for all.
        task: of a job array that waits; "" where there is none.
        restarts: how many times the job has run before.
    """

    def __init__(self, step: int, rank: int = -1, task: str = "", restarts: int = 0) -> None:
        self.step, self.rank, self.task, self.restarts = step, rank, task, restarts

    def on_train_batch_start(self, trainer: L.Trainer, *args: object, **kwargs: object) -> None:
        here = os.environ.get("SLURM_ARRAY_TASK_ID", "") == self.task and self.rank in (-1, trainer.global_rank)
        now = int(os.environ.get("SLURM_RESTART_COUNT", 0)) == self.restarts
        if trainer.global_step != self.step or not here or not now:
            return
        Path(trainer.default_root_dir, f"held.{self.step}.{trainer.global_rank}").touch()
        (stop,) = (callback for callback in trainer.callbacks if isinstance(callback, StopOnSignal))  # type: ignore[attr-defined]
        while not stop.signal:
            time.sleep(0.05)


def hold(*places: dict[str, object]) -> str:
    """Options of each ``Hold``."""
    callbacks = [{"class_path": f"{__name__}.Hold", "init_args": place} for place in places]
    return f"--trainer.callbacks={json.dumps(callbacks)}"


NOTE = f"""#!/bin/bash
[ "$SLURM_ARRAY_TASK_ID" = "$NOT_NOTED" ] && exec {sys.executable} "$@"
name=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}.${{SLURM_ARRAY_TASK_ID:-0}}.${{SLURM_STEP_ID:-0}}.$SLURM_PROCID
printf '%s\\0' "$@" > "$NOTES/$name.args"
env -0 > "$NOTES/$name.environment"
"""
"""Stands for ``python`` in a job, but in the task NOT_NOTED of an array."""


class Noted(NamedTuple):
    """A command that SLURM would have started."""

    module: str
    args: list[str]
    environment: dict[str, str]


class Cluster:
    """Submits batch scripts and waits for them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SSL_GEOMETRY"))},
            "SLURM_CONF": str(directory / "slurm.conf"),
            "SLURM_LOCAL_PORT": "17100",
            "SLURM_LOCAL_NODE_TIMEOUT": "10",
            "SLURM_LOCAL_KILL_WAIT": "300",  # beside other work, saving takes as long as it takes
            "PATH": PATH,
            "MASTER_ADDR": "127.0.0.1",  # n1 and n2 are names of SLURM's alone
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
        }

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=self.directory, capture_output=True, text=True, timeout=HANG_SECONDS
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, script: str, *options: str, args: list[str]) -> str:
        small = ["--gpus-per-node=0", "--cpus-per-task=1"]
        return self("sbatch", "--parsable", *small, *options, str(ROOT / "slurm" / script), *args).strip()

    def wrap(self, command: str, *options: str) -> str:
        return self("sbatch", "--parsable", "--output=slurm-%j.out", *options, f"--wrap={command}").strip()

    @contextmanager
    def notes(self, but: str = "none") -> Iterator[None]:
        """What jobs that are submitted meanwhile would start is noted, but for a task of an array."""
        (folder := self.directory / "notes").mkdir(exist_ok=True)
        (folder / "python").write_text(NOTE)
        (folder / "python").chmod(0o755)
        before = self.environment
        self.environment = {**before, "PATH": f"{folder}:{PATH}", "NOTES": str(folder), "NOT_NOTED": but}
        yield
        self.environment = before

    def noted(self, job: str) -> list[Noted]:
        """By the task of an array, the step and the process."""
        found = []
        for path in sorted((self.directory / "notes").glob(f"{job}.*.args")):
            dash_m, module, *args = path.read_text().split("\0")[:-1]
            assert dash_m == "-m"
            variables = path.with_suffix(".environment").read_text().split("\0")[:-1]
            found.append(Noted(module, args, dict(variable.split("=", 1) for variable in variables)))
        return found

    def facts(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", job)))

    def wait(self, job: str, until: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        end = time.monotonic() + HANG_SECONDS
        while not until(facts := self.facts(job)):
            over = facts["JobState"] in ENDED and until is not has_ended
            assert not over, f"{facts['JobState']}\n{self.output(job)}"
            assert time.monotonic() < end, f"it hangs: {facts['JobState']}\n{self.output(job)}"
            time.sleep(0.2)
        return facts

    def wait_until(self, condition: Callable[[], bool], job: str) -> None:
        end = time.monotonic() + HANG_SECONDS
        while not condition():
            assert time.monotonic() < end, f"it hangs\n{self.output(job)}"
            time.sleep(0.2)

    def ended(self, job: str) -> dict[str, str]:
        return self.wait(job, has_ended)

    def output(self, job: str) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.directory.glob(f"slurm-{job}*.out")))


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def has_ended(facts: dict[str, str]) -> bool:
    return facts["JobState"] in ENDED


def has_restarted(times: int) -> Callable[[dict[str, str]], bool]:
    return lambda facts: facts["Restarts"] == str(times)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    script = str(ROOT / "slurm" / "local_cluster.sh")
    cluster(script, "start", str(cluster.directory))
    yield cluster
    subprocess.run([script, "stop", str(cluster.directory)], env=cluster.environment)


def options(runs: Path, *more: str, epochs: int = 4) -> list[str]:
    model = "--model=ssl_geometry.methods.SimCLR"
    fast = ["--trainer.check_val_every_n_epoch=100", "--probes.every_n_epochs=2", "--cka.every_n_epochs=2"]
    fast += ["--cka.layers=stages", "--probes.layers=stages"]
    return [model, *SMALL, *fast, f"--runs={runs}", "--experiment=e", f"--trainer.max_epochs={epochs}", *more]


def _environments() -> dict[int, set[bytes]]:
    """The variables of all processes."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found[int(process.name)] = set((process / "environ").read_bytes().split(b"\0"))
    return found


def _processes_of(job: str) -> list[int]:
    return [process for process, given in _environments().items() if f"SLURM_JOB_ID={job}".encode() in given]


TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training by two processes without SLURM."""
    runs = tmp_path_factory.mktemp("undisturbed")
    processes = start_ranks(2, options(runs, "--run_id=a"), runs / "out")
    assert [finish(process) for process in processes] == [0, 0], (runs / "out").read_text()
    return runs / "e" / "a"


def assert_as_undisturbed(run: Path, undisturbed: Path) -> None:
    weights = [read_checkpoint(path / "checkpoints" / "last.ckpt", "")["state_dict"] for path in (undisturbed, run)]
    for name, value in weights[0].items():
        np.testing.assert_array_equal(weights[1][name], value, err_msg=name)
    pd.testing.assert_series_equal(losses(run), losses(undisturbed), check_exact=True)
    columns = ["metric", "epoch", "step", "layer", "layer_other", "value"]
    frames = [read_records(path)[columns].sort_values(columns, ignore_index=True) for path in (undisturbed, run)]
    pd.testing.assert_frame_equal(frames[1], frames[0], check_exact=True)


def test_a_job_of_two_nodes_survives_its_time_limit_and_a_dead_node(cluster: Cluster, undisturbed: Path) -> None:
    runs = cluster.directory / "job"
    # SLURM looks every half minute: the signal comes 10 to 40 s after the start, and the end after three minutes.
    limits = ("--time=3", "--signal=USR1@140")
    places = hold({"step": 5}, {"step": 9, "rank": 1, "restarts": 1})
    job = cluster.submit("fit.sbatch", *TWO_NODES, *limits, args=options(runs, places))
    run = runs / "e" / f"slurm-{job}"
    cluster.wait(job, has_restarted(1))
    said = cluster.output(job)
    assert "stopped by SIGUSR1" in said
    assert "SLURM will run this job again" in said
    assert "Traceback" not in said
    cluster("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    cluster.wait(job, lambda _: (run / "held.9.1").exists())
    for process, environment in _environments().items():  # all that runs on n2, at once
        if {b"SLURMD_NODENAME=n2", f"SLURM_JOB_ID={job}".encode()} <= environment:
            os.kill(process, signal.SIGKILL)
    os.kill(int((cluster.directory / "slurmd.n2.pid").read_text()), signal.SIGKILL)
    try:
        cluster.wait(job, has_restarted(2))
    finally:  # the tests after this one need two nodes
        subprocess.run(["setsid", "slurmd", "-N", "n2"], env=cluster.environment, check=True)
    facts = cluster.ended(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "2"), cluster.output(job)
    assert list((runs / "e").iterdir()) == [run]
    assert_as_undisturbed(run, undisturbed)


def test_an_array_is_a_run_for_each_method_and_seed(cluster: Cluster, tmp_path: Path) -> None:
    """A task of it is stopped and goes on; cancelled, it saves and stays so.

    SLURM signals every process: those that train, those that read images for them, and W&B's.
    """
    runs = cluster.directory / "sweep"
    monitors = ("cka", "invariance", "probes", "neighbors", "spectrum")
    small = [*SMALL, "--trainer.max_epochs=2", *(f"--{monitor}.every_n_epochs=0" for monitor in monitors)]
    processes = ["--data.storage=workers", "--data.num_workers=1", "--loggers=[wandb]"]
    places = hold({"step": 2, "task": "5"}, {"step": 5, "task": "5", "restarts": 1})
    output = f"--output={cluster.directory}/slurm-%A_%a.out"
    with cluster.notes(but="5"):
        args = [*small, *processes, f"--runs={runs}", places]
        array = cluster.submit("sweep.sbatch", f"--chdir={ROOT}", output, args=args)
    job, run = f"{array}_5", runs / "sweep" / f"slurm-{array}_5"
    cluster.wait(job, lambda _: (run / "held.2.0").exists())
    cluster("scancel", "--signal=USR1", job)  # the array's last has the number of the array itself
    cluster.wait(job, lambda _: (run / "held.5.0").exists())
    assert f"continuing from {run}" in cluster.output(job)
    number = cluster.facts(job)["JobId"]
    cluster("scancel", job)
    assert cluster.ended(job)["JobState"] == "CANCELLED"
    cluster.wait_until(lambda: "task 0: Exited with exit code 143" in cluster.output(job), job)
    cluster.wait_until(lambda: not _processes_of(number), job)
    said = cluster.output(job)
    assert "stopped by SIGTERM" in said
    assert "Traceback" not in said
    assert not re.search("^error: ", said, re.MULTILINE), said
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt", "")
    assert checkpoint["global_step"] > 4, "beyond the checkpoint of the first epoch"
    assert losses(run).index.tolist() == list(range(checkpoint["global_step"]))
    facts = cluster.facts(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "1"), "nobody is left to put it back into the queue"

    assert {cluster.ended(f"{array}_{task}")["JobState"] for task in range(5)} == {"COMPLETED"}
    noted = cluster.noted(array)
    seeds = [args[args.index("--seed_everything") + 1] for _, args, _ in noted]
    asked = [
        (*re.findall(r"configs/([a-z]+)_", " ".join(args)), seed)
        for (_, args, _), seed in zip(noted, seeds, strict=True)
    ]
    assert asked == [("simclr", "0"), ("simclr", "1"), ("simclr", "2"), ("supervised", "0"), ("supervised", "1")]
    _, args, environment = noted[1]
    args = [*args, "--data.storage=auto", "--loggers=[]"]
    assert finish(start(args, tmp_path / "out", partial(os.chdir, ROOT), environment)) == 0, (
        tmp_path / "out"
    ).read_text()
    found = sorted((runs / "sweep").iterdir())
    assert [path.name for path in found] == [f"slurm-{array}_1", f"slurm-{array}_5"]
    methods = [read_checkpoint(path / "checkpoints" / "last.ckpt", "")["method"] for path in found]
    assert [method["class_path"].rpartition(".")[2] for method in methods] == ["SimCLR", "Supervised"]
    assert [method["init_args"]["seed"] for method in methods] == [1, 2]


def test_two_nodes_share_the_images_of_commands_that_measure(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    common = ["--models", f"a={undisturbed}", "b=random", "--device=cpu", "--data.eval_batch_size=50"]
    of_survey = [
        "--neighbors.k=10",
        "--neighbors.copies=3",
        "--neighbors.settings=[policy]",
        "--neighbors.layers=pooled",
    ]
    of_compare = ["--cka.layers=stages", "--cka.gram_size=10", "--invariance.views=[flip]", "--permutations=9"]
    of_probe = ["--probes.layers=layer4.0", "--evaluations=[layers, linear_augmented]", "--linear_epochs=2"]
    commands = {
        "survey": (survey, [*common, *of_survey]),
        "compare": (compare, [*common, *of_compare]),
        "probe": (probe, [*common, *of_probe]),
    }
    lines = [
        shlex.join(["bash", f"{ROOT}/slurm/{name}.sbatch", *args, f"--out={cluster.directory / name}_two"])
        for name, (_, args) in commands.items()
    ]
    with cluster.notes():
        job = cluster.wrap(" && ".join(lines), "--gpus-per-node=0", "--cpus-per-task=1", *TWO_NODES)
    assert cluster.ended(job)["JobState"] == "COMPLETED", cluster.output(job)
    processes = iter(cluster.noted(job))
    for (name, (command, args)), nodes in zip(commands.items(), zip(processes, processes, strict=True), strict=True):
        assert [node.module for node in nodes] == [f"ssl_geometry.{name}"] * 2
        assert [node.environment["SLURMD_NODENAME"] for node in nodes] == ["n1", "n2"]
        both = [start(node.args, tmp_path / "out", environment=node.environment, command=node.module) for node in nodes]
        assert [finish(process) for process in both] == [0, 0], (tmp_path / "out").read_text()
        two, one = (cluster.directory / f"{name}_{count}" for count in ("two", "one"))
        command([*args, f"--out={one}"])
        frames = [read_records(path).query("metric != 'nnk_jaccard'") for path in (two, one)]
        assert len(frames[0]) == len(frames[1]) > 40
        np.testing.assert_allclose(frames[0]["value"], frames[1]["value"], rtol=1e-9, atol=1e-12)


def test_a_job_that_is_started_without_srun_is_reported(cluster: Cluster, tmp_path: Path) -> None:
    args = options(cluster.directory / "wrong")
    with cluster.notes():
        job = cluster.wrap(f"python -m ssl_geometry.fit {shlex.join(args)}", "--nodes=2", "--ntasks=2")
    assert cluster.ended(job)["JobState"] == "COMPLETED", cluster.output(job)
    (noted,) = cluster.noted(job)
    assert noted.args == args
    assert finish(start(args, tmp_path / "out", environment=noted.environment)) == 2
    assert "without srun" in (tmp_path / "out").read_text()
    assert not (cluster.directory / "wrong").exists()
