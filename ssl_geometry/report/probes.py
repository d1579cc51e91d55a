"""Tables and figure of the evaluations of frozen networks, from the records alone."""

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ssl_geometry.files import write_text
from ssl_geometry.records import Protocol
from ssl_geometry.report.curves import compare_curves
from ssl_geometry.report.style import save_figure
from ssl_geometry.report.tables import latex, markdown, seed_table

PIXELS = "raw pixels"
"""The baseline without a network."""
FIGURE = "linear_probes"


def tables(
    frame: pd.DataFrame,
    groups: Mapping[str, str],
    protocol_of: Mapping[str, Mapping[str, Protocol]],
    out: Path,
    protocol_line: str,
    measure: str = "accuracy",
    balanced: bool = True,
) -> str:
    """The tables of a probe from its records, as Markdown and LaTeX, each with its protocols.

    Args:
        frame: the records.
        groups: network to its name in the table.
        protocol_of: network to evaluation to protocol.
        out: folder of ``tables.md`` and ``tables.tex``.
        protocol_line: the protocol in one line, written below each table.
        measure: name of the measure, such as accuracy.
        balanced: whether classes are balanced; otherwise there are additional tables of the mean over classes.

    Returns:
        The tables of pooled features, in Markdown.
    """
    n = int(frame["n"].iloc[0])
    images = f"in percent on {n:,} test images; mean and standard deviation over networks"
    kinds = {"": measure} if balanced else {"": measure, "_mean_per_class": f"mean per-class {measure}"}
    on_pooled, on_layers = [], []
    for suffix, what in kinds.items():
        mine = frame[frame["metric"].str.endswith(suffix)]
        mine = mine.assign(metric=mine["metric"].str.removesuffix(suffix))
        rows = mine[mine["layer"] == "pooled"]
        columns = {metric: _title(metric) for metric in sorted(rows["metric"].unique(), key=_place) if _title(metric)}
        on_pooled.append((f"Pooled features: {what} {images}", seed_table(rows, columns, groups)))
        for metric, kind in (("logistic_probe", "Logistic regression"), ("ridge_probe", "Ridge regression")):
            rows = mine[mine["metric"] == metric].sort_values("depth", kind="stable")
            if len(rows):
                by_layer = rows.assign(metric=rows["layer"])
                layers = seed_table(by_layer, {layer: layer for layer in rows["layer"].unique()}, groups).T
                on_layers.append((f"{kind} on each layer: {what} {images}", layers))
    parts = [*on_pooled, *on_layers]
    shown = [f"## {title}\n\n{markdown(table)}\n" for title, table in parts]
    texts = _distinct(protocol_of)
    lines = [f"{part}\n{protocol_line}.\n" for part in shown]
    lines += ["## Protocols\n", *(f"### {title}\n\n```json\n{text}\n```\n" for title, text in texts.items())]
    write_text(out / "tables.md", "\n".join(lines))
    comments = [f"% {line}" for title, text in texts.items() for line in (title, *text.splitlines(), "")]
    latexes = [latex(table, f"{title}. {protocol_line}.") for title, table in parts]
    write_text(out / "tables.tex", "\n".join([*comments, *latexes]))
    return "\n".join(shown[: len(on_pooled)])


def _distinct(protocol_of: Mapping[str, Mapping[str, Protocol]]) -> dict[str, str]:
    """Each protocol once: its evaluation, hash and networks to its text."""
    networks: dict[tuple[str, str], list[str]] = {}
    texts = {}
    for network, by_evaluation in protocol_of.items():
        for evaluation, protocol in by_evaluation.items():
            networks.setdefault((evaluation, protocol.hash), []).append(network)
            texts[protocol.hash] = protocol.text
    return {f"{name} {digest} ({', '.join(who)})": texts[digest] for (name, digest), who in networks.items()}


def _place(metric: str) -> int:
    order = ("linear", "logistic", "ridge", "knn", "labels", "finetune")
    return next(number for number, start in enumerate(order) if metric.startswith(start))


def _title(metric: str) -> str:
    """Title of a metric's column; empty for metrics that are not in the tables."""
    fixed = {
        "linear_eval": "linear",
        "linear_eval_augmented": "linear, augmented",
        "logistic_probe": "logistic",
        "ridge_probe": "ridge",
    }
    for pattern, title in {
        r"knn(\d+)": "{}-NN",
        r"knn(\d+)_majority": "{}-NN, majority",
        r"labels_([^_]+)": "{} labels",
        r"labels_([^_]+)_sd": "{} labels, standard deviation over draws",
        r"finetune_([^_]+)": "fine-tuned, {} labels",
    }.items():
        if match := re.fullmatch(pattern, metric):
            return title.format(match[1])
    return fixed.get(metric, "")


def draw(frame: pd.DataFrame, groups: Mapping[str, str], folder: Path, measure: str = "accuracy") -> Path:
    """Accuracy against depth, figure 3 left of Grigg et al. 2021, as PNG and PDF."""
    rows = frame[frame["metric"] == "logistic_probe"]
    curves = rows[rows["model"] != PIXELS]
    pixels = rows[rows["model"] == PIXELS]["value"]
    figure = compare_curves(
        {f"Logistic regression on pooled features, {int(frame['n'].iloc[0]):,} test images": curves},
        {name: group for name, group in groups.items() if name != PIXELS},
        label=measure,
        levels={} if pixels.empty else {PIXELS: float(pixels.iloc[0])},
    )
    return save_figure(figure, folder / FIGURE)
