"""Layer names, depths and activations against lists written out and forwards computed by hand."""

import shutil
import weakref
from itertools import pairwise

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.models.modules.heads import SimCLRProjectionHead
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import ResNet, VisionTransformer, mobilenet_v3_small
from torchvision.models.resnet import BasicBlock
from torchvision.models.swin_transformer import SwinTransformer

from ssl_geometry.errors import UserError
from ssl_geometry.geometry.gram import pool
from ssl_geometry.methods import SimCLR
from ssl_geometry.models import build_backbone
from ssl_geometry.models.layers import layer_depths, layer_names, present
from ssl_geometry.models.taps import Taps

STAGES = {"resnet10": [1, 1, 1, 1], "resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3], "resnet50": [3, 4, 6, 3]}


class Method(nn.Module):
    """What a training method looks like from outside."""

    def __init__(self, backbone, head):
        super().__init__()
        self.head = head  # before the backbone, as nothing forbids it
        self.backbone = backbone

    def forward(self, images):
        return self.head(self.backbone(images))


class CNN(nn.Module):
    """A user's own network, of no known kind, whose ReLU runs twice."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.Tanh()))
        self.more = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)])
        self.relu = nn.ReLU(inplace=True)

    def forward(self, images):
        x = self.features(images)
        for conv in self.more:
            x = self.relu(conv(x))
        return x.mean((2, 3))


def small_resnet(name="resnet10", seed=0):
    torch.manual_seed(seed)
    net = build_backbone(name, stem="cifar", width=1 / 16)
    for module in net.modules():  # batch norms that do something in eval mode
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias)
    return net.eval()


def small_method(head=None):
    net = small_resnet()
    return Method(net, head or SimCLRProjectionHead(net.num_features, 8, 4)).eval()


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def take(model, layers, images, reduce=None):
    with Taps(model, layers, reduce) as taps, torch.no_grad():
        return taps(images)


def assert_same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


# names


@pytest.mark.parametrize("name", STAGES)
def test_resnet_presets(name):
    with torch.device("meta"):
        net = build_backbone(name)
    post = [f"layer{stage + 1}.{i}" for stage, n in enumerate(STAGES[name]) for i in range(n)]
    both = [layer for block in post for layer in (f"{block}.residual", block)]
    assert layer_names(net, "post_residual") == post
    assert layer_names(net, "residual") == [f"{block}.residual" for block in post]
    assert layer_names(net, "blocks") == both
    assert layer_names(net, "stages") == [f"layer{stage + 1}.{n - 1}" for stage, n in enumerate(STAGES[name])]
    assert layer_names(net) == ["stem", *both, "pooled"]
    if name == "resnet50":
        assert len(both) == 32


def test_vit_presets():
    net = build_backbone("vit_tiny_patch16_224", image_size=32)
    blocks = [f"blocks.{i}" for i in range(12)]
    assert layer_names(net) == ["stem", *blocks, "pooled"]
    assert layer_names(net, "blocks") == layer_names(net, "post_residual") == blocks
    assert layer_names(net, "stages") == ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]
    net.blocks = net.blocks[:6]
    assert layer_names(net, "stages") == ["blocks.1", "blocks.2", "blocks.4", "blocks.5"]
    net.blocks = net.blocks[:2]
    assert layer_names(net, "stages") == ["blocks.0", "blocks.1"]


def test_presets_of_a_network_of_no_known_kind_are_its_children():
    layers = ["features.0", "features.1.0", "features.1.1", "more.0", "more.1", "relu"]
    assert layer_names(CNN()) == layer_names(CNN(), "blocks") == layer_names(CNN(), "post_residual") == layers
    assert layer_names(CNN(), "mor*") == ["more.0", "more.1"]  # a ModuleList itself never runs


def test_head_preset_is_every_leaf_of_a_methods_head():
    leaves = [f"head.layers.{i}" for i in range(5)]
    method = small_method()
    assert layer_names(method, "head") == leaves
    assert layer_names(method) == layer_names(method.backbone) + leaves
    assert layer_names(small_method(nn.Linear(32, 4)), "head") == ["head"]
    vit = Method(build_backbone("vit_tiny_patch16_224", image_size=32), nn.Sequential(nn.Linear(192, 4), nn.ReLU()))
    assert layer_names(vit, "head") == ["head.0", "head.1"]  # and not timm's own `head`
    assert layer_names(vit, "head*") == ["head_drop", "head.0", "head.1", "head"]


def test_wrappers_leave_no_trace_in_names():
    expected = layer_names(small_resnet(), "*")
    net = small_resnet()
    net.layer2[0] = torch.compile(net.layer2[0], backend="eager")
    method = Method(torch.compile(net, backend="eager"), nn.Identity())
    assert layer_names(torch.compile(method, backend="eager"), "*") == [*expected, "head"]
    cnn = CNN()
    cnn.features = torch.compile(cnn.features, backend="eager")
    assert layer_names(cnn) == layer_names(CNN())


def test_lists_and_globs_give_forward_order_without_repeats():
    net = small_resnet("resnet18")
    assert layer_names(net, ["pooled", "layer2.*.residual", "stages", "layer2.1", "layer1.0.conv1", "stages"]) == [
        "layer1.0.conv1",
        "layer1.1",
        "layer2.0.residual",
        "layer2.1.residual",
        "layer2.1",
        "layer3.1",
        "layer4.1",
        "pooled",
    ]
    assert layer_names(net, "layer?.0") == ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]


def test_static_order_is_the_order_of_execution():
    for model in (small_resnet("resnet18"), small_resnet("resnet50"), small_method()):
        layers = ["conv1", "layer2.*.conv?", "layer2.*.downsample*", "layer2", "all"]
        assert list(take(model, layers, torch.rand(2, 3, 16, 16))) == layer_names(model, layers)


class _Extras(SimCLR):
    """A method with modules that do not run when it is measured, or give no row for each image."""

    def __init__(self) -> None:
        super().__init__(backbone="resnet10", width=0.25, image_size=16)
        self.criterion = nn.Module()
        self.criterion.memory_bank = nn.Linear(2, 2)
        self.backbone.aux = nn.Linear(2, 2)


def test_a_glob_takes_the_modules_that_run_when_a_method_is_measured():
    method = _Extras().train()
    state = torch.random.get_rng_state()
    names = layer_names(method, "*", "--cka.layers")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(part.training for part in method.modules())
    assert not any(part in name for name in names for part in ("criterion", "aux", "knn"))
    assert {"conv1", "layer1.0", "layer1.0.conv1", "pooled", "head.layers.0"} <= set(names)
    with Taps(method.eval(), names, lambda _, x: x.shape) as taps:
        assert list(taps(torch.rand(2, 3, 16, 16)))


def test_a_module_that_does_not_run_is_refused_by_its_option():
    with pytest.raises(UserError, match=r"--cka.layers='criterion.memory_bank' does not run when _Extras is measured"):
        layer_names(_Extras(), "criterion.memory_bank", "--cka.layers")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("layer5.0", r"layers='layer5.0'.*ResNet.*'layer4.0'"),
        ("layer2.0.residul", "'layer2.0.residual'"),
        ("postresidual", "'post_residual'.*presets: all, blocks, post_residual, residual, stages"),
        (["stem", "layer7.*"], r"layers='layer7.\*'"),
        ("head", "layers='head' matches no layer"),
        ([], "chooses no layer"),
    ],
)
def test_unknown_layers_are_reported_in_one_line(layers, message):
    with pytest.raises(UserError, match=message) as error:
        Taps(small_resnet(), layers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("preset", ["residual", "stages", "head"])
def test_empty_preset_is_an_error_and_is_not_offered(preset):
    with pytest.raises(UserError, match=f"layers='{preset}' matches no layer of CNN") as error:
        layer_names(CNN(), preset)
    assert str(error.value).count(f"'{preset}'") == 1
    assert "(presets: all, blocks, post_residual)" in str(error.value)


# depths


@pytest.mark.parametrize("model", [small_resnet("resnet18"), small_method(), CNN()], ids=["resnet", "method", "cnn"])
def test_depths_rise_evenly_over_all_and_enclose_the_rest(model):
    every = layer_names(model)
    depths = layer_depths(model, layer_names(model, "*"))
    head = [name for name in every if name.startswith("head")]
    backbone = [name for name in every if name not in head]
    assert [depths[name] for name in backbone] == pytest.approx([i / (len(backbone) - 1) for i in range(len(backbone))])
    assert [depths[name] for name in head] == pytest.approx([1 + 0.1 * i for i in range(1, 1 + len(head))])
    values = list(depths.values())
    assert values == sorted(values)
    assert values[0] == 0
    assert values[-1] == pytest.approx(1 + 0.1 * len(head))


@pytest.mark.parametrize("architecture", ["resnet10", "vit_tiny_patch16_224"])
@pytest.mark.parametrize(
    "head", [nn.Identity(), nn.Linear(8, 4), SimCLRProjectionHead(8, 8, 4)], ids=["none", "linear", "simclr"]
)
def test_depth_in_the_backbone_is_the_same_whatever_the_head(architecture, head):
    """Live a network is measured with its head, by ``survey`` without it."""
    with torch.device("meta"):
        net = build_backbone(architecture, image_size=32)
    layers = layer_names(net, "*")  # timm's own head_drop too
    alone, depths = layer_depths(net, layers), layer_depths(Method(net, head), layers)
    kept = [name for name in layers if not name.startswith("head") or name == "head_drop"]
    assert {name: depths[name] for name in kept} == {name: alone[name] for name in kept}
    assert (depths["stem"], depths["pooled"]) == (0, 1)
    assert max(depths[name] for name in kept) == 1


def test_depths_between_two_layers_are_distinct_and_follow_the_forward():
    net = small_resnet("resnet50")
    inside = ["layer2.0", *(f"layer2.1.{name}" for name in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"))]
    depths = list(layer_depths(net, inside).values())
    assert all(a < b for a, b in pairwise(depths))
    both = layer_depths(net, ["layer2.1.bn3", "layer2.1.residual"])
    assert both["layer2.1.bn3"] == both["layer2.1.residual"]


def test_depth_of_a_repeated_call_is_the_modules():
    assert layer_depths(CNN(), ["relu", "relu:1"]) == {"relu": 1, "relu:1": 1}
    assert layer_depths(Method(nn.Flatten(), nn.Linear(3, 1)), ["head"]) == {"head": 1.1}


def test_depth_of_an_unknown_layer_is_an_error():
    with pytest.raises(UserError, match=r"'layer9\.0' is no layer of ResNet.*'layer4\.0'"):
        layer_depths(small_resnet(), ["layer9.0"])


# activations


class Counter:
    """A compiler that counts its graphs and their runs."""

    def __init__(self):
        self.compiled = self.ran = 0

    def __call__(self, graph, inputs):
        self.compiled += 1

        def run(*args):
            self.ran += 1
            return graph.forward(*args)

        return run


def norm(x, bn):
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


@settings(max_examples=5, deadline=None)
@given(batch=st.integers(1, 3), side=st.integers(8, 20), seed=st.integers(0, 99))
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_taps_equal_the_blocks_computed_by_hand(name, batch, side, seed):
    net = small_resnet(name, seed)
    images = torch.rand(batch, 3, side, side)
    got = take(net, "all", images)
    with torch.no_grad():
        x = F.relu(norm(F.conv2d(images, net.conv1.weight, padding=1), net.bn1))
        torch.testing.assert_close(got["stem"], x)
        for path in layer_names(net, "post_residual"):
            block, out = net.get_submodule(path), x
            convs = ["1", "2"] if name == "resnet18" else ["1", "2", "3"]
            for i in convs:
                conv = getattr(block, f"conv{i}")
                out = norm(
                    F.conv2d(out, conv.weight, stride=conv.stride, padding=conv.padding), getattr(block, f"bn{i}")
                )
                out = out if i == convs[-1] else F.relu(out)
            torch.testing.assert_close(got[f"{path}.residual"], out)
            if block.downsample is not None:
                conv, bn = block.downsample
                x = norm(F.conv2d(x, conv.weight, stride=conv.stride), bn)
            x = F.relu(out + x)
            torch.testing.assert_close(got[path], x)
        torch.testing.assert_close(got["pooled"].flatten(1), x.mean((2, 3)))
        assert torch.equal(got["pooled"].flatten(1), net(images))


def test_vit_taps_are_the_tokens_and_pooled_the_features():
    net = build_backbone("vit_tiny_patch16_224", image_size=32).eval()
    images = torch.rand(2, 3, 32, 32)
    got = take(net, "all", images)
    with torch.no_grad():
        patches = F.conv2d(images, net.patch_embed.proj.weight, net.patch_embed.proj.bias, stride=16)
        torch.testing.assert_close(got["stem"], patches.flatten(2).mT)
        torch.testing.assert_close(got["blocks.7"], net.blocks[7](got["blocks.6"]))
        assert torch.equal(got["pooled"], net(images))
        torch.testing.assert_close(got["pooled"], net.norm(got["blocks.11"])[:, 0])


def timm_net(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=0, **options).eval()


LAYOUTS = {
    "swin": lambda: timm_net(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(1, 2)
    ),
    "swin, as many channels as rows": lambda: timm_net(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2)
    ),
    "swin v2": lambda: timm_net(
        "swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(1, 2)
    ),
    "convnext": lambda: timm_net("convnext_tiny", depths=(1, 1, 1, 1), dims=(4, 8, 8, 16)),
    "convnext, as many channels as rows": lambda: timm_net("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 8, 16)),
    "maxvit": lambda: timm_net("maxvit_rmlp_pico_rw_256", img_size=64, embed_dim=(32, 32), depths=(1, 1), stem_width=8),
    "resnet": lambda: small_resnet(),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_maps_have_their_channels_first_whatever_the_networks_layout(kind):
    """Pooled stages are timm's own, as it gives them in NCHW; the last is what the network pools."""
    side = 64 if kind == "maxvit" else 32
    net, images = LAYOUTS[kind](), torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    if kind == "resnet":
        stages, expected = layer_names(net, "stages"), None
    else:
        stages = [info["module"] for info in net.feature_info if info["module"] != "stem"]
        expected = net.forward_intermediates(images, intermediates_only=True)[-len(stages) :]
    last = {"swin": "norm", "maxv": "norm", "conv": "head.norm", "resn": "pooled"}[kind[:4]]
    with torch.no_grad(), Taps(net, [*stages, last], lambda _, x: pool(x)) as taps:
        found = taps(images)
        torch.testing.assert_close(found[last], net(images), rtol=1e-6, atol=1e-6)
    for stage, feature in zip(stages, expected or [], strict=False):
        assert feature.shape[2] == feature.shape[3]
        torch.testing.assert_close(found[stage], feature.mean((2, 3)), rtol=1e-6, atol=1e-6)


def test_maps_that_may_be_either_way_round_are_refused_in_one_line():
    """torchvision's Swin says nothing of its layout; only its shapes do."""
    options = {"patch_size": [4, 4], "depths": [1, 1], "num_heads": [1, 2], "window_size": [4, 4]}
    images = torch.rand(2, 3, 32, 32)
    for width in (12, 8):
        net = SwinTransformer(embed_dim=width, **options).eval()
        with Taps(net, ["features.0", "features.1", "features.1.0.mlp.0"], lambda _, x: x.shape[1]) as taps:
            if width == 12:
                assert taps(images) == {"features.0": 12, "features.1.0.mlp.0": 48, "features.1": 12}
                continue
            with pytest.raises(UserError, match=r"^layers='features.0' gives maps 8x8x8 whose channels may be first"):
                taps(images)
            with pytest.raises(UserError, match="maps 8x12x8 whose channels"):
                taps(torch.rand(2, 3, 32, 48))


def test_heads_of_attention_are_no_maps():
    vit = build_backbone("vit_tiny_patch16_224", image_size=32).eval()
    with Taps(vit, ["blocks.0.attn.q_norm"], lambda _, x: x.shape) as taps:
        assert taps(torch.rand(2, 3, 32, 32)) == {"blocks.0.attn.q_norm": (2, 3, 5, 64)}


def test_images_that_are_not_square_leave_a_convolutional_network_channels_first():
    with Taps(CNN().eval(), ["relu"], lambda _, x: x.shape) as taps:
        assert taps(torch.rand(1, 3, 10, 7))["relu:1"] == (1, 4, 4, 1)


def test_method_taps_reach_through_the_head():
    method = small_method()
    images = torch.rand(4, 3, 16, 16)
    got = take(method, ["pooled", "head"], images)
    with torch.no_grad():
        assert torch.equal(got["pooled"].flatten(1), method.backbone(images))
        torch.testing.assert_close(got["head.layers.2"], F.relu(got["head.layers.1"]))
        assert torch.equal(got["head.layers.4"], method(images))


def test_an_in_place_operation_afterwards_changes_nothing_taken():
    net = nn.Sequential(nn.Linear(3, 50), nn.ReLU(inplace=True))
    images = torch.randn(8, 3)
    expected = net[0](images).detach()
    assert (expected < 0).any()
    assert torch.equal(take(net, "0", images)["0"], expected)
    assert torch.equal(take(net, "0", images, lambda name, x: x.sum())["0"], expected.sum())


def test_every_call_of_a_module_is_captured():
    net = CNN().eval()
    images = torch.rand(2, 3, 12, 12)
    got = take(net, ["relu", "more.*"], images)
    assert list(got) == ["more.0", "relu", "more.1", "relu:1"]
    assert torch.equal(got["relu"], F.relu(got["more.0"]))
    assert torch.equal(got["relu:1"], F.relu(got["more.1"]))


def test_a_module_shared_by_two_parents_goes_by_its_first_name():
    shared = nn.Tanh()
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 4), shared), nn.Sequential(nn.Linear(4, 2), shared))
    assert layer_names(net) == ["0.0", "0.1", "1.0"]
    assert layer_depths(net, layer_names(net)) == {"0.0": 0, "0.1": 0.5, "1.0": 1}
    assert list(take(net, "all", torch.rand(5, 3))) == ["0.0", "0.1", "1.0", "0.1:1"]


def test_the_first_tensor_of_a_tuple_is_the_activation():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x)[0]

    x = torch.rand(2, 5, 8)
    assert torch.equal(take(Net(), "attention", x)["attention"], attention(x, x, x)[0])


def test_nothing_outlives_a_call_but_what_reduce_returned():
    net, seen = small_resnet(), []

    def reduce(name, activation):
        seen.append(weakref.ref(activation))
        return activation.mean()

    images = torch.rand(2, 3, 16, 16)
    with Taps(net, "all", reduce) as taps:
        got = taps(images)
        assert len(seen) == len(got) == 10
        assert not any(ref() is not None for ref in seen)
        net(images)  # the network itself, inside the block: not captured
        assert len(seen) == 10
        assert list(taps(images)) == list(got) == taps.names
    assert not any(x.requires_grad for x in got.values())


def test_hooks_live_inside_the_block_only():
    net = small_resnet()
    taps = Taps(net)
    assert hooks(net) == 0
    for _ in range(2):
        with taps:
            assert hooks(net) == 10
        assert hooks(net) == 0
    with pytest.raises(UserError, match="with Taps"):
        taps(torch.rand(1, 3, 8, 8))


def test_hooks_go_when_the_forward_or_the_reduction_fails():
    net = small_resnet()
    with pytest.raises(RuntimeError, match="channels"):
        take(net, "all", torch.rand(1, 5, 8, 8))
    assert hooks(net) == 0

    def reduce(name, activation):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        take(net, "all", torch.rand(1, 3, 8, 8), reduce)
    assert hooks(net) == 0
    backend = Counter()
    torch.compile(net, backend=backend)(torch.rand(1, 3, 8, 8))
    assert backend.ran == 1  # the compiler is on again


def test_a_layer_that_does_not_run_is_an_error_that_names_it():
    net = CNN()
    net.loss = nn.MSELoss()
    with pytest.raises(UserError, match=r"layers=\['loss'\] did not run in the forward of CNN"):
        take(net, "all", torch.rand(1, 3, 9, 9))


def test_a_layer_without_a_tensor_is_an_error_that_names_it():
    class Shape(nn.Module):
        def forward(self, x):
            return x.shape

    with pytest.raises(UserError, match="layers='0' gives Size"):
        take(nn.Sequential(Shape()), "0", torch.rand(1))


# circumstances


def test_mode_and_random_generators_are_left_alone():
    net = small_resnet()
    net.layer1.train()
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    take(net, "all", torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_reduction_sees_the_activation_outside_autocast():
    net = small_resnet()
    images = torch.rand(2, 3, 16, 16)

    def reduce(name, activation):
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
        return activation.dtype, (activation.float().flatten(1) @ activation.float().flatten(1).T).dtype

    with torch.autocast("cpu", torch.bfloat16), Taps(net, "layer1.0.conv1", reduce) as taps:
        assert taps(images) == {"layer1.0.conv1": (torch.bfloat16, torch.float32)}
        assert torch.is_autocast_enabled("cpu")


def test_taps_work_in_inference_mode():
    net = small_resnet()
    images = torch.rand(2, 3, 16, 16)
    with torch.inference_mode(), Taps(net) as taps:
        got = taps(images)
    assert_same(got, take(net, "all", images))


@pytest.mark.parametrize("how", ["whole", "in place", "backbone", "block"])
def test_compiled_networks_give_what_eager_ones_give_and_stay_compiled(how):
    torch._dynamo.reset()
    method, backend, images = small_method(), Counter(), torch.rand(2, 3, 16, 16)
    expected = take(method, "all", images)
    compiled = method
    if how == "whole":
        compiled = torch.compile(method, backend=backend)
    elif how == "in place":
        method.compile(backend=backend)
    elif how == "backbone":
        method.backbone = torch.compile(method.backbone, backend=backend)
    else:
        method.backbone.layer3[0] = torch.compile(method.backbone.layer3[0], backend=backend)

    with torch.no_grad():
        output = compiled(images)
        graphs, ran = backend.compiled, backend.ran
        assert graphs > 0
        assert_same(take(compiled, "all", images), expected)
        assert (backend.compiled, backend.ran) == (graphs, ran)  # the taps ran eagerly
        assert torch.equal(compiled(images), output)
        assert backend.compiled == graphs  # and left what was compiled as it was
        assert backend.ran == 2 * ran


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_captures_are_eager_ones_after_inductor_fused_the_layers():
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)).eval()
    images = torch.randn(3, 6)
    expected = take(net, "*", images)
    compiled = torch.compile(net)
    with torch.no_grad():
        compiled(images)
    assert_same(take(compiled, "*", images), expected)


def test_ddp_networks_give_what_bare_ones_give_without_communication(tmp_path, monkeypatch):
    method, images = small_method(), torch.rand(2, 3, 16, 16)
    expected = take(method, "all", images)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.compile(DistributedDataParallel(method), backend="eager")
        with monkeypatch.context() as patch:
            patch.setattr(DistributedDataParallel, "forward", None)
            assert_same(take(wrapped, "all", images), expected)
    finally:
        dist.destroy_process_group()


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.fc = net, nn.Linear(8, 2)


@pytest.mark.parametrize(
    ("network", "blocks", "stages"),
    [
        (
            lambda: VisionTransformer(16, 8, num_layers=5, num_heads=2, hidden_dim=8, mlp_dim=8),
            [f"encoder.layers.encoder_layer_{i}" for i in range(5)],
            [f"encoder.layers.encoder_layer_{i}" for i in (1, 2, 3, 4)],
        ),
        (
            lambda: timm_net("convnext_tiny", depths=(2, 1, 3, 2), dims=(4, 8, 8, 16)),
            ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1", "stages.2.blocks.0", "stages.2.blocks.1",
             "stages.2.blocks.2", "stages.3.blocks.0", "stages.3.blocks.1"],
            ["stages.0.blocks.1", "stages.1", "stages.2.blocks.2", "stages.3.blocks.1"],
        ),
        (
            lambda: timm_net("swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=8, depths=(2, 2),
                             num_heads=(1, 2)),
            ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"],
            ["layers.0.blocks.1", "layers.1.blocks.1"],
        ),
        (
            lambda: Wrapped(ResNet(BasicBlock, [2, 1, 1, 2])),
            ["net.layer1.0", "net.layer1.1", "net.layer2.0", "net.layer3.0", "net.layer4.0", "net.layer4.1"],
            ["net.layer1.1", "net.layer4.1"],
        ),
        (mobilenet_v3_small, [f"features.{i}" for i in range(1, 12)], [f"features.{i}" for i in (3, 6, 9, 11)]),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4))), ["0", "1.0", "1.1"], []),
    ],
    ids=["vision transformer of torchvision", "convnext", "swin", "resnet in a wrapper", "mobilenet", "no blocks"],
)  # fmt: skip
def test_networks_of_no_known_kind_have_blocks_and_stages(network, blocks, stages):
    net = network()
    found = [name for name in layer_names(net, "blocks") if name in blocks]
    assert found == blocks
    if stages:
        assert layer_names(net, "stages") == stages
    else:
        assert present(net, None, "stages") == "all"
    inside = [name for name in layer_names(net, "all") if any(name.startswith(f"{block}.") for block in blocks)]
    assert not inside, "a block is one layer"
