"""What the trainings of the embedded base share: sizes, learning rate, tokens, and how a folder is finished."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor
from torch.optim import Optimizer

CONTEXT = 32
"""Tokens of a caption; made-up words are spelled letter by letter, so that short captions may still be long."""


class BuildSettings(BaseModel):
    """How much is drawn and for how many steps each part is trained; the defaults made the weights that are shipped.

    Attributes:
        scenes: Training scenes of VAE and diffusion; of CLIP as many, others.
        judge_scenes: Training scenes of the judge: known, held out, concept.
        vae_steps: Batches of 12 in each of the two processes.
        polish_steps: As many pictures again in each step, for the decoder alone.
        judge_steps: Batches of 128.
        clip_steps: Batches of 128.
        clip_more_steps: Batches of 128 in each of three more rounds, of other scenes, at a lower rate.
        text_steps: Batches of 64 in each of the two processes, for the text encoder alone, before diffusion.
        diffusion_steps: Batches of 24 in each of the two processes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scenes: PositiveInt = 16_000
    judge_scenes: tuple[PositiveInt, PositiveInt, PositiveInt] = (24_000, 3_000, 5_000)
    vae_steps: PositiveInt = 1_300
    polish_steps: PositiveInt = 1_200
    judge_steps: PositiveInt = 1_100
    clip_steps: PositiveInt = 1_100
    clip_more_steps: PositiveInt = 400
    text_steps: PositiveInt = 150
    diffusion_steps: PositiveInt = 1_700


def anneal(optimiser: Optimizer, peak: float, step: int, steps: int, warmup: int = 30) -> None:
    """Sets the learning rate of a step: a linear warm-up, then half a cosine from `peak` down to a fiftieth of it."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimiser.param_groups:
        group["lr"] = peak * min(1, (step + 1) / warmup) * (cosine * 0.98 + 0.02)


def encode(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both int64 [n, 32]; what is longer is cut."""
    tokens = tokenizer(list(texts), padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def replace_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder, or makes it anew: whole, or as it was before.

    Args:
        path: Where it goes.
        fill: Writes the content into the empty folder that it is given. If it raises, `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    fresh, old = partial / "new", partial / "old"
    try:
        fresh.mkdir()
        fill(fresh)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(partial)
