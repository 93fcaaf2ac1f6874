"""Draws the images of requests with one base: writes each when it is finished, shows progress and stops on request."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.errors import InterruptedRun
from lora_engine.files import atomic_write
from lora_engine.inference.prompts.prompt import ParsedPrompt, parse_prompt
from lora_engine.inference.prompts.tags import AdapterTag
from registry.store.snapshot import find_scratch
from tasks.operations.adapter_files import fetch_adapter
from tasks.operations.draw_request import DrawRequest, settings_of
from tasks.progress import StepEvent, publish, stop_requested

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.inference.draw import Drawer
    from lora_engine.inference.image_files import ImageOptions
    from lora_engine.inference.image_metadata import Drawing

PREVIEW = "preview.png"
Note = Callable[[str], None]


def ignore_note(text: str) -> None:
    """Does nothing with a line of text."""
    del text


class OpenDrawing:
    """A loaded base with the adapters of all prompts. Created by `open_drawing`.

    Args:
        drawer: The base.
        files: File and reference of each adapter, by its name in the prompts.
        negative: The negative prompt.
        options: How images are written.
        folder: The output folder.
        previews: Steps between two updates of the preview; 0 writes none.
        steps: Steps of all images of all requests.
        note: See `draw`.

    Attributes:
        written: The finished images, in order.
    """

    def __init__(
        self,
        drawer: Drawer,
        files: Mapping[str, tuple[Path, str]],
        negative: ParsedPrompt,
        options: ImageOptions,
        folder: Path,
        previews: int,
        steps: int,
        note: Note = ignore_note,
    ) -> None:
        self._drawer, self._files, self._negative, self._options = drawer, files, negative, options
        self._folder, self._previews, self._steps = folder, previews, steps
        self._finished, self._note, self._noted = 0, note, set[str]()
        self.written: list[Path] = []

    def draw(self, request: DrawRequest, names: Sequence[str]) -> Tensor:
        """Draws images and writes each batch when it is finished.

        Args:
            request: One of the requests.
            names: Name of each file without its suffix.

        Returns:
            The images, float32 [n, 3, height, width] in [-1, 1].

        Raises:
            InterruptedRun: A stop was requested; no file is partly written.
        """
        import torch

        from lora_engine.data.pixels import to_image
        from lora_engine.inference.draw import encode_drawn
        from lora_engine.inference.image_files import encode_marked
        from lora_engine.inference.settled_tags import all_tags

        prompt, settings = parse_prompt(request.prompt), settings_of(request)
        tags = all_tags(prompt, settings.regions)
        files = [self._files[tag.name] for tag in tags]
        drawing = self._drawer.describe(prompt, self._negative, settings, files)
        # Refuses what cannot be written or signed before anything is drawn.
        encode_drawn(torch.zeros(3, 16, 16), drawing, settings, 0, self._options)

        def on_images(first: int, images: Tensor) -> None:
            for number, pixels in enumerate(images, first):
                path = self._folder / f"{names[number]}{self._options.suffix}"
                atomic_write(path, encode_drawn(pixels, drawing, settings, number, self._options))
                self.written.append(path)

        def on_step(done: int, total: int, latents: Tensor) -> None:
            if self._previews and done % self._previews == 0:
                sheet = to_image(torch.cat(list(self._drawer.preview(latents)), dim=2))
                atomic_write(self._folder / PREVIEW, encode_marked(sheet, drawing.source_type))
            if stop_requested():
                raise InterruptedRun(
                    f"stopped at step {done} of {total}; {len(self.written)} finished images are in {self._folder}",
                    remedy="run the same command to draw all of them",
                )

        pixels, _ = self._drawer.draw(
            prompt,
            settings,
            files=files,
            negative=self._negative,
            progress=self._publish,
            on_step=on_step,
            on_images=on_images,
            drawing=drawing,
        )
        self._finished += settings.image_steps
        self._note_recommended(tags, drawing)
        return pixels

    def _note_recommended(self, tags: Sequence[AdapterTag], drawing: Drawing) -> None:
        """Notes, once, the weights that tags with a name alone have from the cards of their adapters."""
        bare = {tag.name for tag in tags if tag.is_bare}
        for tag in drawing.prompt.adapters:
            if tag.name in bare and tag != AdapterTag(tag.name, guidance=tag.guidance) and tag.name not in self._noted:
                self._noted.add(tag.name)
                weights = ", ".join(f"{name} {value}" for name, value in tag.facts().items())
                self._note(f"{tag.name}: {weights}, as its card recommends")

    def _publish(self, done: int, total: int, values: Mapping[str, float]) -> None:
        del total
        publish(StepEvent("generate", "progress", self._finished + done, self._steps, values))


@contextmanager
def open_drawing(
    requests: Sequence[DrawRequest], home: Path, folder: Path, note: Note = ignore_note
) -> Iterator[OpenDrawing]:
    """Yields what draws requests; the base is loaded, and the adapters are fetched, once.

    A preview is removed at the end, and stays after an interruption.

    Args:
        requests: All requests. The first has the base, the negative prompt, and how images are decoded and written.
        home: The home with the named versions.
        folder: The output folder.
        note: See `draw`.
    """
    from lora_engine.bases.source import resolve_base
    from lora_engine.compute import fitting_threads, measure_free, threads
    from lora_engine.inference.draw import Drawer
    from lora_engine.inference.settled_tags import all_tags

    first = requests[0]
    options, negative = first.options(), parse_prompt(first.negative, is_negative=True)
    settings = [settings_of(request) for request in requests]
    prompts = [parse_prompt(request.prompt) for request in requests]
    tags = [tag for prompt, one in zip(prompts, settings, strict=True) for tag in all_tags(prompt, one.regions)]
    steps = sum(one.image_steps for one in settings)
    count = fitting_threads([resolve_base(first.base)])
    with tempfile.TemporaryDirectory(dir=find_scratch()) as work, threads(count):
        names = dict.fromkeys(tag.name for tag in tags)
        files = {name: fetch_adapter(name, home, Path(work) / str(index)) for index, name in enumerate(names)}
        drawer = Drawer(
            first.base,
            vae=first.vae,
            tile_vae=first.tile_vae,
            offload=first.offload,
            measure_free=measure_free,
        )
        yield OpenDrawing(drawer, files, negative, options, folder, first.previews, steps, note)
    if first.previews:
        (folder / PREVIEW).unlink(missing_ok=True)
