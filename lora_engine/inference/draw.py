"""Generates images from prompts and adapter files and writes them as PNG with their settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.options import options_of_cards
from lora_engine.bases.samplers import Sampler, find_sampler
from lora_engine.bases.vae import resolve_vae
from lora_engine.data.images import open_image
from lora_engine.data.pixels import to_image, write_png
from lora_engine.errors import SettingsError
from lora_engine.files import sha256_file
from lora_engine.formats import Bundle, read_bundle
from lora_engine.inference import ComposedEngine
from lora_engine.inference.composition import Composition, compose, generate_composed
from lora_engine.inference.generate import OnStep, ignore_step
from lora_engine.inference.image_metadata import Drawing, UsedAdapter, UsedImage
from lora_engine.inference.merged_cache import MergedCache
from lora_engine.inference.prompts.prompt import ParsedPrompt
from lora_engine.inference.prompts.tags import AdapterTag
from lora_engine.inference.regions import NO_REGIONS, Regions
from lora_engine.inference.settled_tags import settle_tags
from lora_engine.inference.source_image import SourceImage, fit_image, fit_mask
from lora_engine.progress import Progress, no_progress


@dataclass(frozen=True)
class DrawSettings:
    """Settings of images.

    Attributes:
        seeds: One per image.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 1 is none.
        size: (height, width) in pixels; None takes the source image's, cut to what the base can draw, or the base's
            default.
        sampler: See `find_sampler`; None is the base's own.
        image: File of an image to start from; None starts from noise.
        mask: File of a mask of that image: light parts are drawn. None draws all.
        strength: Share of the steps that run on the image, above 0 to 1.
        enlarge: Factor by which each image is enlarged and then drawn again, above 1 to 4; 1 does not.
        enlarged_strength: Share of the steps that run on the enlarged image, above 0 to 1.
        engine: How adapters act on the base; see `compose`.
        regions: Regions with prompts and adapters of their own.
        adapter_guidance: Scale between the predictions without and with the adapters whose tags have none; 1 is the
            prediction with them.
    """

    seeds: Sequence[int]
    steps: int = 20
    guidance: float = 3.0
    size: tuple[int, int] | None = None
    sampler: str | None = None
    image: Path | None = None
    mask: Path | None = None
    strength: float = 0.75
    enlarge: float = 1.0
    enlarged_strength: float = 0.5
    engine: ComposedEngine = "auto"
    regions: Regions = NO_REGIONS
    adapter_guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.mask is not None and self.image is None:
            raise SettingsError("a mask needs an image", remedy="name the image to start from, too")
        if self.regions.is_mask and (self.mask is not None or self.image is None):
            raise SettingsError("only regions are to be drawn", remedy="name the image to start from, and no mask")
        if not 1.0 <= self.enlarge <= 4.0:
            raise SettingsError(f"images are to be enlarged by {self.enlarge:g}", allowed="a factor from 1 to 4")


class Drawer:
    """Draws images with one base; the file of an adapter is read once.

    Args:
        base: The base, or a name for `load_base`.
        clip_skip: See `BaseOptions`; None is that of the adapters' training.
        vae: Another autoencoder, a name for `resolve_vae`; the one of the adapters' training.

    Raises:
        BaseModelError: No such base.
    """

    def __init__(self, base: str | BaseModel, *, clip_skip: int | None = None, vae: str | None = None) -> None:
        self._model = load_base(base) if isinstance(base, str) else base
        self._clip_skip, self._vae = clip_skip, resolve_vae(vae) if vae else None
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
    ) -> tuple[Tensor, Drawing]:
        """Generates one image per seed with all adapters and their learned tokens attached.

        Args:
            prompt: The prompt; see `parse_prompt`.
            settings: The settings.
            files: File and `name@version` (or file name) of the adapters, in the order of `all_tags`.
            negative: The negative prompt.
            progress: Called after each batch.
            on_step: Called after each step of each batch, but not while images are drawn again after enlarging.

        Returns:
            The images, float32 [n, 3, height, width] in [-1, 1], and what to write into their files.

        Raises:
            SettingsError: The adapters were trained with different options of the base, or with another autoencoder;
                the mask does not fit the image.
            DataError: The image or mask cannot be read.
            AdapterError: An adapter is incomplete or does not match the base, or two have the same learned token.
        """
        bundles = [self._bundle(file) for file, _ in files]
        cards = [bundle.card for bundle in bundles]
        self._model.configure(options_of_cards(cards, clip_skip=self._clip_skip, vae=self._vae))
        source = self._source(settings)
        size = source.size if source is not None else settings.size or self._model.default_size
        larger = self._rounded(tuple(settings.enlarge * side for side in size)) if settings.enlarge > 1.0 else None
        settled = settle_tags(prompt, settings.regions, cards, adapter_guidance=settings.adapter_guidance)
        prompt, files = settled.prompt, [files[index] for index in settled.used]
        pairs = [(tag, bundles[index]) for tag, index in zip(settled.tags, settled.used, strict=True)]
        with self._composed(pairs, settings.engine) as composition:
            drawn = partial(
                generate_composed,
                self._model,
                prompt,
                composition,
                negative=negative,
                steps=settings.steps,
                guidance=settings.guidance,
                sampler=settings.sampler,
                regions=settled.regions,
            )
            pixels = drawn(
                seeds=list(settings.seeds),
                height=size[0],
                width=size[1],
                source=source,
                progress=no_progress if larger else progress,
                on_step=on_step,
            )
            if larger is not None:
                pixels = self._enlarged(drawn, pixels, settings, larger, progress)
        return pixels, self._describe(replace(prompt, adapters=settled.tags), negative, settings, files)

    def forget(self, file: Path) -> None:
        """Drops what was read of an adapter's file."""
        if (bundle := self._bundles.pop(file, None)) is not None:
            self._merged.forget(bundle.adapter)
        self._used = {key: used for key, used in self._used.items() if key[0] != file}

    @torch.no_grad()
    def preview(self, latents: Tensor) -> Tensor:
        """Returns images [n, 3, height, width] in [-1, 1] of latents between two steps, on the CPU."""
        return self._model.decode_latents(latents).clamp(-1.0, 1.0).float().cpu()

    def _composed(
        self, adapters: Sequence[tuple[AdapterTag, Bundle]], engine: ComposedEngine
    ) -> AbstractContextManager[Composition]:
        return compose(self._model, adapters, engine=engine, cache=self._merged)

    def _enlarged(
        self,
        drawn: Callable[..., Tensor],
        pixels: Tensor,
        settings: DrawSettings,
        size: tuple[int, int],
        progress: Progress,
    ) -> Tensor:
        images = []
        for seed, image in zip(settings.seeds, pixels, strict=True):
            source = SourceImage(fit_image(to_image(image), size), settings.enlarged_strength, is_enlarged=True)
            images.append(drawn(seeds=[seed], height=size[0], width=size[1], source=source))
            progress(len(images), len(pixels), {})
        return torch.cat(images)

    def _source(self, settings: DrawSettings) -> SourceImage | None:
        if settings.image is None:
            return None
        image = open_image(settings.image)
        size = settings.size or self._rounded((image.height, image.width))
        self._model.latent_shape(size)  # refuses a size before anything is scaled
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

    def _bundle(self, file: Path) -> Bundle:
        if file not in self._bundles:
            self._bundles[file] = read_bundle(file, self._names)
        return self._bundles[file]

    def _describe_adapter(self, file: tuple[Path, str]) -> UsedAdapter:
        if file not in self._used:
            self._used[file] = UsedAdapter.of_file(*file)
        return self._used[file]

    def _describe(
        self, prompt: ParsedPrompt, negative: ParsedPrompt, settings: DrawSettings, files: Sequence[tuple[Path, str]]
    ) -> Drawing:
        name, own = self._model.name, Sampler(type(self._model.scheduler()).__name__)
        sampler = find_sampler(settings.sampler) if settings.sampler else own
        return Drawing(
            prompt,
            negative,
            [self._describe_adapter(file) for file in files],
            base=Path(name).name if Path(name).exists() else name,  # no path of this machine
            fingerprint=self._model.fingerprint,
            scheduler=sampler.scheduler,
            scheduler_options=sampler.options,
            steps=settings.steps,
            guidance=settings.guidance,
            version=version("loraline"),
            source=None if settings.image is None else _used_image(settings),
            enlarged=(settings.enlarge, settings.enlarged_strength) if settings.enlarge > 1.0 else None,
            regions=[region.facts() for region in settings.regions.items],
        )


def _used_image(settings: DrawSettings) -> UsedImage:
    assert settings.image is not None
    mask = None if settings.mask is None else sha256_file(settings.mask)
    return UsedImage(sha256_file(settings.image), settings.strength, mask)


def write_drawn(path: Path, image: Tensor, drawing: Drawing, seed: int) -> None:
    """Writes an image [3, height, width] with its settings."""
    write_png(path, image, drawing.texts(seed, (image.shape[1], image.shape[2])))
