"""Finds generated images that are copies of training images, by their perceptual hashes. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from lora_engine.data.duplicates import Print, find_same


def find_copies(drawings: Sequence[Print], training: Sequence[Print]) -> dict[int, int]:
    """Returns drawing -> first training image that it copies, as indices; other drawings are absent.

    Of 3,350 pairs of unrelated photographs none differs in fewer than 98 of the 256 bits of a hash; copies differ in at
    most `SAME_BITS`. Drawings of one shape at one place differ less.

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
