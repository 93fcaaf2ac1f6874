"""Finds generated images that are copies of training images, by their perceptual hashes. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from lora_engine.data.duplicates import SAME_BITS, Print, find_same

COPY_BITS = SAME_BITS
"""Largest number of different bits of the hashes (256 bits) of an image and its copy; the mirrored hash counts too. Of
3,350 pairs of unrelated photographs none is below 98 bits. Drawings of one shape at one place differ less."""


def find_copies(drawings: Sequence[Print], training: Sequence[Print]) -> dict[int, int]:
    """Returns drawing -> first training image that it copies, as indices; other drawings are absent.

    Args:
        drawings: Prints of generated images.
        training: Prints of the training images.
    """
    count = len(drawings)
    copies: dict[int, int] = {}
    for first, others in find_same([*drawings, *training], count):
        trained = others[others >= count]
        if len(trained):
            copies[first] = int(trained[0]) - count
    return copies
