"""Captions are checked with the real tokenizers of bases, and with the embedded CLIP on scenes that it knows."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from lora_engine.bases.source import resolve_base
from lora_engine.captioning.checks import (
    BaseTokenizer,
    check_lengths,
    check_match,
    check_trigger,
    load_base_tokenizers,
)
from lora_engine.embedding.embedder import load_embedder
from tools.tiny_base.images import write_images
from tools.tiny_base.world import full_caption, scenes


@pytest.fixture(scope="module")
def tokenizers() -> list[BaseTokenizer]:
    return load_base_tokenizers(resolve_base("tiny"))


def test_the_tokenizers_of_a_base_have_the_limit_of_its_text_encoder(tokenizers: list[BaseTokenizer]) -> None:
    assert [(item.name, item.limit) for item in tokenizers] == [("tokenizer", 32)]
    assert tokenizers[0].count("a red star") == 5


@pytest.mark.parametrize(
    ("trigger", "problem"),
    [("star", "one token of the base's tokenizer: a word that it knows"), ("qzxwvk", "6 tokens"), ("sks", None)],
)
def test_a_trigger_that_is_known_or_long_is_found(
    trigger: str, problem: str | None, tokenizers: list[BaseTokenizer]
) -> None:
    findings = check_trigger(trigger, tokenizers)
    assert [problem in str(item) for item in findings if problem] == ([True] if problem else [])
    assert bool(findings) == bool(problem)


def test_captions_that_no_text_encoder_reads_whole_are_counted(tokenizers: list[BaseTokenizer]) -> None:
    fits, long = "a red star " * 10, "a red star " * 11
    assert tokenizers[0].count(fits) == 32
    assert check_lengths({"a.png": fits}, tokenizers) == []
    (finding,) = check_lengths({"a.png": fits, "b.png": long, "c.png": long * 2}, tokenizers)
    assert finding.images == ("b.png", "c.png")
    assert "2 captions have more than the 32 tokens that the base reads (up to 68)" in str(finding)
    # A second encoder that reads them whole, such as T5, is enough.
    wider = BaseTokenizer("tokenizer_2", tokenizers[0].tokenizer, 100)
    assert check_lengths({"b.png": long}, [*tokenizers, wider]) == []
    assert check_lengths({"b.png": long}, [*tokenizers, BaseTokenizer("tokenizer_2", wider.tokenizer, None)]) == []


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Path], Mapping[str, str]]:
    selected = scenes(5, 16)
    captions = [full_caption(scene) for scene in selected]
    files = write_images(tmp_path_factory.mktemp("scenes"), selected, captions)
    return {path.name: path for path in files}, {path.name: text for path, text in zip(files, captions, strict=True)}


def test_captions_of_other_images_are_found(drawn: tuple[Mapping[str, Path], Mapping[str, str]]) -> None:
    images, captions = drawn
    embedder = load_embedder()
    findings, scores = check_match(images, captions, embedder)
    assert findings == []
    assert set(scores) == set(images)
    names = sorted(captions)
    # Two images have the captions of each other.
    swapped = {**captions, names[0]: captions[names[1]], names[1]: captions[names[0]]}
    (finding,), changed = check_match(images, swapped, embedder)
    assert set(finding.images) <= {names[0], names[1]}
    assert changed[names[0]] < scores[names[0]]
    shuffled = dict(zip(names, random.Random(0).sample([captions[name] for name in names], len(names)), strict=True))
    (finding,), _ = check_match(images, shuffled, embedder)
    assert len(finding.images) >= len(names) // 4


def test_captions_that_are_all_alike_or_empty_are_not_compared(
    drawn: tuple[Mapping[str, Path], Mapping[str, str]],
) -> None:
    images, _ = drawn
    embedder = load_embedder()
    assert check_match(images, dict.fromkeys(images, "a red star"), embedder)[0] == []
    assert check_match(images, dict.fromkeys(images, ""), embedder) == ([], {})
