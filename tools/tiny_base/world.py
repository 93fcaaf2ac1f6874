"""Defines the synthetic world of the embedded base: its scenes, their images and their full captions.

Pure and seeded: the same seed gives the same scenes, and the same scene the same pixels. Training captions are in
`captions`, image files and batches in `images`. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from lora_engine.errors import SettingsError

SIZE = 32
"""Side of an image in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond", "arrow", "hourglass")
"""The shapes that the base is trained on."""

CONCEPT = "crescent"
"""The shape that the base was never trained on; demonstrations teach it with a made-up word."""

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white", "black")
BACKGROUNDS = ("white", "black", "red", "green", "blue", "yellow")
TEXTURES = ("plain", "striped", "dotted")
POSITIONS = ("left", "center", "right")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": (*SHAPES, CONCEPT),
    "colour": COLOURS,
    "background": BACKGROUNDS,
    "texture": TEXTURES,
    "position": POSITIONS,
}
"""Words by attribute, in the order of the classes of the judge and of CLIP's attribute heads."""

Split = Literal["train", "heldout", "concept", "any"]
Triple = tuple[str, str, str]

_RGB: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (35, 150, 60),
    "blue": (40, 70, 215),
    "yellow": (245, 215, 50),
    "purple": (140, 50, 175),
    "cyan": (60, 205, 225),
    "white": (246, 246, 246),
    "black": (16, 16, 16),
}
# The second tone of a patterned background: visibly different, but still of the named color.
_SECOND: dict[str, tuple[int, int, int]] = {
    "red": (160, 15, 25),
    "green": (15, 95, 35),
    "blue": (110, 140, 250),
    "yellow": (200, 160, 15),
    "white": (185, 185, 185),
    "black": (85, 85, 85),
}
_RADIUS = (8.6, 9.5)
_CENTERS = {"left": 10.0, "center": 16.0, "right": 22.0}
_PROBABILITIES = {
    "texture": (0.5, 0.25, 0.25),
    "position": (0.33, 0.34, 0.33),
}
_SUPERSAMPLING = 4
_HELD_OUT_SEED = 20
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Scene:
    """The attributes of one image. `seed` determines the rest: exact position, radius and tint."""

    shape: str
    colour: str
    background: str
    texture: str = "plain"
    position: str = "center"
    seed: int = 0

    @property
    def triple(self) -> Triple:
        """(shape, colour, background), the unit by which scenes are held out of training."""
        return (self.shape, self.colour, self.background)


def triples(shapes: Sequence[str] = SHAPES) -> list[Triple]:
    """Returns every (shape, color, background) of `shapes` whose object differs in color from its background."""
    return [(s, c, b) for s in shapes for c in COLOURS for b in BACKGROUNDS if c != b]


def held_out_triples() -> frozenset[Triple]:
    """Returns the tenth of the triples that is in no training image, equally many per shape; always the same set."""
    rng = np.random.default_rng(_HELD_OUT_SEED)
    chosen: set[Triple] = set()
    for shape in SHAPES:
        of_shape = triples((shape,))
        count = round(len(of_shape) * _HELD_OUT_SHARE)
        chosen.update(of_shape[i] for i in rng.choice(len(of_shape), count, replace=False))
    return frozenset(chosen)


def split_triples(split: Split) -> list[Triple]:
    """Returns the triples of a split: `train`, `heldout`, `concept` (crescents only) or `any` (all three)."""
    held_out = held_out_triples()
    known = triples()
    parts: dict[str, list[Triple]] = {
        "train": [t for t in known if t not in held_out],
        "heldout": [t for t in known if t in held_out],
        "concept": triples((CONCEPT,)),
    }
    parts["any"] = [*known, *parts["concept"]]
    if split not in parts:
        raise SettingsError(f"unknown split {split!r} of the synthetic world", allowed=", ".join(sorted(parts)))
    return parts[split]


def scenes(seed: int, n: int, split: Split = "train") -> list[Scene]:
    """Returns `n` random scenes of a split, from numpy's generator with `seed`; triples are equally likely."""
    rng = np.random.default_rng(seed)
    pool = split_triples(split)
    indices = rng.integers(0, len(pool), n)
    textures = rng.choice(TEXTURES, n, p=_PROBABILITIES["texture"])
    positions = rng.choice(POSITIONS, n, p=_PROBABILITIES["position"])
    # The shipped weights were trained on scenes with one more draw at this point. Without it every seed would give
    # scenes other than those of the weights and of all measured figures.
    rng.random(n)
    seeds = rng.integers(0, 2**31, n)
    return [
        Scene(shape, colour, background, str(texture), str(position), int(image_seed))
        for (shape, colour, background), texture, position, image_seed in zip(
            (pool[i] for i in indices), textures, positions, seeds, strict=True
        )
    ]


def draw(scene: Scene) -> NDArray[np.uint8]:
    """Renders a scene as uint8 RGB of shape (32, 32, 3).

    `scene.seed` moves the position by up to one pixel and the tints by up to six levels. Edges are antialiased by
    4 x supersampling of the mask.
    """
    rng = np.random.default_rng(scene.seed)
    dx, dy = rng.uniform(-1, 1, 2)
    radius = rng.uniform(*_RADIUS)
    tints = rng.integers(-6, 7, (2, 3))
    mask = _mask(scene.shape, _CENTERS[scene.position] + dx, SIZE / 2 + dy, radius)[..., None]
    field = _background(scene.background, scene.texture) + tints[0]
    color = np.asarray(_RGB[scene.colour], dtype=np.float32) + tints[1]
    image = field * (1 - mask) + color * mask
    rounded: NDArray[np.uint8] = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    return rounded


def full_caption(scene: Scene, *, word: str | None = None) -> str:
    """Returns the full caption of a scene, such as `a red star on the left on a striped blue background`.

    Args:
        scene: The scene; a plain texture is not mentioned.
        word: Replaces the word of the shape, such as `zorb` for a crescent; None keeps it.
    """
    return f"a {scene.colour} {word or scene.shape}{place_phrase(scene)}{background_phrase(scene)}"


def place_phrase(scene: Scene) -> str:
    """Returns the position of the object with a leading space: ` on the left`."""
    return f" {'in' if scene.position == 'center' else 'on'} the {scene.position}"


def background_phrase(scene: Scene) -> str:
    """Returns the background with a leading space: ` on a striped blue background`."""
    texture = "" if scene.texture == "plain" else f"{scene.texture} "
    return f" on a {texture}{scene.background} background"


def _background(colour: str, texture: str) -> NDArray[np.float32]:
    """Renders the background without tint, float32 (32, 32, 3). Its period is eight pixels: two latent cells."""
    row = np.arange(SIZE) % 8
    if texture == "striped":
        second = np.broadcast_to(row[None, :] >= 4, (SIZE, SIZE))
    elif texture == "dotted":
        off = (row - 3.5) ** 2
        second = off[:, None] + off[None, :] < 4.6
    else:
        second = np.zeros((SIZE, SIZE), dtype=bool)
    tones = np.asarray([_RGB[colour], _SECOND[colour]], dtype=np.float32)
    return tones[second.astype(np.intp)]


def _mask(shape: str, cx: float, cy: float, radius: float) -> NDArray[np.float32]:
    """Returns the coverage of the shape in [0, 1], float32 (32, 32)."""
    factor = _SUPERSAMPLING
    image = Image.new("L", (SIZE * factor, SIZE * factor))
    pen = ImageDraw.Draw(image)

    def disc(x: float, y: float, r: float, fill: int) -> None:
        left, top = (cx + (x - r) * radius) * factor, (cy + (y - r) * radius) * factor
        pen.ellipse((left, top, left + 2 * r * radius * factor, top + 2 * r * radius * factor), fill=fill)

    if shape in _POLYGONS:
        pen.polygon([((cx + x * radius) * factor, (cy + y * radius) * factor) for x, y in _POLYGONS[shape]], fill=255)
    else:
        disc(0, 0, 1, 255)
        if shape == "ring":
            disc(0, 0, 0.52, 0)
        elif shape == CONCEPT:
            disc(0.5, 0, 0.8, 0)
    fine = np.asarray(image, dtype=np.float32).reshape(SIZE, factor, SIZE, factor)
    covered: NDArray[np.float32] = fine.mean(axis=(1, 3)) / np.float32(255)
    return covered


def _star() -> list[tuple[float, float]]:
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = np.where(np.arange(10) % 2 == 0, 1.12, 0.5)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def _heart() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 60)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return [(float(a) / 15.5, float(b) / 15.5) for a, b in zip(x, y, strict=True)]


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -1.0), (1.05, 0.85), (-1.05, 0.85)],
    "star": _star(),
    "heart": _heart(),
    "cross": [
        (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
        (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
    ],
    "diamond": [(0, -1.12), (0.82, 0), (0, 1.12), (-0.82, 0)],
    "arrow": [(-1, -0.36), (0.1, -0.36), (0.1, -0.95), (1.1, 0), (0.1, 0.95), (0.1, 0.36), (-1, 0.36)],
    "hourglass": [(-0.9, -1), (0.9, -1), (0.16, 0), (0.9, 1), (-0.9, 1), (-0.16, 0)],
}  # fmt: skip
