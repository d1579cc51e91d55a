"""Tables from records, as Markdown and LaTeX. A table only computes means and standard deviations over seeds."""

import re
from collections.abc import Mapping

import pandas as pd


def seed_table(frame: pd.DataFrame, columns: Mapping[str, str], groups: Mapping[str, str]) -> pd.DataFrame:
    """One row per group of networks, one column per metric: mean in percent and standard deviation over seeds.

    Args:
        frame: records, one row per network and metric.
        columns: metric to the title of its column, in the order of the columns; metrics without records are left out.
        groups: network to group, in the order of the rows.

    Returns:
        Strings such as ``71.3 ± 0.4``, indexed by group with the number of its networks; empty where there is none.

    Example:
        >>> frame = pd.DataFrame({"model": ["a", "b"], "metric": ["acc", "acc"], "value": [0.5, 0.7]})
        >>> print(markdown(seed_table(frame, {"acc": "accuracy"}, {"a": "SimCLR", "b": "SimCLR"})))
        |  | accuracy |
        |---|---|
        | SimCLR (2) | 60.0 ± 14.1 |
    """
    seeds = pd.Series(groups).value_counts()
    table = pd.DataFrame(index=[f"{group} ({seeds[group]})" for group in dict.fromkeys(groups.values())])
    for metric, title in columns.items():
        rows = frame[frame["metric"] == metric]
        if rows.empty:
            continue
        for group, values in (100 * rows["value"]).groupby(rows["model"].map(groups)):
            deviation = f" ± {values.std():.1f}" if len(values) > 1 else ""
            table.loc[f"{group} ({seeds[group]})", title] = f"{values.mean():.1f}{deviation}"
    return table.fillna("")


def markdown(table: pd.DataFrame) -> str:
    """A table of strings in Markdown.

    Example:
        >>> print(markdown(pd.DataFrame({"value": ["1"]}, index=["row"])))
        |  | value |
        |---|---|
        | row | 1 |
    """
    head = ["", *map(str, table.columns)]
    rows = [[str(name), *row] for name, row in zip(table.index, table.to_numpy(), strict=True)]
    lines = [f"| {' | '.join(line)} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def latex(table: pd.DataFrame, caption: str) -> str:
    """A table of strings in LaTeX, for the package booktabs."""
    caption = re.sub(r"([%&#_$])", r"\\\1", caption)  # pandas escapes cells alone
    text = table.to_latex(escape=True, caption=caption, column_format="l" + "r" * table.shape[1])
    return text.replace("±", r"$\pm$")
