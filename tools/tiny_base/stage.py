"""Defines the common parts of the embedded base's trainings: settings, learning rate, tokens, atomic folders."""

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
"""Tokens of a caption; made-up words are spelled letter by letter, so even short captions may need many."""


class BuildSettings(BaseModel):
    """The numbers of scenes and steps of the trainings; the defaults are those of the shipped weights.

    Attributes:
        scenes: Training scenes of VAE and diffusion; CLIP has as many in each round, with other seeds.
        judge_scenes: Training scenes of the judge: training split, held out, concept.
        vae_steps: Steps with batches of 12 in each of two processes.
        polish_steps: Further such steps for the decoder only.
        judge_steps: Steps with batches of 128.
        clip_steps: Steps with batches of 128.
        clip_more_steps: Steps with batches of 128 in each of three more rounds, at a lower learning rate.
        text_steps: Steps with batches of 64 in each of two processes, for the text encoder only, before diffusion.
        diffusion_steps: Steps with batches of 24 in each of two processes.
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


def anneal(optimizer: Optimizer, peak: float, step: int, steps: int, warmup: int = 30) -> None:
    """Sets the learning rate of a step: linear warm-up, then half a cosine from `peak` to a fiftieth of it."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1, (step + 1) / warmup) * (cosine * 0.98 + 0.02)


def encode(tokenizer: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Returns token ids and attention mask, both int64 [n, 32]; longer texts are truncated."""
    tokens = tokenizer(list(texts), padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def replace_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Creates or replaces a folder atomically.

    Args:
        path: The folder.
        fill: Writes the content into an empty folder. If it raises, `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    new, old = partial / "new", partial / "old"
    try:
        new.mkdir()
        fill(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(partial)
