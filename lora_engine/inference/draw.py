"""Generates images from prompts and adapter files and writes them as PNG with their settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from lora_engine.bases.base import load_base
from lora_engine.bases.options import options_of_cards
from lora_engine.bases.samplers import Sampler, find_sampler
from lora_engine.bases.vae import resolve_vae
from lora_engine.data.pixels import write_png
from lora_engine.formats import Bundle, read_bundle
from lora_engine.inference.composition import compose, generate_composed
from lora_engine.inference.image_metadata import Drawing, UsedAdapter
from lora_engine.inference.prompts.prompt import ParsedPrompt
from lora_engine.progress import Progress, no_progress


@dataclass(frozen=True)
class DrawSettings:
    """Settings of images.

    Attributes:
        seeds: One per image.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 1 is none.
        size: Width and height in pixels; None takes the base's default.
        sampler: See `find_sampler`; None is the base's own.
    """

    seeds: Sequence[int]
    steps: int = 20
    guidance: float = 3.0
    size: int | None = None
    sampler: str | None = None


class Drawer:
    """Draws images with one base; the file of an adapter is read once.

    Args:
        base: The base; see `load_base`.
        clip_skip: See `BaseOptions`; None is that of the adapters' training.
        vae: Another autoencoder, a name for `resolve_vae`; the one of the adapters' training.

    Raises:
        BaseModelError: No such base.
    """

    def __init__(self, base: str, *, clip_skip: int | None = None, vae: str | None = None) -> None:
        self._model = load_base(base)
        self._clip_skip, self._vae = clip_skip, resolve_vae(vae) if vae else None
        self._names = self._model.module_names()
        self._bundles: dict[Path, Bundle] = {}
        self._used: dict[tuple[Path, str], UsedAdapter] = {}

    def draw(
        self,
        prompt: ParsedPrompt,
        settings: DrawSettings,
        *,
        files: Sequence[tuple[Path, str]] = (),
        negative: ParsedPrompt,
        progress: Progress = no_progress,
    ) -> tuple[Tensor, Drawing]:
        """Generates one image per seed with all adapters and their learned tokens attached.

        Args:
            prompt: The prompt; see `parse_prompt`.
            settings: The settings.
            files: File and `name@version` (or file name) of the prompt's adapters, in their order.
            negative: The negative prompt.
            progress: Called after each batch.

        Returns:
            The images, float32 [n, 3, height, width] in [-1, 1], and what to write into their files.

        Raises:
            SettingsError: The adapters were trained with different options of the base, or with another autoencoder.
            AdapterError: An adapter is incomplete or does not match the base, or two have the same learned token.
        """
        bundles = [self._bundle(file) for file, _ in files]
        cards = [bundle.card for bundle in bundles]
        self._model.configure(options_of_cards(cards, clip_skip=self._clip_skip, vae=self._vae))
        with compose(self._model, list(zip(prompt.adapters, bundles, strict=True))) as composition:
            pixels = generate_composed(
                self._model,
                prompt,
                composition,
                negative=negative,
                seeds=list(settings.seeds),
                steps=settings.steps,
                guidance=settings.guidance,
                height=settings.size,
                width=settings.size,
                sampler=settings.sampler,
                progress=progress,
            )
        return pixels, self._describe(prompt, negative, settings, files)

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
        )


def write_drawn(path: Path, image: Tensor, drawing: Drawing, seed: int) -> None:
    """Writes an image [3, height, width] with its settings."""
    write_png(path, image, drawing.texts(seed, (image.shape[1], image.shape[2])))
