"""Captions images offline: finds the best caption of the embedded world with the embedded CLIP.

Zero-shot over all captions of that world. It only knows drawings of that world: a photo gets the caption of the most
similar drawing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_engine.bases.tiny import world
from lora_engine.bases.tiny.captions import caption
from lora_engine.data.pixels import read_pixels
from lora_engine.data.spec import CaptionSettings
from lora_engine.evaluation.embedder import Embedder, load_embedder
from lora_engine.progress import Progress


def interrogate(
    images: Sequence[Path],
    settings: CaptionSettings,
    progress: Progress | None = None,
    embedder: Embedder | None = None,
) -> list[str]:
    """Returns one caption per image, such as `a red star on the left on a striped blue background`.

    Args:
        images: Files that `read_pixels` can read; one is in memory at a time.
        settings: The trigger, if any, replaces the word of the shape.
        progress: Called after each image.
        embedder: The embedder; None takes the embedded base's CLIP.

    Raises:
        BaseModelError: The embedded base is not built.
        DataError: An image cannot be used.
    """
    clip = embedder or load_embedder()
    scenes = all_scenes()
    embeddings = _embed_captions(clip)
    texts: list[str] = []
    for done, path in enumerate(images, start=1):
        best = int((embeddings @ clip.embed_images(read_pixels(path)[None])[0]).argmax())
        texts.append(describe(scenes[best], settings.trigger))
        if progress is not None:
            progress(done, len(images), {})
    return texts


@functools.cache
def all_scenes() -> tuple[world.Scene, ...]:
    """Returns every scene that captions can distinguish."""
    views = itertools.product(world.triples(), world.TEXTURES, world.POSITIONS)
    return tuple(world.Scene(*triple, texture=texture, position=position) for triple, texture, position in views)


def describe(scene: world.Scene, trigger: str | None = None) -> str:
    """Returns the full caption of a scene; a trigger replaces the word of the shape."""
    text = caption(scene, np.random.default_rng(0), drop=False)
    return text if trigger is None else text.replace(f" {scene.shape} ", f" {trigger} ", 1)


def _embed_captions(embedder: Embedder) -> Tensor:
    with torch.inference_mode():
        return embedder.embed_texts([describe(scene) for scene in all_scenes()])
