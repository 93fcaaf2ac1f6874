"""The synthetic world: deterministic, pure, and without held-out combinations in training."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from lora_engine.errors import SettingsError
from tools.tiny_base.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    CONCEPT,
    SHAPES,
    Scene,
    draw,
    held_out_triples,
    scenes,
    split_triples,
)

# The weights were trained on, and measured with, exactly these scenes and pixels.
GOLDEN = "f00af176b5443c5f43f7c1c1c607cd6cbaca004a79989b2e8d6826989a75c6d2"


def test_seeds_give_the_scenes_and_pixels_of_the_shipped_weights() -> None:
    digest = hashlib.sha256()
    for seed, n, split in ((1, 300, "train"), (3, 100, "any"), (555, 200, "heldout"), (5, 100, "concept")):
        for s in scenes(seed, n, split):  # type: ignore[arg-type]
            digest.update(repr((s.shape, s.colour, s.background, s.texture, s.position, s.seed)).encode())
            digest.update(draw(s).tobytes())
    assert digest.hexdigest() == GOLDEN


def test_scenes_and_images_depend_only_on_their_seeds() -> None:
    np.random.seed(5)
    first = [draw(scene) for scene in scenes(3, 5)]
    np.random.seed(6)
    assert all(np.array_equal(a, draw(b)) for a, b in zip(first, scenes(3, 5), strict=True))


def test_other_seeds_give_other_scenes() -> None:
    assert scenes(1, 20) != scenes(2, 20)
    scene = scenes(1, 1)[0]
    assert not np.array_equal(draw(scene), draw(replace(scene, seed=scene.seed + 1)))


def test_no_training_scene_has_a_held_out_triple_or_the_concept() -> None:
    used = {scene.triple for scene in scenes(11, 6000)}
    assert not used & held_out_triples()
    assert CONCEPT not in {shape for shape, _, _ in used}
    assert used == set(split_triples("train"))


def test_held_out_scenes_have_only_held_out_triples() -> None:
    assert {scene.triple for scene in scenes(11, 1500, "heldout")} == held_out_triples()


def test_every_shape_has_equally_many_held_out_triples() -> None:
    counts = {shape: sum(triple[0] == shape for triple in held_out_triples()) for shape in SHAPES}
    assert len(set(counts.values())) == 1
    assert sum(counts.values()) == pytest.approx(len(SHAPES) * 42 * 0.1, rel=0.1)


def test_the_object_never_has_the_color_of_its_background() -> None:
    assert all(scene.colour != scene.background for scene in scenes(2, 2000, "any"))


def test_an_unknown_split_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(SettingsError, match="concept"):
        scenes(0, 1, "tests")  # type: ignore[arg-type]


@pytest.mark.parametrize("attribute", ["shape", "colour", "background", "texture", "position"])
def test_every_word_of_an_attribute_looks_different(attribute: str) -> None:
    base = Scene("circle", "purple", "white", seed=3)
    images = {draw(replace(base, **{attribute: word})).tobytes() for word in ATTRIBUTES[attribute]}  # type: ignore[arg-type]
    assert len(images) == len(ATTRIBUTES[attribute])


def test_object_and_background_colors_differ_visibly() -> None:
    for colour in COLOURS:
        for background in (name for name in BACKGROUNDS if name != colour):
            image = draw(Scene("square", colour, background, seed=1)).astype(int)
            center, corner = image[16, 16], image[1, 1]
            assert np.abs(center - corner).sum() > 60
