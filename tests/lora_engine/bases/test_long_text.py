from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_engine.bases.base import load_base
from lora_engine.bases.long_text import ReadsTokens, _split, encode_long, weigh
from lora_engine.errors import SettingsError

LONG = "a red star on a blue ground"
SHAPES = ("small-sd", "small-sd-v", "small-sdxl")


def length_of(base: Any) -> int:
    """Returns the tokens per chunk with start and end token; small bases read fewer than the published 77."""
    return int(base.modules["text_encoder"].config.max_position_embeddings)


def plain(text: str) -> list[tuple[str, float]]:
    return [(text, 1.0)]


@pytest.fixture(params=SHAPES)
def base(request: pytest.FixtureRequest, untrained: dict[str, Path]) -> Any:
    return load_base(str(untrained[request.param]), device="cpu")


@torch.no_grad()
def test_one_chunk_without_weights_equals_encode_text(base: Any) -> None:
    texts = ["", "a red star", "ein Stern, ÄÖÜ 日本"]
    expected, encoded = base.encode_text(texts, (32, 64)), encode_long(base, [plain(text) for text in texts], (32, 64))
    assert list(encoded.tensors) == list(expected.tensors)
    assert all(torch.equal(encoded[name], expected[name]) for name in encoded.tensors)


def by_hand(base: Any, ids: list[int]) -> Tensor:
    """Returns the states of one chunk from transformers directly."""
    parts = []
    for suffix, tokenizer in base.tokenizers().items():
        row = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        row += [tokenizer.pad_token_id] * (length_of(base) - len(row))
        output = base.modules[f"text_encoder{suffix}"](torch.tensor([row]), output_hidden_states=True)
        parts.append(output.hidden_states[-2] if len(base.tokenizers()) > 1 else output.last_hidden_state)
    return torch.cat(parts, dim=-1)[0]


@torch.no_grad()
def test_every_chunk_of_a_long_text_has_its_own_start_and_end(base: Any) -> None:
    ids = base.tokenizer(LONG, add_special_tokens=False)["input_ids"]
    length = length_of(base)
    body = length - 2
    assert body < len(ids) <= 3 * body
    encoded = encode_long(base, [plain(LONG)], (32, 32), chunks=3)
    assert encoded["states"].shape[1] == 3 * length
    for chunk_index in range(3):
        expected = by_hand(base, ids[chunk_index * body : (chunk_index + 1) * body])
        chunk = encoded["states"][0, chunk_index * length : (chunk_index + 1) * length]
        torch.testing.assert_close(chunk, expected, atol=1e-5, rtol=1e-5)
    if "pooled" in encoded.tensors:
        # encode_text truncates a long text to its first chunk.
        expected = base.encode_text([LONG], (32, 32))["pooled"]
        torch.testing.assert_close(encoded["pooled"], expected, atol=1e-5, rtol=1e-5)
        assert encoded["time_ids"].shape == (1, 6)
    # The second chunk is not that of an empty text.
    assert not torch.equal(
        encoded["states"][0, length : 2 * length], encode_long(base, [plain("")], (32, 32))["states"][0]
    )


@torch.no_grad()
def test_shorter_texts_are_padded_with_empty_chunks(base: Any) -> None:
    encoded = encode_long(base, [plain("a star"), plain(LONG)], chunks=2)
    length = length_of(base)
    assert encoded["states"].shape[:2] == (2, 2 * length)
    empty = base.encode_text([""])["states"][0]
    torch.testing.assert_close(encoded["states"][0, length:], empty, atol=1e-5, rtol=1e-5)
    alone = encode_long(base, [plain(LONG)], chunks=2)
    torch.testing.assert_close(encoded["states"][1:], alone["states"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_longer_text_is_truncated_with_a_warning(base: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        one = encode_long(base, [plain(LONG)], chunks=1)
    assert f"the base reads the first {length_of(base) - 2}" in caplog.text
    two = encode_long(base, [plain(LONG)], chunks=2)
    torch.testing.assert_close(one["states"][0], two["states"][0, : length_of(base)], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_weight_scales_its_token_and_keeps_the_mean(base: Any) -> None:
    pieces = [("a ", 1.0), ("red", 1.5), (" star", 1.0)]
    expected = base.encode_text(["a red star"])
    encoded = encode_long(base, [pieces])
    width, start = encoded["states"].shape[-1], 0
    parts = len(base.tokenizers())
    assert ("pooled" in encoded.tensors) == (parts == 2)
    for _ in range(parts):
        span = slice(start, start + width // parts)
        before, after = expected["states"][0, :, span], encoded["states"][0, :, span]
        torch.testing.assert_close(after.mean(), before.mean(), atol=1e-5, rtol=1e-3)
        share = (after / before)[before.abs() > 1e-3]
        # Start token, "a", "red": the third position has the weight.
        others = torch.cat([(after / before)[:2].flatten(), (after / before)[3:].flatten()]).median()
        torch.testing.assert_close((after / before)[2].median() / others, torch.tensor(1.5), atol=1e-3, rtol=1e-3)
        assert share.std() > 0
        start += width // parts
    if "pooled" in encoded.tensors:
        assert torch.equal(encoded["pooled"], expected["pooled"])


def test_weights_follow_the_rule_of_a1111_per_row() -> None:
    states = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) + 0.5
    weights = torch.ones(3, 5)
    weights[1, 2], weights[2, 0] = 2.0, 0.0
    encoded = weigh(states, weights)
    assert torch.equal(encoded[0], states[0])
    for row in (1, 2):
        changed = states[row] * weights[row][:, None]
        torch.testing.assert_close(encoded[row], changed * (states[row].mean() / changed.mean()))
    assert torch.equal(weigh(states, torch.ones(3, 5)), states)
    assert torch.equal(weigh(states, torch.zeros(3, 5)), torch.zeros_like(states))


def test_a_zero_mean_is_not_restored_and_gradients_stay_finite() -> None:
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    states = torch.nn.functional.layer_norm(states, (8,)).requires_grad_(True)
    weights = torch.ones(2, 5)
    weights[:, 1] = 1.5
    encoded = weigh(states, weights)
    torch.testing.assert_close(encoded, states * weights[..., None])
    for value in (states, torch.zeros(2, 5, 8, requires_grad=True)):
        (gradient,) = torch.autograd.grad(weigh(value, weights).square().sum(), value)
        assert torch.isfinite(gradient).all()


def test_gradients_reach_the_text_encoder_through_chunks_and_weights(untrained: dict[str, Path]) -> None:
    base = load_base(str(untrained["small-sdxl"]), device="cpu")
    encoder = base.modules["text_encoder"].requires_grad_(True)
    encoded = encode_long(base, [[("a ", 1.0), ("star", 1.3)]], chunks=2)
    torch.autograd.backward(encoded["states"].square().sum())
    has_gradient = [value.grad is not None and bool(value.grad.abs().sum() > 0) for value in encoder.parameters()]
    # The last layer has none: this family does not read its states.
    assert sum(has_gradient) > len(has_gradient) / 3


def test_a_base_without_chunks_is_refused() -> None:
    with pytest.raises(SettingsError, match="all CLIP"):
        encode_long(object(), [plain("a")], chunks=2)


def test_the_bases_of_clip_read_tokens(base: Any) -> None:
    assert isinstance(base, ReadsTokens)


def test_a_chunk_of_a_published_encoder_has_75_tokens(base: Any) -> None:
    repeated = " ".join(["star"] * 60)
    ids = base.tokenizer(repeated, add_special_tokens=False)["input_ids"]
    assert len(ids) > 2 * 75
    rows, weights, used = _split(base.tokenizer, [("star ", 2.0), (repeated[5:], 1.0)], 77, 5)
    assert [len(row) for row in rows + weights + used] == [77] * 15
    assert [token for row, on in zip(rows, used, strict=True) for token in row[1 : sum(on) - 1]] == ids
    assert all(row[0] == base.tokenizer.bos_token_id for row in rows)
    assert all(row[sum(on) - 1] == base.tokenizer.eos_token_id for row, on in zip(rows, used, strict=True))
    weighed = len(base.tokenizer("star ", add_special_tokens=False)["input_ids"])
    assert sum(weight == 2.0 for row in weights for weight in row) == weighed
