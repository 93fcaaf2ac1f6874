"""Trains the CLIP of the synthetic world, for metrics and captions; the base itself does not use it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_engine.formats.safetensors_io import write_safetensors
from tools.tiny_base.assembly import HEADS
from tools.tiny_base.captions import caption
from tools.tiny_base.images import label, render, to_pixels
from tools.tiny_base.stage import CONTEXT, BuildSettings, anneal, encode, replace_folder
from tools.tiny_base.tokenizer import build_vocabulary, load_tokenizer
from tools.tiny_base.world import ATTRIBUTES, SIZE, Scene, scenes

_log = logging.getLogger(__name__)

_BATCH = 128
_RATE = 1.2e-3
_LATER_RATE = 8e-4
_COLOURS = ("colour", "background")
_ALL_BUT_SHAPE = (*_COLOURS, "texture", "position")
_WIDTH = 96
_HEAD_SCALE = 15
_HEAD_WEIGHT = 0.3


def text_settings() -> dict[str, Any]:
    """Returns the settings of the text encoder of CLIP and of the base."""
    size = len(build_vocabulary()[0])
    return {
        "vocab_size": size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "pad_token_id": size - 1,
        "projection_dim": _WIDTH,
    }


def build_clip() -> Any:
    """Builds an untrained `CLIPModel` for images of 32 x 32 pixels."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "projection_dim": _WIDTH,
    }
    return CLIPModel(CLIPConfig(text_config=text_settings(), vision_config=vision, projection_dim=_WIDTH))


def train(work: Path, settings: BuildSettings) -> None:
    """Trains CLIP; needs `tokenizer/` in `work` and writes `clip/` with its attribute heads there.

    Four rounds on different scenes, the later ones at a lower learning rate.
    """
    torch.manual_seed(2)
    clip = build_clip()
    heads = nn.ModuleDict({name: nn.Linear(_WIDTH, len(words)) for name, words in ATTRIBUTES.items()})
    tokenizer = load_tokenizer(work / "tokenizer")
    later_steps = settings.clip_more_steps
    _fit(clip, heads, tokenizer, scenes(7, settings.scenes), _RATE, settings.clip_steps, seed=8)
    for seed in (17, 27):
        _fit(clip, heads, tokenizer, scenes(seed, settings.scenes), _LATER_RATE, later_steps, seed=seed + 1)
    # The last round learns shapes: every second batch has images that differ in little else.
    _fit(clip, heads, tokenizer, scenes(37, settings.scenes), _LATER_RATE, later_steps, seed=38, alike=_ALL_BUT_SHAPE)

    def fill(folder: Path) -> None:
        clip.save_pretrained(folder)
        write_safetensors(folder / HEADS, heads.state_dict(), {})

    replace_folder(work / "clip", fill)


def _fit(
    clip: Any,
    heads: nn.ModuleDict,
    tokenizer: Any,
    dataset: Sequence[Scene],
    rate: float,
    steps: int,
    *,
    seed: int,
    alike: tuple[str, ...] = _COLOURS,
) -> None:
    images, classes, rng = render(dataset), label(dataset), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW([*clip.parameters(), *heads.parameters()], lr=rate, weight_decay=1e-3, fused=True)
    groups = _group(dataset, alike)
    together = 2 if alike == _COLOURS else 4
    for step in range(steps):
        anneal(optimizer, rate, step, steps)
        rows = _choose(rng, groups, len(dataset), together if step % 2 else 0)
        full = rng.random(len(rows)) < 0.5
        texts = [caption(dataset[row], rng, drop=not is_full) for row, is_full in zip(rows, full, strict=True)]
        ids, mask = encode(tokenizer, texts)
        indices = torch.from_numpy(rows)
        output = clip(input_ids=ids, attention_mask=mask, pixel_values=to_pixels(images[indices]))
        targets = {name: values[indices] for name, values in classes.items()}
        loss = _contrastive_loss(output) + _HEAD_WEIGHT * _attribute_loss(
            heads, output, targets, torch.from_numpy(full)
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if step % 100 == 0:
            _log.info("clip: step %d of %d, loss %.3f", step, steps, loss.item())


def _group(dataset: Sequence[Scene], alike: tuple[str, ...]) -> list[list[int]]:
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, scene in enumerate(dataset):
        groups.setdefault(tuple(getattr(scene, name) for name in alike), []).append(index)
    return list(groups.values())


def _choose(rng: np.random.Generator, groups: list[list[int]], count: int, together: int) -> NDArray[np.int64]:
    if not together:
        return rng.integers(0, count, _BATCH)
    # Among images of the same colors, only shape, texture and position differ.
    pool = np.array([row for group in rng.choice(len(groups), together) for row in groups[group]])
    chosen: NDArray[np.int64] = rng.choice(pool, min(_BATCH, len(pool)), replace=False)
    return chosen


def _contrastive_loss(output: Any) -> Tensor:
    own = torch.arange(len(output.logits_per_image))
    return F.cross_entropy(output.logits_per_image, own) / 2 + F.cross_entropy(output.logits_per_text, own) / 2


def _attribute_loss(heads: nn.ModuleDict, output: Any, classes: dict[str, Tensor], full: Tensor) -> Tensor:
    # Colors alone solve the contrastive loss, so shape and position are never learned. One head for both embeddings
    # makes them learn every attribute, in the same direction. Texts with omissions are excluded.
    losses = []
    for name, head in heads.items():
        losses.append(F.cross_entropy(head(_HEAD_SCALE * output.image_embeds), classes[name]))
        if bool(full.any()):
            losses.append(F.cross_entropy(head(_HEAD_SCALE * output.text_embeds)[full], classes[name][full]))
    return torch.stack(losses).sum()
