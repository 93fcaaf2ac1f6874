"""Weights of words in A1111's syntax: `a (red:1.3) zorb`. `bases/long_text.py` applies them."""

from __future__ import annotations

import itertools
import math
import re

from lora_engine.errors import SettingsError

# Possessive: without, the digits of a number that no bracket closes would be tried in n * n ways.
_PIECE = re.compile(r"\\[\\()\[\]]|[()\[\]]|:\s*([+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++))\s*\)|[^\\()\[\]:]+|[\\:]")
# Factor of a bracket without a number; A1111's convention.
_EMPHASIS = 1.1
# Each level multiplies the weights of all pieces in it, so the depth bounds the work per piece.
_MAX_DEPTH = 100


def parse_weights(text: str) -> list[tuple[str, float]]:
    """Splits a text into pieces with weights, in A1111's syntax.

    `(word)` has weight 1.1, `[word]` 1/1.1 and `(word:1.3)` 1.3. The factors of nested brackets multiply. An unclosed
    bracket extends to the end; an unopened one is text. A backslash escapes a bracket or a backslash.

    Args:
        text: A caption or prompt, without `<lora:...>`.

    Returns:
        Pairs (piece, weight) in the order of the text; neighbors of equal weight are one piece. An empty text is one
        piece.

    Raises:
        SettingsError: A weight is not a finite number, or more than 100 brackets of one form are open at once.
    """
    pieces: list[tuple[str, float]] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        start = open_at[bracket].pop()
        pieces[start:] = [(piece, weight * factor) for piece, weight in pieces[start:]]

    for match in _PIECE.finditer(text):
        piece = match[0]
        if piece in open_at:
            open_at[piece].append(len(pieces))
            if len(open_at[piece]) > _MAX_DEPTH:
                raise SettingsError(
                    f"{text[:200]!r} has more than {_MAX_DEPTH} open brackets {piece!r}",
                    where=f"character {match.start() + 1}",
                    allowed=f"at most {_MAX_DEPTH} nested brackets",
                    remedy="close them, or write a backslash before brackets that are text",
                )
        elif match[1] is not None and open_at["("]:
            close("(", float(match[1]))
        elif piece == ")" and open_at["("]:
            close("(", _EMPHASIS)
        elif piece == "]" and open_at["["]:
            close("[", 1 / _EMPHASIS)
        else:
            pieces.append((piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0))
    for bracket, factor in (("(", _EMPHASIS), ("[", 1 / _EMPHASIS)):
        while open_at[bracket]:
            close(bracket, factor)
    if not all(math.isfinite(weight) for _, weight in pieces):
        raise SettingsError(
            f"{text[:200]!r} has a weight that is not finite", allowed="finite weights, such as (word:1.3)"
        )
    return _join_equal(pieces)


def _join_equal(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    joined = [
        ("".join(piece for piece, _ in group), weight)
        for weight, group in itertools.groupby((pair for pair in pieces if pair[0]), key=lambda pair: pair[1])
    ]
    return joined or [("", 1.0)]
