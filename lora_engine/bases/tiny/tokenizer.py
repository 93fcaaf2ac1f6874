"""The tokenizer of the embedded base: the world's words are one to three tokens, other words are spelled in small pieces."""

from __future__ import annotations

from typing import Any

from lora_engine.bases.tiny import world

LENGTH = 32
"""Tokens of a prompt, with begin and end."""

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"
_OTHER_WORDS = ("a", "and", "background", "in", "large", "of", "on", "picture", "small", "style", "the")


def build_tokenizer() -> Any:
    """A `CLIPTokenizer` over bytes, whose only merges are prefixes of the world's words.

    The concept's own word is left out: whoever teaches it must not find a token waiting.
    """
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    symbols = [*letters, *(letter + _END_OF_WORD for letter in letters)]
    merges: list[tuple[str, str]] = []
    known = {word for words in world.ATTRIBUTES.values() for word in words} - {world.CONCEPT}
    for word in sorted(known.union(_OTHER_WORDS)):
        left, *rest = [*word[:-1], word[-1] + _END_OF_WORD]
        for right in rest:
            if left + right not in symbols:
                symbols.append(left + right)
                merges.append((left, right))
            left += right
    vocabulary = {symbol: number for number, symbol in enumerate([*symbols, BEGIN, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level BPE (GPT-2), printable bytes first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
