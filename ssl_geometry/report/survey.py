"""Tables and figures of many models, from records alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ssl_geometry.files import write_text, write_whole
from ssl_geometry.records import read_records
from ssl_geometry.records.catalogue import described
from ssl_geometry.report.models import collapse_over_training
from ssl_geometry.report.tables import latex, markdown

MANIFOLD_METRICS = ("neighbors", "diameter", "affinity")
STATISTICS = ("mean", "std", "median")


def metric_table(frame: pd.DataFrame, layer: Mapping[str, str], manifolds: Sequence[str]) -> pd.DataFrame:
    """Manifold graph metrics of all models: one row per model, columns (manifold, metric, statistic).

    Args:
        frame: records of a survey.
        layer: model to its layer in the table, the last of the encoder; in the order of the rows.
        manifolds: kinds of manifolds, in the order of the columns. Missing values are NaN.

    Example:
        >>> common = {"model": "a", "layer": "pooled", "view": "crop"}
        >>> rows = [{**common, "metric": "diameter", "value": 0.5, "low": 0.4},
        ...         {**common, "metric": "diameter_std", "value": 0.1, "low": None},
        ...         {**common, "metric": "diameter_quantile", "value": 0.6, "low": 0.5}]
        >>> metric_table(pd.DataFrame(rows), {"a": "pooled"}, ["crop"]).iloc[0].dropna().to_list()
        [0.5, 0.1, 0.6]
    """
    at = frame[frame["layer"] == frame["model"].map(layer)]
    parts = {}
    for metric in MANIFOLD_METRICS:
        medians = at[(at["metric"] == f"{metric}_quantile") & (at["low"] == 0.5)]
        for statistic, rows in zip(
            STATISTICS, (at[at["metric"] == metric], at[at["metric"] == f"{metric}_std"], medians), strict=True
        ):
            for view, values in rows.groupby("view", sort=False):
                parts[view, metric, statistic] = values.set_index("model")["value"]
    columns = pd.MultiIndex.from_product(
        [manifolds, MANIFOLD_METRICS, STATISTICS], names=["manifold", "metric", "statistic"]
    )
    empty = pd.Series(dtype=float)
    cells = [parts.get(key, empty).reindex(list(layer)).to_numpy() for key in columns]
    return pd.DataFrame(np.transpose(cells), index=list(layer), columns=columns)


def readable(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The table as text: per metric a table with one column per manifold, mean ± standard deviation (median)."""
    tables = {}
    for metric in MANIFOLD_METRICS:
        part, form = table.xs(metric, axis=1, level="metric"), ("{:.1f}" if metric == "neighbors" else "{:.3f}").format
        tables[described(metric).label] = text = pd.DataFrame(index=table.index)
        for view in part.columns.unique("manifold"):
            numbers = part[view].map(form)
            text[view] = numbers["mean"] + " ± " + numbers["std"] + " (" + numbers["median"] + ")"
            text.loc[part[view]["mean"].isna(), view] = "–"
    return tables


def write_table(table: pd.DataFrame, texts: Mapping[str, pd.DataFrame], path: Path, note: str) -> Path:
    """Write numbers as Parquet, and their texts by title as Markdown and LaTeX; return the Markdown file."""
    flat = table.set_axis([" ".join(key) if isinstance(key, tuple) else str(key) for key in table.columns], axis=1)
    write_whole(path.with_suffix(".parquet"), flat.to_parquet)
    pages = "\n".join(f"# {title}\n\n{note}\n\n{markdown(text)}\n" for title, text in texts.items())
    write_text(path.with_suffix(".md"), pages)
    write_text(path.with_suffix(".tex"), "\n".join(latex(text, f"{title}. {note}") for title, text in texts.items()))
    return path.with_suffix(".md")


def collapse_in_training(models: Mapping[str, str]) -> dict[str, Figure]:
    """The figure of collapse over training, for the runs among the models that measured spectra during training."""
    parts = []
    for name, spec in models.items():
        if (Path(spec) / "records").is_dir():
            frame = read_records(spec)
            frame = frame[frame["metric"].isin(["mean_cosine", "rankme", "diameter"])]
            parts.append(frame.assign(model=name))
    frame = pd.concat(parts) if parts else pd.DataFrame(columns=["metric", "epoch"])
    if frame.loc[frame["metric"] == "mean_cosine", "epoch"].nunique() < 2:
        return {}
    return {"collapse_training": collapse_over_training(frame, "pooled", "Collapse over training, pooled features")}
