"""Measures a finished base: does it draw what it is asked for, and can those that say so be trusted?"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_engine.bases.tiny.autoencoder import decibel, reconstruction_error
from lora_engine.bases.tiny.judge import Judge, load_judge
from lora_engine.bases.tiny.pictures import render, to_pixels
from lora_engine.bases.tiny.stage import encode
from lora_engine.bases.tiny.tokenizer import load_tokenizer
from lora_engine.bases.tiny.world import ATTRIBUTES, CONCEPT, SIZE, Scene, full_caption, scenes

GUIDANCE = 3.0
STEPS = 12

_log = logging.getLogger(__name__)

_BATCH = 32
_TEXTS_AT_ONCE = 256


def measure(folder: Path, *, captions: int = 512, drawings: int = 1024) -> dict[str, Any]:
    """The acceptance figures of a base, with fixed seeds.

    Args:
        folder: As `assemble` makes it, with CLIP and judge.
        captions: How many held-out captions the base is asked for, and how many drawings CLIP is.
        drawings: How many drawings the judge is shown, crescents among them.

    Returns:
        For `judge`, `follows` (the base), `clip`: the number of cases, and the share that is right by attribute and of
        `all` of them together; for `autoencoder` the PSNR in dB.

    Raises:
        EngineError: CLIP or judge are missing.
    """
    judge = load_judge(folder)
    shown = scenes(77, drawings, "any")
    known = count_right(judge.read(to_pixels(render(shown))), shown)
    _log.info("judge on real drawings: %s", known)
    psnr, seen = measure_autoencoder(folder)
    _log.info("autoencoder: %.1f dB", psnr)
    follows = measure_following(folder, judge, captions)
    _log.info("base on held-out captions: %s", follows)
    named = measure_clip(folder, captions)
    _log.info("CLIP on held-out drawings: %s", named)
    return {
        "judge": {"n": drawings, "concepts": sum(scene.shape == CONCEPT for scene in shown), "right": known},
        "follows": {"n": captions, "guidance": GUIDANCE, "steps": STEPS, "right": follows},
        "clip": {"n": captions, "right": named},
        "autoencoder": {"n": seen, "psnr": round(psnr, 2)},
    }


def count_right(read: Sequence[Mapping[str, str]], shown: Sequence[Scene]) -> dict[str, float]:
    """The share of scenes that were read rightly, by attribute, and of all attributes together (`all`)."""
    hits = {
        name: [row[name] == getattr(scene, name) for row, scene in zip(read, shown, strict=True)] for name in ATTRIBUTES
    }
    hits["all"] = [all(row) for row in zip(*hits.values(), strict=True)]
    return {name: round(sum(values) / len(values), 4) for name, values in hits.items()}


def measure_following(folder: Path, judge: Judge, count: int) -> dict[str, float]:
    """Asks the base for held-out scenes by their full captions and has the pictures read by the judge."""
    asked = scenes(555, count, "heldout")
    return count_right(judge.read(generate(folder, asked)), asked)


def generate(folder: Path, asked: Sequence[Scene], *, guidance: float = GUIDANCE, steps: int = STEPS) -> Tensor:
    """What the base draws of scenes, asked by their full captions: [n, 3, 32, 32] in [-1, 1]; seeded by the scenes."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(asked), _BATCH):
        some = asked[start : start + _BATCH]
        pictures = pipeline(
            [full_caption(scene) for scene in some],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(scene.seed) for scene in some],
            output_type="pt",
            height=SIZE,
            width=SIZE,
        ).images
        parts.append(pictures * 2 - 1)
        _log.info("drawn: %d of %d", start + len(some), len(asked))
    return torch.cat(parts)


def measure_autoencoder(folder: Path, count: int = 256) -> tuple[float, int]:
    """PSNR in dB over drawings of all splits, and how many drawings there were."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True).eval()
    return decibel(reconstruction_error(vae, to_pixels(render(scenes(99, count, "any"))))), count


@torch.inference_mode()
def measure_clip(folder: Path, count: int) -> dict[str, float]:
    """How often a held-out drawing is nearest to its own caption, among captions that differ in one attribute."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(folder / "clip", local_files_only=True, dtype=torch.float32).eval()
    shown = scenes(88, count, "heldout")
    pixels = to_pixels(render(shown))
    seen = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    choices = {name: [_choices(scene, name) for scene in shown] for name in ATTRIBUTES}
    texts = sorted({text for options in choices.values() for option in options for text in option.values()})
    row = {text: index for index, text in enumerate(texts)}
    said = _embed_texts(clip, load_tokenizer(folder / "clip"), texts)
    nearest: list[dict[str, str]] = []
    for index in range(count):
        guess = {}
        for name in ATTRIBUTES:
            words, options = zip(*choices[name][index].items(), strict=True)
            guess[name] = words[int((said[[row[text] for text in options]] @ seen[index]).argmax())]
        nearest.append(guess)
    return count_right(nearest, shown)


def _choices(scene: Scene, attribute: str) -> dict[str, str]:
    # Word -> caption. There is no object of its background's colour, and CLIP has never seen the concept.
    other = {"colour": scene.background, "background": scene.colour}.get(attribute, CONCEPT)
    return {word: full_caption(_reword(scene, attribute, word)) for word in ATTRIBUTES[attribute] if word != other}


def _embed_texts(clip: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    parts = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        ids, mask = encode(tokenizer, texts[start : start + _TEXTS_AT_ONCE])
        parts.append(clip.get_text_features(input_ids=ids, attention_mask=mask).pooler_output)
    return F.normalize(torch.cat(parts), dim=-1)


def _reword(scene: Scene, attribute: str, word: str) -> Scene:
    changes: dict[str, Any] = {attribute: word}
    return replace(scene, **changes)
