"""On a real SLURM of two nodes: time limit, requeue, arrays, a cancelled job, a node that dies.

The cluster runs on this machine (``slurm/local_cluster.sh``): Debian's slurm-wlm and munge, as root.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import pytest

from ssl_geometry.records import read_records
from ssl_geometry.runs import read_checkpoint
from ssl_geometry.survey import survey
from tests.integration.test_fit import SMALL, losses

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
READY = os.geteuid() == 0 and all(shutil.which(name, path=PATH) for name in ("slurmctld", "slurmd", "munged"))
pytestmark = pytest.mark.skipif(not READY, reason="needs root and Debian's slurm-wlm and munge")


class Slow(L.Callback):
    """Steps that take as long as those of a large network."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: object, **kwargs: object) -> None:
        time.sleep(self.seconds)


def slow(seconds: float) -> str:
    return f'--trainer.callbacks=[{{"class_path":"{__name__}.Slow","init_args":{{"seconds":{seconds}}}}}]'


class Cluster:
    """Submits batch scripts and waits for them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SSL_GEOMETRY"))},
            "SLURM_CONF": str(directory / "slurm.conf"),
            "SLURM_LOCAL_PORT": "17100",
            "SLURM_LOCAL_NODE_TIMEOUT": "10",
            "PATH": PATH,
            "MASTER_ADDR": "127.0.0.1",  # n1 and n2 are names of SLURM's alone
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
        }

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, cwd=self.directory, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, script: str, *options: str, args: list[str]) -> str:
        small = ["--gpus-per-node=0", "--cpus-per-task=1"]
        return self("sbatch", "--parsable", *small, *options, str(ROOT / "slurm" / script), *args).strip()

    def facts(self, job: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self("scontrol", "show", "job", job)))

    def wait(self, job: str, until: Callable[[dict[str, str]], bool], seconds: float) -> dict[str, str]:
        end = time.monotonic() + seconds
        while not until(facts := self.facts(job)):
            assert time.monotonic() < end, f"{facts['JobState']}\n{self.output(job)}"
            time.sleep(0.5)
        return facts

    def ended(self, job: str, seconds: float) -> dict[str, str]:
        return self.wait(
            job, lambda facts: facts["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), seconds
        )

    def said(self, job: str, words: str, seconds: float = 90) -> None:
        self.wait(job, lambda _: words in self.output(job), seconds)

    def output(self, job: str) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.directory.glob(f"slurm-{job}*.out")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    script = str(ROOT / "slurm" / "local_cluster.sh")
    cluster(script, "start", str(cluster.directory))
    yield cluster
    subprocess.run([script, "stop", str(cluster.directory)], env=cluster.environment, timeout=60)


def options(runs: Path, *more: str, epochs: int = 12) -> list[str]:
    model = "--model=ssl_geometry.methods.SimCLR"
    fast = ["--trainer.check_val_every_n_epoch=100", "--probes.every_n_epochs=6", "--cka.every_n_epochs=3"]
    return [model, *SMALL, *fast, f"--runs={runs}", "--experiment=e", f"--trainer.max_epochs={epochs}", *more]


def _environments() -> dict[int, set[bytes]]:
    """The variables of all processes."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found[int(process.name)] = set((process / "environ").read_bytes().split(b"\0"))
    return found


TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Path:
    runs = cluster.directory / "undisturbed"
    job = cluster.submit("fit.sbatch", *TWO_NODES, args=options(runs))
    assert cluster.ended(job, 180)["JobState"] == "COMPLETED", cluster.output(job)
    return runs / "e" / f"slurm-{job}"


def assert_as_undisturbed(run: Path, undisturbed: Path) -> None:
    weights = [read_checkpoint(path / "checkpoints" / "last.ckpt", "")["state_dict"] for path in (undisturbed, run)]
    for name, value in weights[0].items():
        np.testing.assert_array_equal(weights[1][name], value, err_msg=name)
    pd.testing.assert_series_equal(losses(run), losses(undisturbed), check_exact=True)
    columns = ["metric", "epoch", "step", "layer", "layer_other", "value"]
    frames = [read_records(path)[columns].sort_values(columns, ignore_index=True) for path in (undisturbed, run)]
    pd.testing.assert_frame_equal(frames[1], frames[0], check_exact=True)


def test_a_job_of_two_nodes_runs_into_its_time_limit_and_goes_on(cluster: Cluster, undisturbed: Path) -> None:
    runs = cluster.directory / "limit"
    # SLURM sends the signal up to a minute early; a limit of one minute and 20 s mean 10 to 40 s after the start.
    limits = ("--time=1", "--signal=USR1@20")
    job = cluster.submit("fit.sbatch", *TWO_NODES, *limits, args=options(runs, slow(0.9)))
    facts = cluster.ended(job, 300)
    assert facts["JobState"] == "COMPLETED", cluster.output(job)
    assert int(facts["Restarts"]) >= 1
    assert "stopped by SIGUSR1" in cluster.output(job)
    assert "SLURM will run this job again" in cluster.output(job)
    assert "Traceback" not in cluster.output(job)
    assert [path.name for path in (runs / "e").iterdir()] == [f"slurm-{job}"]
    assert_as_undisturbed(runs / "e" / f"slurm-{job}", undisturbed)


def test_an_array_is_a_run_for_each_method_and_seed(cluster: Cluster) -> None:
    runs = cluster.directory / "sweep"
    small = [*SMALL, "--trainer.max_epochs=3", slow(0.5)]
    job = cluster.submit(
        "sweep.sbatch",
        "--array=1,4",
        f"--chdir={ROOT}",
        f"--output={cluster.directory}/slurm-%A_%a.out",
        args=[*small, f"--runs={runs}", "--probes.every_n_epochs=0"],
    )
    cluster.said(f"{job}_4", "epoch 1/")
    cluster("scancel", "--signal=USR1", f"{job}_4")  # the array's last has the number of the array itself
    for task, restarts in (("4", "1"), ("1", "0")):
        facts = cluster.ended(f"{job}_{task}", 120)
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", restarts), cluster.output(job)
    found = sorted((runs / "sweep").iterdir())
    assert [path.name for path in found] == [f"slurm-{job}_1", f"slurm-{job}_4"]
    methods = [read_checkpoint(path / "checkpoints" / "last.ckpt", "")["method"] for path in found]
    assert [method["class_path"].rpartition(".")[2] for method in methods] == ["SimCLR", "Supervised"]
    assert [method["init_args"]["seed"] for method in methods] == [1, 1]


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster) -> None:
    """SLURM signals every process: those that train, those that read pictures for them, and W&B's."""
    runs = cluster.directory / "cancel"
    more = ["--data.storage=workers", "--data.num_workers=1", "--loggers=[wandb]", slow(0.4)]
    job = cluster.submit("fit.sbatch", *TWO_NODES, args=options(runs, *more))
    cluster.said(job, "epoch 2/")
    cluster("scancel", job)
    facts = cluster.ended(job, 60)
    assert facts["JobState"] == "CANCELLED"
    cluster.said(job, "stopped by SIGTERM", 30)
    cluster.said(job, "task 0: Exited with exit code 143", 60)
    said = cluster.output(job)
    assert "Traceback" not in said
    assert not re.search("^error: ", said, re.MULTILINE), said
    run = runs / "e" / f"slurm-{job}"
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt", "")
    assert checkpoint["global_step"] > 8, "beyond the checkpoint of the second epoch"
    assert losses(run).index.tolist() == list(range(checkpoint["global_step"]))
    time.sleep(8)
    assert cluster.facts(job)["Restarts"] == "0"
    assert not [process for process, given in _environments().items() if f"SLURM_JOB_ID={job}".encode() in given]


def test_a_node_dies_and_the_job_goes_on(cluster: Cluster, undisturbed: Path) -> None:
    runs = cluster.directory / "node"
    job = cluster.submit("fit.sbatch", *TWO_NODES, args=options(runs, slow(0.3)))
    cluster.said(job, "epoch 3/")
    for process, environment in _environments().items():  # all that runs on n2, at once
        if {b"SLURMD_NODENAME=n2", f"SLURM_JOB_ID={job}".encode()} <= environment:
            os.kill(process, signal.SIGKILL)
    os.kill(int((cluster.directory / "slurmd.n2.pid").read_text()), signal.SIGKILL)
    try:
        cluster.wait(job, lambda facts: facts["JobState"] == "PENDING" and facts["Restarts"] == "1", 90)
    finally:  # the tests after this one need two nodes
        subprocess.run(["setsid", "slurmd", "-N", "n2"], env=cluster.environment, check=True, timeout=30)
    assert cluster.ended(job, 180)["JobState"] == "COMPLETED", cluster.output(job)
    assert [path.name for path in (runs / "e").iterdir()] == [f"slurm-{job}"]
    assert_as_undisturbed(runs / "e" / f"slurm-{job}", undisturbed)


def test_two_nodes_share_the_images_of_a_survey(cluster: Cluster, undisturbed: Path) -> None:
    args = ["--models", f"a={undisturbed}", "b=random", "--device=cpu", "--k=10", "--copies=3", "--manifolds=[policy]"]
    args += ["--data.eval_batch_size=50", "--layers=pooled"]
    two, one = (cluster.directory / name for name in ("survey_two", "survey_one"))
    job = cluster.submit("survey.sbatch", *TWO_NODES, args=[*args, f"--out={two}"])
    assert cluster.ended(job, 120)["JobState"] == "COMPLETED", cluster.output(job)
    survey([*args, f"--out={one}"])
    frames = [read_records(path).query("metric != 'nnk_jaccard'") for path in (two, one)]
    assert len(frames[0]) == len(frames[1]) > 80
    np.testing.assert_allclose(frames[0]["value"], frames[1]["value"], rtol=1e-9, atol=1e-12)


def test_a_job_that_is_started_without_srun_is_told(cluster: Cluster) -> None:
    job = cluster(
        "sbatch", "--parsable", "--nodes=2", "--ntasks=2", "--output=slurm-%j.out",
        f"--wrap={sys.executable} -m ssl_geometry.fit {' '.join(options(cluster.directory / 'wrong'))}",
    ).strip()  # fmt: skip
    assert cluster.ended(job, 60)["JobState"] == "FAILED"
    assert "without srun" in cluster.output(job)
    assert not (cluster.directory / "wrong").exists()
