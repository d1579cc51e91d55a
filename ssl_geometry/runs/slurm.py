"""SLURM's description of this job, checks of the trainer against it, and requeueing."""

import os
import re
import subprocess
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from ssl_geometry.errors import UserError

INTERACTIVE = ("bash", "sh", "zsh", "interactive")
"""Names of jobs that are shells: what is started there by hand is no task of the job."""
INTERACTIVE_STEP = "4294967290"
"""Number of the step in which ``salloc`` runs a shell on a node; its variables are those of all tasks of the job."""
FIRST_PORT, PORTS = 10_000, 22_013  # below the ports that Linux gives to outgoing connections


class Task(NamedTuple):
    """Which task of which SLURM job this process is."""

    job: str
    """Number of the job; ``ARRAY_INDEX`` for one of an array."""
    job_id: int
    step: int | None
    """Number of the ``srun`` in the job; None for the batch script itself."""
    tasks: int
    """Processes of the step, over all nodes."""
    nodes: int
    tasks_per_node: int
    restarts: int
    """How often the job was requeued."""

    @property
    def run_id(self) -> str:
        """Name of the run: the same after a requeue, where steps may be numbered on, and no other job's.

        Example:
            >>> Task(job="7", job_id=7, step=0, tasks=1, nodes=1, tasks_per_node=1, restarts=0).run_id
            'slurm-7'
        """
        return f"slurm-{self.job}"

    @property
    def port(self) -> int:
        """Where the processes meet: others for other jobs and steps on the same node, unless 218 jobs apart."""
        return FIRST_PORT + (101 * self.job_id + (self.step or 0)) % PORTS


def this_task(environment: Mapping[str, str] = os.environ) -> Task | None:
    """The task that this process is; None outside of SLURM, in an interactive shell, and under torchrun.

    Raises:
        UserError: a job of several tasks that was started without ``srun``, or nodes with unequal numbers of tasks.

    Example:
        >>> this_task({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0",
        ...            "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}).tasks_per_node
        2
        >>> this_task({}) is None
        True
    """
    if "SLURM_JOB_ID" not in environment or "TORCHELASTIC_RUN_ID" in environment:
        return None
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    step = environment.get("SLURM_STEP_ID")
    if step == INTERACTIVE_STEP or (environment.get("SLURM_JOB_NAME") in INTERACTIVE and (step is None or tasks == 1)):
        return None
    if step is None:
        if tasks > 1:
            raise UserError(
                f"this SLURM job has {tasks} tasks, but its script started the command once, without srun: "
                f"write `srun python -m ssl_geometry.…`, as slurm/fit.sbatch and slurm/survey.sbatch do"
            )
        nodes, layout = 1, "1"
    else:
        nodes = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES", "1"))
        layout = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", str(tasks))
    if not re.fullmatch(r"\d+(\(x\d+\))?", layout):
        raise UserError(
            f"SLURM gives the nodes unequal numbers of tasks ({layout}): ask for --nodes and --ntasks-per-node "
            f"instead of --ntasks"
        )
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return Task(
        job=f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"],
        job_id=int(environment["SLURM_JOB_ID"]),
        step=None if step is None else int(step),
        tasks=tasks,
        nodes=nodes,
        tasks_per_node=int(layout.partition("(")[0]),
        restarts=int(environment.get("SLURM_RESTART_COUNT", "0")),
    )


def trainer_options(task: Task, trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the trainer that follow from the job, so that one configuration runs on any number of nodes.

    Args:
        task: of this process.
        trainer: options as the user gave them.

    Returns:
        ``num_nodes``, ``devices``, and the plugin that gives Lightning each process's rank.

    Raises:
        UserError: nodes or devices that the job does not have, or GPUs that its tasks cannot see.
    """
    if task.step is None:  # the script itself: Lightning starts the processes of further devices
        return {"plugins": [LightningEnvironment()]}
    for name, flag, value, unset in (
        ("num_nodes", "--nodes", task.nodes, ("1",)),
        ("devices", "--ntasks-per-node", task.tasks_per_node, ("auto", "-1")),
    ):
        given = trainer.get(name)
        if given is not None and str(given) not in (*unset, str(value)):
            raise UserError(
                f"--trainer.{name} {given}: this SLURM job has {flag}={value}; set {unset[0]}, or ask SLURM for "
                f"{flag}={given}"
            )
    gpus = torch.cuda.device_count()
    if gpus and trainer.get("accelerator") != "cpu" and gpus < task.tasks_per_node:
        raise UserError(
            f"each task sees {gpus} GPU(s), but the node has {task.tasks_per_node} tasks: ask for "
            f"--gpus-per-node={task.tasks_per_node}, without --gpus-per-task or --gpu-bind, so that all tasks see all"
        )
    if gpus > task.tasks_per_node and trainer.get("accelerator") != "cpu":
        raise UserError(
            f"the node has {gpus} GPUs, but only {task.tasks_per_node} task(s), one for each GPU used: ask for "
            f"--ntasks-per-node={gpus}, or for fewer GPUs"
        )
    os.environ.setdefault("MASTER_PORT", str(task.port))
    os.environ["SLURM_NTASKS_PER_NODE"] = str(task.tasks_per_node)  # Lightning needs it, and --ntasks does not set it
    if nodes := os.environ.get("SLURM_STEP_NODELIST"):
        os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    environment = SLURMEnvironment(auto_requeue=False)  # its handler saves in the middle of a step
    return {"num_nodes": task.nodes, "devices": task.tasks_per_node, "plugins": [environment]}


def plugins_of_a_shell() -> list[LightningEnvironment]:
    """For Lightning where :func:`this_task` is None: it takes a shell in a job for a task unless it is named bash."""
    by_hand = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [LightningEnvironment()] if by_hand else []


def processes_started(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes of this command ``srun`` or torchrun has started.

    Example:
        >>> processes_started({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"})
        4
        >>> processes_started({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"})  # the batch script itself
        1
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return int(environment.get("WORLD_SIZE", "1"))
    by_srun = environment.get("SLURM_STEP_ID", INTERACTIVE_STEP) != INTERACTIVE_STEP
    return int(environment.get("SLURM_NTASKS", "1")) if by_srun else 1


def requeue(task: Task) -> str:
    """Put a job back into the queue; SLURM ends its processes.

    Args:
        task: any of the job's; of an array, only its own job is meant.

    Returns:
        "" when that was done, else why not.
    """
    command = ["scontrol", "requeue", task.job]  # the bare number of an array's first job would mean all of them
    reason = ""
    for _ in range(3):  # srun that ends the other processes of a dead one signals this child as well: asked again
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{' '.join(command)}: {error}"
        if done.returncode == 0:
            return ""
        reason = done.stderr.strip() or f"exit status {done.returncode}"
        if done.returncode > 0:
            break
    return f"{' '.join(command)}: {reason}"
