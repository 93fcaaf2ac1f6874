"""Parity with kohya's tools; the error of its concatenation is pinned."""

import hashlib
import io

import pytest
import safetensors.torch
import torch
from law_adapters import NAMES, random_delta
from peers import lycoris_pair
from torch import nn

from lora_engine.adapters import Adapter
from lora_engine.formats import codecs, write_adapter
from lora_engine.formats.safetensors_io import read_safetensors
from lora_engine.merging.concatenate import concatenate


def adapter_of(seed, rank=4, alpha=4.0):
    return Adapter({name: random_delta("lora", NAMES[name], rank, alpha, seed) for name in NAMES}, "sd")


def kohya_concat(one, two, ratios):
    """`merge_lora.py --concat` of sd-scripts (February 2026): ranks add up, the first alpha stays, the ratio goes into
    both factors."""
    parts = [codecs["kohya"].encode(adapter)[0] for adapter in (one, two)]
    merged = {}
    for key in parts[0]:
        if key.endswith("alpha"):
            merged[key] = parts[0][key]
        else:
            axis = 0 if "lora_down" in key else 1
            merged[key] = torch.cat([part[key] * ratio for part, ratio in zip(parts, ratios, strict=True)], dim=axis)
    return codecs["kohya"].decode(merged, {}, NAMES)


@pytest.mark.parametrize(("ratios", "strength"), [((1.0, 1.0), 0.5), ((0.5, 0.5), 0.25)])
def test_kohya_concat_halves_the_effect_and_ours_is_the_exact_sum(ratios, strength):
    one, two = adapter_of(1), adapter_of(2)
    reference, ours = kohya_concat(one, two, ratios), concatenate([one, two], ratios)
    for name, shape in NAMES.items():
        weight = torch.zeros(shape)
        exact = sum(r * a.modules[name].delta_weight(weight) for a, r in zip((one, two), ratios, strict=True))
        torch.testing.assert_close(ours.modules[name].delta_weight(weight), exact, rtol=1e-6, atol=1e-6)
        wrong = reference.modules[name].delta_weight(weight)
        torch.testing.assert_close(wrong, strength * exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_digests_in_the_header_are_kohyas(dtype, tmp_path):
    names = dict.fromkeys(NAMES, (700, 600))
    modules = {name: random_delta("lora", names[name], 32, 7.0, dtype=dtype) for name in names}
    path = write_adapter(tmp_path / "a.safetensors", Adapter(modules, "sd"), format="kohya")[0]
    tensors, metadata = read_safetensors(path)
    # As in `precalculate_safetensors_hashes` of sd-scripts.
    whole = safetensors.torch.save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    file = io.BytesIO(whole)
    header = int.from_bytes(file.read(8), "little")
    file.seek(header + 8)
    assert metadata["sshs_model_hash"] == hashlib.sha256(file.read()).hexdigest()
    # The old digest starts at a fixed offset, so it depends on the header's length, which is canonical in our files.
    assert len(metadata["sshs_legacy_hash"]) == 8
    body = path.read_bytes()
    own = int.from_bytes(body[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(body[8 + own :]).hexdigest()


def test_kohyas_merge_overlooks_a_tucker_core_and_ours_does_not():
    """`merge_lora.py` of sd-scripts (February 2026) convolves `up` with `down` and ignores the core between them."""
    pair = lycoris_pair("lora tucker", "conv 3x3")
    down, up = (pair.tensors[f"unet.layer.lora_{side}.weight"] for side in ("down", "up"))
    overlooked = nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    assert overlooked.shape == (16, 12, 1, 1), "and so the kernel is lost as well"
    assert pair.delta.mid is not None
    assert pair.delta.delta_weight(pair.layer.weight).shape == (16, 12, 3, 3)
