"""The finished folder of the embedded base, put together from the results of the trainings. Trains nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from lora_engine.bases.tiny.card import write_card
from lora_engine.bases.tiny.judge import WEIGHTS as JUDGE
from lora_engine.bases.tiny.judge import save_judge
from lora_engine.bases.tiny.stage import replace_folder
from lora_engine.errors import BaseModelError
from lora_engine.files import atomic_write
from lora_engine.formats.safetensors_io import read_safetensors, write_safetensors

MAX_BYTES = 16_000_000
"""What the folder may take, since it is kept in the repository."""

HEADS = "heads.safetensors"

SCHEDULE: dict[str, Any] = {
    # The standard's "linear": with Stable Diffusion's own betas the mean colour would never be noised away, since the
    # latents of these pictures are so redundant; and so the last step must be sampled too ("trailing").
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
}

_log = logging.getLogger(__name__)

_PARTS = ("tokenizer", "vae", "unet", "text_encoder")


def assemble(work: Path, out: Path) -> Path:
    """Makes the folder of the base from the results in `work`; an older one at `out` is replaced as a whole.

    Args:
        work: With `tokenizer/`, `vae/`, `unet/`, `text_encoder/`; and `clip/`, `judge.safetensors`, which are left out
            with a warning where they are missing.
        out: The folder to make: a diffusers folder in float16, with `clip/`, `judge.safetensors` and a model card.

    Raises:
        BaseModelError: A part is missing, or the folder would be too large.
    """
    missing = [name for name in _PARTS if not (work / name).is_dir()]
    if missing:
        raise BaseModelError(
            f"the results of {', '.join(missing)} are missing",
            where=str(work),
            remedy="let the build run to its end: `python -m lora_engine.bases.tiny build`",
        )

    def fill(folder: Path) -> None:
        _save_pipeline(work, folder)
        if (work / "clip").is_dir():
            _save_clip(work, folder / "clip")
        else:
            _log.warning("%s has no clip/ yet: the base is put together without it", work)
        if (work / JUDGE).is_file():
            save_judge(folder, read_safetensors(work / JUDGE)[0])
        else:
            _log.warning("%s has no %s yet: the base is put together without it", work, JUDGE)
        write_card(folder, None)
        for path in folder.rglob("*"):
            # safetensors writes files that nobody else may read.
            path.chmod(0o755 if path.is_dir() else 0o644)
        _check_size(folder)

    replace_folder(out, fill)
    return out


def build_scheduler() -> Any:
    """The sampler that is saved with the base; other samplers take their noise schedule from it."""
    from diffusers import DDIMScheduler

    # The offset counts for "leading" steps alone; diffusers warns of pipelines that have another than 1.
    return DDIMScheduler(
        **SCHEDULE, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def folder_size(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _save_pipeline(work: Path, folder: Path) -> None:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae", use_safetensors=True).half(),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder", use_safetensors=True).half(),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet", use_safetensors=True).half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    _copy_tokenizer(work, folder / "tokenizer")
    for part in ("vae", "unet", "text_encoder"):
        _clean_config(folder / part / "config.json")


def _save_clip(work: Path, folder: Path) -> None:
    from transformers import CLIPModel

    CLIPModel.from_pretrained(work / "clip", use_safetensors=True, dtype=torch.float32).half().save_pretrained(folder)
    _copy_tokenizer(work, folder)
    _clean_config(folder / "config.json")
    # The pictures that it was trained on went from -1 to 1, not through the means of real photographs.
    preparation = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    _write_json(folder / "preprocessor_config.json", preparation)
    heads = work / "clip" / HEADS
    if heads.is_file():
        tensors = {name: tensor.half() for name, tensor in read_safetensors(heads)[0].items()}
        write_safetensors(folder / HEADS, tensors, {})


def _copy_tokenizer(work: Path, folder: Path) -> None:
    # As it was made: a tokenizer that was read and saved again also tells where it was read from.
    for path in sorted((work / "tokenizer").iterdir()):
        atomic_write(folder / path.name, path.read_bytes())


def _clean_config(path: Path) -> None:
    """Takes out of a configuration where it was read from, and lets transformers load the weights in float32.

    transformers loads weights in the type that the configuration names, diffusers in float32 unless told otherwise:
    with `float16` in it, `DiffusionPipeline.from_pretrained` would give a pipeline of two types, which fails.
    """
    config = json.loads(path.read_bytes())
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(part, dict):
            part.pop("_name_or_path", None)
            if "dtype" in part:
                part["dtype"] = "float32"
    _write_json(path, config)


def _write_json(path: Path, value: object) -> None:
    atomic_write(path, json.dumps(value, indent=2, sort_keys=True).encode() + b"\n")


def _check_size(folder: Path) -> None:
    size = folder_size(folder)
    if size > MAX_BYTES:
        raise BaseModelError(f"the base takes {size} bytes", where=str(folder), allowed=f"at most {MAX_BYTES}")
