"""What a diffusers folder says beside its weights: settings of the parts, the index, the tokenizers. No tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_engine.bases.published import ComponentConfig, published
from lora_engine.checkpoints.recognize import Recognised
from lora_engine.errors import BaseModelError
from lora_engine.files import atomic_write

INDEX = "model_index.json"
_INPAINTING = "StableDiffusionInpaintPipeline"
_INPAINTING_XL = "StableDiffusionXLInpaintPipeline"


def read_components(folder: Path) -> dict[str, ComponentConfig]:
    """Class and settings of every part of a diffusers folder, tokenizers left out.

    Raises:
        BaseModelError: Not a diffusers folder, or a settings file is missing or broken.
    """
    found = {}
    for name, entry in read_json(folder / INDEX).items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        library, class_name = map(str, entry)
        if library not in ("diffusers", "transformers") or name.startswith(("tokenizer", "feature", "safety", "image")):
            continue
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        found[name] = ComponentConfig(library, class_name, read_json(folder / name / file))
    return found


def components_of(recognised: Recognised, config: Path | None) -> dict[str, ComponentConfig]:
    """Class and settings of the parts that a file is to become.

    Args:
        recognised: What the file is.
        config: A diffusers folder of the same structure; None takes the published settings.

    Raises:
        BaseModelError: The folder cannot be read.
    """
    components = dict(published[recognised.architecture].components if config is None else read_components(config))
    scheduler = components.get("scheduler", published[recognised.architecture].components["scheduler"])
    settings = {**scheduler.config, "prediction_type": recognised.prediction}
    if recognised.zero_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if scheduler.class_name == "PNDMScheduler" and (recognised.zero_snr or recognised.prediction != "epsilon"):
        # It has no such settings, or another meaning for them; DDIM has, and no sampler is tied to a model.
        settings.pop("skip_prk_steps", None)
        scheduler = replace(scheduler, class_name="DDIMScheduler")
    components["scheduler"] = replace(scheduler, config=settings)
    if recognised.variant == "inpainting":
        unet = components["unet"]
        components["unet"] = replace(unet, config={**unet.config, "in_channels": 9})
    return components


def write_settings(
    folder: Path, recognised: Recognised, components: Mapping[str, ComponentConfig], tokenizers: bool
) -> list[Path]:
    """Writes `model_index.json` and a settings file for every part.

    Args:
        folder: The diffusers folder.
        recognised: What the file was.
        components: From `components_of`.
        tokenizers: Whether the folder has them.
    """
    architecture = published[recognised.architecture]
    index: dict[str, Any] = {"_class_name": _pipeline(recognised), **architecture.settings}
    if architecture.family == "sd":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    written = []
    for name, component in sorted(components.items()):
        if name.startswith("tokenizer"):
            continue
        index[name] = [component.library, component.class_name]
        file = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        atomic_write(file, _readable(_described(component)))
        written.append(file)
    for name in architecture.tokenizers:
        index[name] = ["transformers", "CLIPTokenizer"] if tokenizers else [None, None]
    atomic_write(folder / INDEX, _readable(index))
    return [*written, folder / INDEX]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BaseModelError: It is missing or no JSON object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BaseModelError(
            f"the file {path.name!r} is missing", where=str(path.parent), allowed="a whole diffusers folder"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"cannot be read ({error})", where=str(path), allowed="a JSON object") from error
    if not isinstance(content, dict):
        raise BaseModelError("does not hold a JSON object", where=str(path), allowed="a JSON object")
    return content


def _pipeline(recognised: Recognised) -> str:
    if recognised.variant == "inpainting":
        return _INPAINTING_XL if recognised.architecture == "sdxl" else _INPAINTING
    return published[recognised.architecture].pipeline


def _described(component: ComponentConfig) -> dict[str, Any]:
    # How each library's `from_pretrained` finds the class again.
    if component.library == "diffusers":
        return {**component.config, "_class_name": component.class_name}
    return {"model_type": "clip_text_model", **component.config, "architectures": [component.class_name]}


def _readable(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
