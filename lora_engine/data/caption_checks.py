"""Finds captions that train badly: empty, generic, all alike, with loops, refusals or introductions of a model.

Torch-free. `lora_engine.captioning.checks` adds what needs the base's tokenizers and images.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

FEW_WORDS = 3
"""Words of a caption, beside trigger, class word and stop words, below which it is generic."""
_LOOP, _LONG_LOOP = 4, 3
_SHOWN = 3
_STOP = frozenset(
    "a an the of in on at with and or is are this that it image photo picture photograph drawing shows showing".split()  # noqa: SIM905
)
_REFUSAL = re.compile(
    r"\b(i'?m sorry|i am sorry|i apologi[sz]e|i can(?:no|')t (?:help|assist|identify|describe|provide|see|view)"
    r"|as an ai|(?:un|not )able to (?:view|see|assist|identify|process|describe)|against my (?:policy|guidelines))\b",
    re.IGNORECASE,
)
_INTRODUCTION = re.compile(
    r"^(sure|certainly|of course|okay)\b|^here(?:'s| is| are)\b|^(?:the|this) (?:image|picture|photo|photograph) "
    r"(?:shows|depicts|features|captures|is)\b|^caption:",
    re.IGNORECASE,
)
_ADVICE = {
    "empty": ("captions are empty", "write one, or set a captioner or a template"),
    "refusal": ("captions are refusals of the captioner", "use another prompt or model for these images"),
    "loop": (
        "captions repeat themselves",
        "set repetition_penalty to 1.1 or no_repeat_ngram to 3, or lower max_tokens",
    ),
    "introduction": (
        "captions begin with an introduction, which training would learn",
        "ask for none in the prompt, or remove it with an edit (replace)",
    ),
    "generic": (
        f"captions say little: under {FEW_WORDS} words beside trigger and class",
        "describe what varies, such as pose, setting and light",
    ),
}
"""Kind -> problem, after the number of captions, and what to do about it."""


@dataclass(frozen=True)
class CaptionFinding:
    """What is wrong with some captions.

    Attributes:
        kind: Its name, such as `loop`.
        problem: What is wrong, with numbers.
        remedy: What to do about it.
        images: Names of the images.
    """

    kind: str
    problem: str
    remedy: str
    images: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Returns problem, first images and remedy, in one line."""
        shown = ", ".join(self.images[:_SHOWN])
        more = f" and {len(self.images) - _SHOWN} more" if len(self.images) > _SHOWN else ""
        return f"{self.problem}{f' ({shown}{more})' if shown else ''}: {self.remedy}"


def check_captions(captions: Mapping[str, str], words: Iterable[str | None] = ()) -> list[CaptionFinding]:
    """Returns what is wrong with captions, by their texts alone.

    Args:
        captions: Name of an image -> its caption.
        words: Trigger and class word, which say nothing about a single image.
    """
    known = {word for text in words if text for word in _words(text)} | _STOP
    tests: dict[str, Callable[[str], bool]] = {
        "empty": lambda text: not text.strip(),
        "refusal": _is_refusal,
        "loop": has_loop,
        "introduction": lambda text: _INTRODUCTION.search(text) is not None,
        "generic": lambda text: bool(text.strip()) and len(_words(text) - known) < FEW_WORDS,
    }
    findings = []
    for kind, test in tests.items():
        images = tuple(name for name, text in captions.items() if test(text))
        if images:
            problem, remedy = _ADVICE[kind]
            findings.append(CaptionFinding(kind, f"{len(images)} {problem}", remedy, images))
    return [*findings, *_alike(captions)]


def has_loop(text: str) -> bool:
    """Returns True if 1 to 4 words follow each other at least 4 times, or 6 words occur 3 times."""
    words = re.findall(r"\w+", text.lower())
    for size in range(1, 5):
        run = 1
        for start in range(size, len(words) - size + 1):
            same = words[start : start + size] == words[start - size : start]
            run = run + 1 if same else 1
            # n repeats of a sequence have (n - 2) * size + 1 places at which it equals what precedes it.
            if run >= (_LOOP - 2) * size + 2:
                return True
    sequences = Counter(tuple(words[start : start + 6]) for start in range(len(words) - 5))
    return max(sequences.values(), default=0) >= _LONG_LOOP


def _alike(captions: Mapping[str, str]) -> list[CaptionFinding]:
    counts = Counter(text.lower() for text in captions.values() if text)
    if not counts:
        return []
    text, count = counts.most_common(1)[0]
    if count < 2 or 2 * count <= len(captions):
        return []
    shown = next(caption for caption in captions.values() if caption.lower() == text)
    return [
        CaptionFinding(
            "alike",
            f"{count} of {len(captions)} images have the caption {shown[:80]!r}",
            "what varies should be in the captions",
        )
    ]


def _is_refusal(text: str) -> bool:
    return _REFUSAL.search(text.replace("\u2019", "'")) is not None


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
