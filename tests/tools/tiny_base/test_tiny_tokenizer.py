"""The tokenizer has tokens for the words of the world and spells all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools.tiny_base.stage import CONTEXT, BuildSettings, encode
from tools.tiny_base.tokenizer import build_vocabulary, load_tokenizer, train
from tools.tiny_base.world import ATTRIBUTES, CONCEPT


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    work = tmp_path_factory.mktemp("tokenizer")
    train(work, BuildSettings())
    return load_tokenizer(work / "tokenizer")


def test_the_words_of_the_world_are_short_and_the_concept_is_spelled(tokenizer: Any) -> None:
    words = [word for words in ATTRIBUTES.values() for word in words if word != CONCEPT]
    assert sum(len(tokenizer.tokenize(word)) for word in words) < 0.5 * sum(map(len, words))
    assert "crescent</w>" not in tokenizer.get_vocab()
    assert all(f"{word}</w>" in tokenizer.get_vocab() for word in words)


@pytest.mark.parametrize("text", ["a red zorb", "qvx, a blue star", "crescent", "naïve ♥ 7 cats"])
def test_unknown_words_are_spelled_and_decode_unchanged(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_made_up_words_differ_from_each_other(tokenizer: Any) -> None:
    assert tokenizer("zorb").input_ids != tokenizer("sks").input_ids


def test_a_caption_has_start_and_end_token_and_padding(tokenizer: Any) -> None:
    ids, mask = encode(tokenizer, ["a red star"])
    size = len(build_vocabulary()[0])
    assert tuple(ids.shape) == tuple(mask.shape) == (1, CONTEXT)
    assert ids[0, 0] == size - 2
    assert ids[0, int(mask.sum()) - 1] == size - 1


def test_the_longest_full_caption_with_a_trigger_fits(tokenizer: Any) -> None:
    text = "a yellow zorb hourglass in the center on a striped yellow background in zorb style"
    assert len(tokenizer(text).input_ids) <= CONTEXT


def test_the_shipped_tokenizer_equals_the_built_one(weights: Path, tokenizer: Any) -> None:
    for folder in ("tokenizer", "clip"):
        assert load_tokenizer(weights / folder).get_vocab() == tokenizer.get_vocab()
    text = "a red zorb on the left on a dotted green background"
    assert load_tokenizer(weights / "tokenizer")(text).input_ids == tokenizer(text).input_ids
