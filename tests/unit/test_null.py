"""The null of CKA by permuted images: against permuted features, and how often it rejects unrelated networks."""

import pytest
import torch

from ssl_geometry.geometry.cka import cka_matrix, permutation_p, permuted_cka
from ssl_geometry.geometry.gram import gram_vector

CHANCE = 3.3  # binomial standard errors: one in a thousand


def layers(images: int, number: int, seed: int, classes: int = 5) -> list[torch.Tensor]:
    """Layers of one network, related to each other and to nothing else."""
    generator = torch.Generator().manual_seed(seed)
    trunk = torch.randn(classes, 6, generator=generator)[torch.randint(classes, (images,), generator=generator)]
    return [trunk + torch.randn(images, 6, generator=generator) for _ in range(number)]


def vectors(network: list[torch.Tensor], gram_size: int = 16) -> torch.Tensor:
    return torch.stack([gram_vector(layer, gram_size) for layer in network])


@pytest.mark.parametrize("images", [64, 71])
def test_a_draw_is_cka_with_the_images_of_each_gram_matrix_permuted_equally_in_all_layers(images):
    x, y = layers(images, 2, seed=0), layers(images, 3, seed=1)
    null = permuted_cka([vectors(x)], [vectors(y)], 16, draws=3)
    generator = torch.Generator().manual_seed(0)
    whole = [[torch.rand(4, 16, generator=generator).argsort(1) for _ in range(3)]]
    rest = [torch.rand(1, images - 64, generator=generator).argsort(1) for _ in range(3)] if images > 64 else [None] * 3
    for draw, (orders, last) in enumerate(zip(whole[0], rest, strict=True)):
        moved = [(orders + 16 * torch.arange(4)[:, None]).flatten()]
        moved += [] if last is None else [64 + last[0]]
        v, w = vectors(x).double(), vectors([layer[torch.cat(moved)] for layer in y]).double()
        expected = cka_matrix(v @ w.T, v.square().sum(1), w.square().sum(1))
        torch.testing.assert_close(null[draw].double(), expected, rtol=0, atol=1e-5)


def test_the_null_does_not_depend_on_how_images_come_in_batches():
    x, y = vectors(layers(128, 2, seed=0)), vectors(layers(128, 2, seed=1))
    halves = [list(part.chunk(2, dim=1)) for part in (x, y)]
    torch.testing.assert_close(permuted_cka([x], [y], 16, 5), permuted_cka(*halves, 16, 5), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_unrelated_networks_are_rejected_as_often_as_the_level_states_and_the_search_has_its_own_null():
    repetitions, level = 300, 0.1
    rejected = torch.zeros(3)
    for seed in range(repetitions):
        x, y = (vectors(layers(64, 6, seed=2 * seed + network)) for network in range(2))
        null = permuted_cka([x], [y], 16, draws=59, seed=seed)
        value = cka_matrix(x @ y.T, x.square().sum(1), y.square().sum(1))
        every = permutation_p(value, null)
        searched = permutation_p(value[0].max(), null[:, 0].amax(1))
        rejected += torch.stack([every[0, 0], searched, every[0].min()]) <= level
    slack = CHANCE * (level * (1 - level) / repetitions) ** 0.5
    one, searched, best = (rejected / repetitions).tolist()
    assert abs(one - level) < slack
    assert abs(searched - level) < slack
    assert best > level + slack, "the most similar of six layers is found significant more often than it should be"


def test_related_networks_are_found():
    x = layers(128, 1, seed=0)
    y = [x[0] + torch.randn(128, 6)]
    value = cka_matrix(*(part for part in [vectors(x) @ vectors(y).T]), *(vectors(n).square().sum(1) for n in (x, y)))
    assert float(permutation_p(value, permuted_cka([vectors(x)], [vectors(y)], 16, draws=99))) == pytest.approx(0.01)


def test_a_layer_without_cka_has_no_p():
    x, y = layers(64, 2, seed=0), layers(64, 1, seed=1)
    x[1] = torch.ones(64, 6)
    null = permuted_cka([vectors(x)], [vectors(y)], 16, draws=9)
    assert permutation_p(torch.tensor([[0.5], [0.5]]), null).isnan().tolist() == [[False], [True]]
