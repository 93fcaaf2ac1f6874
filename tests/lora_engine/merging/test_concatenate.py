"""Concatenation rejects invalid input, and preserves dtypes and single modules."""

import pytest
import torch

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.merging.concatenate import concatenate
from lora_engine.merging.merge import merge_adapters
from lora_engine.merging.methods import parse_options


def adapter_of(name="unet.a", base="sd", fingerprint=None, shape=(4, 3), dtype=torch.float32):
    out, inner = shape
    return Adapter(
        {name: LoraDelta(torch.ones(2, inner, dtype=dtype), torch.ones(out, 2, dtype=dtype), 1.0)}, base, fingerprint
    )


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (adapter_of(base="sdxl"), "different families of base models: sd, sdxl"),
        (adapter_of(fingerprint="b"), "different base models: a, b"),
        (adapter_of(shape=(4, 5)), "unet.a: the adapters' factors have different shapes"),
        (adapter_of(shape=(5, 3)), "unet.a: the adapters' factors have different shapes"),
    ],
)
def test_adapters_for_different_bases_are_refused(other, problem):
    with pytest.raises(AdapterError, match=problem):
        concatenate([adapter_of(fingerprint="a"), other], [1.0, 1.0])


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ([], "0 weights for 2 adapters"),
        ([1.0], "1 weights for 2 adapters"),
        ([1.0, float("nan")], "the weight nan"),
        ([1.0, float("inf")], "the weight inf"),
        ([1.0, 1.0, 1.0], "3 weights for 2 adapters"),
    ],
)
def test_invalid_weights_are_refused(weights, problem):
    with pytest.raises(SettingsError, match=problem):
        concatenate([adapter_of(), adapter_of()], weights)


def test_an_empty_merge_is_refused():
    with pytest.raises(SettingsError, match="0 adapters"):
        concatenate([], [])


def test_modules_of_one_adapter_only_do_not_change():
    one, two = adapter_of("unet.a"), adapter_of("unet.b", base="", fingerprint="f")
    merged = concatenate([one, two], [1.0, 0.5])
    assert merged.modules["unet.a"] is one.modules["unet.a"]
    assert (merged.base, merged.fingerprint) == ("sd", "f")
    half = merged.modules["unet.b"]
    torch.testing.assert_close(half.delta_weight(torch.zeros(4, 3)), torch.full((4, 3), 0.5))


def test_half_precision_is_merged_in_float32_at_full_rank():
    merged = concatenate([adapter_of(dtype=torch.float16), adapter_of(dtype=torch.bfloat16)], [0.3, -0.7])
    delta = merged.modules["unet.a"]
    assert (delta.rank, delta.alpha, delta.down.dtype) == (4, 4.0, torch.float32)
    torch.testing.assert_close(delta.delta_weight(torch.zeros(4, 3)), torch.full((4, 3), -0.4))


@pytest.mark.parametrize("method", ["concatenate", "linear", "ties"])
def test_factors_whose_product_overflows_are_not_merged(method):
    large = Adapter({"unet.a": LoraDelta(torch.full((2, 3), 1e30), torch.full((4, 2), 1e30), 2.0)}, "sd")
    with pytest.raises(
        AdapterError,
        match=r"^unet.a: the product of the factors overflows|^unet.a: 12 of 12 values are NaN or infinite",
    ):
        merge_adapters([large, adapter_of()], [1.0, 0.5], parse_options(method))


def test_large_factors_with_a_finite_product_are_merged():
    factors = LoraDelta(torch.full((2, 3), 1e30), torch.full((4, 2), 1e-30), 2.0)
    merged, _ = merge_adapters([Adapter({"unet.a": factors}, "sd"), adapter_of()], [1.0, 0.5])
    assert bool(torch.isfinite(merged.modules["unet.a"].delta_weight(torch.zeros(4, 3))).all())
