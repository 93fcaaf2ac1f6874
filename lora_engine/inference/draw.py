"""Images from a prompt and adapter files, written as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lora_engine.adapters import attach
from lora_engine.bases.base import load_base
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
    progress: Progress = no_progress,
) -> list[Path]:
    """Draws one picture a seed with all adapters, and the words that they teach, attached at once.

    Args:
        prompt: What to draw.
        folder: Where the pictures go, as `SEED.png`.
        base: For `load_base`.
        adapters: (file, weight) each.
        seeds: One picture each.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 1 is none.
        size: Pixels of a side; None for the base's own.
        progress: Told after each batch.

    Returns:
        The files, in the order of the seeds.

    Raises:
        AdapterError: An adapter is not whole or does not fit the base, or two teach the same word.
        BaseModelError: No such base.
    """
    model = load_base(base)
    names = model.module_names()
    with ExitStack() as stack:
        bundles = [(read_bundle(file, names), weight) for file, weight in adapters]
        for bundle, weight in bundles:
            if bundle.adapter.modules:
                stack.enter_context(attach(model, bundle.adapter, weight))
        # The words of all of them, after the last adapter: they lie around the input embedding.
        words = [word for bundle, _ in bundles for word in bundle.embeddings]
        stack.enter_context(attach_embeddings(model, words))
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
    for path, picture in zip(paths, pixels, strict=True):
        write_png(path, picture)
    return paths
