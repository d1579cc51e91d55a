"""What a survey finds where there is nothing to find, and where there is: seeds of a recipe as one unit, or apart.

    python benchmarks/prediction.py --draws 1000

Metrics and results are normal and independent at the level of recipes; models of one recipe share both but for a tenth
of noise. Printed: the median Q² of ridge regression and how often it is above 0, how often one metric has p < 0.05, and
how often any of the 54 has it after Holm. With ``--effect 1`` the result is one of the metrics, plus as much noise:
what there is to find.
"""

import argparse

import numpy as np

from ssl_geometry.geometry.prediction import leave_one_out, predictive_r2, rank_correlation, unit_means

METRICS = 54
WITHIN = 0.1
"""Standard deviation between models of one recipe, of that between recipes."""


def draw(recipes: int, seeds: int, effect: float, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Metrics, results and recipe of each model."""
    metrics = generator.normal(size=(recipes, METRICS))
    results = generator.normal(size=recipes) + effect * metrics[:, 0]
    unit = np.repeat(np.arange(recipes), seeds)
    noisy = [part[unit] + WITHIN * generator.normal(size=part[unit].shape) for part in (metrics, results)]
    return *noisy, unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--ridge_draws", type=int, default=300, help="of them with ridge regression, which is slower")
    parser.add_argument("--permutations", type=int, default=2000, help="beyond eight units")
    parser.add_argument("--effect", type=float, default=0.0)
    options = parser.parse_args()
    print(f"{options.draws} draws, {options.ridge_draws} with ridge; effect {options.effect:g}; {METRICS} metrics")
    print("| recipes x seeds | units | median Q² | Q² > 0 | first metric p < 0.05 | any p (Holm) < 0.05 |")
    print("|---|---|---|---|---|---|")
    for recipes, seeds in ((14, 1), (7, 2), (4, 3), (5, 2), (10, 2)):
        for averaged in (True, False) if seeds > 1 else (True,):
            q2, single, best = [], [], []
            for number in range(options.draws):
                x, y, unit = draw(recipes, seeds, options.effect, np.random.default_rng([recipes, seeds, number]))
                if averaged:
                    x, y = unit_means(x, unit), unit_means(y[:, None], unit)[:, 0]
                tested = rank_correlation(x, y, options.permutations, seed=number)
                single.append(tested.p[0] < 0.05)
                best.append(tested.adjusted.min() < 0.05)
                if number < options.ridge_draws:
                    q2.append(predictive_r2(leave_one_out(x, y), y))
            taken = "recipes" if averaged else "models"
            print(
                f"| {recipes} x {seeds} | {taken} | {np.median(q2):.2f} | {np.mean(np.array(q2) > 0):.2f} | "
                f"{np.mean(single):.3f} | {np.mean(best):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
