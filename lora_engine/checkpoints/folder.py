"""Reads and writes the JSON files of a diffusers folder: the index and the settings of its components."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_engine.checkpoints.recognize import Recognized
from lora_engine.documents import read_json_object
from lora_engine.errors import BaseModelError
from lora_engine.families import Architecture, ComponentConfig, published
from lora_engine.families.layout import check_components
from lora_engine.files import atomic_write

_INDEX = "model_index.json"
_MODEL_TYPES = {"T5EncoderModel": "t5", "Qwen3Model": "qwen3"}
"""Class of a text encoder that is no CLIP to transformers' name of its model."""


def read_components(folder: Path) -> dict[str, ComponentConfig]:
    """Returns class and settings of every component of a diffusers folder, except tokenizers.

    Raises:
        BaseModelError: The folder is no diffusers folder, or a settings file is missing or broken.
    """
    components, index = {}, read_json(folder / _INDEX)
    check_components(index, folder / _INDEX)
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        library, class_name = map(str, entry)
        if library not in ("diffusers", "transformers") or name.startswith(("tokenizer", "feature", "safety", "image")):
            continue
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        components[name] = ComponentConfig(library, class_name, read_json(folder / name / file))
    return components


def components_of(recognized: Recognized, config: Path | None) -> dict[str, ComponentConfig]:
    """Returns class and settings of the components for a converted file.

    Args:
        recognized: Properties of the file.
        config: A diffusers folder of the same structure; None uses the published settings.

    Raises:
        BaseModelError: The folder cannot be read.
    """
    components = dict(published[recognized.architecture].components if config is None else read_components(config))
    scheduler = components.get("scheduler", published[recognized.architecture].components["scheduler"])
    settings = {**scheduler.config, "prediction_type": recognized.prediction}
    if recognized.zero_snr:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if scheduler.class_name == "PNDMScheduler" and (recognized.zero_snr or recognized.prediction != "epsilon"):
        # PNDM lacks these settings or uses them differently. DDIM supports them, and a model works with any sampler.
        settings.pop("skip_prk_steps", None)
        scheduler = replace(scheduler, class_name="DDIMScheduler")
    components["scheduler"] = replace(scheduler, config=settings)
    if recognized.variant == "inpainting":
        unet = components["unet"]
        components["unet"] = replace(unet, config={**unet.config, "in_channels": 9})
    return components


def write_settings(
    folder: Path,
    architecture: Architecture,
    pipeline: str,
    components: Mapping[str, ComponentConfig],
    tokenizers: Collection[str],
) -> list[Path]:
    """Writes `model_index.json` and a settings file for every component.

    Args:
        folder: The diffusers folder.
        architecture: The published base with these components; those that are absent are optional.
        pipeline: Name of the pipeline's class.
        components: Class and settings of the components; tokenizers among them are ignored.
        tokenizers: Names of the tokenizers that the folder has.
    """
    index: dict[str, Any] = {"_class_name": pipeline, **architecture.settings}
    if architecture.family == "sd":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    index |= {name: [None, None] for name in architecture.components}
    written = []
    for name, component in sorted(components.items()):
        if name.startswith("tokenizer"):
            continue
        index[name] = [component.library, component.class_name]
        file = folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")
        atomic_write(file, _readable(_described(component)))
        written.append(file)
    for name in tokenizers:
        index[name] = ["transformers", architecture.components[name].class_name]
    atomic_write(folder / _INDEX, _readable(index))
    return [*written, folder / _INDEX]


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        BaseModelError: The file is missing or no JSON object.
    """
    try:
        content: dict[str, Any] = read_json_object(path, BaseModelError)
    except FileNotFoundError:
        raise BaseModelError(
            f"the file {path.name!r} is missing", where=str(path.parent), allowed="a complete diffusers folder"
        ) from None
    return content


def _described(component: ComponentConfig) -> dict[str, Any]:
    # The keys by which each library's `from_pretrained` finds the class.
    if component.library == "diffusers":
        return {**component.config, "_class_name": component.class_name}
    model_type = _MODEL_TYPES.get(component.class_name, "clip_text_model")
    return {"model_type": model_type, **component.config, "architectures": [component.class_name]}


def _readable(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
