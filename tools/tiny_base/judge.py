"""Defines and trains the judge, a small classifier of an image's shape, color, background, texture and position.

It is trained on drawings, including the concept, and is independent of the base. It measures whether the base follows
its prompts and whether an adapter learned the concept.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_engine.errors import BaseModelError, DataError
from lora_engine.files import atomic_write
from lora_engine.formats.safetensors_io import read_safetensors, write_safetensors
from tools.tiny_base.images import label, render, to_pixels
from tools.tiny_base.stage import BuildSettings, anneal
from tools.tiny_base.world import ATTRIBUTES, SIZE, scenes

WEIGHTS = "judge.safetensors"
CLASSES = "judge.json"

_log = logging.getLogger(__name__)

_WIDTHS = (24, 40, 64, 64)
_HIDDEN = 96
_BATCH = 128
_RATE = 2e-3


class Judge(nn.Module):
    """Convolutions down to 4 x 4, one hidden layer, one linear head for each attribute.

    Args:
        attributes: Words by attribute name, in the order of the classes.
    """

    def __init__(self, attributes: Mapping[str, Sequence[str]] = ATTRIBUTES) -> None:
        super().__init__()
        self.attributes = {name: tuple(words) for name, words in attributes.items()}
        layers: list[nn.Module] = []
        before = 3
        for index, width in enumerate(_WIDTHS):
            stride = 2 if index < 3 else 1
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, stride=stride), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.body = nn.Sequential(*layers)
        self.neck = nn.Linear(before * (SIZE // 8) ** 2, _HIDDEN)
        self.heads = nn.ModuleDict({name: nn.Linear(_HIDDEN, len(words)) for name, words in self.attributes.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Returns the logits [n, classes] of each attribute for float32 images [n, 3, 32, 32] in [-1, 1]."""
        hidden = F.silu(self.neck(self.body(pixels).flatten(1)))
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.inference_mode()
    def read(self, images: Tensor, batch: int = 256) -> list[dict[str, str]]:
        """Returns the word of each attribute for every image.

        Args:
            images: [n, 3, 32, 32] in [-1, 1].
            batch: Images per batch.

        Raises:
            DataError: The images have another shape.
        """
        if images.dim() != 4 or tuple(images.shape[1:]) != (3, SIZE, SIZE):
            raise DataError(f"the judge cannot read images of shape {tuple(images.shape)}", allowed="(n, 3, 32, 32)")
        rows: list[dict[str, str]] = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch].float()
            classes = {name: logits.argmax(1).tolist() for name, logits in self(part).items()}
            rows += [
                {name: words[classes[name][row]] for name, words in self.attributes.items()} for row in range(len(part))
            ]
        return rows


def load_judge(folder: Path) -> Judge:
    """Loads the judge of a folder with `judge.safetensors` and `judge.json`, in float32, frozen.

    Raises:
        AdapterError: The weights are missing or not a complete safetensors file.
        BaseModelError: The description is missing or damaged, or the weights do not match it.
    """
    try:
        description = json.loads((folder / CLASSES).read_bytes())
        judge = Judge(cast("dict[str, list[str]]", description["attributes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"the description of the judge cannot be read ({error})",
            where=str(folder / CLASSES),
            remedy="reinstall the package, or run `python -m tools.tiny_base build`",
        ) from None
    tensors = {name: tensor.float() for name, tensor in read_safetensors(folder / WEIGHTS)[0].items()}
    try:
        judge.load_state_dict(tensors)
    except RuntimeError as error:
        raise BaseModelError(f"the weights do not match the judge ({error})", where=str(folder / WEIGHTS)) from None
    return judge.requires_grad_(False).eval()


def save_judge(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the weights of a judge of `ATTRIBUTES`, in float16, and the names of its classes.

    Raises:
        BaseModelError: A tensor of the judge is missing.
    """
    # Judges of richer worlds have more heads, which are dropped.
    needed = Judge().state_dict()
    missing = sorted(set(needed) - set(tensors))
    if missing:
        raise BaseModelError(f"the judge lacks {len(missing)} tensors, among them {missing[0]!r}", where=str(folder))
    write_safetensors(folder / WEIGHTS, {name: tensors[name].half() for name in needed}, {})
    description = {"attributes": ATTRIBUTES, "input": {"range": [-1, 1], "shape": [3, SIZE, SIZE]}}
    atomic_write(folder / CLASSES, json.dumps(description, indent=2).encode() + b"\n")


def train(work: Path, settings: BuildSettings) -> None:
    """Trains the judge on drawings of all splits; writes `judge.safetensors` (float32) into `work`."""
    torch.manual_seed(1)
    known, held_out, concept = settings.judge_scenes
    dataset = scenes(3, known, "train") + scenes(4, held_out, "heldout") + scenes(5, concept, "concept")
    images, classes = render(dataset), label(dataset)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=_RATE, weight_decay=1e-2, fused=True)
    rng, noise = np.random.default_rng(6), torch.Generator().manual_seed(0)
    for step in range(settings.judge_steps):
        anneal(optimizer, _RATE, step, settings.judge_steps)
        rows = torch.from_numpy(rng.integers(0, len(dataset), _BATCH))
        logits = judge(_degrade(to_pixels(images[rows]), step, noise))
        loss = torch.stack([F.cross_entropy(logits[name], classes[name][rows]) for name in logits]).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if step % 100 == 0:
            _log.info("judge: step %d of %d, loss %.4f", step, settings.judge_steps, loss.item())
    write_safetensors(work / WEIGHTS, judge.state_dict(), {})


def _degrade(pixels: Tensor, step: int, generator: torch.Generator) -> Tensor:
    # Generated images are softer and noisier than drawn ones; the judge must classify them too.
    if step % 3 == 1:
        return F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    if step % 3 == 2:
        return pixels + torch.randn(pixels.shape, generator=generator) * 0.12
    return pixels
