"""Train a network and watch the geometry of its layers while it learns.

    python -m ssl_geometry.fit --config configs/simclr_resnet18_cifar10.yaml
    python -m ssl_geometry.fit --config configs/quickstart/simclr.yaml --cka.every_n_epochs 5 --trainer.max_epochs 20
    python -m ssl_geometry.fit --model my_package.MyMethod --data.dataset path/to/images

Several --config files merge, later ones win, and options on the command line win over all of them. A config file may
name another one to start from: ``base: other.yaml``. Everything a run makes lies in runs/<experiment>/<run-id>/.
"""

import gc
import signal

if __name__ == "__main__":  # the imports take seconds; a signal waits until StopOnSignal listens, and is not lost
    signal.signal(signal.SIGUSR1, lambda *_: None)  # nor does it fail a job that has finished and is about to exit
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM))
    gc.disable()  # nothing that is imported is garbage: to look for it takes a fifth of the start

import multiprocessing
from collections.abc import Mapping, Sequence
from contextlib import suppress

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.table import Table

from ssl_geometry.callbacks import ResumableWandbLogger, Status
from ssl_geometry.cli import mistake_behind, run_command
from ssl_geometry.config_files import config_of_resumed, expand_bases
from ssl_geometry.errors import ExitCode, Interrupted, UserError, as_options
from ssl_geometry.failures import explain
from ssl_geometry.fit_cli import FitCLI
from ssl_geometry.launching import said_once
from ssl_geometry.runs.run import Run


@as_options
def fit(args: Sequence[str]) -> Run:
    """Train, evaluate on the test images, and print the summary.

    Raises:
        UserError: a mistake in the options, the data, or a run that cannot go on.
    """
    others = multiprocessing.active_children()
    cli = _begin(args)
    exit_code: int = ExitCode.FAULT
    is_run = True
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.run.resumed_from)
        tested = is_overridden("test_step", cli.model, L.LightningModule)
        results = cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0] if tested else {}
        speed = getattr(cli.trainer.progress_bar_callback, "images_per_second", None)
        rate = {"images_per_second": round(speed, 1)} if speed else {}
        cli.watch.stop(Status.OVER)
        cli.run.note(status="finished", results=results, **rate)
        exit_code = ExitCode.DONE
    except BaseException as error:
        reason = cli.stop_on_signal.stopped or error
        reported = cli.watch.stop(Status.OVER if isinstance(error, Interrupted) else Status.FAILED)
        with suppress(OSError):
            cli.run.note(status="stopped")
        if reported is None:
            explained = explain(reason, cli.run, cli.trainer, cli.checkpoint_at_start)
        else:
            explained = Interrupted("", reported)
        exit_code = getattr(explained, "code", exit_code)
        is_run = (
            explained is not error or cli.trainer.global_step > 0
        )  # other errors have a message about how to continue
        if explained is error:
            raise
        raise explained from error
    finally:
        for process in multiprocessing.active_children():
            if process not in others:  # a data worker: torch waits five seconds for each that is alive
                process.terminate()
        for logger in cli.trainer.loggers:
            if isinstance(logger, ResumableWandbLogger):
                logger.finish(exit_code)  # last: a server that is away must not keep a job from the queue
        cli.stop_on_signal.restore()
        if not is_run:
            cli.run.discard()
        cli.run.release()
    print_summary(cli.run, cli.trainer, results)
    return cli.run


@said_once
def _begin(args: Sequence[str]) -> FitCLI:
    """Read the command line, and open the run."""
    try:
        _check_seeds(args)
        return FitCLI(expand_bases([*config_of_resumed(args), *args]))
    except ValueError as error:  # jsonargparse wraps errors of constructors
        raise mistake_behind(error) or error from None


def _check_seeds(args: Sequence[str]) -> None:
    """There is one seed: those of the data and the method are linked to it, and not options of their own."""
    for option in (arg.partition("=")[0] for arg in args):
        if option in ("--data.seed", "--model.seed", "--model.init_args.seed"):
            raise UserError(f"{option}: use --seed_everything, the seed of the data and the method as well")


@rank_zero_only
def print_summary(run: Run, trainer: L.Trainer, results: Mapping[str, float]) -> None:
    """Accuracies, and where the files are."""
    counts = {"epoch": trainer.current_epoch, "step": trainer.global_step}
    done = ", ".join(f"{n} {unit}{'' if n == 1 else 's'}" for unit, n in counts.items())
    table = Table(title=f"{run.directory.name}: {done}", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    names = {"test/acc": "test accuracy (classifier)", "test/knn": "test accuracy (20 nearest neighbours)"}
    for key, name in names.items():
        table.add_row(name, f"{results[key]:.2%}" if key in results else "no classifier")
    for key in sorted(set(results) - set(names)):
        table.add_row(key, f"{results[key]:.4g}")
    console = Console()
    console.print(table)
    for name, path in {
        "checkpoint": run.last_checkpoint,
        "records": run.directory / "records",
        "figures": run.directory / "figures",
    }.items():
        console.print(f"{name:>10}  {path}", highlight=False, soft_wrap=True)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.fit``."""
    run_command(fit, args, interrupted="interrupted: continue with the same command and --resume auto")


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    try:
        main()
    finally:
        gc.unfreeze()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # while it exits, Python puts the system's handlers back
