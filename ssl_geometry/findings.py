"""The findings of Grigg et al. 2021 as contrasts of measured numbers, and their verdicts: see docs/cka.md.

Every contrast is a weighted sum of rows: means over networks (or pairs of networks) and layers, minus other such means.
Its error over images therefore follows from the jackknife deviations of the rows, block by block, including what both
sides share. No layer is selected by its value, since a maximum has no such interval.

With one network of each kind, verdicts are about these networks. As soon as one kind has several runs, they are about
methods; a single network gives no estimate of the variance between runs, so contrasts with it have no interval.
(Another method's variance cannot replace it: it may differ, and most contrasts have no counterpart there.)
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy import ndarray as Array

from ssl_geometry.geometry.contrast import LEVEL, SMALLEST, Contrast, deviations, interval, verdict
from ssl_geometry.report.style import BLOCK

UNTRAINED, SUPERVISED = "untrained", "supervised"
"""What claims call networks that were not trained, and those that learned from labels."""
GAIN = 0.1
"""CKA of two views by which a network becomes invariant: from first to last blocks, or over an untrained network."""
LEAST_RUNS = 3
"""Of a method, for the similarity of its runs to be a level: of two, how far it depends on the runs is not known."""
NO_LEVEL = f"no level to hold it against: add untrained=random, or {LEAST_RUNS} runs of one method"
COLUMNS = ["claim", "contrast", "numbers", "effect", "low", "high", "over", "baseline", "verdict"]


def views_of(name: str) -> str:
    """The name, in the records, of the views that a network of the comparison was trained on."""
    return f"views of {name}"


class Mean(NamedTuple):
    """A mean over rows, and how it enters a difference."""

    rows: Array
    """Their numbers; none where there is nothing to average."""
    weights: Array
    factor: float = 1.0

    def of(self, values: Array) -> Array:
        """The mean of values of all rows, (N,) or (N, J)."""
        return self.weights @ values[self.rows] if len(self.rows) else np.full(values.shape[1:], np.nan)


class Difference(NamedTuple):
    """A sum of means that a claim states to be positive."""

    claim: str
    says: str
    parts: Mapping[str, Mean]
    baseline: str = ""
    """The baseline of the networks that the claim names; without it the difference is left out."""
    margin: float = 0.0
    """Added to the sum."""

    @property
    def measured(self) -> bool:
        """Whether there are rows for all of it."""
        return all(len(part.rows) for part in self.parts.values())

    def of(self, values: Array) -> float:
        """The difference, of values of the rows, (N,)."""
        return float(self.margin + sum(part.factor * part.of(values) for part in self.parts.values()))

    def error(self, deviations: Array) -> Array:
        """The jackknife deviations of the difference, (J,), of those of the rows, (N, J)."""
        return sum((part.factor * part.of(deviations) for part in self.parts.values()), np.zeros(deviations.shape[1]))


def findings(
    frame: pd.DataFrame,
    groups: Mapping[str, str],
    labels: Mapping[str, bool | None],
    architectures: Mapping[str, Hashable] | None = None,
) -> pd.DataFrame:
    """Verdicts on the findings of Grigg et al. 2021, for each self-supervised method.

    Args:
        frame: the records of a comparison, with a column ``deviations``: for each row the jackknife deviations over
            blocks of images, (J,), whose squares sum up to its squared standard error. Without it nothing is decided.
        groups: network to method, or to what stands for it: networks of one are its runs. Those that were not trained
            are ``untrained``; no method has that name or ``supervised``, unless it is.
        labels: network to whether it learned from labels; None is unknown (it takes part in nothing) or untrained.
        architectures: network to architecture: an untrained network is a baseline for networks of its own. None: all
            have the same.

    Returns:
        One row per contrast: claim, contrast, numbers, effect, its 95 % interval (low, high), over what that is taken
        (and whether more images, or more runs of which kind of network, are needed for there to be one), the baseline,
        and the verdict on the claim. Claims whose networks or layers are not there are left out.
    """
    rows = _Rows(frame, groups, labels, architectures)
    return _decided(rows, _plan(rows))


class _Plan(NamedTuple):
    """A claim about a method: its contrasts, and the same without each run."""

    contrasts: list[Difference]
    without: list[dict[str, Difference]]
    teams: dict[str, list[str]]


def _plan(rows: "_Rows") -> list[_Plan]:
    """All claims whose networks and layers are there; contrasts with a baseline where that is there too."""
    plans = []
    for method in rows.methods:
        whole = rows.differences(method)
        without = {run: rows.differences(method, run) for run in rows.groups}
        for claim in dict.fromkeys(one.claim for one in whole):
            places = [place for place, one in enumerate(whole) if one.claim == claim]
            if all(whole[place].measured for place in places if not whole[place].baseline):
                kept = [place for place in places if whole[place].measured]
                again = [{run: differences[place] for run, differences in without.items()} for place in kept]
                plans.append(_Plan([whole[place] for place in kept], again, rows.teams(method)))
    return plans


def _decided(rows: "_Rows", plans: list[_Plan]) -> pd.DataFrame:
    found: list[dict[str, object]] = []
    for plan in plans:
        contrasts, overs = [], []
        of_methods = any(len(members) > 1 for members in plan.teams.values())
        for one, without in zip(plan.contrasts, plan.without, strict=True):
            value, runs, single = one.of(rows.values), {}, []
            networks = rows.networks(one)
            for team, members in plan.teams.items():
                left_out = np.array([without[run].of(rows.values) for run in members])
                if not np.isfinite(left_out).all():  # nothing is left without one of them
                    single += [team] if of_methods and networks.intersection(members) else []
                elif len(members) > 1 and (left_out != value).any():
                    runs[f"{len(members)} runs of {team}"] = deviations(left_out)
            unknown = [np.zeros(1)] * len(single)
            images = one.error(rows.deviations)
            contrasts.append(Contrast(value, images, [*runs.values(), *unknown]))
            over = ", ".join(["images", *runs]) if runs else "images alone"
            few = np.isnan(interval(Contrast(value, images))).any()
            needed = ["images (two Gram matrices at least)"] if few else []
            needed += ["runs of " + " and of ".join(single)] if single else []
            overs.append(f"{over}; needs more {', and more '.join(needed)}" if needed else over)
        baselines = ", ".join(dict.fromkeys(one.baseline for one in plan.contrasts if one.baseline and one.parts))
        decided = verdict(contrasts)
        for one, contrast, over in zip(plan.contrasts, contrasts, overs, strict=True):
            numbers = ", ".join(f"{name} {float(part.of(rows.values)):.3f}" for name, part in one.parts.items())
            cells = (one.claim, one.says, numbers, contrast.value, *interval(contrast), over, baselines, decided)
            found.append(dict(zip(COLUMNS, cells, strict=True)))
    return pd.DataFrame(found, columns=COLUMNS)


class _Rows:
    """The rows that claims are about, and where in its network each layer is."""

    def __init__(
        self,
        frame: pd.DataFrame,
        groups: Mapping[str, str],
        labels: Mapping[str, bool | None],
        architectures: Mapping[str, Hashable] | None = None,
    ) -> None:
        self.groups, self.architectures = groups, architectures or dict.fromkeys(groups)
        self.supervised = [name for name, label in labels.items() if label]
        self.of_method = {
            method: [name for name in groups if groups[name] == method and labels[name] is False]
            for method in groups.values()
        }
        self.methods = list(dict.fromkeys(groups[name] for name, label in labels.items() if label is False))
        self._untrained = [name for name, group in groups.items() if group == UNTRAINED]
        frame = frame[frame["metric"].isin(["cka", "class_cka", "invariance"])].reset_index(drop=True)
        layer = frame["layer"].astype(str)
        frame["kind"] = np.select(
            [layer.str.fullmatch(BLOCK), layer.str.endswith(".residual")], ["block", "branch"], ""
        )
        frame["place"] = _places(frame)
        frame["deepest"] = False
        alone = frame[frame["model_other"].isna()].sort_values("depth", kind="stable")
        frame.loc[alone.groupby(["metric", "view", "model"]).tail(1).index, "deepest"] = True
        keep = frame["model_other"].isna()
        keep.loc[_same_place(frame[~keep])] = True
        self.frame = frame = frame[keep].reset_index(drop=True)
        self.network = frame.groupby(["metric", "view", "model", "model_other"], dropna=False).ngroup().to_numpy()
        self.names = frame[["model", "model_other"]].to_numpy(object)
        self.values = frame["value"].to_numpy(float)
        self.deviations = np.full((len(frame), 1), np.nan)
        if "deviations" in frame and len(frame) and frame["deviations"].notna().all():
            self.deviations = np.stack(frame["deviations"].tolist())

    def teams(self, method: str) -> dict[str, list[str]]:
        """The groups of runs over which intervals are taken."""
        trained = {method: self.of_method[method], SUPERVISED: self.supervised}
        kinds = dict.fromkeys(self.architectures[name] for names in trained.values() for name in names)
        blank = {kind: [name for name in self._untrained if self.architectures[name] == kind] for kind in kinds}
        return trained | {UNTRAINED if len(kinds) == 1 else f"{UNTRAINED} {kind}": blank[kind] for kind in kinds}

    def untrained(self, networks: Sequence[str]) -> list[str]:
        """The baseline of networks: untrained ones of their architectures, where there is one of each."""
        kinds = {self.architectures[name] for name in networks}
        found = [name for name in self._untrained if self.architectures[name] in kinds]
        return found if kinds == {self.architectures[name] for name in found} else []

    def networks(self, one: Difference) -> set[str]:
        """Networks whose numbers enter a difference, not those that only contribute their views."""
        rows = np.concatenate([np.zeros(0, int), *(part.rows for part in one.parts.values())])
        return set(self.names[rows].ravel())

    def mean(self, chosen: pd.Series, factor: float = 1.0) -> Mean:
        """The mean over layers, then over networks (pairs of them, or views)."""
        rows = np.flatnonzero(chosen)
        _, network, layers = np.unique(self.network[rows], return_inverse=True, return_counts=True)
        return Mean(rows, 1 / (layers[network] * max(1, len(layers))), factor)

    def differences(self, method: str, run: str | None = None) -> list[Difference]:
        """All differences of the claims about a method, always in the same order; optionally without one run."""
        frame = self.frame
        stays = (frame["model"] != run) & (frame["model_other"] != run) if run else pd.Series(True, frame.index)
        ours, theirs = self.of_method[method], self.supervised
        cka, classes, invariance = (
            stays & (frame["metric"] == metric) for metric in ("cka", "class_cka", "invariance")
        )

        def at(place: str, kind: str = "block") -> pd.Series:
            return (frame["kind"] == kind) & (frame["place"] == place)

        def between(a: Sequence[str], b: Sequence[str]) -> pd.Series:
            one, other = frame["model"], frame["model_other"]
            return cka & (one != other) & ((one.isin(a) & other.isin(b)) | (one.isin(b) & other.isin(a)))

        def same(where: pd.Series, factor: float) -> Mean:
            """Mean over pairs of runs of one method, with equal weights of methods; at least two runs must be left."""
            means = [self.mean(between(runs, runs) & where) for runs in repeated]
            rows, weights = (np.concatenate([[], *(mean[i] for mean in means)]) for i in (0, 1))
            return Mean(rows.astype(int), weights / max(1, len(means)), factor)

        of_group = [[name for name in (*ours, *theirs) if self.groups[name] == group] for group in self.of_method]
        repeated = [runs for runs in of_group if len(runs) >= LEAST_RUNS]
        both = [*ours, *theirs]
        pair, fresh = between(ours, theirs), between(both, self.untrained(both))
        middle, last, branch = at("middle"), at("last"), at("middle", "branch")
        runs, chance = "runs of one method", "untrained networks"
        mean = self.mean
        found: list[Difference] = []

        def add(says: str, parts: Mapping[str, Mean], baseline: str = "", margin: float = 0.0) -> None:
            found.append(Difference(claim, says, parts, baseline, margin))

        claim = f"{method} and supervised: intermediate representations are similar, and diverge in the last layers"
        add(
            "intermediate blocks: more similar than to untrained networks",
            {"both": mean(pair & middle), "to untrained": mean(fresh & middle, -1)},
            chance,
        )
        add(
            "intermediate blocks: at least half as similar as runs of one method",
            {"both": mean(pair & middle), runs: same(middle, -0.5)},
            runs,
        )
        add(
            "last blocks: less similar than intermediate ones",
            {"intermediate": mean(pair & middle), "last": mean(pair & last, -1)},
        )
        add(
            "from intermediate to last blocks: they fall further apart than runs of one method",
            {
                "intermediate": mean(pair & middle),
                "last": mean(pair & last, -1),
                f"{runs}, intermediate": same(middle, -1),
                f"{runs}, last": same(last, 1),
            },
            runs,
        )
        if not self.untrained(both) and not repeated:
            add(NO_LEVEL, {}, NO_LEVEL, np.nan)

        claim = f"{method} and supervised: they become similar by dissimilar means"
        add(
            "intermediate blocks: residual branches are less similar than outputs",
            {"outputs": mean(pair & middle), "branches": mean(pair & branch, -1)},
        )
        add(
            "intermediate blocks: the gap between outputs and branches is wider than between runs of one method",
            {
                "outputs": mean(pair & middle),
                "branches": mean(pair & branch, -1),
                f"{runs}, outputs": same(middle, -1),
                f"{runs}, branches": same(branch, 1),
            },
            runs,
        )

        kept = [views_of(name) for name in ours if name != run]
        own = invariance & frame["view"].isin(kept)  # every network under the views of all runs of the method
        itself = own & (frame["view"] == "views of " + frame["model"]) & frame["model"].isin(ours)
        us, their = frame["model"].isin(ours), frame["model"].isin(theirs)
        our_blank, their_blank = (frame["model"].isin(self.untrained(names)) for names in (ours, theirs))
        deepest = frame["deepest"]
        claim = f"{method}: its last layer fits augmentation invariance"
        add(
            f"last layer: more invariant to the views of {method} than a supervised network's",
            {method: mean(itself & deepest), "supervised": mean(own & their & deepest, -1)},
        )
        add(
            f"last layer: more invariant to the views of {method} than an untrained network's",
            {method: mean(itself & deepest), UNTRAINED: mean(own & our_blank & deepest, -1)},
            chance,
        )

        claim = f"supervised: its last layers fit the classes (next to {method})"
        add(
            f"last blocks: nearer to the classes than those of {method}",
            {"supervised": mean(classes & their & last), method: mean(classes & us & last, -1)},
        )
        add(
            "last blocks: nearer to the classes than those of an untrained network",
            {"supervised": mean(classes & their & last), UNTRAINED: mean(classes & their_blank & last, -1)},
            chance,
        )

        claim = f"{method}: it fits the classes implicitly in intermediate layers"
        add(
            "intermediate blocks: nearer to the classes than the first ones",
            {"intermediate": mean(classes & us & middle), "first": mean(classes & us & at("first"), -1)},
        )
        add(
            "intermediate blocks: nearer to the classes than those of an untrained network",
            {method: mean(classes & us & middle), UNTRAINED: mean(classes & our_blank & middle, -1)},
            chance,
        )

        claim = f"supervised: it does not become invariant to the augmentations of {method}"
        add(
            f"from first to last blocks: invariance grows by less than {GAIN}",
            {"first": mean(own & their & at("first")), "last": mean(own & their & last, -1)},
            margin=GAIN,
        )
        add(
            f"last blocks: less than {GAIN} more invariant than an untrained network's",
            {UNTRAINED: mean(own & their_blank & last), "supervised": mean(own & their & last, -1)},
            chance,
            GAIN,
        )
        return found


def _places(frame: pd.DataFrame) -> pd.Series:
    """Of each block or residual branch: in the first, the last, or another block group of its network.

    Block groups are the stages of a ResNet, and the quarters of a vision transformer's blocks.
    """
    block = frame["layer"].astype(str).str.removesuffix(".residual").str.extract(r"^(layer|blocks\.)(\d+)(?:\.\d+)?$")
    number = pd.to_numeric(block[1])
    vit = block[0] == "blocks."
    rank, count = (
        number.where(vit).groupby(frame["model"]).transform(how)
        for how in (lambda x: x.rank(method="dense"), "nunique")
    )
    group = number.where(~vit, (4 * (rank - 1)) // count.clip(lower=1))
    ends = group.groupby(frame["model"])
    first, last = group == ends.transform("min"), group == ends.transform("max")
    return pd.Series(
        np.select([first & last, first, last, group.notna()], ["", "first", "last", "middle"], ""), frame.index
    )


def _same_place(pairs: pd.DataFrame) -> pd.Index:
    """The rows that compare a block with the block, or a branch with the branch, of the same name, or nearest depth."""
    other = pairs["layer_other"].astype(str)
    alike = np.select([other.str.fullmatch(BLOCK), other.str.endswith(".residual")], ["block", "branch"], "")
    pairs = pairs[(pairs["kind"] != "") & (pairs["kind"] == alike)]
    away = (pairs["depth"] - pairs["depth_other"]).abs().where(pairs["layer"] != pairs["layer_other"], -1)
    nearest = pairs.assign(away=away).sort_values("away", kind="stable")
    return nearest.groupby(["model", "model_other", "layer"], sort=False).head(1).index


def effect(row: Mapping[Hashable, Any]) -> str:
    """A row of :func:`findings` and its interval, as text."""
    if not np.isfinite(row["effect"]):
        return "–"
    if not np.isfinite(row["low"]):
        return f"{row['effect']:+.3f}, no interval over {row['over']}"
    return f"{row['effect']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}] over {row['over']}"


def markdown(table: pd.DataFrame, models: Sequence[str], n: int) -> str:
    """The findings as a page."""
    lines = [
        "# What this comparison decides about the findings of Grigg et al. 2021",
        "",
        f"Networks: {', '.join(models)}; {n} images. These are numbers of these runs, not the paper's. A claim "
        f"is supported if the {LEVEL:.0%} intervals of all of its contrasts lie above {SMALLEST}, and contradicted if "
        f"one of k lies below -{SMALLEST} at a level of {LEVEL:.0%} for all k; else it is undecided, which more images "
        "(--data.measure_size), and more runs with other seeds where intervals are over runs, may decide. An interval "
        "over images alone speaks of these networks, not of their methods; where one kind of network has several runs, "
        "a single network of another kind has no interval. The criteria: docs/cka.md.",
        "",
        "| claim | contrast (positive where the claim holds) | numbers | effect, 95 % interval | baseline | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for claim, rows in table.groupby("claim", sort=False):
        for place, row in enumerate(rows.to_dict("records")):
            ends = (claim, row["baseline"] or "none", row["verdict"]) if place == 0 else ("", "", "")
            cells = (ends[0], row["contrast"], row["numbers"], effect(row), *ends[1:])
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"
