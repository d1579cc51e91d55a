"""What CKA packages answer where the right answer is known; prints a Markdown table.

    pip install torch-cka pytorch-cka cka-pytorch ckatorch     # one that is absent is left out
    python -P benchmarks/cka_traps.py                          # -P: benchmarks/cka.py is not pytorch-cka's `cka`

Batches of 64 images, in order, once, float32, on the CPU, networks in evaluation mode. "right" is unbiased minibatch
CKA (Nguyen et al. 2021), written out in float64 NumPy. ckatorch takes what a layer gives for (samples, tokens,
features) and compares tokens; in every row but the first its hook is wrapped so that images take the place of tokens.
"""

import contextlib
import io
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ssl_geometry.geometry.gram import gram_vector
from ssl_geometry.metrics import LayerwiseCKA
from ssl_geometry.models import build_backbone
from ssl_geometry.models.taps import Taps

BATCH = 64
Measure = Callable[[nn.Module, nn.Module, list[str], Tensor], tuple[np.ndarray, list[str]]]
"""(network, network, layers, images) -> the map of CKA and the names that the package gives to its rows."""


def ours(a: nn.Module, b: nn.Module, layers: list[str], images: Tensor) -> tuple[np.ndarray, list[str]]:
    rows, cols = (Taps(net, layers, lambda _, x: gram_vector(x, BATCH)) for net in (a, b))
    metric = None
    with rows, cols, torch.no_grad():
        for batch in images.split(BATCH):
            x, y = rows(batch), cols(batch)
            metric = metric or LayerwiseCKA(list(x), list(y))  # each call of a module is a row
            metric.update(x, y)
    assert metric is not None
    return metric.compute().numpy().reshape(len(metric.rows), -1), metric.rows


def loader(images: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(images, torch.zeros(len(images))), batch_size=BATCH)


def torch_cka(a: nn.Module, b: nn.Module, layers: list[str], images: Tensor) -> tuple[np.ndarray, list[str]]:
    from torch_cka import CKA

    cka = CKA(a, b, model1_layers=layers, model2_layers=layers)
    cka.compare(loader(images))
    return cka.export()["CKA"].detach().numpy(), cka.export()["model1_layers"]


def pytorch_cka(a: nn.Module, b: nn.Module, layers: list[str], images: Tensor) -> tuple[np.ndarray, list[str]]:
    from cka import compute_cka

    return compute_cka(a, b, loader(images), layers=layers, device="cpu", progress=False)[0].numpy(), layers


def cka_pytorch(a: nn.Module, b: nn.Module, layers: list[str], images: Tensor) -> tuple[np.ndarray, list[str]]:
    from cka_pytorch import CKACalculator

    cka = CKACalculator(a, b, model1_layers=layers, device=torch.device("cpu"), verbose=False)
    matrix = cka.calculate_cka_matrix(loader(images), num_epochs=1)
    return matrix.numpy(), cka.hook_manager1.module_names


def ckatorch(
    a: nn.Module, b: nn.Module, layers: list[str], images: Tensor, as_shipped: bool = False
) -> tuple[np.ndarray, list[str]]:
    from ckatorch import CKA

    class ImagesAsTokens(CKA):
        def _hook(self, model: str, name: str, module: nn.Module, inputs: object, out: Tensor) -> None:
            super()._hook(model, name, module, inputs, out.flatten(1)[None])

    cka = (CKA if as_shipped else ImagesAsTokens)(a, b, layers=layers)
    matrix = cka(loader(images), epochs=1, f_extract=lambda batch: {"x": batch[0]}, f_args={})
    return matrix.numpy(), cka.first_model_info.layers


PEERS: dict[str, Measure] = {
    "torch-cka": torch_cka,
    "pytorch-cka": pytorch_cka,
    "cka-pytorch": cka_pytorch,
    "ckatorch": ckatorch,
}


def right(x: Tensor, y: Tensor) -> float:
    """Ratio of the sums over batches of HSIC_1 (Song et al. 2012, eq. 5); a batch of fewer than four is left out."""
    sums = np.zeros(3)
    for p, q in zip(x.split(BATCH), y.split(BATCH), strict=True):
        n = len(p)
        if n < 4:
            continue
        features = [z.detach().flatten(1).double().numpy() for z in (p, q)]
        k, l = (z @ z.T for z in (z - z.mean(0) for z in features))  # noqa: E741
        np.fill_diagonal(k, 0)
        np.fill_diagonal(l, 0)
        for i, (s, t) in enumerate(((k, l), (k, k), (l, l))):
            sums[i] += (s * t).sum() + s.sum() * t.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * s.sum(0) @ t.sum(0)
    return float(sums[0] / np.sqrt(sums[1] * sums[2]))


class Features(nn.Module):
    """A network whose layer `out` gives the features that a function makes of the images."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.out = function, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(x))


class Chain(nn.Sequential):
    """Modules in a row."""

    def forward(self, x: Tensor) -> Tensor:  # ckatorch calls networks by the name of their argument
        return super().forward(x)


class Twice(nn.Module):
    """One activation that runs twice, and linear layers registered in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first, self.act = nn.Linear(32, 32), nn.Linear(32, 32), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        first = self.first(x)
        second = self.second(self.act(first))
        return {"first": first, "act": self.act(first), "second": second, "act:1": self.act(second)}


def largest_error(measure: Measure, nets: tuple[nn.Module, nn.Module], layers: list[str], images: Tensor) -> str:
    a, b = (taps_of(net, layers, images) for net in nets)
    truth = np.array([[right(a[row], b[col]) for col in layers] for row in layers])
    return f"{np.abs(measure(*nets, layers, images)[0] - truth).max():.0e}"


def taps_of(net: nn.Module, layers: list[str], images: Tensor) -> dict[str, Tensor]:
    with Taps(net, layers) as taps:
        return taps(images)


def calls_of_one_module(measure: Measure, a: Twice, b: Twice, x: Tensor) -> str:
    matrix, names = measure(a, b, ["act"], x)
    if len(names) == 2:
        return " and ".join(f"`{name}`" for name in names)
    truth = [right(a.outputs(x)[name], b.outputs(x)[name]) for name in ("act", "act:1")]
    return f"{'first' if abs(matrix[0, 0] - truth[0]) < abs(matrix[0, 0] - truth[1]) else 'second'} call"


def names_fit(measure: Measure, a: Twice, b: Twice, x: Tensor) -> str:
    matrix, names = measure(a, b, ["first", "second"], x)
    truth = [[right(a.outputs(x)[row], b.outputs(x)[col]) for col in names] for row in names]
    return "yes" if np.allclose(matrix, truth, atol=0.01) else "no"


def in_autocast(measure: Measure, *args: nn.Module | list[str] | Tensor) -> str:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return cell(measure, *args)


def as_shipped(measure: Measure, *args: nn.Module | list[str] | Tensor) -> str:
    return cell(partial(ckatorch, as_shipped=True) if measure is ckatorch else measure, *args)


def constant(measure: Measure, net: nn.Module, x: Tensor) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answer = cell(measure, net, net, ["out"], x)
    return answer + (", named in a warning" if any("vary" in str(warning.message) for warning in caught) else "")


def modes_after(measure: Measure, x: Tensor) -> str:
    net = Chain(nn.Linear(32, 32), nn.BatchNorm1d(32)).train()
    net[1].eval()
    measure(net, net, ["1"], x)
    return f"network {'train' if net.training else 'eval'}, BN {'train' if net[1].training else 'eval'}"


def hooks_after(measure: Measure, x: Tensor) -> str:
    a, b = (Chain(nn.Linear(32, 32)).eval() for _ in range(2))
    measure(a, b, ["0"], x)
    return str(len(a[0]._forward_hooks))


def gradients_recorded(measure: Measure, x: Tensor) -> str:
    seen: list[bool] = []
    net = Features(lambda z: (seen.append(torch.is_grad_enabled()), z)[1])
    measure(net, net, ["out"], x)
    return "yes" if any(seen) else "no"


def cell(measure: Measure, *args: nn.Module | list[str] | Tensor, at: tuple[int, int] = (0, 0)) -> str:
    return f"{measure(*args)[0][at]:.4f}"  # type: ignore[arg-type]


@torch.no_grad()
def traps() -> list[tuple[str, str, Callable[[Measure], str]]]:
    """(what is asked, the right answer, how to ask)."""
    torch.manual_seed(1)

    def two(
        title: str, f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor], x: Tensor, ask: Callable = cell
    ) -> tuple[str, str, Callable[[Measure], str]]:
        return title, f"{right(f(x), g(x)):.4f}", lambda m: ask(m, Features(f), Features(g), ["out"], x)

    x, wide, maps = torch.randn(256, 32), torch.randn(256, 8192), torch.randn(128, 3, 8, 8)
    low_rank = x[:, :8] @ torch.randn(8, 500)
    noisy = low_rank + 0.3 * torch.randn_like(low_rank)
    half = x[:128].clone()
    half[64:, 16:] = half[64:, :16]
    untrained, calibrated = (
        tuple(build_backbone("resnet18", stem="cifar", width=0.5).eval() for _ in range(2)) for _ in range(2)
    )
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    images = torch.rand(128, 3, 32, 32)
    for net in calibrated:  # as training would: every BN has the statistics of the images
        for module in net.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        net(images)
        net.eval()
    before = nn.Linear(32, 32)
    in_place = Chain(before, nn.ReLU(inplace=True)).eval()
    a, b = Twice().eval(), Twice().eval()

    def same(z: Tensor) -> Tensor:
        return z

    def left_half(z: Tensor) -> Tensor:
        return z[:, : z.shape[1] // 2]

    def right_half(z: Tensor) -> Tensor:
        return z[:, z.shape[1] // 2 :]

    return [
        two("convolution maps (4-D), with themselves", same, same, maps, as_shipped),
        (
            "ResNet-18 with random weights: largest error",
            "0",
            lambda m: largest_error(m, untrained, blocks, images),
        ),
        (
            "the same with calibrated BN statistics: largest error",
            "0",
            lambda m: largest_error(m, calibrated, blocks, images),
        ),
        two("rank 8 plus noise", left_half, right_half, torch.cat([low_rank, noisy], 1)),
        two("the same, every feature + 100", left_half, right_half, torch.cat([low_rank, noisy], 1) + 100),
        two(
            "the same, every feature + 10, inside bf16 autocast",
            left_half,
            right_half,
            torch.cat([low_rank, noisy], 1) + 10,
            in_autocast,
        ),
        two("independent Gaussians, 4,096 features", left_half, right_half, wide),
        two("features with 0.001 times themselves", same, lambda z: 0.001 * z, x),
        ("a constant layer", "nan", lambda m: constant(m, Features(torch.zeros_like), x)),
        two("unrelated in the first batch, equal in the second", left_half, right_half, half),
        two("a last batch of 3 (131 images)", same, lambda z: z.tanh(), x[:131]),
        (
            "a layer with the in-place ReLU after it",
            f"{right(before(x), before(x).relu()):.4f}",
            lambda m: cell(m, in_place, in_place, ["0", "1"], x, at=(0, 1)),
        ),
        ("a module that runs twice", "both calls", lambda m: calls_of_one_module(m, a, b, x)),
        (
            "modules registered in another order than they run: names fit the rows",
            "yes",
            lambda m: names_fit(m, a, b, x),
        ),
        (
            "modes afterwards, of a network in train with a BN in eval",
            "network train, BN eval",
            lambda m: modes_after(m, x),
        ),
        ("hooks left on a layer", "0", lambda m: hooks_after(m, x)),
        ("records gradients", "no", lambda m: gradients_recorded(m, x)),
    ]


def answer(ask: Callable[[Measure], str], measure: Measure) -> str:
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return ask(measure)
    except Exception as error:  # the answer is that it fails
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def main() -> None:
    warnings.simplefilter("ignore")
    measures: dict[str, Measure] = {"ours": ours}
    for name, measure in PEERS.items():
        with contextlib.suppress(PackageNotFoundError):
            measures[f"{name} {version(name)}"] = measure
    print(f"torch {torch.__version__}\n")
    print(f"| | right | {' | '.join(measures)} |")
    print("|---" * (len(measures) + 2) + "|")
    for title, truth, ask in traps():
        print(
            f"| {title} | {truth} | {' | '.join(answer(ask, measure) for measure in measures.values())} |", flush=True
        )


if __name__ == "__main__":
    main()
