"""Full captions name all attributes; training captions have omissions and made-up words."""

from __future__ import annotations

import numpy as np

from tools.tiny_base.captions import caption, made_up_word
from tools.tiny_base.world import Scene, scenes

SCENE = Scene("star", "red", "blue", texture="striped", position="left")


def test_a_full_caption_names_every_attribute() -> None:
    rng = np.random.default_rng(0)
    assert caption(SCENE, rng, drop=False) == "a red star on the left on a striped blue background"
    for scene in scenes(4, 200, "any"):
        words = caption(scene, rng, drop=False).split()
        named = [scene.shape, scene.colour, scene.background, scene.position]
        assert all(word in words for word in [*named, *([] if scene.texture == "plain" else [scene.texture])])
        assert "plain" not in words


def test_a_full_caption_does_not_use_the_generator() -> None:
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    caption(SCENE, rng, drop=False)
    assert rng.bit_generator.state == before


def test_training_captions_are_true_and_always_name_the_shape() -> None:
    rng = np.random.default_rng(1)
    wrong = {"green", "yellow", "purple", "dotted", "right", "center", "circle", "square"}
    for _ in range(500):
        words = caption(SCENE, rng).replace(",", "").split()
        assert "star" in words
        assert not wrong & set(words)


def test_training_captions_have_omissions_and_made_up_words() -> None:
    rng = np.random.default_rng(2)
    texts = [caption(SCENE, rng) for _ in range(1000)]
    assert 0.2 < np.mean(["on the left" not in text for text in texts]) < 0.4
    assert 0.04 < np.mean(["background" not in text for text in texts]) < 0.12
    known = {"a", "red", "star", "on", "the", "left", "striped", "blue", "background", "in", "style"}
    unknown = [set(text.replace(",", "").split()) - known for text in texts]
    assert 0.15 < np.mean([bool(words) for words in unknown]) < 0.35


def test_the_same_generator_gives_the_same_captions() -> None:
    def captions() -> list[str]:
        rng = np.random.default_rng(7)
        return [caption(scene, rng) for scene in scenes(1, 50)]

    assert captions() == captions()


def test_made_up_words_have_three_to_five_letters() -> None:
    rng = np.random.default_rng(3)
    words = [made_up_word(rng) for _ in range(200)]
    assert all(3 <= len(word) <= 5 and word.isalpha() for word in words)
    assert len(set(words)) > 150
