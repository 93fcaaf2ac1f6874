"""Draws the images of a request with one base: writes each when it is finished, shows progress and stops on request."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.errors import InterruptedRun
from lora_engine.files import atomic_write
from lora_engine.inference.prompts.prompt import ParsedPrompt, parse_prompt
from registry.store.snapshot import find_scratch
from tasks.operations.adapter_files import fetch_adapter
from tasks.progress import StepEvent, publish, stop_requested

if TYPE_CHECKING:
    from torch import Tensor

    from lora_engine.inference.draw import Drawer
    from lora_engine.inference.draw_settings import DrawSettings
    from lora_engine.inference.image_files import ImageOptions
    from tasks.operations.images import DrawRequest

PREVIEW = "preview.png"


class OpenDrawing:
    """A loaded base with the adapters of all prompts of a request. Created by `open_drawing`.

    Args:
        drawer: The base.
        files: File and reference of each adapter, by its name in the prompts.
        negative: The negative prompt.
        options: How images are written.
        folder: The output folder.
        previews: Steps between two updates of the preview; 0 writes none.
        steps: Steps of all images of the request.

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
    ) -> None:
        self._drawer, self._files, self._negative, self._options = drawer, files, negative, options
        self._folder, self._previews, self._steps = folder, previews, steps
        self._finished = 0
        self.written: list[Path] = []

    def draw(self, prompt: ParsedPrompt, settings: DrawSettings, names: Sequence[str]) -> Tensor:
        """Draws images and writes each batch when it is finished.

        Args:
            prompt: The prompt.
            settings: The settings.
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

        files = [self._files[tag.name] for tag in prompt.adapters]
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
        )
        self._finished += settings.image_steps
        return pixels

    def _publish(self, done: int, total: int, values: Mapping[str, float]) -> None:
        del total
        publish(StepEvent("generate", "progress", self._finished + done, self._steps, values))


@contextmanager
def open_drawing(
    request: DrawRequest, home: Path, prompts: Sequence[ParsedPrompt], folder: Path, *, steps: int
) -> Iterator[OpenDrawing]:
    """Yields what draws the prompts of a request; the base is loaded, and the adapters are fetched, once.

    A preview is removed at the end, and stays after an interruption.

    Args:
        request: The request.
        home: The home with the named versions.
        prompts: All prompts that will be drawn.
        folder: The output folder.
        steps: Steps of all images.
    """
    from lora_engine.bases.source import resolve_base
    from lora_engine.compute import fitting_threads, measure_free, threads
    from lora_engine.inference.draw import Drawer

    options, negative = request.options(), parse_prompt(request.negative, is_negative=True)
    names = dict.fromkeys(tag.name for prompt in prompts for tag in prompt.adapters)
    count = fitting_threads([resolve_base(request.base)])
    with tempfile.TemporaryDirectory(dir=find_scratch()) as work, threads(count):
        files = {name: fetch_adapter(name, home, Path(work) / str(index)) for index, name in enumerate(names)}
        drawer = Drawer(
            request.base,
            clip_skip=request.clip_skip,
            vae=request.vae,
            tile_vae=request.tile_vae,
            offload=request.offload,
            measure_free=measure_free,
        )
        yield OpenDrawing(drawer, files, negative, options, folder, request.previews, steps)
    if request.previews:
        (folder / PREVIEW).unlink(missing_ok=True)
