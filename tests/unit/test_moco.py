"""The losses of MoCo v2 and v3 by their definitions, the queue of the one, the frozen patches of the other."""

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

from ssl_geometry.methods import MoCoV2, MoCoV3
from ssl_geometry.methods.parts.queue import Queue
from tests.methods import build, by_hand, images

Rows = np.ndarray[Any, np.dtype[np.float64]]
V2, V3 = build("MoCoV2", temperature=0.2), build("MoCoV3", temperature=0.2)


def unit(rows: Rows) -> Rows:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def info_nce(query: Rows, key: Rows, others: list[Rows]) -> float:
    """Equation 1 of the first paper, for one query, at a temperature of 0.2."""
    positive = query @ key / 0.2
    logits = [positive, *(query @ other / 0.2 for other in others)]
    return float(np.logaddexp.reduce(logits) - positive)


@settings(deadline=None, max_examples=20)
@given(symmetric=st.booleans(), images=st.integers(1, 6), length=st.integers(1, 9), seed=st.integers(0, 99))
def test_v2_contrasts_with_the_queue_which_then_takes_in_the_keys(
    symmetric: bool, images: int, length: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    V2.queue = Queue(length, 3).double()
    queue = deque(V2.queue.rows.clone().numpy(), maxlen=length)
    torch.testing.assert_close(V2.queue.rows.norm(dim=1), torch.ones(length).double())
    for _ in range(3):
        queries, keys = random.normal(size=(2, 1 + symmetric, images, 3))
        loss = V2.loss(tuple(torch.from_numpy(np.concatenate([queries, keys]))), {})  # type: ignore[typeddict-item]
        pairs = zip(unit(queries).reshape(-1, 3), unit(keys).reshape(-1, 3), strict=True)
        expected = np.mean([info_nce(query, key, list(queue)) for query, key in pairs])
        assert float(loss) == pytest.approx(expected, rel=1e-10)
        queue.extend(unit(keys).reshape(-1, 3))
        rows = V2.queue.rows.roll(-int(V2.queue.position), 0)
        np.testing.assert_allclose(rows, np.stack(queue), rtol=1e-12, atol=1e-15)


@settings(deadline=None, max_examples=20)
@given(images=st.integers(1, 6), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_v3_contrasts_with_the_keys_of_the_batch(images: int, width: int, seed: int) -> None:
    """Algorithm 1 of the paper."""
    outputs = np.random.default_rng(seed).normal(size=(4, images, width))
    q1, q2, k1, k2 = unit(outputs)
    each = [
        info_nce(query[i], key[i], [key[j] for j in range(images) if j != i])
        for query, key in ((q1, k2), (q2, k1))
        for i in range(images)
    ]
    loss = V3.loss(tuple(torch.from_numpy(outputs)), {})  # type: ignore[typeddict-item]
    assert float(loss) == pytest.approx(2 * 0.2 * sum(each) / images, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_queries_of_v2_are_paired_with_the_teachers_keys_of_the_other_view(symmetric: bool) -> None:
    method = by_hand(build("MoCoV2", symmetric=symmetric), 1).eval()
    assert method.teacher is not None
    views = torch.rand(2, 4, 3, 16, 16).unbind()
    with torch.no_grad():
        outputs = method.outputs(views, images(4))
        pairs = [(0, 1), (1, 0)] if symmetric else [(0, 1)]
        expected = [method(views[q]) for q, _ in pairs] + [method.teacher(views[k]) for _, k in pairs]
    torch.testing.assert_close(outputs, tuple(expected))


def test_the_queue_is_whole_when_the_backward_comes() -> None:
    """It takes in keys before: a loss that keeps its rows must have a copy."""
    method: MoCoV2 = by_hand(build("MoCoV2"), 1)  # type: ignore[assignment]
    before = method.queue.rows.clone()
    loss = method.training_step(images(12), 0)
    assert not torch.equal(method.queue.rows, before)
    loss.backward()


def vit() -> VisionTransformer:
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=0)


def test_heads_of_v3_have_the_layers_of_their_authors() -> None:
    """The predictor of ResNets ends without batch norm, unlike all else; no layer has a bias."""
    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    heads: dict[str, Any] = {"image_size": 16, "hidden_dim": 16, "output_dim": 8}
    on_resnet, on_vit = MoCoV3(backbone="resnet10", width=1 / 16, **heads), MoCoV3(backbone=vit(), **heads)
    for method, projector, end in ((on_resnet, 1, []), (on_vit, 2, ["BatchNorm1d"])):
        for mlp, layers in (
            (method.head, [*projector * hidden, "Linear", "BatchNorm1d"]),
            (method.predictor, [*hidden, "Linear", *end]),
        ):
            (parts,) = mlp.children()
            assert [type(layer).__name__ for layer in parts.children()] == layers
            assert all(layer.bias is None for layer in parts.children() if isinstance(layer, torch.nn.Linear))


@pytest.mark.parametrize("frozen", [True, False])
def test_patches_of_a_vision_transformer_stay_as_they_were(frozen: bool) -> None:
    method = by_hand(
        MoCoV3(backbone=vit(), image_size=16, hidden_dim=16, output_dim=8, freeze_patches=frozen, lr=0.1), 4
    )
    assert len([m for m in method.head.modules() if isinstance(m, torch.nn.Linear)]) == 3, "two for ResNets"
    before = {name: value.clone() for name, value in method.named_parameters()}
    optimizer = method.build_optimizer(0.1)
    for _ in range(2):
        method.training_step(images(12), 0).backward()
        optimizer.step()
        method.after_step(0.1)
    same = {name for name, value in method.named_parameters() if torch.equal(value, before[name])}
    patches = {name for name in before if "patch_embed" in name}
    assert len(patches) == 4, "weight and bias, of student and teacher"
    assert same & patches == (patches if frozen else set())
    assert same <= patches
