"""Converts full checkpoints: an original single file to a diffusers folder, and a folder to a single file.

Missing, misshaped and unknown tensors are refused before the first byte is written.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from lora_engine.checkpoints.convert_transformer import transformer_to_diffusers, transformer_to_original
from lora_engine.checkpoints.convert_whole import whole_to_diffusers
from lora_engine.checkpoints.folder import components_of, read_components
from lora_engine.checkpoints.folder_writer import write_folder
from lora_engine.checkpoints.names import checkpoint_names, component_locations
from lora_engine.checkpoints.original import open_original
from lora_engine.checkpoints.plan import folder_architecture, folder_tensors, plan_folder, plan_single_file, refuse
from lora_engine.checkpoints.recognize import Prediction, recognize
from lora_engine.checkpoints.tensor_files import write_tensors
from lora_engine.checkpoints.tokenizers import find_tokenizers
from lora_engine.checkpoints.transformer_names import find_transformer
from lora_engine.errors import BaseModelError, SettingsError
from lora_engine.families import families, published
from lora_engine.families.layout import INDEX, read_layout
from lora_engine.files import FilePath

TargetLayout = Literal["diffusers", "original", "ldm"]
_log = logging.getLogger(__name__)


def convert_checkpoint(
    source: FilePath,
    out: FilePath,
    *,
    to: TargetLayout,
    architecture: str | None = None,
    prediction: Prediction | None = None,
    config: FilePath | None = None,
    tokenizer: FilePath | None = None,
    without_tokenizer: bool = False,
    averaged: bool = False,
    drop_unknown: bool = False,
) -> list[Path]:
    """Converts a checkpoint tensor by tensor, keeping dtypes, and returns the written files.

    Scaled float8 weights are written in bfloat16, times their scale.

    Args:
        source: A single file (`.safetensors`, `.ckpt`) for `to="diffusers"`; a diffusers folder, or the folder or file
            of a transformer, for `to="original"`.
        out: The folder to create (must be empty or new), or the `.safetensors` file to write.
        to: `diffusers`, or `original` (for Stable Diffusion also `ldm`) for the names of the original code.
        architecture: `sd15`, `sd2`, `sd2-base`, `sdxl`; None detects it from the source.
        prediction: Prediction type of the U-Net; None detects it. Most SD 2 files do not state it.
        config: A diffusers folder with the settings, for an unpublished structure; None uses the published settings.
        tokenizer: A folder with the tokenizer's files, or a diffusers folder that has one.
        without_tokenizer: True writes the folder without tokenizers.
        averaged: True uses the running averages (EMA) of the U-Net.
        drop_unknown: True drops unknown tensors.

    Raises:
        BaseModelError: The source is not convertible, damaged or incomplete, or `out` exists; nothing is left behind.
        AdapterError: The file cannot be read, or is a pickle with more than tensors.
        SettingsError: The architecture or target is unknown.
    """
    source, out = Path(source), Path(out)
    config, tokenizer = Path(config) if config else None, Path(tokenizer) if tokenizer else None
    if architecture is not None:
        component_locations(architecture)
    if to in ("original", "ldm"):
        return _to_single_file(source, out, architecture, prediction, drop_unknown)
    if to != "diffusers":
        raise SettingsError(f"a checkpoint cannot be converted to {to!r}", allowed="diffusers, original, ldm")
    with open_original(source) as original:
        transformer = None if architecture else find_transformer(original.tensors, str(source))
        if transformer is not None and transformer.others and out.suffix != ".safetensors":
            return whole_to_diffusers(
                original,
                transformer,
                out,
                config=config,
                tokenizer=tokenizer,
                without_tokenizer=without_tokenizer,
                drop_unknown=drop_unknown,
            )
        if transformer is not None:
            return transformer_to_diffusers(original, transformer, out, config)
        recognized = recognize(
            original.shapes,
            original.metadata,
            str(source),
            architecture=architecture,
            prediction=prediction,
            steps=original.steps,
        )
        _log.info(
            "%s: %s, predicts %s (%s)", source, recognized.architecture, recognized.prediction, recognized.decided_by
        )
        components = components_of(recognized, config)
        plans = plan_folder(original, recognized, components, averaged=averaged, drop_unknown=drop_unknown)
        known = published[recognized.architecture]
        tokenizers = {} if without_tokenizer else find_tokenizers(known, tokenizer, config)
        used = {name: part for name, part in components.items() if name in plans or name == "scheduler"}
        pipelines = families[known.family].pipelines
        pipeline = next(entry.name for entry in pipelines if entry.variant == recognized.variant)
        return write_folder(out, known, pipeline, used, plans, tokenizers)


def _to_single_file(
    folder: Path, out: Path, requested: str | None, prediction: Prediction | None, drop_unknown: bool
) -> list[Path]:
    if out.suffix != ".safetensors":
        raise BaseModelError("an original file is only written as safetensors", where=str(out), allowed="*.safetensors")
    if not (folder / INDEX).is_file() and folder.exists():
        return transformer_to_original(folder, out)
    family = read_layout(folder).family.name
    components = read_components(folder)
    architecture = requested or folder_architecture(family, components)
    names = checkpoint_names(architecture, components)
    parts = folder_tensors(folder)
    if not drop_unknown:
        known = {(entry.component, entry.name) for entry in names}
        unknown = [
            f"{part}: {name}" for part, tensors in parts.items() for name in tensors if (part, name) not in known
        ]
        refuse(
            unknown,
            "tensors are unknown",
            str(folder),
            "the tensors of the base",
            "drop them with --drop-unknown (drop_unknown=True)",
        )
    predicted = prediction or components["scheduler"].config.get("prediction_type", "epsilon")
    write_tensors(out, plan_single_file(names, components, parts), _metadata(architecture, predicted, folder.name))
    return [out]


def _metadata(architecture: str, prediction: Any, title: str) -> dict[str, str]:
    name, resolution = published[architecture].modelspec
    # https://github.com/Stability-AI/ModelSpec, version 1.0.0.
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": name,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": resolution,
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
    }
