"""Generates images from a prompt and adapter files and writes them as PNG with their settings."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from lora_engine.bases.base import load_base
from lora_engine.bases.options import options_of_cards
from lora_engine.bases.samplers import Sampler, find_sampler
from lora_engine.bases.vae import resolve_vae
from lora_engine.data.pixels import write_png
from lora_engine.formats import read_bundle
from lora_engine.inference.composition import compose, generate_composed
from lora_engine.inference.image_metadata import Drawing, UsedAdapter
from lora_engine.inference.prompts.prompt import ParsedPrompt
from lora_engine.progress import Progress, no_progress


def draw_images(
    prompt: ParsedPrompt,
    folder: Path,
    *,
    base: str,
    files: Sequence[tuple[Path, str]] = (),
    negative: ParsedPrompt,
    seeds: Sequence[int],
    steps: int = 20,
    guidance: float = 3.0,
    size: int | None = None,
    sampler: str | None = None,
    clip_skip: int | None = None,
    vae: str | None = None,
    progress: Progress = no_progress,
) -> list[Path]:
    """Generates one image per seed with all adapters and their learned tokens attached.

    Args:
        prompt: The prompt; see `parse_prompt`.
        folder: The folder for the images, which are named `SEED.png`.
        base: The base; see `load_base`.
        files: File and `name@version` (or file name) of the prompt's adapters, in their order.
        negative: The negative prompt.
        seeds: One per image.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 1 is none.
        size: Width and height in pixels; None takes the base's default.
        sampler: See `find_sampler`; None is the base's own.
        clip_skip: See `BaseOptions`; None is that of the adapters' training.
        vae: Another autoencoder, a name for `resolve_vae`; the one of the adapters' training.
        progress: Called after each batch.

    Returns:
        The files, in the order of the seeds.

    Raises:
        SettingsError: The adapters were trained with different options of the base, or with another autoencoder.
        AdapterError: An adapter is incomplete or does not match the base, or two have the same learned token.
        BaseModelError: No such base.
    """
    model = load_base(base)
    names = model.module_names()
    bundles = [read_bundle(file, names) for file, _ in files]
    cards = [bundle.card for bundle in bundles]
    model.configure(options_of_cards(cards, clip_skip=clip_skip, vae=resolve_vae(vae) if vae else None))
    with compose(model, list(zip(prompt.adapters, bundles, strict=True))) as composition:
        pixels = generate_composed(
            model,
            prompt,
            composition,
            negative=negative,
            seeds=list(seeds),
            steps=steps,
            guidance=guidance,
            height=size,
            width=size,
            sampler=sampler,
            progress=progress,
        )
    paths = [folder / f"{seed}.png" for seed in seeds]
    chosen = find_sampler(sampler) if sampler else Sampler(type(model.scheduler()).__name__)
    drawing = Drawing(
        prompt,
        negative,
        [UsedAdapter.of_file(*file) for file in files],
        base=model.name,
        fingerprint=model.fingerprint,
        scheduler=chosen.scheduler,
        scheduler_options=chosen.options,
        steps=steps,
        guidance=guidance,
        version=version("loraline"),
    )
    for seed, path, image in zip(seeds, paths, pixels, strict=True):
        write_png(path, image, drawing.texts(seed, (image.shape[1], image.shape[2])))
    return paths
