"""What a conversion is to write: every tensor of the result as ranges of other files. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_engine.bases.layout import read_layout
from lora_engine.bases.published import ComponentConfig
from lora_engine.checkpoints.leftovers import reason_unused
from lora_engine.checkpoints.names import (
    AVERAGES,
    TensorName,
    checkpoint_names,
    is_buffer,
    places_of,
    stored_name,
    tensor_shapes,
)
from lora_engine.checkpoints.original import OriginalFile
from lora_engine.checkpoints.recognize import Recognised
from lora_engine.checkpoints.tensor_files import PlannedTensor, StoredTensor, merge_stored
from lora_engine.checkpoints.text_names import canonical_text_name
from lora_engine.checkpoints.vae_names import current_vae_name
from lora_engine.errors import BaseModelError


def plan_folder(
    original: OriginalFile,
    recognised: Recognised,
    components: Mapping[str, ComponentConfig],
    *,
    averaged: bool = False,
    drop_unknown: bool = False,
) -> dict[str, dict[str, PlannedTensor]]:
    """The tensors of each component of a diffusers folder, as ranges of an original file.

    Raises:
        BaseModelError: Tensors lack, do not fit the settings, or are unknown; names them.
    """
    if averaged and not any(name.startswith(AVERAGES) for name in original.tensors):
        raise BaseModelError(
            "the file holds no running averages", where=str(original.path), remedy="convert its plain weights"
        )
    names = checkpoint_names(recognised.architecture, components)
    where, used, missing, unfit = str(original.path), set(), [], []
    plans: dict[str, dict[str, PlannedTensor]] = {}
    for component in places_of(recognised.architecture):
        shapes = tensor_shapes(component, components[component])
        for entry in (entry for entry in names if entry.component == component):
            key = stored_name(entry, original.tensors, averaged=averaged)
            if key is None:
                missing.append(entry.stored)
                continue
            used.update({key, entry.stored})
            stored, shape = original.tensors[key], shapes[entry.name]
            # Some programs store the autoencoder's 1x1 convolutions as matrices; the bytes are the same.
            if stored.shape not in (entry.stored_shape(shape), shape if entry.change == "convolution" else None):
                unfit.append(f"{key} is {list(stored.shape)} instead of {list(entry.stored_shape(shape))}")
                continue
            piece = stored if entry.part == (0, 1) else stored.rows(*entry.rows(stored.shape[0]))
            planned = PlannedTensor(shape, (piece,), entry.change == "transposed")
            plans.setdefault(component, {})[entry.name] = planned
    refuse(missing, "tensors lack", where, f"a whole {recognised.architecture} checkpoint", "download it again")
    refuse(unfit, "tensors do not fit the settings", where, "the published widths, or `config` with others", "")
    if not drop_unknown:
        left = [name for name in original.tensors if name not in used and reason_unused(name) is None]
        refuse(left, "tensors are unknown", where, "the tensors of the base", "ask to drop them if nothing needs them")
    return plans


def plan_single_file(
    names: Sequence[TensorName],
    components: Mapping[str, ComponentConfig],
    parts: Mapping[str, Mapping[str, StoredTensor]],
) -> dict[str, PlannedTensor]:
    """The tensors of an original file, as ranges of the files of a diffusers folder.

    Args:
        names: The table of the architecture.
        components: Class and settings of the parts.
        parts: For each component, canonical name to tensor.

    Raises:
        BaseModelError: Tensors lack, do not fit the settings, or parts of one tensor differ in dtype.
    """
    pieces: dict[str, dict[int, StoredTensor]] = {}
    kinds: dict[str, TensorName] = {}
    missing, unfit = [], []
    for entry in names:
        tensor = parts[entry.component].get(entry.name)
        if tensor is None:
            missing.append(f"{entry.component}: {entry.name}")
            continue
        wanted = tensor_shapes(entry.component, components[entry.component])[entry.name]
        # Folders of earlier versions of diffusers keep these matrices as convolutions.
        if tensor.shape not in (wanted, entry.stored_shape(wanted) if entry.change == "convolution" else None):
            unfit.append(f"{entry.component}: {entry.name} is {list(tensor.shape)} instead of {list(wanted)}")
            continue
        kinds[entry.stored] = entry
        pieces.setdefault(entry.stored, {})[entry.part[0]] = tensor
    where = "the diffusers folder"
    refuse(missing, "tensors lack", where, "a whole folder", "save or download it again")
    refuse(unfit, "tensors do not fit the settings", where, "the shapes of its config.json", "download it again")
    mixed = [name for name, found in pieces.items() if len({piece.dtype for piece in found.values()}) > 1]
    refuse(mixed, "tensors have parts of several dtypes", where, "one dtype for q, k and v of a layer", "cast them")
    plans = {}
    for name, found in pieces.items():
        entry = kinds[name]
        shape = entry.stored_shape(tensor_shapes(entry.component, components[entry.component])[entry.name])
        ordered = tuple(found[place] for place in sorted(found))
        plans[name] = PlannedTensor(shape, ordered, entry.change == "transposed")
    return plans


def folder_tensors(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """For each component with weights of a diffusers folder, canonical name to tensor; shards together.

    Raises:
        BaseModelError: Not a whole diffusers folder of a known family.
    """
    found: dict[str, list[Path]] = {}
    for name in read_layout(folder).files:
        if name.endswith(".safetensors"):
            found.setdefault(name.split("/")[0], []).append(folder / name)
    return {
        component: {
            _canonical(component, name): tensor for name, tensor in merge_stored(files).items() if not is_buffer(name)
        }
        for component, files in found.items()
    }


def folder_architecture(family: str, components: Mapping[str, ComponentConfig]) -> str:
    """The architecture of a diffusers folder, by its settings.

    Args:
        family: `sd` or `sdxl`.
        components: From `read_components`.

    Raises:
        BaseModelError: Another family.
    """
    if family not in ("sd", "sdxl"):
        raise BaseModelError(
            f"bases of the family {family!r} are not converted",
            allowed="sd, sdxl",
            remedy="keep the diffusers folder, which every part of the line reads",
        )
    if family == "sdxl":
        return "sdxl"
    # OpenCLIP's text encoder without its last layer is what makes an SD 2; its width may be any.
    if int(components["text_encoder"].config.get("num_hidden_layers", 12)) != 23:
        return "sd15"
    return "sd2" if components["scheduler"].config.get("prediction_type") == "v_prediction" else "sd2-base"


def _canonical(component: str, name: str) -> str:
    if component == "vae":
        return current_vae_name(name)
    return canonical_text_name(name) if component.startswith("text_encoder") else name


def refuse(names: Sequence[str], what: str, where: str, allowed: str, remedy: str) -> None:
    """Does nothing for no names.

    Raises:
        BaseModelError: There are some; counts them and lists the first.
    """
    if names:
        shown = ", ".join(sorted(names)[:8])
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise BaseModelError(f"{len(names)} {what}: {shown}{more}", where=where, allowed=allowed, remedy=remedy)
