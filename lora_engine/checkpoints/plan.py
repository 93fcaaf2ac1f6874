"""Plans a conversion: every tensor of the result as byte ranges of other files. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_engine.checkpoints.leftovers import reason_unused
from lora_engine.checkpoints.names import (
    AVERAGES,
    TensorName,
    checkpoint_names,
    component_locations,
    is_buffer,
    stored_name,
    tensor_shapes,
)
from lora_engine.checkpoints.original import OriginalFile
from lora_engine.checkpoints.quantization import weights_of
from lora_engine.checkpoints.recognize import Recognized
from lora_engine.checkpoints.stored_tensor import PlannedTensor, StoredTensor
from lora_engine.checkpoints.tensor_files import merge_stored
from lora_engine.checkpoints.text_names import canonical_text_name
from lora_engine.checkpoints.vae_names import current_vae_name
from lora_engine.errors import BaseModelError
from lora_engine.families import ComponentConfig
from lora_engine.families.layout import read_layout


def plan_folder(
    original: OriginalFile,
    recognized: Recognized,
    components: Mapping[str, ComponentConfig],
    *,
    averaged: bool = False,
    drop_unknown: bool = False,
) -> dict[str, dict[str, PlannedTensor]]:
    """Returns the tensors of each component of a diffusers folder, as byte ranges of an original file.

    Raises:
        BaseModelError: Tensors are missing, do not fit the settings, or are unknown; names them.
    """
    if averaged and not any(name.startswith(AVERAGES) for name in original.tensors):
        raise BaseModelError(
            "the file holds no running averages", where=str(original.path), remedy="convert without averages"
        )
    names = checkpoint_names(recognized.architecture, components)
    where, used, missing, misshaped = str(original.path), set(), [], []
    plans: dict[str, dict[str, PlannedTensor]] = {}
    for component in component_locations(recognized.architecture):
        shapes = tensor_shapes(component, components[component])
        for entry in (entry for entry in names if entry.component == component):
            key = stored_name(entry, original.tensors, averaged=averaged)
            if key is None:
                missing.append(entry.stored)
                continue
            used.update({key, entry.stored})
            stored, shape = original.tensors[key], shapes[entry.name]
            # Some programs store the autoencoder's 1x1 convolutions as matrices, with the same bytes.
            if stored.shape not in (entry.stored_shape(shape), shape if entry.change == "convolution" else None):
                misshaped.append(f"{key} is {list(stored.shape)} instead of {list(entry.stored_shape(shape))}")
                continue
            piece = stored if entry.part == (0, 1) else stored.rows(*entry.rows(stored.shape[0]))
            planned = PlannedTensor(shape, (piece,), entry.change == "transposed")
            plans.setdefault(component, {})[entry.name] = planned
    refuse(
        missing, "tensors are missing", where, f"a complete {recognized.architecture} checkpoint", "download it again"
    )
    refuse(misshaped, "tensors do not fit the settings", where, "the published widths, or those in `config`", "")
    if not drop_unknown:
        unknown = [name for name in original.tensors if name not in used and reason_unused(name) is None]
        refuse(
            unknown,
            "tensors are unknown",
            where,
            "the tensors of the base",
            "drop them with --drop-unknown (drop_unknown=True)",
        )
    return plans


def plan_single_file(
    names: Sequence[TensorName],
    components: Mapping[str, ComponentConfig],
    parts: Mapping[str, Mapping[str, StoredTensor]],
) -> dict[str, PlannedTensor]:
    """Returns the tensors of an original file, as byte ranges of the files of a diffusers folder.

    Args:
        names: The name table of the architecture.
        components: Class and settings of the components.
        parts: For each component, canonical name to tensor.

    Raises:
        BaseModelError: Tensors are missing, do not fit the settings, or parts of one tensor differ in dtype.
    """
    pieces: dict[str, dict[int, StoredTensor]] = {}
    entries: dict[str, TensorName] = {}
    missing, misshaped = [], []
    for entry in names:
        tensor = parts[entry.component].get(entry.name)
        if tensor is None:
            missing.append(f"{entry.component}: {entry.name}")
            continue
        expected = tensor_shapes(entry.component, components[entry.component])[entry.name]
        # Earlier versions of diffusers store these matrices as convolutions.
        if tensor.shape not in (expected, entry.stored_shape(expected) if entry.change == "convolution" else None):
            misshaped.append(f"{entry.component}: {entry.name} is {list(tensor.shape)} instead of {list(expected)}")
            continue
        entries[entry.stored] = entry
        pieces.setdefault(entry.stored, {})[entry.part[0]] = tensor
    where = "the diffusers folder"
    refuse(missing, "tensors are missing", where, "a complete folder", "save or download it again")
    refuse(misshaped, "tensors do not fit the settings", where, "the shapes of its config.json", "download it again")
    mixed = [name for name, ranges in pieces.items() if len({piece.value_dtype for piece in ranges.values()}) > 1]
    refuse(mixed, "tensors have parts of several dtypes", where, "one dtype for q, k and v of a layer", "cast them")
    plans = {}
    for name, ranges in pieces.items():
        entry = entries[name]
        shape = entry.stored_shape(tensor_shapes(entry.component, components[entry.component])[entry.name])
        ordered = tuple(ranges[index] for index in sorted(ranges))
        plans[name] = PlannedTensor(shape, ordered, entry.change == "transposed")
    return plans


def folder_tensors(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Returns, for each component with weights, canonical name to tensor; scaled weights have their scale.

    Raises:
        BaseModelError: The folder is no complete diffusers folder of a known family, or weights are packed.
    """
    return {
        component: {_canonical(component, name): tensor for name, tensor in weights_of(tensors).items()}
        for component, tensors in stored_components(folder).items()
    }


def stored_components(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Returns, for each component with weights, the tensors of its files by their names; merges shards.

    Raises:
        BaseModelError: The folder is no complete diffusers folder of a known family.
    """
    component_files: dict[str, list[Path]] = {}
    for name in read_layout(folder).files:
        if name.endswith(".safetensors"):
            component_files.setdefault(name.split("/")[0], []).append(folder / name)
    return {
        component: {name: tensor for name, tensor in merge_stored(files).items() if not is_buffer(name)}
        for component, files in component_files.items()
    }


def folder_architecture(family: str, components: Mapping[str, ComponentConfig]) -> str:
    """Returns the architecture of a diffusers folder by its settings.

    Args:
        family: `sd` or `sdxl`.
        components: Result of `read_components`.

    Raises:
        BaseModelError: The family is not supported.
    """
    if family not in ("sd", "sdxl"):
        raise BaseModelError(
            f"bases of the family {family!r} cannot be converted",
            allowed="sd, sdxl; of other families the folder of the transformer alone",
            remedy="pass the transformer's folder, or use the diffusers folder, which all commands accept",
        )
    if family == "sdxl":
        return "sdxl"
    # SD 2 is recognized by OpenCLIP's text encoder without its last layer; the width may be any.
    if int(components["text_encoder"].config.get("num_hidden_layers", 12)) != 23:
        return "sd15"
    return "sd2" if components["scheduler"].config.get("prediction_type") == "v_prediction" else "sd2-base"


def _canonical(component: str, name: str) -> str:
    if component == "vae":
        return current_vae_name(name)
    return canonical_text_name(name) if component.startswith("text_encoder") else name


def refuse(names: Sequence[str], problem: str, where: str, allowed: str, remedy: str) -> None:
    """Raises an error if there are any names.

    Raises:
        BaseModelError: With the number of names and the first ones.
    """
    if names:
        shown = ", ".join(sorted(names)[:8])
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise BaseModelError(f"{len(names)} {problem}: {shown}{more}", where=where, allowed=allowed, remedy=remedy)
