"""The captions that the embedded base is trained on: all that can be said of a scene, less this or that, and noise.

A caption depends on the scene and on the generator alone.
"""

from __future__ import annotations

import numpy as np

from lora_engine.bases.tiny.world import Scene, background_phrase, full_caption, place_phrase

_CONSONANTS = list("bcdfghjklmnpqrstvwxz")
_VOWELS = list("aeiou")


def caption(scene: Scene, rng: np.random.Generator, drop: bool = True) -> str:
    """One caption of a scene, such as `a red star on the left on a striped blue background`.

    Args:
        scene: What is to be said.
        rng: Decides what is left out and which made-up words come in; not asked at all without `drop`.
        drop: Leaves parts out now and then and puts made-up words in, as for training; else it is the full caption.
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
        # The base must have met words that mean nothing everywhere in a caption, or a trigger word wrecks its pictures.
        word = made_up_word(rng)
        text = [f"{text} in {word} style", f"{text}, {word}", f"{word}, {text}"][int(rng.integers(3))]
    return text


def made_up_word(rng: np.random.Generator) -> str:
    """A pronounceable word of three to five letters that means nothing, such as `zorb` or `qex`."""
    syllables = int(rng.integers(2, 4))
    word = "".join(str(rng.choice(_CONSONANTS)) + str(rng.choice(_VOWELS)) for _ in range(syllables))
    return word[: int(rng.integers(3, 6))]
