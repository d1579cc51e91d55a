"""How much GPU memory the configurations in `configs/` ask for, derived from the tensors that autograd keeps.

    python benchmarks/memory.py

One step of each method is run on the CPU under bf16 autocast, with two sizes of batch; `saved_tensors_hooks` counts the
bytes of distinct storages that the backward pass waits for, without those of parameters. The difference of the two is
what one more image costs. To it come weights, gradients and the optimiser's states in float32. Allocator, cuDNN's
workspaces and the views themselves are not in it: an estimate, from below.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_geometry.cli import Parser
from ssl_geometry.config_files import expand_bases
from ssl_geometry.methods import Method
from ssl_geometry.methods.base import Batch

CONFIGS = Path(__file__).parents[1] / "configs"
FEW, MORE = 2, 4
GIB = 2**30
STATES = {"lars": 1, "sgd": 1, "adamw": 2}
"""Tensors that an optimiser keeps for each weight."""


def saved_bytes(method: Method, images: int) -> int:
    """Bytes that the backward of one step waits for, in distinct storages that are no parameters."""
    fixed = {tensor.untyped_storage().data_ptr() for tensor in (*method.parameters(), *method.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    views = [torch.rand(images, 3, view.size, view.size) for view, numbers in method.training_views for _ in numbers]
    batch: Batch = {"image": views[0], "label": torch.zeros(images).long(), "index": torch.arange(images)}
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = method.outputs(views, batch)
    assert any(output.requires_grad for output in outputs)  # they hold the graph, and so the storages, until here
    return sum(seen.values())


def bytes_an_image(method: Method) -> int:
    """What the views of one more image cost until the backward pass."""
    method.train()
    few, more = (saved_bytes(method, images) for images in (FEW, MORE))
    return (more - few) // (MORE - FEW)


def options_of(config: Path) -> Any:
    """Model and data of a configuration, as `fit` would read them."""
    parser = Parser()
    parser.add_argument("--config", action="config")
    for option in ("--base", "--experiment", "--loggers"):
        parser.add_argument(option, type=Any)
    parser.add_subclass_arguments(Method, "model")
    for group in ("data", "trainer", "cka", "invariance", "probes", "neighbors", "spectrum"):
        parser.add_argument(f"--{group}", type=dict)
    return parser.parse_args(expand_bases(["--config", str(config)]))


def main() -> None:
    print("| config | batch x views | MiB per view | activations, GiB | weights, gradients, states, GiB | sum, GiB |")
    print("|---|---|---|---|---|---|")
    recipes = sorted([*CONFIGS.glob("*_cifar10.yaml"), *CONFIGS.glob("*_imagenet.yaml")])
    for config in [*recipes, *sorted(CONFIGS.glob("quickstart/s*.yaml"))]:
        options = options_of(config)
        given = vars(options.model.init_args)
        module, _, name = options.model.class_path.rpartition(".")
        method = getattr(__import__(module, fromlist=[name]), name)(**given)
        each, views = bytes_an_image(method), sum(len(numbers) for _, numbers in method.training_views)
        batch = options.data["batch_size"]
        parameters = list(nn.Module.parameters(method))
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        weights = sum(parameter.numel() for parameter in parameters)
        fixed = 4 * (weights + trained * (1 + STATES[given["optimizer"]]))
        activations = batch * each
        print(
            f"| {config.relative_to(CONFIGS)} | {batch:,} x {views} | {each / views / 2**20:.1f} | "
            f"{activations / GIB:.1f} | {fixed / GIB:.2f} | {(activations + fixed) / GIB:.1f} |"
        )


if __name__ == "__main__":
    main()
