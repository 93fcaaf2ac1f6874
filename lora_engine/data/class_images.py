"""Notices class images that preserve nothing: of one color, the same as another, or unlike the class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from PIL import Image

from lora_engine.data.duplicates import Print, find_same, take_print
from lora_engine.data.quality import find_flaws

_BLANK = {"nearly of one color", "very dark"}  # not "very bright": a drawing or a product on white is
UNLIKE = 3.0
"""Deviations (1.4826 times the median absolute one) below the median from which an image is unlike its class.

With the embedded CLIP, 1.2 % of 24 drawn images of a shape are, and 43 % of three of another shape among them."""
USUAL = 0.2
"""Share of drawn class images that may be unlike the others; of few images, chance gives one or two."""
GIVEN = "remove or replace them"
DRAWN = "set another prior.prompt or seed, more prior.steps, or give class images"


@dataclass(frozen=True)
class ClassImage:
    """What is compared of a class image.

    Attributes:
        name: Its name for display.
        is_blank: True if it is nearly of one color or very dark.
        print: See `take_print`.
    """

    name: str
    is_blank: bool
    print: Print


@dataclass(frozen=True)
class Likeness:
    """How alike the class images and their prompts are, by the embedder of images and texts; cosines.

    Attributes:
        prompt: A prompt of the class.
        own: One value per image, with its own prompt.
        neutral: One value per image, with a text that says nothing of the class.
    """

    prompt: str
    own: Sequence[float]
    neutral: Sequence[float]


def read_class_image(name: str, image: Image.Image, print_: Print | None = None) -> ClassImage:
    """Returns what is compared of an RGB image."""
    return ClassImage(name, is_blank(find_flaws(image)), print_ or take_print(image))


def is_blank(flaws: Iterable[str]) -> bool:
    """Returns True if the flaws of an image leave nothing of it."""
    return not _BLANK.isdisjoint(flaws)


def find_odd(
    images: Sequence[ClassImage], fix: str, likeness: Likeness | None = None, *, tolerated: float = 0.0
) -> Iterator[str]:
    """Yields what is odd about class images: the number, the first name, and the fix.

    Args:
        images: The class images.
        fix: What to do about them: `GIVEN` or `DRAWN`.
        likeness: See `Likeness`, in the order of the images; None means that there is no embedder.
        tolerated: Share of images unlike the others that is not named.
    """
    blank = [image.name for image in images if image.is_blank]
    if blank:
        yield _describe(blank, images, "are nearly of one color or very dark", fix)
    shown = [image for image in images if not image.is_blank]
    repeated = sorted({index for _, others in find_same([image.print for image in shown]) for index in others.tolist()})
    if repeated:
        yield _describe([shown[index].name for index in repeated], images, "show the same as another", fix)
    if likeness is None or not images:
        return
    middle = median(likeness.own)
    if middle < median(likeness.neutral):
        yield f"the {len(images)} class images are less like {likeness.prompt!r} than like any image; {fix}"
        return
    deviation = 1.4826 * median(abs(value - middle) for value in likeness.own)
    unlike = [i.name for i, value in zip(images, likeness.own, strict=True) if value < middle - UNLIKE * deviation]
    if len(unlike) > tolerated * len(images):
        yield _describe(unlike, images, f"are less like {likeness.prompt!r} than the others", fix)


def _describe(names: Sequence[str], images: Sequence[ClassImage], problem: str, fix: str) -> str:
    return f"{len(names)} of {len(images)} class images {problem}, first {names[0]}; {fix}"
