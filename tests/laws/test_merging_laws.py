"""Laws of the exact linear combination."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from law_adapters import NAMES, SDXL_NAMES, adapters

from lora_engine.adapters import Adapter
from lora_engine.merging import concatenate

few = settings(max_examples=20, deadline=None)


def dense(adapter, name):
    return adapter.modules[name].delta_weight(torch.zeros(SDXL_NAMES[name], dtype=torch.float64))


@few
@given(adapters("lora"))
def test_merging_one_adapter_with_weight_1_is_the_adapter(adapter):
    assert concatenate([adapter], [1.0]) == adapter


@few
@given(st.lists(adapters("lora"), min_size=1, max_size=3), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_the_merged_delta_is_the_weighted_sum_of_the_deltas(parts, weights):
    parts = [Adapter(part.modules, "sdxl") for part in parts]
    weights = weights[: len(parts)]
    merged = concatenate(parts, weights)
    assert set(merged.modules) == set().union(*(part.modules for part in parts))
    for name in merged.modules:
        terms = [w * dense(part, name) for part, w in zip(parts, weights, strict=True) if name in part.modules]
        size = max(float(term.abs().max()) for term in terms)
        torch.testing.assert_close(dense(merged, name), sum(terms), rtol=1e-5, atol=1e-5 * max(size, 1e-30))


@few
@given(st.lists(adapters("lora"), min_size=2, max_size=3), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_the_order_of_the_adapters_does_not_matter(parts, weights):
    parts = [Adapter(part.modules, "sdxl") for part in parts]
    pairs = list(zip(parts, weights, strict=False))
    merged = [concatenate([p for p, _ in order], [w for _, w in order]) for order in itertools.permutations(pairs)]
    assert all(one == merged[0] for one in merged)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, 0.5], [2.0, -1.0]])
@few
@given(data=st.data())
def test_weights_are_linear_in_the_merge(weights, data):
    one = data.draw(adapters("lora"))
    merged = concatenate([one, one], weights)
    for name in one.modules:
        expected = sum(weights) * dense(one, name)
        torch.testing.assert_close(dense(merged, name), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_names_cover_both_families():
    assert set(NAMES) < set(SDXL_NAMES)
