"""Options of ``survey``, and what the images allow of them."""

from collections.abc import Sequence
from typing import Annotated, Any

from rich.console import Console

from ssl_geometry.data.datamodule import DataModule
from ssl_geometry.errors import UserError, did_you_mean
from ssl_geometry.measure.neighbors import CANDIDATES, LEAST_CANDIDATES, SETTINGS
from ssl_geometry.ranges import at_least
from ssl_geometry.shared_options import Sources, networks_parser, parse_networks, unchanged

SEMANTIC = "semantic"
LAYERS = ("stages", "pooled")
SOURCES: Sources = {
    "neighbors.layers": {"neighbors.layers": unchanged, "spectrum.layers": unchanged},
    **{f"neighbors.{name}": {f"neighbors.{name}": unchanged} for name in ("k", "settings", "copies")},
    "spectrum.copies": {"spectrum.copies": unchanged},
}
"""Option of this command to the options of ``fit`` that set its default."""
LEAST_OF_A_CLASS = 3
"""Images of a class with fewer have no two neighbours, and no manifold."""
NOTES = "models.json"
"""In the folder of results: what decides whether a model is measured again."""


def parse(args: Sequence[str]) -> Any:
    """The options of the command line; see :func:`parse_networks`.

    Raises:
        UserError: a mistake in the options.
    """
    parser = networks_parser(
        "survey",
        "Measure the manifolds of many models, which models are similar, and what predicts their transfer. The same "
        "command continues with the missing models when it is started again.",
        "neighbors",
        layers="stages and pooled features; heads differ, and published models have none",
        several=True,
    )
    parser.add_argument(
        "--neighbors.settings",
        type=list[str],
        default=list(SETTINGS),
        help="manifolds of augmented views of an image, in addition to those of a class: policy (the views of "
        "SimCLR), crop, color, rotate, translate",
    )
    parser.add_argument(
        "--neighbors.k",
        type=Annotated[int, at_least(LEAST_CANDIDATES)] | None,
        help=f"nearest images that NNK selects from (default: {CANDIDATES}, or all others where there are fewer)",
    )
    parser.add_argument(
        "--neighbors.copies", type=Annotated[int, at_least(3)], default=10, help="augmented views of each image"
    )
    parser.add_argument(
        "--spectrum.copies",
        type=Annotated[int, at_least(2, also=0)],
        default=10,
        help="augmented views of each image for LiDAR; 0 leaves LiDAR and alignment out",
    )
    parser.add_argument("--clusters", type=Annotated[int, at_least(2)], default=3, help="number of clusters of models")
    parser.add_argument(
        "--targets",
        type=list[str],
        default=[],
        help="results to predict: published (of the benchmark's checkpoints), CSV files with the columns task, "
        "dataset, model, value, or folders that ssl_geometry.probe wrote",
    )
    parser.add_argument(
        "--recipes",
        type=dict | list | str,  # what is no dictionary is reported in one line
        default={},
        help="model to the name of its recipe, such as {a: x, b: x}, where it cannot be inferred; models "
        "of one recipe are averaged in predictions",
    )
    options = parse_networks(parser, "survey", args, "neighbors", LAYERS, SOURCES, NOTES)
    options.recipes = _named_recipes(options.recipes)
    for name in options.neighbors.settings:
        if name not in SETTINGS:
            raise UserError(f"--neighbors.settings {name}: {did_you_mean(name, SETTINGS)}")
    options.manifolds = [SEMANTIC, *options.neighbors.settings]
    return options


def _named_recipes(given: Any) -> dict[str, str]:
    if not isinstance(given, dict) or any(name is None or isinstance(name, dict | list) for name in given.values()):
        raise UserError(f"--recipes {given}: expected models with the names of their recipes, such as '{{a: x, b: x}}'")
    return {str(model): str(name) for model, name in given.items()}


def report_small_classes(options: Any, data: DataModule, console: Console) -> None:
    """Print which classes have no manifold; where none has one, semantic manifolds are left out of the tables.

    Raises:
        UserError: no manifold is left.
    """
    few = (data.measure_labels.bincount(minlength=data.num_classes) < LEAST_OF_A_CLASS).nonzero().squeeze(1).tolist()
    if len(few) == data.num_classes:
        message = (
            f"no class has {LEAST_OF_A_CLASS} of the {data.measure_size} measurement images, so none has a manifold"
        )
        if not options.neighbors.settings:
            raise UserError(
                f"--neighbors.settings []: {message}; choose some, or measure more images (--data.measure_size)"
            )
        console.print(f"left out  semantic manifolds: {message}")
        options.manifolds = list(options.neighbors.settings)
    elif few:
        console.print(
            f"{len(few)} of {data.num_classes} classes have fewer than {LEAST_OF_A_CLASS} measurement images and no "
            f"manifold, the first is {data.class_names[few[0]]}: --data.measure_size {data.measure_size}",
        )
