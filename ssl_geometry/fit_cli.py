"""The options of ``fit``, and the trainer, method and data that they describe."""

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any

import lightning as L
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from ssl_geometry.callbacks import (
    EvaluateAtStart,
    FitProgress,
    FlushRecords,
    GeometryMonitor,
    KeptCheckpoint,
    LastCheckpoint,
    LogEveryEpoch,
    LoggerName,
    ResumableWandbLogger,
    SameStart,
    SeedSteps,
    StopOnNaN,
    StopOnSignal,
    WatchProcesses,
    make_loggers,
)
from ssl_geometry.cli import Parser
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.devices import ManyDevices, check_devices, check_nodes, check_strategy, check_torchrun
from ssl_geometry.errors import ExitCode, UserError, first_line
from ssl_geometry.failures import end_with_parent, report_lost
from ssl_geometry.measure import CKA, Invariance, Measurement, Neighborhoods, Probes, Spectrum, Subject
from ssl_geometry.methods import Method
from ssl_geometry.models.sync_batchnorm import SyncBatchNormPlugin
from ssl_geometry.ranges import Seed, above, at_least, check_project
from ssl_geometry.runs.checkpoints import WholeCheckpointIO
from ssl_geometry.runs.directory import open_run
from ssl_geometry.runs.run import Run, is_first_process
from ssl_geometry.runs.slurm import plugins_of_a_shell, this_task, trainer_options

logger = logging.getLogger(__name__)

PROGRAM = "python -m ssl_geometry.fit"
USAGE = f"{PROGRAM} --config FILE [--config FILE ...] [--option VALUE ...]"
DESCRIPTION = (
    "Train a network and watch the geometry of its layers while it learns. Start from a file in configs/; any option "
    "below can be given in a file or on the command line, later ones win. A method's own options: --model.help CLASS. "
    "Everything that a run makes lies in runs/<experiment>/<run-id>/."
)
TRAINER_DEFAULTS = {
    "max_epochs": 100,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "check_val_every_n_epoch": 10,
    "use_distributed_sampler": False,  # the datamodule shards by itself, without padding
    "enable_model_summary": False,
    "sync_batchnorm": True,
}
TITLES = {
    "model": "The method, a LightningModule; --model.help CLASS lists its options, such as --model.lr",
    "trainer": "Options of Lightning's Trainer",
}
"""Titles in --help, in place of Lightning's."""
MEASUREMENTS = {cls.group: cls for cls in (CKA, Invariance, Probes, Neighborhoods, Spectrum)}
"""Name of a group of options to the measurement that it configures."""
EVERY_N_EPOCHS = {"cka": 1, "invariance": 0, "probes": 5, "neighbors": 0, "spectrum": 0}
TRAINER_RANGES = {
    "num_nodes": Annotated[int, at_least(1)],
    "max_epochs": Annotated[int, at_least(1, also=-1)],
    "min_epochs": Annotated[int, at_least(0)],
    "max_steps": Annotated[int, at_least(1, also=-1)],
    "min_steps": Annotated[int, at_least(0)],
    "limit_train_batches": Annotated[float, above(0)],
    "limit_val_batches": Annotated[float, at_least(0)],
    "limit_test_batches": Annotated[float, at_least(0)],
    "limit_predict_batches": Annotated[float, at_least(0)],
    "overfit_batches": Annotated[float, at_least(0)],
    "fast_dev_run": Annotated[int, at_least(0)],
    "val_check_interval": Annotated[float, above(0)],
    "check_val_every_n_epoch": Annotated[int, at_least(1)],
    "num_sanity_val_steps": Annotated[int, at_least(0, also=-1)],
    "log_every_n_steps": Annotated[int, at_least(0)],
    "accumulate_grad_batches": Annotated[int, at_least(1)],
    "gradient_clip_val": Annotated[float, at_least(0)],
    "reload_dataloaders_every_n_epochs": Annotated[int, at_least(0)],
}
"""Lightning's options in batches, epochs or steps; a share of the batches if below 1."""
REFUSED = {"trainer.logger": "--loggers", "trainer.default_root_dir": "--runs, --experiment and --run_id"}
"""Options of Lightning's Trainer that are refused, and the options to use instead."""
STATES_A_DEFAULT = r"(?i)default|not specified|current session"
"""Sentences of Lightning's help that state its own defaults, which are not those here."""


def in_short(text: str) -> str:
    """Lightning's help text of an option: at most two sentences, without its default, which is not the one here.

    Example:
        >>> in_short("How often to log within steps. Default: ``50``. Beside :class:`logging.Logger`. More. More.")
        'How often to log within steps. Beside logging.Logger.'
    """
    plain = re.sub(r":\w+:`~?([^`]*)`|``([^`]*)``", r"\1\2", " ".join(text.split())).replace(" by default.", ".")
    sentences = [sentence for sentence in re.split(r"(?<=\.)\s+", plain) if not re.search(STATES_A_DEFAULT, sentence)]
    return " ".join(sentences[:2])


class FitParser(Parser, LightningArgumentParser):
    """Has the options of a method, a data module, monitors and a trainer."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Without lists of Lightning's classes, which ``--trainer.callbacks.help`` and its like know."""
        ours, title, trainer = super().format_help(*args, **kwargs).partition("\n  --trainer CONFIG")
        return ours + title + re.sub(r",\s+known\s+subclasses:[^)]*", "", trainer)


class FitCLI(LightningCLI):
    """Options of ``fit``: the run, the method, the data, the trainer, and one group a monitor."""

    run: Run

    def __init__(self, args: Sequence[str]) -> None:
        self.args = args
        try:
            super().__init__(
                L.LightningModule,
                DataModule,
                run=False,
                subclass_mode_model=True,
                save_config_callback=None,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_class=FitParser,
                parser_kwargs={"prog": PROGRAM, "usage": USAGE, "description": DESCRIPTION, "default_env": False},
                args=list(args),
            )
        except BaseException:  # a constructor found a mistake after the run was opened, so nothing trains in it
            if run := getattr(self, "run", None):
                with suppress(OSError):
                    run.note(status="stopped")
                run.discard()
                run.release()
            raise

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed, as a number alone (Lightning also takes true): the data and the method get it as well."""
        parser.add_argument(
            "--seed_everything",
            type=Seed,
            default=self.seed_everything_default,
            help="seed of everything random: weights, the order of images, views, the validation split",
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options in the order in which ``--help`` shows them: the run, the method, the data, monitors, the trainer."""
        parser.add_argument("--base", type=str | None, help="in a config file: another config file to start from")
        parser.add_argument("--runs", type=str, default="runs", help="folder of all runs")
        parser.add_argument(
            "--experiment",
            type=str,
            default="default",
            help="name of the folder of the runs that belong together, at most 128 bytes",
        )
        parser.add_argument(
            "--run_id",
            type=str | None,
            help="name of this run and of its folder, at most 128 bytes (default: the SLURM job, or method, backbone, "
            "seed and time)",
        )
        parser.add_argument(
            "--resume",
            type=str | None,
            help="auto: continue this run where it stopped, or start it; PATH: continue that run or checkpoint",
        )
        parser.add_argument(
            "--save_every_n_minutes",
            type=Annotated[float, at_least(0)],
            default=5.0,
            help="minutes of training that a killed run repeats at most; 0 saves after every epoch",
        )
        parser.add_argument(
            "--keep_every_n_epochs",
            type=Annotated[int, at_least(0)],
            default=0,
            help="keep the checkpoint of every n-th epoch; 0 keeps the last one only",
        )
        parser.add_argument(
            "--loggers",
            type=list[LoggerName],
            default=["wandb"],
            help="where to watch curves, next to the records: wandb (offline without a key), tensorboard, csv",
        )
        parser.add_argument(
            "--wandb_project", type=str, default="ssl_geometry", help="W&B project, at most 128 characters"
        )
        parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
        parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(DataModule, "data")
        for group, cls in MEASUREMENTS.items():
            parser.add_class_arguments(cls, group, fail_untyped=False)
        parser.add_argument(
            "--measurements",
            type=list[Measurement],
            default=[],
            help="measurements of your own, subclasses of ssl_geometry.measure.Measurement: --measurements+ CLASS",
        )
        parser.add_lightning_class_args(L.Trainer, "trainer")
        groups = parser.groups or {}
        for name, title in TITLES.items():
            groups[name].title = title
        parser.set_defaults({f"{group}.every_n_epochs": every for group, every in EVERY_N_EPOCHS.items()})
        for action in parser._actions:
            if action.dest.startswith("trainer."):
                instead = REFUSED.get(action.dest)
                action.help = f"refused: use {instead}" if instead else in_short(action.help or "")
            elif action.dest == "model":
                action.help = "the method: a class of ssl_geometry.methods, or the import path of your own"
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
        assert isinstance(parser, Parser)
        for name, hint in TRAINER_RANGES.items():
            parser.restrict(f"trainer.{name}", hint)
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.init_args.seed")

    def before_instantiate_classes(self) -> None:
        """Open the run directory before anything is built, so that a mistake costs nothing."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        for option in ("base", "resume", "debug"):
            config.pop(option, None)
        if config.get("model") is None:
            raise UserError("no --model: give a --config such as configs/quickstart/simclr.yaml, or --model CLASS")
        for option, instead in REFUSED.items():
            if (given := config["trainer"].get(option.removeprefix("trainer."))) is not None:
                raise UserError(f"--{option} {given}: use {instead}")
        self._check_trainer(config)
        check_project(config["wandb_project"], "--wandb_project")
        self.settings = config
        self.run = open_run(config, config["runs"], config["experiment"], config["run_id"], self.config.resume)
        last = self.run.last_checkpoint
        self.checkpoint_at_start = last.stat().st_mtime_ns if last.exists() else None
        if not is_first_process():
            end_with_parent()

    def _check_trainer(self, config: Mapping[str, Any]) -> None:
        """Refuse options that contradict each other, or that this machine cannot fulfil."""
        trainer = config["trainer"]
        check_strategy(trainer["strategy"])
        check_devices(trainer["accelerator"], trainer["devices"])
        check_nodes(trainer["num_nodes"], "--trainer.num_nodes")
        check_torchrun(trainer["accelerator"], trainer["devices"], trainer["num_nodes"], "--trainer.")
        for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"):
            if isinstance(trainer[name], float) and trainer[name] > 1:
                raise UserError(f"--trainer.{name} {trainer[name]}: expected a share up to 1.0, or a whole number")
        epochs, warmup = trainer["max_epochs"], config["model"].get("init_args", {}).get("warmup_epochs")
        if epochs == -1 and trainer["max_steps"] == -1:
            raise UserError("--trainer.max_epochs -1: the schedule needs an end; set --trainer.max_steps with it")
        if epochs and warmup and 0 < epochs < warmup:
            fault = f"--model.warmup_epochs {warmup}: longer than the run of --trainer.max_epochs {epochs}"
            if any(arg.startswith("--model.warmup_epochs") for arg in self.args):
                raise UserError(f"{fault}; expected at most {epochs}")
            logger.warning(f"{fault}: the learning rate rises to the end, and never reaches its peak")

    def after_instantiate_classes(self) -> None:
        """Check the measurements against the method, before images are read."""
        for measurement in self._measurements() if isinstance(self.model, Method) else ():
            if measurement.every_n_epochs != 0:
                measurement.check(Subject.of(self.model))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer of the configuration, with this run's loggers, checkpoints and progress."""
        given = self._get(self.config_init, "trainer.callbacks") or []
        losses = StopOnNaN()
        last = LastCheckpoint(self.run.last_checkpoint.parent, self.settings["save_every_n_minutes"])
        self.stop_on_signal = StopOnSignal(last, losses)
        self.watch = WatchProcesses(
            lambda process: report_lost(process, self.run, self.trainer, self.checkpoint_at_start)
        )
        callbacks: list[Callback] = [
            SameStart(self.run.resumed_from is not None),
            *([ManyDevices()] if self._takes_all_devices() else []),
            FitProgress(),  # first: its clock starts before the first measurement
            FlushRecords(),
            LogEveryEpoch(),
            *(given if isinstance(given, list) else [given]),
            *self._callbacks(),
            EvaluateAtStart(),  # before the monitor, which shares a pass with the evaluation of the same weights
            *self._monitors(),
            SeedSteps(self.settings["seed_everything"]),
            losses,
            self.stop_on_signal,
            self.watch,
            last,
        ]
        if self.settings["keep_every_n_epochs"]:
            callbacks.append(KeptCheckpoint(self.run.last_checkpoint.parent, self.settings["keep_every_n_epochs"]))
        trainer = {
            **self._get(self.config_init, "trainer", default={}),
            "callbacks": callbacks,
            "logger": make_loggers(self.settings["loggers"], self.run, self.settings, self.settings["wandb_project"]),
            "default_root_dir": self.run.directory,
        }
        if trainer["benchmark"] is None:
            trainer["benchmark"] = not trainer["deterministic"]  # a step's shapes are always the same
        trainer["plugins"] = [*(trainer.get("plugins") or []), WholeCheckpointIO()]
        if trainer["sync_batchnorm"]:
            trainer["sync_batchnorm"] = False  # torch's, which waits for the device in every layer
            trainer["plugins"].append(SyncBatchNormPlugin())
        if task := this_task():
            more = trainer_options(task, trainer)
            trainer |= more | {"plugins": [*trainer["plugins"], *more["plugins"]]}
        else:
            trainer["plugins"] += plugins_of_a_shell()
        try:
            return L.Trainer(**trainer)
        except UserError:
            raise
        except (MisconfigurationException, ValueError, TypeError) as error:
            for started in trainer["logger"]:
                if isinstance(started, ResumableWandbLogger):
                    started.finish(ExitCode.MISTAKE)
            raise UserError(f"--trainer: {first_line(error)}") from error

    def _monitors(self) -> list[GeometryMonitor]:
        """The monitor of the network; with ``--model.measured both``, another one of its teacher."""
        measurements = self._measurements()
        both = isinstance(self.model, Method) and self.model.hparams["measured"] == "both"
        teachers = [GeometryMonitor(copy.deepcopy(measurements), network="teacher", name="teacher")] if both else []
        return [GeometryMonitor(measurements), *teachers]

    def _takes_all_devices(self) -> bool:
        """Whether the number of devices is not set; in a SLURM job, the tasks determine it."""
        return str(self.settings["trainer"]["devices"]) in ("auto", "-1") and this_task() is None

    def _measurements(self) -> list[Measurement]:
        groups = [self._get(self.config_init, group) for group in MEASUREMENTS]
        return [*groups, *self._get(self.config_init, "measurements")]

    def _callbacks(self) -> list[Callback]:
        return [self._get(self.config_init, key) for key in self._parser(None).callback_keys]
