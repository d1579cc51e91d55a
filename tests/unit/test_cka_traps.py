"""CKA of whole networks, where implementations of it go wrong: against the textbook formula in float64."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ssl_geometry.geometry.gram import gram_vector
from ssl_geometry.metrics import LayerwiseCKA
from ssl_geometry.models import build_backbone
from ssl_geometry.models.taps import Taps


def hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """n(n-3) times HSIC_1 (Song et al. 2012, eq. 5) of Gram matrices with zero diagonals."""
    n = len(k)
    return (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * k.sum(0) @ l.sum(0)


def expected(x: Tensor, y: Tensor, size: int = 64) -> float:
    sums = np.zeros(3)
    for p, q in zip(x.split(size), y.split(size), strict=True):
        if len(p) >= 4:
            features = [z.detach().flatten(1).double().numpy() for z in (p, q)]
            k, l = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in features)  # noqa: E741
            np.fill_diagonal(k, 0)
            np.fill_diagonal(l, 0)
            sums += hsic(k, l), hsic(k, k), hsic(l, l)
    return float(sums[0] / np.sqrt(sums[1] * sums[2]))


def expected_map(a: dict[str, Tensor], b: dict[str, Tensor]) -> np.ndarray:
    return np.array([[expected(x, y) for y in b.values()] for x in a.values()])


def cka_map(a: nn.Module, b: nn.Module, layers: str | list[str], images: Tensor, batch: int = 64) -> LayerwiseCKA:
    """What a user writes: two networks, tapped on the same batches."""
    rows, cols = (Taps(net, layers, lambda _, x: gram_vector(x)) for net in (a, b))
    metric = LayerwiseCKA(rows.names, cols.names)
    with rows, cols, torch.no_grad():
        for part in images.split(batch):
            metric.update(rows(part), cols(part))
    return metric


def kept(net: nn.Module, layers: str | list[str], images: Tensor) -> dict[str, Tensor]:
    with Taps(net, layers) as taps, torch.no_grad():
        return taps(images)


def resnet(name: str = "resnet18", width: float = 0.25, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_backbone(name, stem="cifar", width=width).eval()


class Twice(nn.Module):
    """One activation that runs twice, and linear layers registered in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first, self.act = nn.Linear(16, 16), nn.Linear(16, 16), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(128, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_a_layer_before_an_in_place_relu_is_what_it_was_before_it() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True)), torch.randn(128, 16)
    before = net[0](x)
    truth = expected(before, before.relu())
    assert truth < 0.95
    assert cka_map(net, net, ["0", "1"], x).compute()[0, 1] == pytest.approx(truth, abs=1e-6)


def test_the_residual_branch_is_not_the_block_output_that_is_added_into_it(images: Tensor) -> None:
    net = resnet()
    block = net.get_submodule("layer2.0")
    with torch.no_grad():
        x = net.layer1(net.relu(net.bn1(net.conv1(images))))
        residual = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
        output = (residual + block.downsample(x)).relu()
    got = cka_map(net, net, ["layer2.0.residual", "layer2.0"], images).compute()
    assert got[0, 1] == pytest.approx(expected(residual, output), abs=1e-5)
    assert got[0, 1] < 0.99


def test_each_call_of_a_module_that_runs_twice_is_a_layer() -> None:
    torch.manual_seed(0)
    net, x = Twice(), torch.randn(128, 16)
    calls = {"act": net.act(net.first(x)), "act:1": net(x)}
    metric = LayerwiseCKA(list(calls))
    with Taps(net, ["act"], lambda _, y: gram_vector(y)) as taps, torch.no_grad():
        metric.update(taps(x))
    np.testing.assert_allclose(metric.compute(), expected_map(calls, calls), atol=1e-6)


def test_rows_are_in_the_order_of_the_names() -> None:
    torch.manual_seed(0)
    a, b, x = Twice(), Twice(), torch.randn(128, 16)
    outputs = [{"first": net.first(x), "second": net.second(net.act(net.first(x)))} for net in (a, b)]
    metric = cka_map(a, b, ["first", "second"], x)
    truth = [[expected(outputs[0][row], outputs[1][col]) for col in metric.cols or []] for row in metric.rows]
    assert abs(truth[0][0] - truth[1][1]) > 0.01
    np.testing.assert_allclose(metric.compute(), truth, atol=1e-6)


def test_measuring_leaves_modes_hooks_and_statistics_as_they_were(images: Tensor) -> None:
    net = resnet().train()
    frozen = [module.eval() for module in net.layer1.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [buffer.clone() for module in frozen for buffer in module.buffers()]
    modes = [module.training for module in net.modules()]
    cka_map(net, net, "blocks", images)
    assert [module.training for module in net.modules()] == modes
    assert all(map(torch.equal, before, [buffer for module in frozen for buffer in module.buffers()]))
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("rest", [1, 2, 3])
def test_a_last_batch_of_fewer_than_four_changes_nothing(rest: int, images: Tensor) -> None:
    a, b = resnet(seed=0), resnet(seed=1)
    more = torch.cat([images, images[:rest]])
    assert torch.equal(cka_map(a, b, "stages", more).compute(), cka_map(a, b, "stages", images).compute())


def test_untrained_networks_match_float64(images: Tensor) -> None:
    a, b = resnet(seed=0), resnet(seed=1)
    truth = expected_map(kept(a, "blocks", images), kept(b, "blocks", images))
    np.testing.assert_allclose(cka_map(a, b, "blocks", images).compute(), truth, atol=1e-6)


def test_networks_of_different_depth_and_width(images: Tensor) -> None:
    a, b = resnet("resnet10"), resnet("resnet34", width=0.125)
    truth = expected_map(kept(a, "post_residual", images), kept(b, "post_residual", images))
    got = cka_map(a, b, "post_residual", images).compute()
    assert got.shape == (4, 16)
    np.testing.assert_allclose(got, truth, atol=1e-6)


@pytest.mark.parametrize("variation", [1e-2, 1e-4])
def test_a_nearly_collapsed_network_matches_float64_of_what_it_gave(variation: float, images: Tensor) -> None:
    net = resnet()
    for norm in (net.layer4[0].bn2, net.layer4[0].downsample[1]):
        nn.init.constant_(norm.weight, variation)
        nn.init.constant_(norm.bias, 1)
    layers = ["layer3.1", "layer4.0"]
    features = kept(net, layers, images)
    assert features["layer4.0"].std(0).max() < variation
    np.testing.assert_allclose(cka_map(net, net, layers, images).compute(), expected_map(features, features), atol=1e-5)


def test_a_collapsed_network_is_nan_from_the_collapse_on_and_named(images: Tensor) -> None:
    net = resnet()
    for norm in (net.layer4[0].bn2, net.layer4[0].downsample[1]):
        nn.init.zeros_(norm.weight)
        nn.init.constant_(norm.bias, 1)
    metric = cka_map(net, net, "post_residual", images)
    with pytest.warns(UserWarning, match=r"layer4\.0, layer4\.1") as caught:
        got = metric.compute()
    assert len(caught) == 1
    assert torch.isfinite(got[:6, :6]).all()
    assert torch.isnan(got[6:]).all()
    assert torch.isnan(got[:, 6:]).all()


def test_autocast_around_the_forward_changes_activations_but_not_the_arithmetic(images: Tensor) -> None:
    net = resnet()
    for module in net.modules():  # features that lie far from 0, where a product in bf16 would fail
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = kept(net, "residual", images)
        got = cka_map(net, net, "residual", images, batch=128).compute()
    assert any(x.dtype == torch.bfloat16 for x in features.values())
    np.testing.assert_allclose(got, expected_map(features, features), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    images=st.integers(4, 140),
    size=st.integers(4, 70),
    width=st.integers(1, 1600),
    offset=st.sampled_from([0.0, 100.0, 1000.0]),
    seed=st.integers(0, 10**6),
)
def test_every_shape_gives_the_float64_gram_matrix(
    images: int, size: int, width: int, offset: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(images, 8, generator=generator) @ torch.randn(8, width, generator=generator) + offset
    parts = []
    for group in x.double().split(size):
        n = len(group)
        if n >= 4:
            gram = (group - group.mean(0)) @ (group - group.mean(0)).T
            gram.fill_diagonal_(0)
            means = gram.sum(0) / (n - 2) - gram.sum() / (2 * (n - 1) * (n - 2))
            parts.append((gram - means - means[:, None])[*torch.triu_indices(n, n, 1)])
    truth = torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)
    got = gram_vector(x, size).double()
    assert got.shape == truth.shape
    scale = truth.abs().max() if len(truth) else 1.0
    assert bool(((got - truth).abs() <= 1e-5 * scale).all())


def test_the_memory_format_does_not_matter() -> None:
    x = torch.randn(64, 24, 6, 5)
    plain, last = gram_vector(x), gram_vector(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(plain, last, rtol=0, atol=1e-5 * float(plain.abs().max()))


def test_scaled_and_rotated_channels_are_the_same_layer(images: Tensor) -> None:
    torch.manual_seed(0)
    net = resnet()
    rotate = nn.Conv2d(16, 16, 1, bias=False)
    rotate.weight.data = 1e-3 * torch.linalg.qr(torch.randn(16, 16))[0][:, :, None, None]
    turned = nn.Sequential(net.conv1, rotate)
    got = cka_map(turned, turned, ["0", "1"], images).compute()
    np.testing.assert_allclose(got, np.ones((2, 2)), atol=1e-6)


def test_no_warning_where_every_layer_varies(images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cka_map(resnet(), resnet(seed=1), "blocks", images).compute()
