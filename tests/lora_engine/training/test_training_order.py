from __future__ import annotations

from collections import Counter

import pytest
import torch

from lora_engine.seeds import derive_seed, generator
from lora_engine.training.batches import Order, rounds

SMALL, LARGE = (16, 16), (32, 16)


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("batch", [1, 4, 8])
def test_every_picture_comes_up_once_a_round_and_every_batch_is_full(count: int, batch: int) -> None:
    order = Order([SMALL] * count, batch, seed=3)
    seen = [place for number in range(count * 2) for place in order.batch(number)[2]]
    assert len(seen) == count * 2 * batch
    for start in range(0, len(seen) - count + 1, count):
        assert sorted(seen[start : start + count]) == list(range(count))


def test_a_batch_is_a_function_of_seed_and_number_alone() -> None:
    sizes = [SMALL] * 5 + [LARGE] * 3
    forwards, backwards = Order(sizes, 2, seed=1), Order(sizes, 2, seed=1)
    expected = [forwards.batch(number) for number in range(40)]
    assert [backwards.batch(number) for number in reversed(range(40))] == expected[::-1]
    assert [Order(sizes, 2, seed=2).batch(number) for number in range(40)] != expected


def test_rounds_differ_from_each_other() -> None:
    first, second = rounds(20, 0, 20, 1, "x"), rounds(20, 20, 20, 1, "x")
    assert first != second
    assert rounds(20, 10, 20, 1, "x") == first[10:] + second[:10]


def test_a_batch_has_one_size_and_sizes_come_up_in_proportion() -> None:
    sizes = [SMALL] * 8 + [LARGE] * 4
    order = Order(sizes, 2, seed=0)
    seen: Counter[int] = Counter()
    for number in range(60):
        size, _, places = order.batch(number)
        assert {sizes[place] for place in places} == {size}
        seen.update(places)
    assert set(seen.values()) == {10}


def test_the_batches_of_a_size_are_numbered_without_gaps() -> None:
    order = Order([SMALL] * 8 + [LARGE] * 4, 2, seed=0)
    found: dict[tuple[int, int], list[int]] = {SMALL: [], LARGE: []}
    for number in range(30):
        size, position, _ = order.batch(number)
        found[size].append(position)
    assert sorted(found[SMALL]) == list(range(20))
    assert sorted(found[LARGE]) == list(range(10))


def test_seeds_differ_by_purpose() -> None:
    purposes = [("noise", 1), ("noise", 11), ("order", 1), ("noise", "1", "1")]
    assert len({derive_seed(0, *purpose) for purpose in purposes} | {derive_seed(1, "noise", 1)}) == 5
    assert all(0 <= derive_seed(0, *purpose) < 1 << 63 for purpose in purposes)
    draws = [torch.rand(2, generator=generator(0, "noise", 1)) for _ in range(2)]
    assert torch.equal(*draws)
