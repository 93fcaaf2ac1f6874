"""Converts diffusion transformers between their original names and those of a component of a diffusers folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lora_engine.checkpoints.folder import read_json
from lora_engine.checkpoints.names import tensor_shapes
from lora_engine.checkpoints.original import OriginalFile
from lora_engine.checkpoints.plan import refuse
from lora_engine.checkpoints.quantization import weights_of
from lora_engine.checkpoints.stored_tensor import PlannedTensor
from lora_engine.checkpoints.tensor_files import merge_stored, stored_tensors, write_tensors
from lora_engine.checkpoints.transformer_names import OriginalTransformer, family_of, find_transformer, plan_original
from lora_engine.errors import BaseModelError
from lora_engine.families import ComponentConfig, Family
from lora_engine.families.layout import INDEX
from lora_engine.families.names import TRANSFORMER
from lora_engine.files import atomic_write
from lora_engine.formats.pickles import is_pickled

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_METADATA = {"format": "pt"}


def transformer_to_diffusers(
    original: OriginalFile, transformer: OriginalTransformer, out: Path, config: Path | None
) -> list[Path]:
    """Writes the transformer of an original file with diffusers' names, and returns the written files.

    Args:
        original: The file.
        transformer: Its transformer.
        out: A new or empty folder, which also gets `config.json`, or a `.safetensors` file.
        config: A folder with the settings: the transformer's, or a diffusers folder; None uses the published ones.

    Raises:
        BaseModelError: The file has other tensors too, `out` is not empty, or the settings of a folder are unknown.
    """
    refuse(
        transformer.others,
        f"tensors do not belong to the transformer of {transformer.family.title}",
        str(original.path),
        "the transformer alone",
        "remove them from the file",
    )
    planned = {entry.name: entry.plan(original.tensors[entry.key]) for entry in transformer.tensors}
    if out.suffix == ".safetensors":
        write_tensors(out, planned, _METADATA)
        return [out]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BaseModelError("the output already exists", where=str(out), allowed="a new or empty folder")
    settings = _settings(transformer.family, planned, config, original.path)
    write_tensors(out / _WEIGHTS, planned, _METADATA)
    atomic_write(out / "config.json", (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode())
    return [out / "config.json", out / _WEIGHTS]


def transformer_to_original(source: Path, out: Path) -> list[Path]:
    """Writes a transformer with diffusers' names to a file with the original names, and returns the written file.

    Args:
        source: The folder or the file of the component.
        out: The `.safetensors` file.

    Raises:
        BaseModelError: It is not a transformer of a supported family, or the original names lack a tensor.
    """
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    tensors = weights_of(merge_stored(files))
    family = family_of(tensors, class_of(source))
    if family is None:
        raise BaseModelError(
            "the original names of this model are unknown",
            where=str(source),
            allowed="a diffusers folder of Stable Diffusion 1.x, 2.x or XL, or the transformer of a supported family",
            remedy="pass such a folder or file",
        )
    write_tensors(out, plan_original(family, tensors, str(source)), _METADATA)
    return [out]


def is_original_transformer(path: Path) -> bool:
    """Returns True for a `.safetensors` file with a transformer in its original names, and nothing else.

    Raises:
        BaseModelError: The file is damaged, or has packed weights.
        AdapterError: The file is not a safetensors file.
    """
    if is_pickled(path):
        return False
    transformer = find_transformer(weights_of(stored_tensors(path)[0]), str(path))
    return transformer is not None and not transformer.others


def class_of(component: Path) -> str:
    """Returns the class in the `config.json` of a component's folder or beside its file; empty if there is none."""
    config = (component if component.is_dir() else component.parent) / "config.json"
    return str(read_json(config).get("_class_name", "")) if config.is_file() else ""


def _settings(
    family: Family, planned: Mapping[str, PlannedTensor], config: Path | None, where: Path
) -> dict[str, object]:
    if config is not None:
        folder = config / TRANSFORMER if (config / INDEX).is_file() else config
        settings = read_json(folder / "config.json")
        known = {"the settings in config": ComponentConfig("diffusers", str(settings.get("_class_name")), settings)}
    else:
        known = {entry.name: entry.components[TRANSFORMER] for entry in family.published}
    component = known[find_settings(known, {name: tensor.shape for name, tensor in planned.items()}, where)]
    return {**component.config, "_class_name": component.class_name}


def find_settings(known: Mapping[str, ComponentConfig], shapes: Mapping[str, tuple[int, ...]], where: Path) -> str:
    """Returns the name of the settings that give a transformer exactly these tensors.

    Args:
        known: Name to class and settings.
        shapes: Name of a tensor in diffusers to its shape.
        where: The file, for errors.

    Raises:
        BaseModelError: None does.
    """
    for name, component in known.items():
        if tensor_shapes(TRANSFORMER, component) == shapes:
            return name
    raise BaseModelError(
        "the tensors do not fit the settings",
        where=str(where),
        allowed=f"{', '.join(known)}; each sets names and shapes",
        remedy="pass a folder with the model's config.json as config, or name a .safetensors file as the output",
    )
