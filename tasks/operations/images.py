"""Draws images from prompts that name registered adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from registry.store.snapshot import find_scratch
from tasks.operations.draw_request import DrawRequest, settings_of
from tasks.operations.image_drawing import Note, ignore_note, open_drawing


def draw(request: DrawRequest, folder: Path, home: Path, note: Note = ignore_note) -> list[Path]:
    """Generates images and writes each batch when it is finished, named by their seeds.

    Args:
        request: What to draw.
        folder: The output folder.
        home: The home with the named versions.
        note: Takes the weights that the cards of adapters recommend, as a line of text each.

    Raises:
        InterruptedRun: A stop was requested; the images of finished batches are written.
    """
    settings = settings_of(request)
    names = []
    for number, seed in enumerate(settings.seeds):
        variation = settings.variation_of(number)
        names.append(str(seed) if variation is None else f"{seed}-{variation.seed}")
    with open_drawing([request], home, folder, note) as drawing:
        drawing.draw(request, names)
    return drawing.written


def draw_each(requests: Sequence[DrawRequest], home: Path) -> Iterator[list[bytes]]:
    """Yields the images of each request as PNG files without any settings in them.

    Args:
        requests: What to draw; all share what `open_drawing` takes from the first.
        home: The home with the named versions.
    """
    from lora_engine.data.images import encode_png
    from lora_engine.data.pixels import to_image

    with (
        tempfile.TemporaryDirectory(dir=find_scratch()) as folder,
        open_drawing(requests, home, Path(folder)) as drawing,
    ):
        for number, request in enumerate(requests):
            names = [f"{number}-{image}" for image in range(request.count)]
            yield [encode_png(to_image(pixels)) for pixels in drawing.draw(request, names)]
