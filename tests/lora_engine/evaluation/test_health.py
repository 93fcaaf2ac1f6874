"""Examining weights without a base: the spectrum is torch's, and every planted fault has its note."""

from __future__ import annotations

import math

import pytest
import torch

from lora_engine.adapters import LoraDelta, kinds
from lora_engine.adapters.full import FullDelta
from lora_engine.evaluation.health import effective_rank, examine_adapter, examine_delta


def lora(rank: int = 4, alpha: float = 8.0, seed: int = 0) -> LoraDelta:
    draw = torch.Generator().manual_seed(seed)
    return LoraDelta(torch.randn(rank, 10, generator=draw), torch.randn(6, rank, generator=draw), alpha)


def test_the_effective_rank_counts_equal_singular_values() -> None:
    assert effective_rank(torch.ones(5)) == pytest.approx(5.0)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1.0)
    shares = torch.tensor([0.5, 0.3, 0.2])
    assert effective_rank(shares * 7) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares.tolist())))
    assert effective_rank(torch.zeros(3)) == 0.0


def test_the_spectrum_of_a_lora_is_that_of_its_delta() -> None:
    delta = lora()
    dense = delta.delta_weight(torch.zeros(6, 10))
    health = examine_delta(delta)
    assert health.spectrum == pytest.approx(torch.linalg.svdvals(dense.double())[:4].tolist(), rel=1e-6)
    assert health.norm == pytest.approx(float(dense.norm()), rel=1e-6)
    assert (health.rank, health.dead, health.notes) == (4, 0, [])
    assert 1.0 < (health.effective_rank or 0.0) <= 4.0


@pytest.mark.parametrize("kind", list(kinds))
def test_every_kind_is_examined_with_a_spectrum_or_because_it_reads_the_base_without(kind: str) -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    entry = kinds[kind]
    delta = entry.create(weight, None, rank=2, alpha=2.0, generator=torch.Generator().manual_seed(2))
    draw = torch.Generator().manual_seed(3)
    factors = {
        name: torch.randn(f.shape, generator=draw) * 0.1 if f.dim() else f for name, f in delta.factors().items()
    }
    changed = delta.with_factors(factors)
    health = examine_delta(changed)
    if changed.reads_base or changed.weight_shape is None:
        assert (health.effective_rank, health.norm, health.spectrum) == (None, None, ())
    else:
        dense = changed.delta_weight(torch.zeros(8, 12)).reshape(8, -1)
        assert health.norm == pytest.approx(float(dense.norm()), rel=1e-4)
        assert 0.99 <= (health.effective_rank or 0.0) <= 8.0


def test_dead_components_and_modules_are_noted() -> None:
    delta = lora()
    up = delta.up.clone()
    up[:, 1:3] = 0.0
    partly = examine_delta(LoraDelta(delta.down, up, delta.alpha))
    assert (partly.dead, partly.notes) == (2, ["2 of 4 components are dead"])
    fresh = examine_delta(LoraDelta(delta.down, torch.zeros_like(up), delta.alpha))
    assert (fresh.dead, fresh.norm, fresh.effective_rank, fresh.notes) == (4, 0.0, 0.0, ["changes nothing"])


def test_values_outside_of_the_range_of_float16_are_noted() -> None:
    delta = lora()
    large = delta.down.clone()
    large[0, 0] = 70_000.0
    assert examine_delta(LoraDelta(large, delta.up, delta.alpha)).notes[-1] == "overflows float16"
    small = examine_delta(LoraDelta(delta.down * 1e-10, delta.up, delta.alpha))
    assert small.underflow == pytest.approx(40 / 64)
    assert small.notes == ["float16 rounds 62% of the values to 0"]
    assert examine_delta(LoraDelta(large.fill_(math.nan), delta.up, 8.0)).notes == ["has NaN or infinite values"]


def test_vectors_and_zeros_of_a_dense_difference_are_examined() -> None:
    health = examine_adapter({"norm": FullDelta(torch.ones(9), None), "zero": FullDelta(torch.zeros(3, 4), None)})
    assert health["norm"].norm == pytest.approx(3.0)
    assert health["norm"].effective_rank == pytest.approx(1.0)
    assert health["zero"].notes == ["changes nothing"]
    assert health["norm"].as_dict()["notes"] == []
