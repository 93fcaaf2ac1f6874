"""Measures a finished base, and the judge and CLIP that measure it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.tiny_base.autoencoder import decibel, reconstruction_error
from tools.tiny_base.images import render, to_pixels
from tools.tiny_base.judge import Judge, load_judge
from tools.tiny_base.stage import encode
from tools.tiny_base.tokenizer import load_tokenizer
from tools.tiny_base.world import ATTRIBUTES, CONCEPT, SIZE, Scene, full_caption, scenes

GUIDANCE = 3.0
STEPS = 12

_log = logging.getLogger(__name__)

_BATCH = 32
_TEXT_BATCH = 256


def measure(folder: Path, *, captions: int = 512, drawings: int = 1024) -> dict[str, Any]:
    """Returns the acceptance figures of a base, with fixed seeds.

    Args:
        folder: A folder of `assemble`, with CLIP and judge.
        captions: Number of held-out captions for the base, and of drawings for CLIP.
        drawings: Number of drawings for the judge, including crescents.

    Returns:
        For `judge`, `follows` (the base) and `clip`: the number of cases, and the accuracy by attribute and of `all`
        attributes together; for `autoencoder` the PSNR in dB.

    Raises:
        EngineError: CLIP or the judge is missing.
    """
    judge = load_judge(folder)
    dataset = scenes(77, drawings, "any")
    judge_accuracy = count_right(judge.read(to_pixels(render(dataset))), dataset)
    _log.info("judge on drawings: %s", judge_accuracy)
    psnr, count = measure_autoencoder(folder)
    _log.info("autoencoder: %.1f dB", psnr)
    base_accuracy = measure_following(folder, judge, captions)
    _log.info("base on held-out captions: %s", base_accuracy)
    clip_accuracy = measure_clip(folder, captions)
    _log.info("CLIP on held-out drawings: %s", clip_accuracy)
    concepts = sum(scene.shape == CONCEPT for scene in dataset)
    return {
        "judge": {"n": drawings, "concepts": concepts, "right": judge_accuracy},
        "follows": {"n": captions, "guidance": GUIDANCE, "steps": STEPS, "right": base_accuracy},
        "clip": {"n": captions, "right": clip_accuracy},
        "autoencoder": {"n": count, "psnr": round(psnr, 2)},
    }


def count_right(predictions: Sequence[Mapping[str, str]], dataset: Sequence[Scene]) -> dict[str, float]:
    """Returns the accuracy of predictions by attribute, and of all attributes together (`all`)."""
    hits = {
        name: [row[name] == getattr(scene, name) for row, scene in zip(predictions, dataset, strict=True)]
        for name in ATTRIBUTES
    }
    hits["all"] = [all(row) for row in zip(*hits.values(), strict=True)]
    return {name: round(sum(values) / len(values), 4) for name, values in hits.items()}


def measure_following(folder: Path, judge: Judge, count: int) -> dict[str, float]:
    """Returns the accuracy of the base on full captions of held-out scenes, as classified by the judge."""
    requested = scenes(555, count, "heldout")
    return count_right(judge.read(generate(folder, requested)), requested)


def generate(folder: Path, requested: Sequence[Scene], *, guidance: float = GUIDANCE, steps: int = STEPS) -> Tensor:
    """Generates images [n, 3, 32, 32] in [-1, 1] from the full captions and the seeds of scenes."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(requested), _BATCH):
        part = requested[start : start + _BATCH]
        images = pipeline(
            [full_caption(scene) for scene in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(scene.seed) for scene in part],
            output_type="pt",
            height=SIZE,
            width=SIZE,
        ).images
        parts.append(images * 2 - 1)
        _log.info("generated %d of %d images", start + len(part), len(requested))
    return torch.cat(parts)


def measure_autoencoder(folder: Path, count: int = 256) -> tuple[float, int]:
    """Returns the PSNR in dB over drawings of all splits, and the number of drawings."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True).eval()
    return decibel(reconstruction_error(vae, to_pixels(render(scenes(99, count, "any"))))), count


@torch.inference_mode()
def measure_clip(folder: Path, count: int) -> dict[str, float]:
    """Returns the zero-shot accuracy of CLIP on held-out drawings, among captions that differ in one attribute."""
    from transformers import CLIPModel

    clip = CLIPModel.from_pretrained(folder / "clip", local_files_only=True, dtype=torch.float32).eval()
    dataset = scenes(88, count, "heldout")
    pixels = to_pixels(render(dataset))
    image_embeddings = F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    choices = {name: [_choices(scene, name) for scene in dataset] for name in ATTRIBUTES}
    texts = sorted({text for options in choices.values() for option in options for text in option.values()})
    row = {text: index for index, text in enumerate(texts)}
    text_embeddings = _embed_texts(clip, load_tokenizer(folder / "clip"), texts)
    predictions: list[dict[str, str]] = []
    for index in range(count):
        prediction = {}
        for name in ATTRIBUTES:
            words, options = zip(*choices[name][index].items(), strict=True)
            similarity = text_embeddings[[row[text] for text in options]] @ image_embeddings[index]
            prediction[name] = words[int(similarity.argmax())]
        predictions.append(prediction)
    return count_right(predictions, dataset)


def _choices(scene: Scene, attribute: str) -> dict[str, str]:
    # Captions by word. No object has the color of its background, and CLIP was not trained on the concept.
    excluded = {"colour": scene.background, "background": scene.colour}.get(attribute, CONCEPT)
    return {word: full_caption(_reword(scene, attribute, word)) for word in ATTRIBUTES[attribute] if word != excluded}


def _embed_texts(clip: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    parts = []
    for start in range(0, len(texts), _TEXT_BATCH):
        ids, mask = encode(tokenizer, texts[start : start + _TEXT_BATCH])
        parts.append(clip.get_text_features(input_ids=ids, attention_mask=mask).pooler_output)
    return F.normalize(torch.cat(parts), dim=-1)


def _reword(scene: Scene, attribute: str, word: str) -> Scene:
    changes: dict[str, Any] = {attribute: word}
    return replace(scene, **changes)
