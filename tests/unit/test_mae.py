"""MAE: masks, what the encoder sees, the loss, and the decoder against lightly's order of tokens."""

from typing import Any

import numpy as np
import pytest
import torch
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.utils import get_at_index, patchify, repeat_token, set_at_index

from ssl_geometry.errors import UserError
from ssl_geometry.measure import Subject
from ssl_geometry.methods import MAE
from tests.methods import build, by_hand, images

BATCH = images(6)
PIXELS = [{"augment": "none"}]


def mae(**options: Any) -> MAE:
    return by_hand(build("MAE", **{"views": PIXELS, **options}), 1)  # type: ignore[return-value]


def views(method: MAE) -> list[torch.Tensor]:
    return [method.view(BATCH["image"], BATCH["index"], seed=0, epoch=0, view=0)]


@pytest.mark.parametrize(
    ("ratio", "visible"), [(0.75, 4), (0.5, 8), (0.7, 5), (0.0, 15), (1.0, 1)], ids=lambda value: str(value)
)
def test_the_share_of_masked_patches(ratio: float, visible: int) -> None:
    method = mae(mask_ratio=ratio)
    predicted, pixels = method.outputs(views(method), BATCH)
    assert predicted.shape == pixels.shape == (6, 16 - visible, 48)


def test_masks_are_a_function_of_seed_epoch_and_index() -> None:
    method = mae()
    order = method.order(BATCH["index"])
    torch.testing.assert_close(order[3:], method.order(BATCH["index"][3:]))
    assert order[:, 0].eq(0).all(), "the class token is first"
    assert order.sort(1).values.eq(torch.arange(17)).all()
    method.trainer.current_epoch = 1  # type: ignore[misc]
    assert (method.order(BATCH["index"]) != order).any(1).all()
    assert (mae(seed=1).order(BATCH["index"]) != order).any(1).all()


def test_each_patch_is_visible_equally_often() -> None:
    method = mae()
    visible = method.order(torch.arange(4000))[:, 1:5]
    share = visible.flatten().bincount(minlength=17)[1:] / 4000
    assert (share - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5


def test_loss_is_the_squared_error_of_standardised_patches() -> None:
    rng = np.random.default_rng(0)
    predicted, pixels = rng.normal(size=(2, 3, 12)), rng.uniform(size=(2, 3, 12))
    standardised = (pixels - pixels.mean(2, keepdims=True)) / np.sqrt(pixels.var(2, ddof=1, keepdims=True) + 1e-6)
    found = mae().loss((torch.from_numpy(predicted), torch.from_numpy(pixels)), BATCH)
    assert found.item() == pytest.approx(np.mean((predicted - standardised) ** 2), rel=1e-12)


def test_predictions_are_those_of_tokens_in_their_places() -> None:
    """As lightly's examples compute them, which put each token back where its patch was."""
    method = mae().eval()
    order = method.order(BATCH["index"])
    keep, mask = order[:, :5], order[:, 5:]
    encoder = MaskedVisionTransformerTIMM(method.backbone, weight_initialization="skip")  # type: ignore[arg-type]
    (view,) = views(method)
    tokens = method.decoder_embed(encoder.encode(view, idx_keep=keep))
    places = set_at_index(repeat_token(method.decoder.mask_token, (6, 17)), keep, tokens)
    expected = method.decoder_pred(get_at_index(method.decoder(places), mask))
    predicted, pixels = method.outputs([view], BATCH)
    torch.testing.assert_close(predicted, expected)
    patches = get_at_index(patchify(view, 4), mask - 1)
    torch.testing.assert_close(pixels.sort(2).values, patches.sort(2).values, rtol=0, atol=0)


def test_the_encoder_sees_visible_patches_alone_and_measurements_the_whole_image() -> None:
    method = mae().eval()
    lengths: list[int] = []
    block: Any = method.backbone.get_submodule("blocks.0")
    block.register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    (view,) = views(method)
    predicted, _ = method.outputs([view], BATCH)
    patch = int(method.order(BATCH["index"])[0, -1]) - 1  # masked in the first image
    row, column = 4 * (patch // 4), 4 * (patch % 4)
    changed = view.clone()
    changed[0, :, row : row + 4, column : column + 4] += 1
    torch.testing.assert_close(method.outputs([changed], BATCH)[0], predicted, rtol=0, atol=0)
    before, after = (Subject.of(method).network.backbone(x) for x in (view, changed))  # type: ignore[union-attr]
    assert (before[0] != after[0]).any()
    assert lengths == [5, 5, 17, 17]
    assert not method.steps_show_images


def test_all_that_is_trained_has_a_gradient_and_each_parameter_one_owner() -> None:
    method = mae()
    method.training_step(BATCH, 0).backward()
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in method.named_parameters() if p.grad is not None}
    assert {"backbone.pos_embed", "decoder.pos_embed"}.isdisjoint(trained)
    assert not [name for name in method.state_dict() if name.startswith("encoder")]
    decayed, _ = method.parameter_groups()
    spared = {id(p) for p in (method.decoder.mask_token, method.backbone.cls_token)}
    assert spared.isdisjoint(id(p) for p in decayed["params"])  # type: ignore[union-attr]


@pytest.mark.parametrize("backbone", ["resnet10", "test_vit2", "test_vit3"])
def test_other_backbones_are_refused(backbone: str) -> None:
    with pytest.raises(UserError, match=rf"--model\.backbone {backbone}: MAE takes ViTs that pool last"):
        MAE(backbone=backbone, image_size=160)


def test_a_decoder_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"--model\.decoder_dim 40: expected a multiple of 32"):
        build("MAE", decoder_dim=40)


def test_one_patch_leaves_nothing_to_see() -> None:
    with pytest.raises(UserError, match=r"^--model\.patch_size 4: a view is one patch; set patches"):
        mae(views=[{"augment": "none", "size": 4}])
