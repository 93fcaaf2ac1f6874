"""Assembles the folder of the embedded base from the results of the trainings."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from lora_engine.errors import BaseModelError
from lora_engine.files import atomic_write
from lora_engine.formats.safetensors_io import read_safetensors, write_safetensors
from tools.tiny_base.card import write_card
from tools.tiny_base.judge import WEIGHTS as JUDGE
from tools.tiny_base.judge import save_judge
from tools.tiny_base.stage import replace_folder

MAX_BYTES = 16_000_000
"""Largest size of the folder, which is part of the repository."""

HEADS = "heads.safetensors"

SCHEDULE: dict[str, Any] = {
    # Linear betas: with Stable Diffusion's own, the mean color would survive the last step, because the latents of
    # these images are highly redundant. For the same reason the last step must be sampled ("trailing").
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
}

_log = logging.getLogger(__name__)

_PARTS = ("tokenizer", "vae", "unet", "text_encoder")


def assemble(work: Path, out: Path) -> Path:
    """Writes the folder of the base from the results in `work`; replaces an older folder at `out`.

    Args:
        work: A folder with `tokenizer/`, `vae/`, `unet/` and `text_encoder/`; missing `clip/` or `judge.safetensors`
            only cause a warning.
        out: The diffusers folder, in float16, with `clip/`, `judge.safetensors` and a model card.

    Raises:
        BaseModelError: A part is missing, or the folder would be too large.
    """
    missing = [name for name in _PARTS if not (work / name).is_dir()]
    if missing:
        raise BaseModelError(
            f"the results of {', '.join(missing)} are missing",
            where=str(work),
            remedy="complete the build: `python -m tools.tiny_base build`",
        )

    def fill(folder: Path) -> None:
        _save_pipeline(work, folder)
        if (work / "clip").is_dir():
            _save_clip(work, folder / "clip")
        else:
            _log.warning("%s has no clip/ yet; the base is assembled without it", work)
        if (work / JUDGE).is_file():
            save_judge(folder, read_safetensors(work / JUDGE)[0])
        else:
            _log.warning("%s has no %s yet; the base is assembled without it", work, JUDGE)
        write_card(folder, None)
        for path in folder.rglob("*"):
            # safetensors writes files that other users cannot read.
            path.chmod(0o755 if path.is_dir() else 0o644)
        _check_size(folder)

    replace_folder(out, fill)
    return out


def build_scheduler() -> Any:
    """Builds the sampler that is saved with the base; other samplers derive their noise schedule from it."""
    from diffusers import DDIMScheduler

    # The offset only affects "leading" steps; diffusers warns of values other than 1.
    return DDIMScheduler(
        **SCHEDULE, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def folder_size(folder: Path) -> int:
    """Returns the total size of the files in a folder in bytes."""
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
    # Its training images were in [-1, 1], not normalized with the statistics of photos.
    preparation = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    _write_json(folder / "preprocessor_config.json", preparation)
    heads = work / "clip" / HEADS
    if heads.is_file():
        tensors = {name: tensor.half() for name, tensor in read_safetensors(heads)[0].items()}
        write_safetensors(folder / HEADS, tensors, {})


def _copy_tokenizer(work: Path, folder: Path) -> None:
    # Copied, because a tokenizer that is loaded and saved again contains the path that it was loaded from.
    for path in sorted((work / "tokenizer").iterdir()):
        atomic_write(folder / path.name, path.read_bytes())


def _clean_config(path: Path) -> None:
    """Removes paths from a configuration and sets its dtype to float32.

    transformers loads weights in the dtype of the configuration, diffusers in float32 by default. With `float16`,
    `DiffusionPipeline.from_pretrained` would return a pipeline of mixed dtypes, which fails.
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
        raise BaseModelError(f"the base has {size} bytes", where=str(folder), allowed=f"at most {MAX_BYTES}")
