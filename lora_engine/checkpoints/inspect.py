"""Describes checkpoints without converting them or reading tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_engine.checkpoints.convert_transformer import class_of
from lora_engine.checkpoints.folder import read_components
from lora_engine.checkpoints.leftovers import reason_unused
from lora_engine.checkpoints.names import AVERAGES, checkpoint_names, stored_name
from lora_engine.checkpoints.original import OriginalFile, open_original
from lora_engine.checkpoints.plan import folder_architecture, stored_components
from lora_engine.checkpoints.quantization import describe_quantization, is_description, is_packed
from lora_engine.checkpoints.recognize import component_of, recognize
from lora_engine.checkpoints.stored_tensor import StoredTensor
from lora_engine.checkpoints.tensor_files import merge_stored, stored_tensors
from lora_engine.checkpoints.text_names import text_tensor_name
from lora_engine.checkpoints.transformer_names import family_of, find_transformer
from lora_engine.checkpoints.vae_names import VAE_PREFIXES
from lora_engine.errors import BaseModelError
from lora_engine.families.layout import INDEX, read_layout
from lora_engine.families.names import TRANSFORMER
from lora_engine.families.proof import has_known_modules
from lora_engine.files import FilePath
from lora_engine.formats.pickles import is_pickled
from lora_engine.formats.safetensors_io import read_header

_COMPONENTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
# Weights that only whole components have under these names; adapters name them with a prefix or a suffix.
_INPUTS = {
    "conv_in.weight",
    "encoder.conv_in.weight",
    "text_model.embeddings.token_embedding.weight",
    "shared.weight",
    "x_embedder.weight",
    "pos_embed.proj.weight",
    "img_in.weight",
    "patch_embedding.weight",
}


def is_checkpoint(path: Path) -> bool:
    """Returns True for a whole model or one of its components: a folder, a `.ckpt` or a `.safetensors` file.

    Raises:
        AdapterError: The header of a `.safetensors` file cannot be read.
    """
    if path.is_dir():
        is_component = (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()
        return (path / INDEX).is_file() or is_component
    if not path.is_file() or is_pickled(path):
        return path.suffix.lower() == ".ckpt"
    names = read_header(path)[0]
    return any(name.startswith(_COMPONENTS) for name in names) or _is_component(names)


def _is_component(names: Collection[str]) -> bool:
    if not _INPUTS.isdisjoint(names):
        return True
    # A part of a transformer: at least half of its tensors are weights of known layers.
    weights = [name.removesuffix(".weight").replace(".", "_") for name in names if name.endswith(".weight")]
    return 2 * sum(has_known_modules([name]) for name in weights) >= max(1, len(names))


def inspect_checkpoint(path: FilePath) -> dict[str, Any]:
    """Describes a checkpoint and its contents as JSON values.

    Args:
        path: A single file, a diffusers folder, or the folder of one of its components.

    Returns:
        `layout` (`ldm`, `original` or `diffusers`), `architecture`, `quantization` (empty if there is none), and for
        each component its tensors, parameters and dtypes. For Stable Diffusion also `prediction` with the reason and
        `variant`. For a single file also missing, unused (with reasons) and unknown tensors, whether it has running
        averages, and `problem` if no command can use it.

    Raises:
        BaseModelError: The path does not exist, or is a folder that is no base.
        AdapterError: The file cannot be read, or is refused.
    """
    path = Path(path)
    if (path / INDEX).is_file():
        return _inspect_folder(path)
    if path.is_dir():
        stored = merge_stored(sorted(path.glob("*.safetensors")))
        return _inspect_component(path, stored, describe_quantization(stored))
    report: dict[str, Any] = {"layout": "ldm", "file": path.name}
    if path.is_file() and not is_pickled(path):
        stored, metadata = stored_tensors(path)
        report |= {"metadata": metadata, "tensors": len(stored), "dropped": []}
        report["quantization"] = describe_quantization(stored)
        if is_packed(stored):
            form = report["quantization"]
            return report | {"architecture": None, "problem": f"the weights are quantized as {form}", "components": {}}
    with open_original(path) as original:
        report |= {"metadata": dict(original.metadata), "tensors": len(original.tensors)}
        report |= {"dropped": list(original.dropped)}
        try:
            return report | _inspect_single_file(original, report.get("quantization", ""))
        except BaseModelError as error:
            return report | {"architecture": None, "problem": error.problem}


def _inspect_single_file(original: OriginalFile, quantization: str) -> dict[str, Any]:
    transformer = find_transformer(original.tensors, str(original.path))
    if transformer is not None:
        keys = {TRANSFORMER: {entry.key for entry in transformer.tensors}}
        for key in transformer.others:
            name = text_tensor_name(transformer.family, key) or ("vae" if key.startswith(VAE_PREFIXES) else "")
            keys.setdefault(name.partition(".")[0], set()).add(key)
        unknown = keys.pop("", set())
        return {
            "layout": "original",
            "architecture": transformer.family.name,
            "components": {name: _summary(original.tensors[key] for key in own) for name, own in keys.items()},
            "unknown": sorted(unknown),
        }
    if any(name.startswith(_COMPONENTS) for name in original.tensors) or not _is_component(original.tensors):
        return _inspect_original(original)
    return _inspect_component(original.path, original.tensors, quantization)


def _inspect_component(path: Path, tensors: Mapping[str, StoredTensor], quantization: str) -> dict[str, Any]:
    component = component_of(path, tensors)
    family = family_of(tensors, class_of(path))
    return {
        "layout": "diffusers",
        "file": path.name,
        "architecture": None if family is None else family.name,
        "quantization": quantization,
        "components": {component: _summary(stored for name, stored in tensors.items() if not is_description(name))},
    }


def _inspect_original(original: OriginalFile) -> dict[str, Any]:
    recognized = recognize(original.shapes, original.metadata, str(original.path), steps=original.steps)
    names = checkpoint_names(recognized.architecture)
    pairs = [(entry, stored_name(entry, original.tensors)) for entry in names]
    missing = sorted({entry.stored for entry, key in pairs if key is None})
    parts: dict[str, dict[str, StoredTensor]] = {}
    for entry, key in pairs:
        if key is not None:
            parts.setdefault(entry.component, {})[key] = original.tensors[key]
    used = {key for _, key in pairs}
    rest = {name: reason_unused(name) for name in original.tensors if name not in used}
    report: dict[str, Any] = {
        "architecture": recognized.architecture,
        "variant": recognized.variant,
        "prediction": recognized.prediction,
        "prediction_decided_by": recognized.decided_by,
        "components": {name: _summary(tensors.values()) for name, tensors in parts.items()},
        "missing": missing,
        "unused": dict(Counter(reason for reason in rest.values() if reason)),
        "unknown": sorted(name for name, reason in rest.items() if reason is None),
        "has_averages": any(name.startswith(AVERAGES) for name in original.tensors),
    }
    return report | ({"problem": f"{len(missing)} tensors are missing"} if missing else {})


def _inspect_folder(path: Path) -> dict[str, Any]:
    layout, stored = read_layout(path), stored_components(path)
    report: dict[str, Any] = {"layout": "diffusers", "file": path.name, "architecture": layout.family.name}
    if layout.family.unet is not None:
        components = read_components(path)
        report["architecture"] = folder_architecture(layout.family.name, components)
        report["prediction"] = components["scheduler"].config.get("prediction_type", "epsilon")
        report["prediction_decided_by"] = "the scheduler's settings"
    forms = {name: describe_quantization(tensors) for name, tensors in stored.items()}
    return report | {
        "variant": layout.pipeline.variant,
        "quantization": "; ".join(f"{name}: {form}" for name, form in forms.items() if form),
        "components": {
            name: _summary(tensor for key, tensor in tensors.items() if not is_description(key))
            for name, tensors in stored.items()
        },
    }


def _summary(tensors: Iterable[StoredTensor]) -> dict[str, Any]:
    entries = list(tensors)
    return {
        "tensors": len(entries),
        "parameters": sum(math.prod(tensor.shape) for tensor in entries),
        "bytes": sum(tensor.size for tensor in entries),
        "dtypes": dict(Counter(tensor.dtype for tensor in entries)),
    }
