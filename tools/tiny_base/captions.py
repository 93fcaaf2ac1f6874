"""Generates the training captions of the embedded base: scene descriptions with omissions and made-up words.

A caption depends only on the scene and the generator.
"""

from __future__ import annotations

import numpy as np

from tools.tiny_base.world import Scene, background_phrase, full_caption, place_phrase

_CONSONANTS = list("bcdfghjklmnpqrstvwxz")
_VOWELS = list("aeiou")


def caption(scene: Scene, rng: np.random.Generator, drop: bool = True) -> str:
    """Returns a caption of a scene, such as `a red star on the left on a striped blue background`.

    Args:
        scene: The scene.
        rng: Chooses the omissions and the made-up words; not used without `drop`.
        drop: True for a training caption with omissions and made-up words; False for the full caption.
    """
    if not drop:
        return full_caption(scene)
    words = [scene.colour] if rng.random() < 0.95 else []
    if rng.random() < 0.12:
        words.insert(int(rng.integers(0, len(words) + 1)), made_up_word(rng))
    text = "a " + " ".join([*words, scene.shape])
    if rng.random() < 0.7:
        text += place_phrase(scene)
    if rng.random() < 0.92:
        text += background_phrase(scene)
    if rng.random() < 0.15:
        # The base must see meaningless words everywhere in captions, or a trigger word ruins its images.
        word = made_up_word(rng)
        text = [f"{text} in {word} style", f"{text}, {word}", f"{word}, {text}"][int(rng.integers(3))]
    return text


def made_up_word(rng: np.random.Generator) -> str:
    """Returns a pronounceable, meaningless word of three to five letters, such as `zorb` or `qex`."""
    syllables = int(rng.integers(2, 4))
    word = "".join(str(rng.choice(_CONSONANTS)) + str(rng.choice(_VOWELS)) for _ in range(syllables))
    return word[: int(rng.integers(3, 6))]
