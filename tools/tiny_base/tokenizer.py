"""Builds the tokenizer of the embedded base: a CLIP tokenizer with the words of the world; it spells all others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_engine.files import atomic_write
from tools.tiny_base.stage import CONTEXT, BuildSettings, replace_folder
from tools.tiny_base.world import ATTRIBUTES, CONCEPT

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"
_OTHER_WORDS = ("a", "and", "background", "in", "large", "of", "on", "picture", "small", "style", "the")


def train(work: Path, settings: BuildSettings) -> None:
    """Writes `tokenizer/` into `work`. The vocabulary is fixed: the words of the world."""
    del settings

    def fill(folder: Path) -> None:
        from transformers import CLIPTokenizer

        vocabulary, merges = build_vocabulary()
        # The legacy files, for programs that cannot read tokenizer.json.
        atomic_write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False).encode())
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        atomic_write(folder / "merges.txt", ("\n".join(lines) + "\n").encode())
        CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT).save_pretrained(folder)

    replace_folder(work / "tokenizer", fill)


def build_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns ids by token (bytes, word-final bytes, word prefixes, start and end token), and the merges in order.

    Excludes the concept: a trigger for it is then spelled like any unknown word.
    """
    letters = _byte_letters()
    tokens = [*letters, *(letter + _END_OF_WORD for letter in letters)]
    known = set(tokens)
    merges: list[tuple[str, str]] = []
    words = {word for words in ATTRIBUTES.values() for word in words if word != CONCEPT} | set(_OTHER_WORDS)
    for word in sorted(words):
        # From left to right: every prefix of a word becomes a token.
        left, *rest = [*word[:-1], word[-1] + _END_OF_WORD]
        for right in rest:
            if left + right not in known:
                known.add(left + right)
                tokens.append(left + right)
                merges.append((left, right))
            left += right
    return {token: number for number, token in enumerate([*tokens, BEGIN, END])}, merges


def load_tokenizer(folder: Path) -> Any:
    """Loads the tokenizer of a folder, such as `work / "tokenizer"`."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _byte_letters() -> list[str]:
    # Byte-level BPE represents every byte by a printable letter (GPT-2's mapping).
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
