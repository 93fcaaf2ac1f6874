"""Draws images from prompts and adapter files, and encodes them as files with their settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel, default_device, load_base
from lora_engine.bases.options import BaseOptions, options_of_cards
from lora_engine.bases.samplers import find_sampler
from lora_engine.bases.vae import resolve_vae
from lora_engine.data.images import open_image
from lora_engine.data.pixels import to_image
from lora_engine.errors import SettingsError
from lora_engine.files import sha256_file
from lora_engine.formats import Bundle, read_bundle
from lora_engine.inference import ComposedEngine
from lora_engine.inference.composed_images import generate_composed
from lora_engine.inference.composition import Composition, compose
from lora_engine.inference.draw_settings import DrawSettings
from lora_engine.inference.generate import OnStep, ignore_step
from lora_engine.inference.image_files import PNG, ImageOptions, encode_image
from lora_engine.inference.image_metadata import Drawing, UsedAdapter, UsedImage
from lora_engine.inference.memory import check_memory
from lora_engine.inference.merged_cache import MergedCache
from lora_engine.inference.previews import preview_latents
from lora_engine.inference.prompts.prompt import ParsedPrompt
from lora_engine.inference.prompts.tags import AdapterTag
from lora_engine.inference.settled_tags import SettledTags, settle_tags
from lora_engine.inference.source_image import SourceImage, fit_image, fit_mask
from lora_engine.inference.step_watch import StepWatch
from lora_engine.inference.variation import draw_varied
from lora_engine.progress import Progress, no_progress

__all__ = ["DrawSettings", "Drawer", "encode_drawn"]
OnImages = Callable[[int, Tensor], None]
"""Takes the number of the first image of a batch from 0, and the batch."""


def ignore_images(first: int, images: Tensor) -> None:
    """Does nothing with a batch."""
    del first, images


class Drawer:
    """Draws images with one base; the file of an adapter is read once.

    Args:
        base: The base, or a name for `load_base`.
        vae: Another autoencoder, a name for `resolve_vae`; the one of the adapters' training.
        tile_vae: True decodes one image at a time, in tiles of the autoencoder's size that overlap by a quarter.
        offload: Share of the denoiser's linear layers whose weights stay in the CPU's memory; see `load_base`.
        measure_free: Returns the free and the whole memory of a device in bytes, such as `compute.measure_free`; images
            that need more are refused. None checks nothing.

    Raises:
        BaseModelError: No such base.
        SettingsError: Weights are to stay in the CPU's memory, but the CPU is the device.
    """

    def __init__(
        self,
        base: str | BaseModel,
        *,
        vae: str | None = None,
        tile_vae: bool = False,
        offload: float = 0.0,
        measure_free: Callable[[str], tuple[int, int]] | None = None,
    ) -> None:
        if not 0.0 <= offload <= 1.0 or (offload and default_device() == "cpu"):
            raise SettingsError(
                f"offload is {offload:g} and the device is {default_device()}",
                allowed="a share from 0 to 1, on a machine with a GPU",
                remedy="leave offload out",
            )
        self._model = load_base(base, offload=offload) if isinstance(base, str) else base
        self._measure_free = measure_free
        self._vae, self._tiled = resolve_vae(vae) if vae else None, tile_vae
        self._names = self._model.module_names()
        self._bundles: dict[Path, Bundle] = {}
        self._used: dict[tuple[Path, str], UsedAdapter] = {}
        self._merged = MergedCache(self._model)

    def draw(
        self,
        prompt: ParsedPrompt,
        settings: DrawSettings,
        *,
        files: Sequence[tuple[Path, str]] = (),
        negative: ParsedPrompt,
        progress: Progress = no_progress,
        on_step: OnStep = ignore_step,
        on_images: OnImages = ignore_images,
        drawing: Drawing | None = None,
    ) -> tuple[Tensor, Drawing]:
        """Generates one image per seed with all adapters and their learned tokens attached.

        Args:
            prompt: The prompt; see `parse_prompt`.
            settings: The settings.
            files: File and `name@version` (or file name) of the adapters, in the order of `all_tags`.
            negative: The negative prompt.
            progress: Called after each step with the number of finished steps of all images.
            on_step: Called after each step of each batch; may raise to stop.
            on_images: Called after each batch with its finished images.
            drawing: What `describe` returned for the same arguments; None describes them.

        Returns:
            The images, float32 [n, 3, height, width] in [-1, 1], and what to write into their files.

        Raises:
            SettingsError: The adapters were trained with different options of the base, or with another autoencoder;
                the mask does not fit the image; the free memory is too small for the size.
            DataError: The image or mask cannot be read, or a step gives NaN or Inf.
            AdapterError: An adapter is incomplete or does not match the base, or two have the same learned token.
        """
        bundles = [self._bundle(file) for file, _ in files]
        self._model.configure(self._options(settings, files))
        if self._tiled:
            vae: Any = self._model.vae  # type: ignore[attr-defined]
            vae.enable_tiling()
            vae.enable_slicing()
        is_guided = settings.guidance > 1.0 and not self._model.distilled
        rows = len(prompt.parts) + is_guided
        source = self._source(settings, rows)
        size = source.size if source is not None else settings.size or self._model.default_size
        larger = self._rounded(tuple(settings.enlarge * side for side in size)) if settings.enlarge > 1.0 else None
        self._check_memory(size, settings, rows)
        if larger is not None:
            self._check_memory(larger, settings, rows, at_most=1)  # enlarged images are drawn one by one
        settled = self._settle(prompt, settings, files)
        pairs = [(tag, bundles[index]) for tag, index in zip(settled.tags, settled.used, strict=True)]
        images: list[Tensor] = []
        with self._composed(pairs, settings.engine) as composition:
            drawn = partial(
                generate_composed,
                self._model,
                settled.prompt,
                composition,
                negative=negative,
                steps=settings.steps,
                guidance=settings.guidance,
                sampler=settings.sampler,
                batch=settings.batch,
                regions=settled.regions,
            )
            for first in range(0, len(settings.seeds), settings.batch):
                watch = StepWatch(settings, first, on_step, progress)
                numbers = range(first, min(first + settings.batch, len(settings.seeds)))
                pixels = self._draw_rows(drawn, settings, numbers, size, source, watch)
                if larger is not None:
                    pixels = self._enlarged(drawn, pixels, settings, numbers, larger, watch)
                on_images(first, pixels)
                images.append(pixels)
        pixels = torch.cat(images) if images else torch.empty(0, 3, *(larger or size))
        return pixels, drawing or self.describe(prompt, negative, settings, files)

    def _draw_rows(
        self,
        drawn: Callable[..., Tensor],
        settings: DrawSettings,
        numbers: range,
        size: tuple[int, int],
        source: SourceImage | None,
        watch: StepWatch,
    ) -> Tensor:
        shape = self._model.latent_shape(size)
        inner = None if settings.seed_size is None else self._model.latent_shape(settings.seed_size)
        seeds = [settings.seeds[number] for number in numbers]
        noise = [
            draw_varied(shape, seed, settings.variation_of(number), inner)
            for number, seed in zip(numbers, seeds, strict=True)
        ]
        return drawn(
            seeds=seeds,
            height=size[0],
            width=size[1],
            source=source,
            noise=torch.stack(noise),
            on_step=watch.begin(len(seeds)),
        )

    def _options(self, settings: DrawSettings, files: Sequence[tuple[Path, str]]) -> BaseOptions:
        cards = [self._bundle(file).card for file, _ in files]
        return options_of_cards(cards, clip_skip=settings.clip_skip, vae=self._vae)

    def _settle(self, prompt: ParsedPrompt, settings: DrawSettings, files: Sequence[tuple[Path, str]]) -> SettledTags:
        cards = [self._bundle(file).card for file, _ in files]
        return settle_tags(prompt, settings.regions, cards, adapter_guidance=settings.adapter_guidance)

    def forget(self, file: Path) -> None:
        """Drops what was read of an adapter's file."""
        if (bundle := self._bundles.pop(file, None)) is not None:
            self._merged.forget(bundle.adapter)
        self._used = {key: used for key, used in self._used.items() if key[0] != file}

    def preview(self, latents: Tensor) -> Tensor:
        """Returns images [n, 3, height, width] in [-1, 1] of latents between two steps; see `preview_latents`."""
        return preview_latents(self._model, latents)

    def _composed(
        self, adapters: Sequence[tuple[AdapterTag, Bundle]], engine: ComposedEngine
    ) -> AbstractContextManager[Composition]:
        return compose(self._model, adapters, engine=engine, cache=self._merged)

    def _enlarged(
        self,
        drawn: Callable[..., Tensor],
        pixels: Tensor,
        settings: DrawSettings,
        numbers: range,
        size: tuple[int, int],
        watch: StepWatch,
    ) -> Tensor:
        images = []
        for number, image in zip(numbers, pixels, strict=True):
            source = SourceImage(fit_image(to_image(image), size), settings.enlarged_strength, is_enlarged=True)
            images.append(self._draw_rows(drawn, settings, range(number, number + 1), size, source, watch))
        return torch.cat(images)

    def _source(self, settings: DrawSettings, rows: int) -> SourceImage | None:
        if settings.image is None:
            return None
        image = open_image(settings.image)
        size = settings.size or self._rounded((image.height, image.width))
        self._check_memory(size, settings, rows)  # refuses a size before anything is scaled
        mask = None if settings.mask is None else open_image(settings.mask)
        if mask is not None and mask.size != image.size:
            raise SettingsError(
                f"the mask has {mask.width} x {mask.height} pixels, the image {image.width} x {image.height}",
                where=str(settings.mask),
                remedy="use a mask of the image's size",
            )
        settings.regions.check_image(image.size)
        drawn = settings.regions.mask(size) if settings.regions.is_mask else None
        return SourceImage(fit_image(image, size), settings.strength, drawn if mask is None else fit_mask(mask, size))

    def _rounded(self, size: tuple[float, ...]) -> tuple[int, int]:
        """Returns (height, width) cut to multiples of 64 pixels, or of an eighth of a small base's default size."""
        unit = max(1, min(64, self._model.default_size[0] // 8))
        height, width = (max(unit, int(side) // unit * unit) for side in size)
        return height, width

    def _check_memory(self, size: tuple[int, int], settings: DrawSettings, parts: int, at_most: int = 1 << 30) -> None:
        self._model.latent_shape(size)  # refuses what the base cannot draw
        if self._measure_free is not None:
            free, _ = self._measure_free(str(self._model.device))
            images = min(settings.batch, len(settings.seeds), at_most)
            check_memory(self._model, size, free, rows=images * parts, images=images, tiled=self._tiled)

    def _bundle(self, file: Path) -> Bundle:
        if file not in self._bundles:
            self._bundles[file] = read_bundle(file, self._names)
        return self._bundles[file]

    def _describe_adapter(self, file: tuple[Path, str]) -> UsedAdapter:
        if file not in self._used:
            self._used[file] = UsedAdapter.of_file(*file)
        return self._used[file]

    def describe(
        self, prompt: ParsedPrompt, negative: ParsedPrompt, settings: DrawSettings, files: Sequence[tuple[Path, str]]
    ) -> Drawing:
        """Returns what to write into the files of images; see `draw` for the arguments."""
        name, settled = self._model.name, self._settle(prompt, settings, files)
        return Drawing(
            replace(settled.prompt, adapters=settled.tags),
            negative,
            [self._describe_adapter(files[index]) for index in settled.used],
            base=Path(name).name if Path(name).exists() else name,  # no path of this machine
            fingerprint=self._model.fingerprint,
            scheduler=type(self._model.scheduler(sampler=settings.sampler)).__name__,
            scheduler_options=find_sampler(settings.sampler).options if settings.sampler else {},
            steps=settings.steps,
            guidance=settings.guidance,
            version=version("loraline"),
            source=None if settings.image is None else _used_image(settings),
            enlarged=(settings.enlarge, settings.enlarged_strength) if settings.enlarge > 1.0 else None,
            regions=settled.region_facts(),
            feather=settings.regions.feather,
            only_regions=settings.regions.is_mask,
            seed_size=settings.seed_size,
            clip_skip=self._options(settings, files).clip_skip,
        )


def _used_image(settings: DrawSettings) -> UsedImage:
    assert settings.image is not None
    mask = None if settings.mask is None else sha256_file(settings.mask)
    return UsedImage(sha256_file(settings.image), settings.strength, mask)


def encode_drawn(
    pixels: Tensor, drawing: Drawing, settings: DrawSettings, number: int, options: ImageOptions = PNG
) -> bytes:
    """Returns a drawn image as the bytes of a file; see `encode_image`.

    Args:
        pixels: The image, [3, height, width] in [-1, 1].
        drawing: The result of `Drawer.draw`.
        settings: Its settings.
        number: Number of the image from 0.
        options: Format, quality and signature.
    """
    variation = settings.variation_of(number)
    if variation is not None:
        drawing = replace(drawing, variation=(variation.seed, variation.strength))
    return encode_image(to_image(pixels), drawing, settings.seeds[number], options)
