"""Reads a whole prompt: adapters, parts joined by AND, texts over the steps, and chunks divided by BREAK."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lora_engine.errors import SettingsError
from lora_engine.inference.prompts.editing import texts_by_step
from lora_engine.inference.prompts.emphasis import parse_weights
from lora_engine.inference.prompts.foreign import check_foreign, unescape_braces
from lora_engine.inference.prompts.tags import AdapterTag, blank_tags, parse_tags

MAX_LENGTH = 500_000
"""Characters of a prompt."""
_AND = re.compile(r"\bAND\b")
# The spaces before it are matched from the first one on only, which takes linear time.
_BREAK = re.compile(r"(?:(?<!\s)\s+)?\bBREAK\b\s*")
_PART_WEIGHT = re.compile(r":\s*([+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9}))\s*$")
_MAX_PARTS, _MAX_BREAKS = 20, 20

WeightedPieces = list[tuple[str, float]]


@dataclass(frozen=True)
class PromptPart:
    """A text that guides the image.

    Attributes:
        text: The text with its brackets, without adapter tags.
        weight: Factor of its guidance.
    """

    text: str
    weight: float = 1.0

    def by_step(self, steps: int, *, is_enlarged: bool = False) -> list[tuple[int, str]]:
        """Returns pairs (last step, text), steps from 1; see `texts_by_step`."""
        return texts_by_step(self.text, steps, is_enlarged=is_enlarged)


@dataclass(frozen=True)
class ParsedPrompt:
    """A prompt as it was read.

    Attributes:
        text: The text without adapter tags.
        adapters: The adapters that it names.
        parts: The parts that AND divides; the predictions of all are added with their weights.
    """

    text: str
    adapters: tuple[AdapterTag, ...]
    parts: tuple[PromptPart, ...]


def parse_prompt(text: str, *, is_negative: bool = False) -> ParsedPrompt:
    """Reads a prompt.

    Args:
        text: The prompt.
        is_negative: True for a negative prompt, which names no adapters and has one part.

    Raises:
        SettingsError: The prompt is too long, a tag or bracket cannot be read, or it has the syntax of another program
            that Loraline would draw as words; names its position.
    """
    if len(text) > MAX_LENGTH:
        raise SettingsError(f"the prompt has {len(text)} characters", allowed=f"at most {MAX_LENGTH}")
    plain, adapters = parse_tags(text)
    check_foreign(blank_tags(text))
    plain = unescape_braces(plain)
    if is_negative and adapters:
        raise SettingsError(
            f"the negative prompt names the adapter {adapters[0].name!r}",
            remedy="name it in the prompt, with a negative weight to remove what it adds",
        )
    texts = [plain] if is_negative else _AND.split(plain)
    if len(texts) > _MAX_PARTS:
        raise SettingsError(f"the prompt has {len(texts)} parts divided by AND", allowed=f"at most {_MAX_PARTS}")
    parts = tuple(_part(part) for part in texts) if len(texts) > 1 else (PromptPart(plain),)
    for part in parts:
        part.by_step(1)  # finds errors before anything is drawn
        if len(_BREAK.findall(part.text)) > _MAX_BREAKS:
            raise SettingsError("the prompt has too many BREAK", allowed=f"at most {_MAX_BREAKS}")
    return ParsedPrompt(plain, tuple(adapters), parts)


def chunks_of(text: str) -> list[WeightedPieces]:
    """Returns the pieces of a text with their weights, in the divisions of BREAK, which also divides in brackets."""
    chunks: list[WeightedPieces] = [[]]
    for piece, weight in parse_weights(text):
        first, *rest = _BREAK.split(piece)
        chunks[-1] += [(first, weight)] if first or not rest else []
        chunks += [[(part, weight)] if part else [] for part in rest]
    return [chunk or [("", 1.0)] for chunk in chunks]


def is_unweighted(text: str) -> bool:
    """Returns True if no word has a weight and no BREAK divides the text; it is then `plain_text(text)`."""
    chunks = chunks_of(text)
    return len(chunks) == 1 and all(weight == 1.0 for _, weight in chunks[0])


def plain_text(text: str) -> str:
    """Returns a text without weights, brackets and BREAK, for encoders that read no weights."""
    return " ".join("".join(piece for piece, _ in chunk) for chunk in chunks_of(text))


def _part(text: str) -> PromptPart:
    match = _PART_WEIGHT.search(text)
    return PromptPart(text.strip()) if match is None else PromptPart(text[: match.start()].strip(), float(match[1]))
