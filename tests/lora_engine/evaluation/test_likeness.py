"""Measures of embeddings are right on constructed cases: equal sets, shuffled captions, one image for all prompts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.errors import SettingsError
from lora_engine.evaluation.likeness import (
    nearest_similarity,
    paired_similarity,
    prompt_margin,
    seed_distance,
    subject_similarity,
)


def vectors(seed: int, *shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_paired_similarity_is_torchs_cosine_and_1_for_the_same_images() -> None:
    images, reference = vectors(0, 5, 16), vectors(1, 5, 16)
    expected = F.cosine_similarity(images, reference)
    assert torch.allclose(paired_similarity(images, reference), expected, atol=1e-6)
    assert torch.allclose(paired_similarity(images, images), torch.ones(5), atol=1e-6)
    assert torch.allclose(paired_similarity(images, reference[0]), images @ reference[0], atol=1e-6)


def test_shuffled_captions_turn_the_margin_around() -> None:
    texts = torch.eye(4)
    images = F.normalize(texts * 3 + 0.1, dim=-1)
    right = [float(prompt_margin(images[own][None], texts, own)) for own in range(4)]
    shuffled = [float(prompt_margin(images[own][None], texts, (own + 1) % 4)) for own in range(4)]
    assert min(right) > 0.5
    assert max(shuffled) < 0.0


def test_the_same_image_for_every_prompt_has_no_margin_on_average() -> None:
    texts, image = vectors(2, 6, 16), vectors(3, 1, 16)
    margins = torch.cat([prompt_margin(image, texts, own) for own in range(6)])
    assert float(margins.mean()) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(SettingsError, match="compares prompts"):
        prompt_margin(image, texts[:1], 0)


def test_the_distance_of_seeds_is_the_mean_over_pairs_and_0_for_one_image() -> None:
    images = vectors(4, 5, 16)
    pairs = [1 - float(images[a] @ images[b]) for a, b in itertools.combinations(range(5), 2)]
    assert float(seed_distance(images).mean()) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert torch.allclose(seed_distance(images[:1].expand(3, 16)), torch.zeros(3), atol=1e-6)
    with pytest.raises(SettingsError, match=r"there is one.*seeds: 2"):
        seed_distance(images[:1])


def test_the_similarity_to_a_subject_is_the_mean_over_its_images() -> None:
    images, subject = vectors(5, 3, 16), vectors(6, 7, 16)
    expected = torch.stack([F.cosine_similarity(image[None], subject).mean() for image in images])
    assert torch.allclose(subject_similarity(images, subject), expected, atol=1e-6)


@pytest.mark.parametrize("among", [1, 2, 5, 6])
def test_the_nearest_among_few_is_the_mean_over_all_subsets(among: int) -> None:
    images, candidates = vectors(7, 4, 8), vectors(8, 6, 8)
    subsets = list(itertools.combinations(range(6), among))
    nearest = torch.stack([(images @ candidates[list(subset)].T).max(dim=1).values for subset in subsets])
    assert torch.allclose(nearest_similarity(images, candidates, among), nearest.mean(dim=0), atol=1e-6)


def test_a_planted_copy_is_nearer_to_training_and_equal_sets_are_not() -> None:
    training, heldout = vectors(9, 40, 8), vectors(10, 10, 8)
    copies, fresh = training[:10], vectors(11, 400, 8)
    gap = nearest_similarity(copies, training[:10], 10) - nearest_similarity(copies, heldout)
    assert float(gap.min()) > 0.0
    # Of 40 candidates, a subset of 10 has the copied image in a quarter of the cases: less power, the same direction.
    assert float((nearest_similarity(copies, training, 10) - nearest_similarity(copies, heldout)).mean()) > 0.05
    # Without equal sizes, the larger set is nearer to anything.
    equal = (nearest_similarity(fresh, training, 10) - nearest_similarity(fresh, heldout)).mean()
    unequal = (nearest_similarity(fresh, training) - nearest_similarity(fresh, heldout)).mean()
    assert abs(float(equal)) < 0.05 < float(unequal)
    with pytest.raises(SettingsError, match="41 of 40"):
        nearest_similarity(fresh, training, 41)
