"""The backbones against torchvision, timm and counts by hand; shapes are compared on the meta device, for speed."""

import math

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_geometry.errors import UserError
from ssl_geometry.models import build_backbone

BLOCKS = {"resnet10": [1, 1, 1, 1], "resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}


def meta(name, **options):
    with torch.device("meta"):
        return build_backbone(name, **options)


def basic_block_parameters(blocks, c, stem_kernel):
    """Parameters of a ResNet of BasicBlocks with c channels in the stem, counted from the paper's table."""
    count = 3 * c * stem_kernel**2 + 2 * c
    fan_in = c
    for stage, n in enumerate(blocks):
        out = c * 2**stage
        count += (9 * fan_in * out + 9 * out * out + 4 * out) + (n - 1) * (18 * out * out + 4 * out)
        if stage > 0:
            count += fan_in * out + 2 * out  # the 1x1 shortcut and its batch norm
        fan_in = out
    return count


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_weights_load_strictly_and_give_its_features(name):
    torch.manual_seed(0)
    reference = torchvision.models.get_model(name).eval()
    state = {key: value for key, value in reference.state_dict().items() if not key.startswith("fc.")}
    net = build_backbone(name).eval()
    net.load_state_dict(state, strict=True)
    reference.fc = torch.nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(net(images), reference(images))


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_parameters_are_torchvisions_without_the_classifier(name):
    with torch.device("meta"):
        reference = torchvision.models.get_model(name)
    expected = {key: value.shape for key, value in reference.state_dict().items() if not key.startswith("fc.")}
    net = meta(name)
    assert {key: value.shape for key, value in net.state_dict().items()} == expected
    assert net.num_features == reference.fc.in_features


@pytest.mark.parametrize("name", BLOCKS)
@given(channels=st.integers(1, 130), cifar=st.booleans())
@settings(max_examples=10, deadline=None)
def test_width_scales_every_channel_count(name, channels, cifar):
    net = meta(name, stem="cifar" if cifar else "imagenet", width=channels / 64)
    count = sum(parameter.numel() for parameter in net.parameters())
    assert count == basic_block_parameters(BLOCKS[name], channels, stem_kernel=3 if cifar else 7)
    assert net.num_features == 8 * channels
    assert net(torch.empty(2, 3, 40, 40, device="meta")).shape == (2, 8 * channels)


@pytest.mark.parametrize("width", [0.25, 0.5, 2])
def test_width_scales_bottlenecks(width):
    narrow, full = meta("resnet50", width=width).state_dict(), meta("resnet50").state_dict()
    for key, value in full.items():
        scaled = [n if i >= 2 or (key == "conv1.weight" and i == 1) else n * width for i, n in enumerate(value.shape)]
        assert list(narrow[key].shape) == scaled, key


def test_initialisation_is_he_with_fan_out_and_unit_batch_norm():
    torch.manual_seed(0)
    net = build_backbone("resnet18", stem="cifar", width=0.5)
    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            # the standard deviation of n normal draws is off by 1/sqrt(2n): five of these are allowed
            tolerance = 5 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=tolerance), name
        if isinstance(module, torch.nn.BatchNorm2d):
            assert bool((module.weight == 1).all() and (module.bias == 0).all()), name


def test_cifar_stem_keeps_the_resolution():
    net, sizes = build_backbone("resnet10", stem="cifar", width=0.1), []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    net(torch.rand(2, 3, 32, 32))
    assert sizes == [32, 16, 8, 4]


@pytest.mark.parametrize(
    ("name", "size", "patch_size", "patch"),
    [("vit_tiny_patch16_224", None, None, 16), ("vit_small_patch32_224", 96, None, 32), ("test_vit", 16, 4, 4)],
)
def test_vit_is_timms_without_the_classifier(name, size, patch_size, patch):
    net = build_backbone(name, image_size=size, patch_size=patch_size).eval()
    size = size or 224
    reference = timm.create_model(name, num_classes=7, img_size=size, patch_size=patch).eval()
    reference.load_state_dict(net.state_dict(), strict=False)
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        features = net(images)
        expected = reference.forward_features(images)[:, 0]  # the class token
    assert features.shape == (2, net.num_features)
    torch.testing.assert_close(features, expected)
    assert net.pos_embed.shape[1] == (size // patch) ** 2 + 1


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a backbone asked for published weights")

    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    build_backbone("vit_tiny_patch16_224", image_size=32)
    build_backbone("resnet10", width=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet81"}, "backbone 'resnet81'.*'resnet18'"),
        ({"backbone": "vit_tiny_patch61_224"}, "'vit_tiny_patch16_224'"),
        ({"backbone": "resnet18", "stem": "small"}, "stem='small'.*'cifar' or 'imagenet'"),
        ({"backbone": "resnet18", "width": 0.001}, "width=0.001.*at least 0.015625"),
        ({"backbone": "vit_tiny_patch16_224", "stem": "cifar"}, "stem='cifar'.*for ResNets"),
        ({"backbone": "vit_tiny_patch16_224", "width": 2.0}, "width=2.0.*for ResNets"),
        ({"backbone": "resnet18", "patch_size": 4}, "patch_size=4.*for vision transformers"),
        (
            {"backbone": "vit_tiny_patch16_224", "image_size": 40},
            "image_size=40.*multiple of 16, or a patch_size",
        ),
        ({"backbone": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 5}, "image_size=32.*multiple of 5"),
        ({"backbone": "vit_tiny_patch16_224", "image_size": 8}, "image_size=8.*multiple of 16"),
    ],
)
def test_mistakes_are_reported_in_one_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        build_backbone(**options)
    assert "\n" not in str(error.value)
