"""How often verdicts on the findings of Grigg et al. 2021 are wrong where nothing is, and right where something is.

    python benchmarks/verdicts.py --draws 500

Made-up records of SimCLR and supervised networks (ResNet-18's blocks), some of each, with or without an untrained one.
Every number has noise over 16 blocks of images, half of it shared by all networks that see them, and every network has
noise of its own in every block group. *Null*: all contrasts are 0 (of the last claim: growth is the margin). *Edge*:
what the claim says of its own networks is 0, baselines are far away, which is where support is easiest. *Effect*: all
contrasts are as large as said. Printed: the share of draws in which each claim is supported, and contradicted.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import pandas as pd

from ssl_geometry.findings import GAIN, _decided, _plan, _Rows, views_of
from ssl_geometry.records import record

METHODS = {"s": "SimCLR", "t": "Supervised", "u": "untrained"}
LABELS = {"s": False, "t": True, "u": None}
CLAIMS = ("similar", "means", "fits", "classes", "implicit", "invariant")
BLOCKS = [f"layer{stage}.{block}{kind}" for stage in (1, 2, 3, 4) for block in (0, 1) for kind in (".residual", "")]
IMAGES = 16


def truth(metric: str, kinds: set[str], layer: str, effect: float, baseline: float) -> float:
    """The number behind a row: claims' own contrasts are ``effect``, those with a baseline ``baseline``."""
    last, first, branch = layer.startswith("layer4"), layer.startswith("layer1"), layer.endswith(".residual")
    if metric == "cka":
        if "u" in kinds:
            return 0.45 - baseline
        if len(kinds) == 1:  # runs of one method: twice the level, no fall, no gap
            return 2 * (0.45 - baseline) + (baseline - effect) * (last + branch)
        return 0.45 - effect * (last + branch)
    if metric == "class_cka":
        if "u" in kinds:
            return 0.3 - baseline
        return 0.3 - effect * ((first and "s" in kinds) + (last and "s" in kinds))
    if layer == "head":
        return 0.3 + (effect if "s" in kinds else effect - baseline if "u" in kinds else 0)
    if "u" in kinds:
        return 0.3 - GAIN + baseline
    return 0.3 + (effect - GAIN) * first


def made_up(runs: dict[str, int], effect: float, baseline: float) -> tuple[_Rows, np.ndarray]:
    """The rows of a comparison, and the truth of each."""
    names = [f"{kind}{number}" for kind, count in runs.items() for number in range(count)]

    def rows() -> Iterator[dict[str, object]]:
        for place, a in enumerate(names):
            for depth, layer in enumerate([*BLOCKS, "head"]):
                at = {"model": a, "layer": layer, "depth": depth / len(BLOCKS)}
                for b in names[place + 1 :] if layer != "head" else ():
                    other = {"model_other": b, "layer_other": layer, "depth_other": at["depth"]}
                    yield record(**at, **other, metric="cka", view="clean")
                yield record(**at, metric="class_cka", view="clean")
                yield from (record(**at, metric="invariance", view=views_of(name)) for name in names)

    frame = pd.DataFrame(rows())
    kinds = [
        {a[0], b[0]} if isinstance(b, str) else {a[0]}
        for a, b in zip(frame["model"], frame["model_other"], strict=True)
    ]
    each = zip(frame["metric"], kinds, frame["layer"], strict=True)
    frame["value"] = [truth(metric, kind, layer, effect, baseline) for metric, kind, layer in each]
    found = _Rows(frame, {name: METHODS[name[0]] for name in names}, {name: LABELS[name[0]] for name in names})
    return found, found.values


def simulate(
    draws: int, runs: dict[str, int], effect: float, baseline: float, images: float, seeds: float, seed: int = 0
) -> pd.DataFrame:
    """Share of draws in which each claim is supported, and contradicted.

    Args:
        draws: how many.
        runs: of each kind of network: s (self-supervised), t (supervised), u (untrained).
        effect: of the contrasts between the networks that a claim names.
        baseline: of those with a baseline.
        images: standard error of a number over the choice of images.
        seeds: standard deviation over runs of what a network adds to its numbers, in each block group.
        seed: of the draws.
    """
    rows, mean = made_up(runs, effect, baseline)
    plans, frame, generator = _plan(rows), rows.frame, np.random.default_rng(seed)
    place = frame["metric"] + frame["place"] + frame["kind"] + frame["deepest"].astype(str)
    both = pd.concat([frame["model"] + place, (frame["model_other"] + place).dropna()])
    code = pd.Series(pd.factorize(both)[0], both.index)
    one, other = code[: len(frame)].to_numpy(), code[len(frame) :]
    shared = pd.factorize(place)[0]
    counts = []
    for _ in range(draws):
        own = seeds * generator.normal(size=code.max() + 1)
        moved = own[one]
        moved[other.index] = (moved[other.index] + own[other]) / 2**0.5
        blocks = generator.normal(size=(len(frame), IMAGES)) + generator.normal(size=(shared.max() + 1, IMAGES))[shared]
        blocks *= images * (IMAGES / 2) ** 0.5
        rows.values = mean + moved + blocks.mean(1)
        rows.deviations = (blocks.mean(1, keepdims=True) - blocks) / (IMAGES * (IMAGES - 1)) ** 0.5
        counts.append(_decided(rows, plans).groupby("claim", sort=False)["verdict"].first().tolist())
    found = pd.DataFrame(counts, columns=list(CLAIMS))
    return pd.DataFrame({kind: (found == kind).mean() for kind in ("supports", "contradicts")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500)
    options = parser.parse_args()
    print(f"| case | runs (s, t, u) | SE images | sd runs | {' | '.join(CLAIMS)} |")
    print("|---|---|---|---|" + "---|" * len(CLAIMS))
    alone, several = [(1, 1, 0), (1, 1, 1)], [(2, 2, 2), (3, 3, 3), (5, 5, 3)]
    unequal = [(3, 1, 0), (5, 1, 0), (3, 1, 1), (5, 1, 1), (1, 3, 1), (3, 3, 1), (5, 5, 1), (5, 2, 2)]
    # With a large error the smallest difference of 0.01 does not help, so these are the errors of the rule itself.
    cases = [
        ((case, 0.0, far), *how)
        for case, far in (("null", 0.0), ("edge", 2.0))
        for how in ((0.2, 0.0, alone), (0.1, 0.5, several + unequal))
    ]
    cases += [(("effect", effect, effect), 0.004, 0.02, alone + several) for effect in (0.03, 0.05, 0.1)]
    for (case, effect, baseline), images, seeds, numbers in cases:
        for runs in numbers:
            kinds = {kind: count for kind, count in zip("stu", runs, strict=True) if count}
            found = simulate(options.draws, kinds, effect, baseline, images, seeds)
            cells = [f"{row.supports:.3f}, {row.contradicts:.3f}" for row in found.itertuples()]
            title = f"{case} {effect:g}" if case == "effect" else case
            print(f"| {title} | {runs} | {images:g} | {seeds:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
