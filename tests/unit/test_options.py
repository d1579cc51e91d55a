"""Every option is held to its range before anything is read: one line with the option as typed, the value, the fix."""

import ast
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
import torch
import wandb

from ssl_geometry import compare, probe, probe_options, survey, survey_options
from ssl_geometry.cli import Parser, annotation, run_command, warning_line
from ssl_geometry.config_files import expand_bases
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.doctor import examine
from ssl_geometry.errors import UserError, as_options
from ssl_geometry.fit import fit, print_summary
from ssl_geometry.fit_cli import FitCLI
from ssl_geometry.measure import CKA, Invariance, Spectrum, Subject
from ssl_geometry.methods import SimCLR
from ssl_geometry.ranges import above, at_least, between, check_arguments, check_value
from ssl_geometry.report.__main__ import report
from ssl_geometry.report.upload import new_id
from ssl_geometry.runs.directory import open_run
from ssl_geometry.runs.run import Run
from ssl_geometry.shared_options import networks_parser
from ssl_geometry.zoo import run as checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")

ROOT = Path(__file__).parents[2]
QUICK = [
    "--config",
    str(ROOT / "configs" / "quickstart" / "simclr.yaml"),
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=30",
]

FIT = """
--model.temperature -1: expected a number above 0
--model.temperature 0: expected a number above 0
--model.temperature nan: expected a number above 0
--model.temperature inf: expected a number above 0
--model.temperature warm: expected a number above 0
--model.hidden_dim -3: expected a whole number of at least 1
--model.output_dim 0: expected a whole number of at least 1
--model.lr -0.001: expected a number of at least 0
--model.lr null: expected a number of at least 0
--model.weight_decay -1: expected a number of at least 0
--model.momentum 2: expected a number of at least 0, below 1
--model.momentum -0.5: expected a number of at least 0, below 1
--model.warmup_epochs -3: expected a whole number of at least 0
--model.warmup_epochs 100: longer than the run of --trainer.max_epochs 30; expected at most 30
--model.width 0: expected a number above 0
--model.image_size 1: expected a whole number of at least 8
--model.center_crop 1.5: expected a number above 0, at most 1
--model.compile maybe: expected true or false
--model.eval_precision bf16-mixed: expected one of float32, training
--model.eval_precision null: expected one of float32, training
--model.optimizer adam: expected one of lars, sgd, adamw
--model.stem big: expected one of cifar, imagenet
--model.backbone null: expected text
--seed_everything -1: expected a whole number from 0 to 4,294,967,295
--seed_everything 99999999999: expected a whole number from 0 to 4,294,967,295
--seed_everything true: expected a whole number from 0 to 4,294,967,295
--save_every_n_minutes -1: expected a number of at least 0
--save_every_n_minutes inf: expected a number of at least 0
--keep_every_n_epochs -3: expected a whole number of at least 0
--data.image_size 1: expected a whole number of at least 8
--data.batch_size 1: expected a whole number of at least 2
--data.batch_size many: expected a whole number of at least 2
--data.batch_size 1.5: expected a whole number of at least 2
--data.eval_batch_size 0: expected a whole number of at least 1
--data.val_fraction 1: expected a number of at least 0, below 1
--data.measure_size 0: expected a whole number of at least 1
--data.limit_train 0: expected a whole number of at least 1
--data.limit_test -1: expected a whole number of at least 1
--data.num_workers -1: expected a whole number of at least 0
--data.storage ram: expected one of auto, device, workers
--data.on_error ignore: expected one of raise, skip
--data.dataset_args 3: expected a mapping such as {a: b}
--cka.every_n_epochs -1: expected a whole number of at least 0
--cka.gram_size 3: expected a whole number of at least 4
--invariance.every_n_epochs -1: expected a whole number of at least 0
--invariance.gram_size 3: expected a whole number of at least 4
--probes.every_n_epochs -3: expected a whole number of at least 0
--probes.train_images 0: expected a whole number of at least 1
--probes.learning_rates [9]: expected numbers above 0, at most 7
--probes.learning_rates [0.1, -1]: expected numbers above 0, at most 7
--probes.weight_decays [-1]: expected numbers of at least 0
--probes.online maybe: expected true or false
--probes.online_sent_in half: expected one of auto, float32, bfloat16
--neighbors.every_n_epochs -1: expected a whole number of at least 0
--neighbors.k 2: expected a whole number of at least 3
--neighbors.copies 2: expected a whole number of at least 3
--spectrum.every_n_epochs -1: expected a whole number of at least 0
--spectrum.copies 1: expected a whole number of at least 2, or 0
--trainer.max_epochs 0: expected a whole number of at least 1, or -1
--trainer.max_epochs -5: expected a whole number of at least 1, or -1
--trainer.max_epochs -1: the schedule needs an end; set --trainer.max_steps with it
--trainer.max_steps 0: expected a whole number of at least 1, or -1
--trainer.min_epochs -1: expected a whole number of at least 0
--trainer.limit_train_batches 0: expected a number above 0
--trainer.limit_train_batches 1.5: expected a share up to 1.0, or a whole number
--trainer.limit_val_batches -1: expected a number of at least 0
--trainer.accumulate_grad_batches 0: expected a whole number of at least 1
--trainer.gradient_clip_val -1: expected a number of at least 0
--trainer.check_val_every_n_epoch 0: expected a whole number of at least 1
--trainer.log_every_n_steps -1: expected a whole number of at least 0
--trainer.num_nodes 0: expected a whole number of at least 1
--trainer.num_nodes 2: nothing has started processes on the other nodes; start the command with srun
--trainer.devices 0: expected auto or a number of processes of at least 1
--trainer.devices -1: expected auto or a number of processes of at least 1
--trainer.devices abc: expected auto or a number of processes of at least 1
--trainer.devices 1.5: expected auto or a number of processes of at least 1
--trainer.devices nan: expected auto or a number of processes of at least 1
--trainer.devices [0, 0]: expected auto or a number of processes of at least 1
--trainer.accelerator gpu: torch finds no GPU here; use auto or cpu
--trainer.accelerator cuda: torch finds no GPU here; use auto or cpu
--trainer.accelerator nonsense: known: 'auto', 'gpu'
--trainer.precision 15: expected one of 64, 32, 16
--loggers [wandbb]: expected one of wandb, tensorboard, csv
--model no_such.Thing: No module named 'no_such'; expected the import path of a class
--model ssl_geometry.methods.SimCRL: ssl_geometry.methods has no SimCRL; did you mean 'SimCLR'?
--model tests: names no class; expected the import path of a class
"""
COMPARE = """
--cka.gram_size 3: expected a whole number of at least 4
--permutations -1: expected a whole number from 0 to 10,000
--permutations 10001: expected a whole number from 0 to 10,000
--k 0: expected a whole number of at least 1
--k many: expected a whole number of at least 1
--show_neighbors -1: expected whole numbers of at least 0
--show_neighbors [5, -1]: expected whole numbers of at least 0
--invariance.views own,crop: expected a list such as [a, b]; write '[own, crop]', with the quotes
--show_neighbors 5,6: expected whole numbers of at least 0; write '[5, 6]', with the quotes
--data.batch_size 0: expected a whole number of at least 2
--device tpu: expected cpu, cuda, or cuda:NUMBER
"""
PROBE = """
--train_images 0: expected a whole number from 1 to 50,000
--train_images 50001: expected a whole number from 1 to 50,000
--k [0]: expected whole numbers of at least 1
--k []: expected at least one, such as 20
--linear_epochs 0: expected a whole number of at least 1
--linear_weight_decay -1: expected a number of at least 0
--linear_weight_decay 9.0: expected 0 to
--label_fractions [2]: expected numbers above 0, at most 1
--label_fractions [0]: expected numbers above 0, at most 1
--draws 0: expected a whole number of at least 1
--finetune_epochs 0: expected a whole number of at least 1
--finetune_lr 0: expected a number above 0
--finetune_lr inf: expected a number above 0
--evaluations magic: known: 'layers'
"""
SURVEY = """
--neighbors.k 2: expected a whole number of at least 3
--neighbors.copies 2: expected a whole number of at least 3
--clusters 1: expected a whole number of at least 2
--devices 0: expected a whole number of at least 1
--num_nodes 0: expected a whole number of at least 1
--num_nodes 2: nothing has started processes on the other nodes; start the command with srun
--neighbors.settings [magic]: known: 'policy', 'crop', 'color', 'rotate', 'translate'
"""
REPORT = """
--max_mb 0: expected a number above 0
--max_mb nan: expected a number above 0
--port -1: expected a whole number from 0 to 65,535
--port 70000: expected a whole number from 0 to 65,535
"""


class Accepted(Exception):
    """Options were taken, and the run would begin."""


@pytest.fixture(scope="module")
def cli() -> Iterator[FitCLI]:
    """The command line of fit, up to where the run directory is made."""

    def accept(*args: Any, **kwargs: Any) -> None:
        raise Accepted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssl_geometry.fit_cli.open_run", accept)
        for variable in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "NODE_RANK", "GROUP_RANK", "LSB_JOBID"):
            patch.delenv(variable, raising=False)
        cli = object.__new__(FitCLI)
        with pytest.raises(Accepted):
            cli.__init__(QUICK)  # type: ignore[misc]
        yield cli


def read(cli: FitCLI, args: list[str]) -> None:
    cli.args = args
    cli.parse_arguments(cli.parser, args)
    cli.before_instantiate_classes()


def table(text: str) -> list[Any]:
    """Option, value and what is said, of each line."""
    lines = [re.fullmatch(r"(--[\w.]+) ([^:]*): (.*)", line) for line in text.strip().splitlines()]
    return [pytest.param(*line.groups(), id=f"{line[1]} {line[2]}") for line in lines if line]


def refused(capsys: pytest.CaptureFixture[str], command: Callable[[], Any]) -> str:
    """What is said on standard error, or by the UserError that becomes that line."""
    with pytest.raises((UserError, SystemExit)) as error:
        command()
    if isinstance(error.value, UserError):
        return str(error.value)
    assert error.value.code == 2
    return capsys.readouterr().err.strip().removeprefix("error: ")


def assert_said(said: str, option: str, value: str, words: str) -> None:
    assert "\n" not in said
    assert len(said) < 400
    typed = value.strip("[]") if option in ("--loggers", "--neighbors.settings") else value
    assert said.startswith((f"{option} {value}: {words}", f"{option} {typed}: {words}")), said


def test_rooms_that_scripts_use_name_no_option() -> None:
    """Messages name what the user typed: an option in a command, an argument in a script (``errors.argument``)."""
    named = []
    for room in ("geometry", "metrics", "models", "measure", "data", "records"):
        for path in (ROOT / "ssl_geometry" / room).rglob("*.py"):
            tree = ast.parse(path.read_text("utf-8"))
            docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            texts = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
            named += [text.value for text in texts if re.search("--[a-z]", text.value) and id(text) not in docs]
    assert named == ["--trainer.accelerator cpu"], "of a device without float64: a script moves the network instead"


def test_data_are_named_as_they_were_given() -> None:
    options: dict[str, Any] = {"dataset": "digits", "image_size": 8, "limit_train": 60, "limit_test": 4}

    def mistakes() -> list[str]:
        found = []
        for wrong in ({"batch_size": 1}, {"measure_size": 5}, {"dataset": "digitz"}):
            with pytest.raises(UserError) as error:
                DataModule(**options | wrong).setup()
            found.append(str(error.value).partition(" ")[0])
        return found

    assert mistakes() == ["DataModule.batch_size", "DataModule.measure_size", "DataModule.dataset"]
    assert as_options(mistakes)() == ["--data.batch_size", "--data.measure_size", "--data.dataset"]


def test_an_option_has_one_spelling_in_all_commands(cli: FitCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    """In snake_case; and what several commands take has one name and takes the same."""
    parsers: dict[str, Parser] = {"fit": cli.parser}  # type: ignore[dict-item]

    class Parsed(Exception):
        pass

    def parse(parser: Parser, *args: Any) -> None:
        parsers[parser.prog.rpartition(".")[2]] = parser
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse)
    models = ["--models", "x=random:resnet10"]
    commands: list[Callable[[Any], Any]] = [compare.compare, probe.probe, survey.survey, report, examine, checkpoints]
    for command, args in zip(commands, [models, models, models, [], [], []], strict=True):
        with pytest.raises(Parsed):
            command(args)
    assert list(parsers) == ["fit", "compare", "probe", "survey", "report", "doctor", "zoo"]
    taken: dict[str, dict[str, Any]] = {}
    for command_name, parser in parsers.items():
        for action in parser._actions:
            for option in action.option_strings if "-->" not in str(action.option_strings) else ():
                assert re.fullmatch(r"-\w|--[a-z0-9_]+(\.[a-z0-9_]+)*\+?", option)
            if action.option_strings and not action.dest.startswith("trainer."):
                taken.setdefault(action.dest, {})[command_name] = (type(action), annotation(action))
    unlike = {name for name, of in taken.items() if len(set(map(str, of.values()))) > 1}
    # None stands for what a run has, or for a default; a comparison has one k, a classifier several.
    chosen_by_a_run = {"cka.layers", "probes.layers", "neighbors.layers", "wandb_project"}
    assert unlike <= {*chosen_by_a_run, "invariance.views", "neighbors.settings", "k", "out"}
    ends: dict[str, set[str]] = {}
    for name in taken:
        ends.setdefault(name.rpartition(".")[2], set()).add(name)
    alone = {end: names for end, names in ends.items() if end in names and len(names) > 1}
    # Neighbours of mutual kNN, or that vote, not of a graph; live probes learn from fewer images on purpose; the zoo
    # downloads checkpoints.
    assert set(alone) == {"k", "train_images", "download", "help"}


@pytest.mark.parametrize(("option", "value", "words"), table(FIT))
def test_fit(cli: FitCLI, capsys: pytest.CaptureFixture[str], option: str, value: str, words: str) -> None:
    if value in ("cuda", "gpu") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert_said(refused(capsys, lambda: read(cli, [*QUICK, f"{option}={value}"])), option, value, words)


def test_a_method_in_an_unfinished_file(
    cli: FitCLI, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unfinished.py").write_text("class Mine(\n")
    monkeypatch.syspath_prepend(tmp_path)
    error = refused(capsys, lambda: read(cli, [*QUICK, "--model=unfinished.Mine"]))
    assert "--model unfinished.Mine: cannot be imported (SyntaxError: '(' was never closed (unfinished.py" in error


@pytest.mark.parametrize(
    ("module", "option", "value", "words"),
    [
        (module, *case.values)
        for module, text in ((compare, COMPARE), (probe, PROBE), (survey, SURVEY))
        for case in table(text)
    ],
)
def test_commands_that_measure(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    option: str,
    value: str,
    words: str,
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    command = getattr(module, module.__name__.rpartition(".")[2])
    said = refused(capsys, lambda: command(["--models=byol", f"{option}={value}"]))
    assert_said(said, option, value, words)


@pytest.mark.parametrize(("option", "value", "words"), table(REPORT))
def test_report(capsys: pytest.CaptureFixture[str], option: str, value: str, words: str) -> None:
    assert_said(refused(capsys, lambda: report(["runs/x", f"{option}={value}"])), option, value, words)


@pytest.mark.parametrize(
    "args",
    [
        ["--trainer.max_epochs=-1", "--trainer.max_steps=10"],
        ["--trainer.limit_val_batches=0", "--trainer.limit_train_batches=0.5"],
        ["--trainer.devices=2"],
        ["--spectrum.copies=0", "--cka.every_n_epochs=0", "--save_every_n_minutes=0", "--model.momentum=0"],
        ["--model.hidden_dim=null", "--model.compile=null", "--data.image_size=null", "--model.lr=1e-3"],
        ["--seed_everything=4294967295"],
    ],
    ids=str,
)
def test_what_is_in_range_is_taken(cli: FitCLI, args: list[str]) -> None:
    with pytest.raises(Accepted):
        read(cli, [*QUICK, *args])


@pytest.mark.parametrize(
    ("args", "option", "value"),
    [
        (["--probes.logistic"], "probes.logistic", True),
        (["--probes.logistic", "false"], "probes.logistic", False),
        (["--probes.logistic", "--probes.online", "false", "--probes.logistic=false"], "probes.logistic", False),
        (["--data.download", "-c", str(ROOT / "configs" / "quickstart" / "simclr.yaml")], "data.download", True),
        (["--model.channels_last", "false"], "model.init_args.channels_last", False),
        (["--model.compile", "--data.batch_size", "8"], "model.init_args.compile", True),
        (["--model.init_args.compile"], "model.init_args.compile", True),
        (["--trainer.deterministic"], "trainer.deterministic", True),
        (["--trainer.deterministic", "warn"], "trainer.deterministic", "warn"),
    ],
    ids=str,
)
def test_a_flag_of_a_class_needs_no_value(cli: FitCLI, args: list[str], option: str, value: bool | str) -> None:
    with pytest.raises(Accepted):
        read(cli, [*QUICK, *args])
    assert cli.config[option] == value


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--data.root", "--data.root: expected one argument"),
        ("--model.backbone", "--model.backbone: expected one argument"),
        ("--model.lr", "--model.lr true: expected a number of at least 0"),
        ("--model.fast", "unknown option '--model.fast'; "),
        ("--data.fast", "unknown option '--data.fast'; "),
        ("--trainer.max_epochs", "--trainer.max_epochs: expected one argument"),
    ],
)
def test_an_option_that_is_no_flag_needs_one(
    cli: FitCLI, capsys: pytest.CaptureFixture[str], option: str, words: str
) -> None:
    said = refused(capsys, lambda: read(cli, [*QUICK, option, "--trainer.devices=1"]))
    assert said.startswith(words)


def test_help_shows_that_a_flag_needs_no_value(cli: FitCLI) -> None:
    text = " ".join(cli.parser.format_help().split())
    assert "--probes.logistic [{true,false}]" in text
    assert "--trainer.inference_mode [{true,false}]" in text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--model.backbone.width=16", "--model.width"),
        ("--data.dataset.image_size=16", "--data.image_size"),
    ],
)
def test_an_option_of_an_option_names_both(
    cli: FitCLI, capsys: pytest.CaptureFixture[str], typed: str, meant: str
) -> None:
    said = refused(capsys, lambda: read(cli, [*QUICK, typed]))
    assert said == f"unknown option {typed.partition('=')[0]!r}; did you mean {meant!r}? (see --help)"


def test_a_warning_is_one_line_without_its_place_in_the_source() -> None:
    said: list[str] = []
    before = warnings.formatwarning

    def command(args: Any) -> None:
        said.append(warnings.formatwarning(UserWarning("few\n  pairs"), UserWarning, "/x/torchmetrics/metric.py", 714))

    run_command(command, [], "")
    assert said == ["warning: few pairs\n"]
    assert warnings.formatwarning is before


def test_of_several_processes_the_first_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may have seen no image at all, which torchmetrics warns of."""
    for rank, said in ((0, "warning: few\n"), (1, "")):
        monkeypatch.setattr("ssl_geometry.cli.rank_zero_only.rank", rank, raising=False)
        assert warning_line(UserWarning("few"), UserWarning, "x.py", 1) == said


def test_help_of_the_trainer_names_no_defaults_but_those_here(cli: FitCLI) -> None:
    said = {action.dest: action.help or "" for action in cli.parser._actions if action.dest.startswith("trainer.")}
    assert said["trainer.log_every_n_steps"] == "How often to log within steps (a whole number of at least 0)"
    assert said["trainer.logger"] == "refused: use --loggers"
    assert all(said.values())
    assert not [name for name, text in said.items() if re.search("(?i)default|``", text)]
    text = " ".join(cli.parser.format_help().split())
    places = [text.index(f"--{group} CONFIG") for group in ("data", "cka", "spectrum", "trainer")]
    assert places == sorted(places), "Lightning's options come last"


def test_help_shows_a_list_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.parse(["--help"])
    text = capsys.readouterr().out
    assert "--invariance.views '[ITEM, ...]'" in text
    assert "[ITEM,...]" not in text


def test_help_names_types_in_words_and_fills_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = networks_parser("compare", "", "cka", layers="all").format_help()
    assert "(type: int, at least 2, or null, default: null)" in " ".join(text.split())
    assert not re.search(r"Annotated|Optional", text)
    paragraphs = re.findall(r"(?:^ {24}\S.*\n)+", text, re.MULTILINE)
    assert len(paragraphs) > 10
    for paragraph in paragraphs:
        lines = [line.strip() for line in paragraph.splitlines()]
        assert lines == textwrap.wrap(" ".join(lines), 120 - 2 - 24)


def test_groups_of_fit_have_titles_in_words(cli: FitCLI) -> None:
    titles = [group.title for group in cli.parser._action_groups]
    assert not [title for title in titles if title and re.search("<|Customize", title)]


def test_a_start_that_a_constructor_refuses_is_no_running_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssl_geometry.fit_cli.open_run", open_run)  # the command line above has none
    args = [*QUICK, f"--runs={tmp_path}", "--experiment=e", "--run_id=a", "--loggers=[]"]
    for there in (False, True):
        if there:
            (tmp_path / "e" / "a").mkdir()
            (tmp_path / "e" / "a" / "notes.txt").touch()
        with pytest.raises(UserError, match="'convnext_atto' is unknown; timm has it"):
            fit([*args, "--model.backbone=convnext_atto"])
        assert (tmp_path / "e" / "a").exists() == there, "what it made itself, it takes away"
    assert (tmp_path / "e" / "a" / "notes.txt").exists()
    assert Run(tmp_path / "e" / "a").facts["status"] == "stopped"
    assert (tmp_path / "e" / "a" / ".lock").read_text() == ""


@pytest.mark.parametrize(("n", "words"), [(1, "1 epoch, 1 step"), (2, "2 epochs, 2 steps")])
def test_the_summary_counts_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str], n: int, words: str) -> None:
    trainer: Any = SimpleNamespace(current_epoch=n, global_step=n)
    print_summary(Run(tmp_path / "a"), trainer, {})
    assert capsys.readouterr().out.splitlines()[0].rstrip().endswith(f": {words}")


def test_a_short_run_of_a_config_with_a_longer_warm_up_is_a_warning(
    cli: FitCLI, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Accepted), caplog.at_level("WARNING"):
        read(cli, [*QUICK, "--trainer.max_epochs=1"])
    assert re.search(r"--model.warmup_epochs \d+: longer than the run of --trainer.max_epochs 1", caplog.text)


def test_several_nodes_are_fine_where_something_started_them(cli: FitCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "0")
    with pytest.raises(Accepted):
        read(cli, [*QUICK, "--trainer.num_nodes=2"])


ANY_NUMBER = {"fit": {"trainer.devices", "trainer.max_time"}}
"""Options of numbers that are checked otherwise."""


@pytest.mark.parametrize("command", ["fit", "compare", "probe", "survey"])
def test_every_option_that_takes_a_number_states_its_range_in_its_help(
    cli: FitCLI, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    parsers: list[Parser] = [cli.parser] if command == "fit" else []  # type: ignore[list-item]
    if command != "fit":
        module = {"compare": compare, "probe": probe_options, "survey": survey_options}[command]

        def keep(*args: Any, **kwargs: Any) -> Parser:
            parsers.append(networks_parser(*args, **kwargs))
            return parsers[-1]

        monkeypatch.setattr(module, "networks_parser", keep)
        with pytest.raises(SystemExit):
            module.parse(["--help"])
    text = " ".join(parsers[0].format_help().split())
    numbers = {
        action.dest: str(annotation(action))
        for action in parsers[0]._actions
        if re.search(r"\b(int|float)\b", str(annotation(action))) and action.dest not in ANY_NUMBER.get(command, ())
    }
    assert len(numbers) > 5
    for option, hint in numbers.items():
        limits = re.findall(r"(?:at least|above|from) [^\]]*", hint)
        assert limits, f"--{option} has no range"
        place = text.index(f"--{option} ", text.index("options:"))
        assert limits[0] in text[place : place + 900], f"the help of --{option}"
    assert "Annotated" not in text


def test_a_library_call_is_held_to_the_same_ranges() -> None:
    with pytest.raises(UserError, match=r"DataModule\.batch_size 1: expected a whole number of at least 2"):
        DataModule("digits", batch_size=1)
    with pytest.raises(UserError, match=r"--model\.lr -1: expected a number of at least 0"):
        SimCLR(backbone="resnet10", width=0.25, lr=-1.0)
    with pytest.raises(UserError, match=r"Spectrum\.copies 1: expected"):
        Spectrum(copies=1)


def small() -> SimCLR:
    return SimCLR(backbone="resnet10", width=0.25, image_size=16)


def test_accumulation_over_more_batches_than_an_epoch_has() -> None:
    method = small()
    method.trainer = SimpleNamespace(  # type: ignore[assignment]
        accumulate_grad_batches=100,
        num_training_batches=4,
        world_size=1,
        datamodule=SimpleNamespace(batch_size=64),
        fit_loop=SimpleNamespace(setup_data=lambda: None),
    )
    with pytest.raises(UserError, match=r"^--trainer.accumulate_grad_batches 100: an epoch has only 4 batches"):
        method.configure_optimizers()


@pytest.mark.parametrize(
    ("measurement", "words"),
    [
        (Invariance(views=["own", "sepia"]), "--invariance.views [sepia]: no operation or policy is called"),
        (CKA(layers="layer9"), "--cka.layers='layer9' matches no layer"),
        (Spectrum(layers=["pooled", "knn"]), "--spectrum.layers='knn' does not run when SimCLR is measured"),
    ],
)
@as_options
def test_measurements_are_held_to_the_method_before_images_are_read(measurement: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        measurement.check(Subject.of(small()))
    assert str(error.value).startswith(words)


class Mine(SimCLR):
    def __init__(self, decay: Annotated[float, between(0, 1)] = 0.99, momentum: float = 1.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)


def test_a_method_of_ones_own_declares_its_own_ranges() -> None:
    with pytest.raises(UserError, match=r"^--model\.decay 2: expected a number from 0 to 1$"):
        check_arguments(Mine, {"decay": 2.0}, "--model.")
    with pytest.raises(UserError, match="temperature"):
        check_arguments(Mine, {"temperature": 0.0}, "--model.")
    check_arguments(Mine, {"momentum": 1.5}, "--model.")  # its own, which means something else


def test_a_measurement_that_cannot_be_imported(cli: FitCLI, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, lambda: read(cli, [*QUICK, "--measurements+=no.X"]))
    assert "--measurements no.X: No module" in said
    assert said.strip().endswith("such as ssl_geometry.measure.CKA")


def test_ranges_hold_numbers_alone() -> None:
    assert math.inf not in at_least(0)
    assert math.nan not in at_least(0)
    assert 0 not in above(0)
    assert 1 not in between(0, 1, below=True)
    check_value(Annotated[float, above(0)] | None, None, "--x")
    check_value(Annotated[float, above(0)] | str, "00:10", "--x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"trainer: {max_epochs: 3}\nmodel: null\ntrainer: {max_steps: 4}\n",
            "'trainer' is given twice, in lines 1 and 3",
        ),
        (b"trainer:\n  max_epochs: 3\n  max_epochs: 4\n", "'max_epochs' is given twice, in lines 2 and 3"),
        (b"trainer: {max_epochs: 2, max_epochs: 3}\n", "'max_epochs' is given twice, in line 1"),
        (b"base: [x.yaml]\n", "base: ['x.yaml']: expected one config file"),
        (b"base: 5\n", "base: 5: expected one config file"),
        (bytes(range(256)), "not YAML"),
        (b"\x80\x04\x95\xff", "not YAML"),
        (b"[1, 2]", "expected options as `key: value`, found list"),
    ],
    ids=["key twice", "inner key twice", "one line", "bases", "number", "binary", "pickle", "list"],
)
def test_config_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        expand_bases(["--config", str(path)])
    assert str(error.value).startswith(f"--config {path}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["seed_0", "my run#1", "größe (2)", "名前", "lr=0.1+wd", "x" * 128])
def test_wandb_takes_the_id_of_every_run(name: str) -> None:
    """As its own settings check it."""
    identity = new_id(Path("runs/e") / name)
    assert wandb.Settings(run_id=identity).run_id == identity
    assert re.fullmatch(r"[A-Za-z0-9_.=+-]{1,64}", identity)
    assert new_id(Path(name)) != identity, "of this run alone"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "no --model: give a --config such as"),
        (["--resume=auto"], "no --model: give a --config such as"),
        (["--resume", "{}/typo"], "no run or checkpoint here; did you mean '{}/tyro'"),
        (["--resume={}/tyro/checkpoints"], "--resume {}/tyro/checkpoints: no run or checkpoint here; did you mean "),
        (["--resume={}/tyro/checkpoints/lost.ckpt"], "did you mean '{}/tyro/checkpoints/last.ckpt'"),
        (
            ["--resume={}/five"],
            "--resume {}/five: its config.yaml, the options of the run, is missing or damaged",
        ),
        (["--data.seed", "3"], "--data.seed: use --seed_everything"),
        (["--model.seed=3"], "--model.seed: use --seed_everything"),
    ],
    ids=str,
)
def test_fit_reports_what_is_missing(tmp_path: Path, args: list[str], words: str) -> None:
    run = tmp_path / "tyro"
    (run / "checkpoints").mkdir(parents=True)
    run.joinpath("config.yaml").touch()
    (tmp_path / "five").mkdir()
    (tmp_path / "five" / "config.yaml").write_text("model: 5")
    if args and "lost" in args[0]:
        run.joinpath("checkpoints", "last.ckpt").touch()
    with pytest.raises(UserError) as error:
        fit([arg.format(tmp_path) for arg in args])
    assert words.format(tmp_path) in str(error.value)
