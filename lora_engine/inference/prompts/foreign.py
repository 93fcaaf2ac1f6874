"""Names the syntaxes of other programs, which would otherwise be drawn as words.

Of SwarmUI, SD.Next, ComfyUI (prompt-control), InvokeAI (compel), NovelAI, Dynamic Prompts and Regional Prompter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora_engine.errors import SettingsError

_REGION = "use --region WHERE=PROMPT"
_KINDS: Mapping[str, tuple[str, str]] = {
    "hypernet": ("a hypernetwork, which Loraline does not read", "train or import a LoRA instead"),
    "segment": ("SwarmUI's second pass over a part of the image", "draw again with --image and --mask"),
    "refine": ("SwarmUI's second pass", "use --enlarge"),
    "region": ("SwarmUI's text for a part of the image", _REGION),
    "object": ("SwarmUI's text for a part of the image", _REGION),
    "alternate": ("SwarmUI's alternation", "write [a|b]"),
    "alt": ("SwarmUI's alternation", "write [a|b]"),
    "fromto": ("SwarmUI's prompt editing", "write [a:b:0.5]"),
    "random": ("SwarmUI's random choice", "write one of the texts, or make it an axis of a grid with -x"),
    "wildcard": ("a wildcard", "write one of its texts, or make it an axis of a grid with -x"),
    "wc": ("a wildcard", "write one of its texts, or make it an axis of a grid with -x"),
    "embed": ("SwarmUI's learned token", "write the token as a word, and name its file in <lora:FILE>"),
    "embedding": ("SwarmUI's learned token", "write the token as a word, and name its file in <lora:FILE>"),
    "repeat": ("SwarmUI's repetition", "write the text as often as it is meant"),
    "var": ("a variable of SwarmUI", "write its text"),
    "setvar": ("a variable of SwarmUI", "write its text"),
    "preset": ("a preset of SwarmUI", "write its text"),
}
"""Kinds of tags of other programs: what they are, and what to write."""


@dataclass(frozen=True)
class _Syntax:
    """A syntax of another program.

    Attributes:
        pattern: Matches it.
        meaning: What it is there.
        remedy: What to write here.
        at_end: True finds it only after the last square bracket of a text.
    """

    pattern: re.Pattern[str]
    meaning: str
    remedy: str
    at_end: bool = False

    def find(self, text: str) -> re.Match[str] | None:
        """Returns the first match in a text; None if there is none."""
        return self.pattern.search(text, 1 + max(text.rfind("["), text.rfind("]")) if self.at_end else 0)


_NUMBER = r"(?:[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})"
_WEIGHT = rf"(?<![\w.:\[])-?{_NUMBER}::"
_WORDS = ("NovelAI's weight of words", "write (text:1.2)")
_SYNTAXES = (
    _Syntax(
        re.compile(r"(?<!\\)\{[^{}|]*\|[^{}]*\}"),
        "Dynamic Prompts' random choice",
        "write one of the texts, [a|b] to alternate, or a backslash before a brace that is text",
    ),
    _Syntax(
        re.compile(r"(?<!\\)\{[^{}]*\}"),
        "NovelAI's emphasis",
        "write (text:1.05), or a backslash before a brace that is text",
    ),
    _Syntax(re.compile(rf"{_WEIGHT}(?=[^:\[\]]+::)"), *_WORDS),
    _Syntax(re.compile(rf"{_WEIGHT}(?=\s*\S)"), *_WORDS, at_end=True),
    _Syntax(re.compile(rf"\)(?:\+{{1,20}}|-{{1,20}}|{_NUMBER})(?![\w+-])"), "InvokeAI's weight", "write (text:1.1)"),
    _Syntax(re.compile(r"(?<!\w)[^\W\d_]{2,80}\+\+"), "InvokeAI's weight", "write (text:1.2)"),
    _Syntax(
        re.compile(r"[\)\"']\.(?:blend|and|swap)\("),
        "InvokeAI's function",
        "write `a AND b`, or [a:b:0.5] to change during the run",
    ),
    _Syntax(
        re.compile(r"(?<!\w)__[\w*/.-]{1,80}__(?!\w)"),
        "a wildcard",
        "write one of its texts, or make it an axis of a grid with -x",
    ),
    _Syntax(
        re.compile(r"(?<!\w)embedding:(?=\S)"),
        "ComfyUI's learned token",
        "write the token as a word, and name its file in <lora:FILE>",
    ),
    _Syntax(
        re.compile(r"\b(?:MASK|IMASK|AREA|FEATHER|FILL|COUPLE)\("), "a region of ComfyUI's prompt-control", _REGION
    ),
    _Syntax(
        re.compile(r"\b(?:AVG|NOISE|STYLE|SHIFT|SHUFFLE|ATTN)\("), "a function of ComfyUI's prompt-control", "remove it"
    ),
    _Syntax(re.compile(r"\b(?:ADDCOMM|ADDBASE|ADDCOL|ADDROW)\b"), "a divider of Regional Prompter", _REGION),
)


def check_foreign(text: str) -> None:
    """Raises an error for the first syntax of another program in a prompt without adapter tags.

    Raises:
        SettingsError: There is one; names its position.
    """
    hits = [(match, syntax) for syntax in _SYNTAXES if (match := syntax.find(text))]
    if hits:
        # Of several that begin at one place, the first of the list is the most specific.
        match, syntax = min(hits, key=lambda hit: hit[0].start())
        raise SettingsError(
            f"{text[match.start() : match.start() + 40]!r} is {syntax.meaning}, which would be drawn as words",
            where=f"character {match.start() + 1}",
            remedy=syntax.remedy,
        )


def check_tag_kind(tag: str, kind: str, place: str, allowed: str) -> None:
    """Raises an error for a tag that names no adapter.

    Args:
        tag: The whole tag.
        kind: What precedes its first colon; `lora` and A1111's `lyco` name adapters.
        place: Its position, for the error.
        allowed: The tags that can be read, for the error.

    Raises:
        SettingsError: It is of another kind.
    """
    if kind in {"lora", "lyco"} and tag[1 + len(kind)] == ":":
        return
    meaning, remedy = _KINDS.get(kind, ("", "remove it, or write other brackets"))
    raise SettingsError(
        f"tag {tag[:80]!r}{f' is {meaning}' if meaning else ''}", where=place, allowed=allowed, remedy=remedy
    )


def unescape_braces(text: str) -> str:
    r"""Returns a prompt with `{` and `}` for `\{` and `\}`."""
    return re.sub(r"\\([{}])", r"\1", text)
