"""Evaluate frozen networks: linear probes of every layer, nearest neighbours, few labels, fine-tuning.

    python -m ssl_geometry.probe --models simclr=runs/cifar10/simclr supervised=runs/cifar10/supervised
    python -m ssl_geometry.probe --models simclr=RUN,RUN,RUN --evaluations [layers, knn]     # seeds of one method

Protocol: the encoder is frozen, in evaluation mode, float32; features are averaged over space; training images are the
clean labelled ones of the run, test images the whole test split, evaluated once. Hyper-parameters are selected on a
fixed validation split (10 % of the training images). The table includes an untrained network and the raw pixels.

Several processes share the forward passes of frozen networks; the first one fits the classifiers and fine-tunes.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from ssl_geometry.cli import run_command
from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.errors import ExitCode, Interrupted, UserError, as_options
from ssl_geometry.geometry.classification import FEW, FOLDS
from ssl_geometry.launching import by_turns, launch, said_once, together
from ssl_geometry.measure.frozen import POOLED, Found, LayerProbes
from ssl_geometry.measure.probes import probe_protocol, probe_rows
from ssl_geometry.measure.processes import alone, is_agreed, this_process
from ssl_geometry.methods import Method
from ssl_geometry.methods.raw_pixels import PIXEL_SIDE, RawPixels
from ssl_geometry.probe_features import extract
from ssl_geometry.probe_options import check, evaluations, parse
from ssl_geometry.progress import progress_bar
from ssl_geometry.records import Protocol, RecordStore
from ssl_geometry.report.probes import FIGURE, PIXELS, draw, tables
from ssl_geometry.runs.networks import Loaded, load_networks, split_seeds

UNTRAINED = "untrained"
UNBALANCED = 1.1
"""Classes are unbalanced where the largest has more than this factor times the test images of the smallest."""


def summary(data: DataModule, options: Any) -> str:
    """The protocol in one line, for the head of a table."""
    bank, test = (len(data.loader(*part).sampler.rows) for part in (("bank", options.train_images), ("test", None)))
    chosen = "hyper-parameters selected on a fixed 10 % of them (few labels: on 10 % of each class)"
    if bank < FEW:
        chosen = f"regularisation selected by {FOLDS}-fold cross-validation, learning rates on a fixed 10 % of them"
    return (
        "Protocol: frozen network (but for fine-tuning) in evaluation mode, float32, averaged over space; "
        f"{bank:,} clean training images, {chosen}; the whole test split, {test:,} images"
    )


def load_subjects(options: Any) -> dict[str, Loaded]:
    """The networks of ``--models`` and the two baselines, by name."""
    networks = load_networks(options.models)
    for model in networks.values():
        if model.given == PIXELS or (model.given == UNTRAINED and model.epochs is not None):
            raise UserError(f"--models {model.given}=…: a baseline that is measured too has that name; set another")
    trained = [model for model in networks.values() if model.epochs is not None]
    first = trained[0] if trained else next(iter(networks.values()))
    if len(trained) == len(networks):
        name, spec = next(iter(split_seeds(options.models)[0].items()))
        networks[UNTRAINED] = load_networks([f"{name}={spec}", f"{UNTRAINED}=random"])[UNTRAINED]
    known = Method(backbone="resnet10").init_args.keys() - {"measured"}  # pixels have no teacher
    base = {key: value for key, value in first.method.init_args.items() if key in known}
    networks[PIXELS] = Loaded(PIXELS, RawPixels(**base), None, PIXELS)
    return networks


@as_options
@said_once
def probe(args: Sequence[str]) -> Path:
    """Measure, write records, draw the figure and print the tables.

    Raises:
        UserError: a mistake in the options, a network or the data.
    """
    options = parse(args)
    fabric = launch(options)
    options.device, is_first = str(fabric.device), fabric.is_global_zero
    out, console = options.out, Console(quiet=not is_first, highlight=False, soft_wrap=True)
    networks = by_turns(lambda: load_subjects(options), options, fabric)
    groups = {name: model.given for name, model in networks.items()}
    by_turns(options.data.prepare_data, options, fabric)
    with together(options):
        check(options, networks, console)
        if is_first:
            _remove_results(out)
    store = RecordStore(out / "records")
    protocol_of: dict[str, dict[str, Protocol]] = {}
    failed: dict[str, str] = {}
    with progress_bar(shown=fabric.is_global_zero) as progress:
        for name in list(networks):
            model = networks.pop(name)  # one network at a time on the device
            try:
                with together(options, name):
                    model.method.to(options.device)
                    protocol_of[name] = measure(model, store, options, progress, console)
            except (UserError, Interrupted) as error:
                if not is_agreed(error) or (isinstance(error, Interrupted) and error.code != ExitCode.MISTAKE):
                    raise  # another process has ended, or the program has a fault
                failed[name] = str(error)
            del model  # before the next one is on the device
            for task in progress.task_ids:
                progress.remove_task(task)
            message = "not measured" if name in failed else "    measured"
            console.print(f"{message}  {name}")
    with together(options):
        groups = {name: group for name, group in groups.items() if name not in failed}
        if not groups:
            raise UserError(next(iter(failed.values())))
        if is_first and not (frame := store.read()).empty:  # raw pixels, which are not fine-tuned, may be what is left
            _report(frame, groups, protocol_of, options, console)
        if failed:
            raise UserError(f"{', '.join(failed)}: not measured, the tables are without; {'; '.join(failed.values())}")
    return out


def _report(
    frame: pd.DataFrame,
    groups: Mapping[str, str],
    protocol_of: Mapping[str, Mapping[str, Protocol]],
    options: Any,
    console: Console,
) -> None:
    """Tables and figure of the networks that were measured."""
    out, data = options.out, options.data
    frame = frame[frame["model"].isin(groups)]
    measure_name = "mean average precision" if data.multi_label else "accuracy"
    protocol_line = summary(data, options)
    text = tables(frame, groups, protocol_of, out, protocol_line, measure_name, balanced=_is_balanced(data))
    console.print(f"{text}\n{protocol_line}", markup=False)
    if "layers" in options.evaluations:
        console.print(f"     figure  {draw(frame, groups, out / 'figures', measure_name)}")
    console.print(f"    records  {out / 'records'}")
    console.print(f"     tables  {out / 'tables.md'}, {out / 'tables.tex'}")


def measure(model: Loaded, store: RecordStore, options: Any, progress: Any, console: Console) -> dict[str, Protocol]:
    """Everything about one network, into the records; every process must call it.

    Returns:
        Evaluation to protocol.

    Raises:
        ValueError: features or labels that no classifier can learn from.
    """
    data, (rank, _) = options.data, this_process()
    frozen = extract(model, options, progress, console)
    protocols: dict[str, Protocol] = {}
    bank: dict[str, Any] = {"clean training images": len(frozen.train_labels)}
    if isinstance(model.method, RawPixels):
        bank["pixels"] = f"averaged down to {PIXEL_SIDE} x {PIXEL_SIDE}"
    for evaluation in evaluations(options):
        kind = evaluation.name
        protocols[kind] = probe_protocol(kind, data, frozen.occasion.subject, "test", **bank, **evaluation.protocol())
        found: Found = {}
        if evaluation.on_every_process:
            found = evaluation.evaluate(frozen, progress)
        elif rank == 0:
            with alone():
                found = evaluation.evaluate(frozen, progress)
        if rank:
            continue
        common = {
            "run": options.out.name,
            "model": model.name,
            "view": "clean",
            "split": "test",
            "epoch": model.epochs or 0,
            "protocol": protocols[kind].hash,
        }
        rows = []
        for metric, numbers in found.items():
            depths = frozen.depths if kind == LayerProbes.name else {POOLED: frozen.depths[POOLED]}
            rows += probe_rows(metric, depths, numbers, len(frozen.test_labels), **common)
        store.write(f"{kind}/{model.name}", rows, [protocols[kind]])
    return protocols


def _remove_results(out: Path) -> None:
    """What an earlier run of this command left; other files stay."""
    shutil.rmtree(out / "records", ignore_errors=True)
    for path in ("tables.md", "tables.tex", f"figures/{FIGURE}.png", f"figures/{FIGURE}.pdf"):
        (out / path).unlink(missing_ok=True)


def _is_balanced(data: DataModule) -> bool:
    loader = data.loader("test")
    labels = loader.images.labels[loader.sampler.rows]
    if data.multi_label:  # mAP is a mean over classes already
        return True
    counts = labels[labels >= 0].bincount()
    return int(counts.max()) <= UNBALANCED * int(counts[counts > 0].min())


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ssl_geometry.probe``."""
    run_command(probe, args, interrupted="interrupted: run the same command again, with --overwrite")


if __name__ == "__main__":
    main()
