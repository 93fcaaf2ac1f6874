"""The fixed prompts that show what else an adapter has changed: of its class, and of nothing related. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from lora_engine.bases.source import TINY
from lora_engine.data.trigger import holds_word

CLASS_PROMPTS = (
    "{a} {word}",
    "a photo of {a} {word}",
    "a close-up of {a} {word}",
    "a drawing of {a} {word}",
    "{a} {word} on a table",
    "{a} {word} in the grass",
    "two of them: {a} {word} and another {word}",
    "{a} {word} in front of a wall",
)
"""Prompts of the class word, `word`; `a` is its article."""
UNRELATED = (
    "a bowl of fruit on a wooden table",
    "a mountain lake at sunrise",
    "a busy street in the rain at night",
    "a portrait of an old fisherman",
    "a cat asleep on a sofa",
    "a red bicycle against a brick wall",
    "an astronaut on the moon",
    "a bunch of tulips in a vase",
    "a steam locomotive on a bridge",
    "a watercolor of a sailing boat",
    "a stack of books beside a lamp",
    "an aerial view of a city",
)
"""Prompts for bases of photographs and paintings."""
UNRELATED_TINY = (
    "a yellow circle on the right on a striped green background",
    "a white square on the left on a dotted red background",
    "a purple triangle on the right on a white background",
    "a red star on the left on a striped white background",
    "a green heart on the left on a dotted red background",
    "a cyan cross in the center on a red background",
    "a green ring on the right on a red background",
    "a white diamond in the center on a yellow background",
    "a blue arrow on the right on a green background",
    "a black hourglass in the center on a blue background",
)
"""Prompts of the embedded base's world, one of each shape."""


def class_prompts(class_word: str | None) -> tuple[str, ...]:
    """Returns the prompts of a class word; none without one."""
    if not class_word:
        return ()
    article = "an" if class_word[0].lower() in "aeiou" else "a"
    return tuple(prompt.format(a=article, word=class_word) for prompt in CLASS_PROMPTS)


def unrelated_prompts(base: str, words: Iterable[str | None]) -> tuple[str, ...]:
    """Returns the prompts of a list that name none of the words.

    Args:
        base: Name of the base: `tiny` has a list of its own.
        words: Trigger and class word; None for those that are not set.
    """
    named = [word for word in words if word]
    prompts = UNRELATED_TINY if base == TINY else UNRELATED
    return tuple(prompt for prompt in prompts if not any(holds_word(prompt, word) for word in named))
