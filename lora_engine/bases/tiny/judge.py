"""The judge: a small convolutional classifier, apart from CLIP, that reads every attribute of a drawing.

It measures whether the base and adapters on it draw what the prompt says. It knows the concept that the base does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_engine.bases.tiny import pictures, world
from lora_engine.bases.tiny.fitting import Schedule, fit

_BATCH = 128
_NOISE = 0.12


class Judge(nn.Module):
    """Reads the attributes of 32-px pictures with values in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for level, width in enumerate((24, 40, 64, 64)):
            stride = 2 if level < 3 else 1
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, stride=stride), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.body = nn.Sequential(*layers)
        self.neck = nn.Linear(before * 16, 96)
        self.heads = nn.ModuleDict({name: nn.Linear(96, len(words)) for name, words in world.ATTRIBUTES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Attribute -> logits [n, words of `world.ATTRIBUTES`] of float images [n, 3, 32, 32] in [-1, 1]."""
        hidden = F.silu(self.neck(self.body(images).flatten(1)))
        return {name: head(hidden) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> list[dict[str, str]]:
        """What each picture shows: one `{attribute: word}` per image of float [n, 3, 32, 32] in [-1, 1].

        Raises:
            ValueError: The images have another shape.
        """
        expected = (3, world.SIZE, world.SIZE)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images of shape {tuple(images.shape)} cannot be judged: it takes (n, 3, 32, 32)")
        logits = self(images.float())
        classes = {name: values.argmax(1).tolist() for name, values in logits.items()}
        return [
            {name: world.ATTRIBUTES[name][numbers[i]] for name, numbers in classes.items()} for i in range(len(images))
        ]


def load_judge_file(path: Path) -> Judge:
    """A judge with the weights of a safetensors file, as float32, in evaluation mode."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return judge.eval().requires_grad_(False)


def train_judge(scenes: Sequence[world.Scene], schedule: Schedule, *, seed: int) -> Judge:
    """Trains a judge on drawings; a third of the batches is blurred and a third noisy, as generated pictures may be."""
    torch.manual_seed(seed)
    judge = Judge()
    drawings, labels = pictures.stack_drawings(scenes), pictures.label(scenes)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)

    def loss(step: int) -> Tensor:
        chosen = torch.from_numpy(rng.integers(0, len(drawings), _BATCH))
        images = pictures.to_pixels(drawings[chosen])
        if step % 3 == 1:
            images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
        elif step % 3 == 2:
            images = images + torch.randn(images.shape, generator=generator) * _NOISE
        losses = [F.cross_entropy(logits, labels[name][chosen]) for name, logits in judge(images).items()]
        return torch.stack(losses).sum()

    fit("judge", judge.parameters(), loss, schedule)
    return judge.eval().requires_grad_(False)


def count_right(read: Sequence[dict[str, str]], scenes: Sequence[world.Scene]) -> dict[str, float]:
    """Share of pictures whose attribute was read as the scene has it; `all` is the share with every attribute right."""
    right = [
        {name: words[name] == getattr(scene, name) for name in words} for words, scene in zip(read, scenes, strict=True)
    ]
    shares = {name: sum(one[name] for one in right) / len(right) for name in world.ATTRIBUTES}
    return {**shares, "all": sum(all(one.values()) for one in right) / len(right)}
