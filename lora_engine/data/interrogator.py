"""The offline interrogator: which caption of the embedded world fits a picture best, as the embedded CLIP sees it.

Zero-shot over every caption that the drawn world can have. It knows drawings of that world alone: a photograph
gets the caption of the drawing that is most like it.
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
    pictures: Sequence[Path],
    settings: CaptionSettings,
    progress: Progress | None = None,
    embedder: Embedder | None = None,
) -> list[str]:
    """One caption a picture, such as `a red star on the left on a striped blue background`.

    Args:
        pictures: Files that `read_pixels` can read; one is in memory at a time.
        settings: With a trigger, it stands where the word of the shape would.
        progress: Told after each picture.
        embedder: What sees; the embedded base's CLIP by default.

    Raises:
        BaseModelError: The embedded base is not built.
        DataError: A picture cannot be used.
    """
    seer = embedder or load_embedder()
    scenes = all_scenes()
    known = _embed_captions(seer)
    texts: list[str] = []
    for done, path in enumerate(pictures, start=1):
        best = int((known @ seer.embed_images(read_pixels(path)[None])[0]).argmax())
        texts.append(describe(scenes[best], settings.trigger))
        if progress is not None:
            progress(done, len(pictures), {})
    return texts


@functools.cache
def all_scenes() -> tuple[world.Scene, ...]:
    """Every scene that captions can tell apart."""
    views = itertools.product(world.triples(), world.TEXTURES, world.POSITIONS)
    return tuple(world.Scene(*triple, texture=texture, position=position) for triple, texture, position in views)


def describe(scene: world.Scene, trigger: str | None = None) -> str:
    """The full caption of a scene, with the trigger in place of the shape's word where there is one."""
    text = caption(scene, np.random.default_rng(0), drop=False)
    return text if trigger is None else text.replace(f" {scene.shape} ", f" {trigger} ", 1)


def _embed_captions(embedder: Embedder) -> Tensor:
    with torch.inference_mode():
        return embedder.embed_texts([describe(scene) for scene in all_scenes()])
