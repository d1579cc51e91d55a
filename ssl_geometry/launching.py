"""The processes that share the images of a command: started, agreed on mistakes, and ended together."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import lightning as L
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning_utilities.core.rank_zero import rank_zero_only

from ssl_geometry.cli import OF_THE_MACHINE, in_words
from ssl_geometry.devices import check_torchrun, memory_for_measuring
from ssl_geometry.errors import ExitCode, Interrupted, UserError
from ssl_geometry.measure.processes import agreeing, is_agreed
from ssl_geometry.runs.slurm import plugins_of_a_shell, processes_started, this_task, trainer_options

GRACE_SECONDS = 15
"""How long the main thread has to end by itself where another process has ended."""
HEARD_SECONDS = 10
"""How long the others wait for the first process's words: srun and torchrun end all processes with the first that
ends."""
P = ParamSpec("P")
T = TypeVar("T")


def launch(options: Any) -> L.Fabric:
    """The processes that share the images: those of the SLURM job, or started here.

    Args:
        options: of a command that takes ``--devices`` and ``--num_nodes``.

    Returns:
        What knows the processes; they are joined, each on its device.

    Raises:
        UserError: devices that are not there, or processes that were started in another way.
    """
    given: dict[str, Any] = {"devices": options.devices, "num_nodes": options.num_nodes}
    accelerator = "cuda" if options.device.startswith("cuda") else "cpu"
    check_torchrun(accelerator, options.devices, options.num_nodes, "--")
    if task := this_task():
        given |= trainer_options(task, {"accelerator": accelerator})
    elif accelerator == "cuda" and options.devices > (gpus := torch.cuda.device_count()):
        raise UserError(f"--devices {options.devices}: this machine has {gpus} GPU{'s' * (gpus > 1)}")
    else:
        given["plugins"] = plugins_of_a_shell()
    if ":" in options.device:
        if given["devices"] != 1:
            raise UserError(
                f"--device {options.device}: one GPU; leave its number out for --devices {given['devices']}"
            )
        given["devices"] = [int(options.device.partition(":")[2])]
    fabric = L.Fabric(accelerator=accelerator, **given)
    _ChildProcessObserver._terminate_all = _speak_and_end  # type: ignore[assignment, method-assign]
    fabric.launch()
    return fabric


def _speak_and_end(observer: _ChildProcessObserver) -> None:
    """Where one of the processes that were started here has ended, all end, with one line.

    Lightning's observer kills them all within five seconds and without a word. Here the main thread has time to end by
    itself, as it does where it exchanges something with the process that is gone.
    """
    others = observer._child_processes
    time.sleep(GRACE_SECONDS)
    rank, code = next((rank, other.returncode) for rank, other in enumerate(others, 1) if other.returncode)
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    print(
        f"error: process {rank} of {len(others) + 1} has ended ({how}); its own output may say why; start the command "
        "again",
        file=sys.stderr,
        flush=True,
    )
    for other in others:
        other.kill()
    os._exit(ExitCode.MISTAKE)


def said_once(command: Callable[P, T]) -> Callable[P, T]:
    """A command whose mistakes all of its processes find: the first one reports it, and all end with its code.

    Before the processes meet, each reads the same command line. The others give the first one time to speak, with which
    srun and torchrun end them; what it has not found, such as a node without a GPU, they report themselves. Afterwards
    the processes agree (:func:`together`).
    """

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except UserError as error:
            if getattr(rank_zero_only, "rank", 0):
                if is_agreed(error):
                    raise Interrupted("", ExitCode.MISTAKE) from error
                if processes_started() > 1:
                    time.sleep(HEARD_SECONDS)
            raise

    return run


@contextmanager
def together(options: Any, network: str | None = None) -> Iterator[None]:
    """A part of a command that all processes come to the end of, or none; see :func:`agreeing`.

    Raises:
        UserError: a mistake in any of them, or memory that is full.
    """
    with agreeing(), memory_for_measuring(options, network), naming(network) if network else nullcontext():
        yield


@contextmanager
def naming(network: str) -> Iterator[None]:
    """What metrics cannot compute of a network, such as features that are not finite, is one line that names it.

    Raises:
        UserError: in place of a metric's ``ValueError``; or of a full disk and its like, with the file.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--models {network}: {error}") from error
    except OSError as error:
        if error.errno not in OF_THE_MACHINE:
            raise
        raise UserError(in_words(error)) from error


def by_turns(do: Callable[[], T], options: Any, fabric: L.Fabric) -> T:
    """Do something that may download in every process, in one of each node first."""
    done: list[T] = []
    for turn in (True, False):
        with together(options):
            if turn == (fabric.local_rank == 0):
                done.append(do())
    return done[0]
