from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_engine.bases.base import load_base
from lora_engine.bases.conditioning import Conditioning
from lora_engine.data.manifest import Manifest
from lora_engine.seeds import derive_seed, generator
from lora_engine.training.batches import BatchBuilder, BucketSampler, shuffled_epochs
from lora_engine.training.examples import Encoder, read_examples
from lora_engine.training.specs.captions import Captions

SMALL, LARGE = (16, 16), (32, 16)


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("batch", [1, 4, 8])
def test_every_image_occurs_once_per_epoch_and_every_batch_is_full(count: int, batch: int) -> None:
    sampler = BucketSampler([SMALL] * count, batch, seed=3)
    seen = [index for number in range(count * 2) for index in sampler.batch(number)[2]]
    assert len(seen) == count * 2 * batch
    for start in range(0, len(seen) - count + 1, count):
        assert sorted(seen[start : start + count]) == list(range(count))


def test_a_batch_depends_on_seed_and_number_only() -> None:
    sizes = [SMALL] * 5 + [LARGE] * 3
    forwards, backwards = BucketSampler(sizes, 2, seed=1), BucketSampler(sizes, 2, seed=1)
    expected = [forwards.batch(number) for number in range(40)]
    assert [backwards.batch(number) for number in reversed(range(40))] == expected[::-1]
    assert [BucketSampler(sizes, 2, seed=2).batch(number) for number in range(40)] != expected


def test_epochs_differ_from_each_other() -> None:
    first, second = shuffled_epochs(20, 0, 20, 1, "x"), shuffled_epochs(20, 20, 20, 1, "x")
    assert first != second
    assert shuffled_epochs(20, 10, 20, 1, "x") == first[10:] + second[:10]


def test_a_batch_has_one_size_and_sizes_occur_in_proportion() -> None:
    sizes = [SMALL] * 8 + [LARGE] * 4
    sampler = BucketSampler(sizes, 2, seed=0)
    seen: Counter[int] = Counter()
    for number in range(60):
        size, _, indices = sampler.batch(number)
        assert {sizes[index] for index in indices} == {size}
        seen.update(indices)
    assert set(seen.values()) == {10}


def test_the_batches_of_a_size_are_numbered_without_gaps() -> None:
    sampler = BucketSampler([SMALL] * 8 + [LARGE] * 4, 2, seed=0)
    positions: dict[tuple[int, int], list[int]] = {SMALL: [], LARGE: []}
    for number in range(30):
        size, position, _ = sampler.batch(number)
        positions[size].append(position)
    assert sorted(positions[SMALL]) == list(range(20))
    assert sorted(positions[LARGE]) == list(range(10))


def test_seeds_differ_by_purpose() -> None:
    purposes = [("noise", 1), ("noise", 11), ("order", 1), ("noise", "1", "1")]
    assert len({derive_seed(0, *purpose) for purpose in purposes} | {derive_seed(1, "noise", 1)}) == 5
    assert all(0 <= derive_seed(0, *purpose) < 1 << 63 for purpose in purposes)
    draws = [torch.rand(2, generator=generator(0, "noise", 1)) for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_every_image_is_seen_equally_often_whatever_the_sizes(batch: int) -> None:
    sizes = [SMALL] * 7 + [LARGE] * 2 + [(16, 32)]
    sampler = BucketSampler(sizes, batch, seed=5)
    # An epoch has at most as many batches as there are images.
    epochs = 10 if batch > 1 else 3
    seen: Counter[int] = Counter()
    for number in range(len(sizes) * epochs):
        size, _, indices = sampler.batch(number)
        assert len(indices) == batch
        assert {sizes[index] for index in indices} == {size}
        seen.update(indices)
    assert set(seen.values()) == {epochs * batch}


def test_a_short_run_sees_every_size_in_proportion() -> None:
    sizes = [SMALL] * 60 + [LARGE] * 30 + [(16, 32)] * 10
    sampler = BucketSampler(sizes, 1, seed=2)
    for start in range(0, 300, 20):
        counts = Counter(sampler.batch(number)[0] for number in range(start, start + 20))
        assert abs(counts[SMALL] - 12) <= 2
        assert abs(counts[LARGE] - 6) <= 2
        assert 1 <= counts[16, 32] <= 4


def test_thousands_of_images_are_ordered_quickly() -> None:
    sizes = [((number % 20 + 1) * 8, 64) for number in range(20_000)]
    sampler = BucketSampler(sizes, 4, seed=2)
    # Epochs are spread when they begin, not for every batch.
    assert len({sampler.batch(number)[2][0] for number in range(200)}) == 200
    assert sampler._epoch.cache_info().misses == 1


def test_repeats_set_the_occurrences_of_an_image(bases: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    base = load_base(str(bases["small-sd"]), device="cpu")
    encoder = Encoder(base, tmp_path)
    first, *rest = read_examples(dataset, Manifest.load(dataset), "train")
    examples = (replace(first, repeats=3), *rest)
    builder = BatchBuilder(base, encoder.latents, encoder.conditioning, examples, batch=1, seed=1)
    seen = Counter(builder(number).examples[0].digest for number in range(2 * (len(examples) + 2)))
    assert seen == {first.digest: 6} | {example.digest: 2 for example in rest}


def test_captions_are_empty_in_every_nth_epoch_of_their_size(
    bases: dict[str, Path], dataset: Path, tmp_path: Path
) -> None:
    base = load_base(str(bases["small-sd"]), device="cpu")
    encoder = Encoder(base, tmp_path)
    first, *rest = read_examples(dataset, Manifest.load(dataset), "train")
    examples = (replace(first, repeats=2), *rest)
    count = len(examples) + 1
    seen: list[list[str]] = []

    def conditioner(texts: Sequence[str], size: tuple[int, int]) -> Conditioning:
        seen.append(list(texts))
        return encoder.conditioning(texts, size)

    settings = Captions(dropout_every=3)
    builder = BatchBuilder(base, encoder.latents, conditioner, examples, batch=1, seed=1, captions=settings)
    for number in range(6 * count):
        builder(number)
    is_empty = [text == "" for (text,) in seen]
    assert is_empty == [epoch % 3 == 2 for epoch in range(6) for _ in range(count)]
    whole = BatchBuilder(base, encoder.latents, conditioner, examples, batch=count + 1, seed=1, captions=settings)
    whole(2)
    # The batch has the last count - 2 images of epoch 2, which is the third one, and three of the fourth.
    assert [text == "" for text in seen[-1]] == [True] * (count - 2) + [False] * 3
