"""Generates images from a prompt and adapter files and writes them as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lora_engine.adapters import attach
from lora_engine.bases.base import load_base
from lora_engine.bases.options import options_of_cards
from lora_engine.bases.vae import resolve_vae
from lora_engine.data.pixels import write_png
from lora_engine.formats import read_bundle
from lora_engine.inference.generate import generate
from lora_engine.inference.textual_inversion import attach_embeddings
from lora_engine.progress import Progress, no_progress


def draw_images(
    prompt: str,
    folder: Path,
    *,
    base: str,
    adapters: Sequence[tuple[Path, float]] = (),
    seeds: Sequence[int],
    steps: int = 20,
    guidance: float = 3.0,
    size: int | None = None,
    clip_skip: int | None = None,
    vae: str | None = None,
    progress: Progress = no_progress,
) -> list[Path]:
    """Generates one image per seed with all adapters and their learned tokens attached.

    Args:
        prompt: The prompt.
        folder: The folder for the images, which are named `SEED.png`.
        base: The base; see `load_base`.
        adapters: Pairs (file, weight).
        seeds: One per image.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 1 is none.
        size: Width and height in pixels; None takes the base's default.
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
    bundles = [(read_bundle(file, names), weight) for file, weight in adapters]
    cards = [bundle.card for bundle, _ in bundles]
    model.configure(options_of_cards(cards, clip_skip=clip_skip, vae=resolve_vae(vae) if vae else None))
    with ExitStack() as stack:
        for bundle, weight in bundles:
            if bundle.adapter.modules:
                stack.enter_context(attach(model, bundle.adapter, weight))
        # After the last adapter and all at once: they wrap the input embedding.
        embeddings = [embedding for bundle, _ in bundles for embedding in bundle.embeddings]
        stack.enter_context(attach_embeddings(model, embeddings))
        pixels = generate(
            model,
            [prompt] * len(seeds),
            seeds=list(seeds),
            steps=steps,
            guidance=guidance,
            height=size,
            width=size,
            progress=progress,
        )
    paths = [folder / f"{seed}.png" for seed in seeds]
    for path, image in zip(paths, pixels, strict=True):
        write_png(path, image)
    return paths
