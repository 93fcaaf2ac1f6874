"""A model as it lies in files: where each weight of each module is, by canonical name. No tensor is read here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_engine.bases.layout import INDEX, read_layout
from lora_engine.bases.source import resolve_base
from lora_engine.checkpoints.names import checkpoint_names, stored_name
from lora_engine.checkpoints.recognize import recognize
from lora_engine.checkpoints.tensor_files import StoredTensor, stored_tensors
from lora_engine.checkpoints.text_names import canonical_text_name
from lora_engine.errors import BaseModelError

_SUFFIX = ".safetensors"
_COMPONENTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
_ORIGINAL = "model.diffusion_model."
# Files that may lie in a diffusers folder and do not belong to the model that is written.
_PICKLES = {".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx"}


@dataclass(frozen=True)
class Place:
    """Where a weight or a bias lies.

    Attributes:
        stored: The tensor of the file.
        name: Its name there.
        shape: Of the weight, as its module has it.
        rows: First and last + 1 of the rows that are this weight's.
        transposed: Whether the file holds the transpose.
    """

    stored: StoredTensor
    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    transposed: bool = False


@dataclass(frozen=True)
class StoredModel:
    """A model in files.

    Attributes:
        path: The folder or the file that it was named by.
        family: `sd`, `sdxl`, ...; empty where it cannot be told.
        files: Each file of weights, with its tensors and its metadata.
        others: All other files that belong to a folder.
        places: Canonical name of a tensor (`unet.conv_in.weight`) to its place.
        is_original: Whether it is an original single file, whose tensors have names and forms of their own.
    """

    path: Path
    family: str
    files: Mapping[Path, tuple[Mapping[str, StoredTensor], Mapping[str, str]]]
    others: tuple[Path, ...]
    places: Mapping[str, Place]
    is_original: bool = False

    @cached_property
    def origins(self) -> dict[str, tuple[Path, str]]:
        """Every tensor: its name, canonical but in an original file, to its file and its name there."""
        if self.is_original:
            return {name: (file, name) for file, (tensors, _) in self.files.items() for name in tensors}
        return {key: (place.stored.path, place.name) for key, place in self.places.items()}

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by its name in `origins`."""
        return {key: self.files[file][0][name] for key, (file, name) in self.origins.items()}

    @cached_property
    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name of every module with a weight, to the shape of that."""
        return {
            name.removesuffix(".weight"): place.shape for name, place in self.places.items() if name.endswith(".weight")
        }

    @property
    def is_pipeline(self) -> bool:
        """Whether it is a diffusers folder."""
        return (self.path / INDEX).is_file()

    def fingerprint(self) -> str | None:
        """The fingerprint of a diffusers folder, which takes reading all of it; None for what is only a part of one."""
        return resolve_base(str(self.path)).fingerprint() if self.is_pipeline else None


def open_model(path: Path, *, component: str | None = None, architecture: str | None = None) -> StoredModel:
    """Looks into a model.

    Args:
        path: A diffusers folder; the folder of one of its components; one `.safetensors` file of a component; or an
            original single file.
        component: What a file of a component is (`unet`); None tells it from the folder's name or from the tensors.
        architecture: Of an original single file; None tells it from the tensors.

    Raises:
        BaseModelError: No such model, or one that is not known.
        AdapterError: A file that is no safetensors file.
    """
    if not path.exists():
        raise BaseModelError("no such file or folder", where=str(path), remedy="check the path")
    if (path / INDEX).is_file():
        return _open_pipeline(path)
    if path.is_dir():
        weights = _component_files(path)
        others = tuple(sorted(file for file in path.iterdir() if _is_kept(file) and file not in weights))
        return _open_component(path, weights, others, component)
    tensors, metadata = stored_tensors(path)
    if any(name.startswith(_ORIGINAL) for name in tensors):
        return _open_original(path, tensors, metadata, architecture)
    return _open_component(path, [path], (), component)


def _open_pipeline(path: Path) -> StoredModel:
    layout = read_layout(path)
    weights = [path / name for name in layout.files if name.endswith(_SUFFIX)]
    files = {file: stored_tensors(file) for file in weights}
    places = _together(
        (_canonical(file.parent.name, name), Place(stored, name, stored.shape, _all_rows(stored)))
        for file, (tensors, _) in files.items()
        for name, stored in tensors.items()
    )
    others = {path / name for name in layout.files} - set(weights)
    for name, entry in layout.index.items():
        # Components that the engine does not use (a safety checker) stay with the model that names them.
        if name not in layout.family.components and isinstance(entry, list) and (path / name).is_dir():
            others |= {file for file in (path / name).iterdir() if _is_kept(file)}
    return StoredModel(path, layout.family.adapters, files, tuple(sorted(others)), places)


def _open_component(path: Path, weights: list[Path], others: tuple[Path, ...], component: str | None) -> StoredModel:
    files = {file: stored_tensors(file) for file in weights}
    names = [name for tensors, _ in files.values() for name in tensors]
    part = component or _component_of(path, names)
    places = _together(
        (_canonical(part, name), Place(stored, name, stored.shape, _all_rows(stored)))
        for tensors, _ in files.values()
        for name, stored in tensors.items()
    )
    return StoredModel(path, "", files, others, places)


def _open_original(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], architecture: str | None
) -> StoredModel:
    shapes = {name: stored.shape for name, stored in tensors.items()}
    found = recognize(shapes, metadata, str(path), architecture=architecture)
    places: dict[str, Place] = {}
    for entry in checkpoint_names(found.architecture):
        key = stored_name(entry, tensors)
        if key is None:
            continue
        stored = tensors[key]
        rows = _all_rows(stored) if entry.change == "transposed" else entry.rows(stored.shape[0])
        shape = entry.folder_shape(stored.shape)
        canonical = f"{entry.component}.{entry.name}"
        places[canonical] = Place(stored, key, shape, rows, entry.change == "transposed")
    family = "sdxl" if found.architecture == "sdxl" else "sd"
    return StoredModel(path, family, {path: (tensors, metadata)}, (), places, is_original=True)


def _together(entries: Iterator[tuple[str, Place]]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for name, place in entries:
        if name in places:
            where = f"{places[name].stored.path}, {place.stored.path}"
            raise BaseModelError(f"the tensor {name!r} is in two files", where=where, remedy="remove one of the files")
        places[name] = place
    return places


def _canonical(component: str, name: str) -> str:
    return f"{component}.{canonical_text_name(name) if component.startswith('text_encoder') else name}"


def _all_rows(stored: StoredTensor) -> tuple[int, int]:
    return 0, stored.shape[0] if stored.shape else 1


def _is_kept(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".") and file.suffix not in _PICKLES


def _component_files(folder: Path) -> list[Path]:
    found = sorted(folder.glob(f"*{_SUFFIX}"))
    plain = [file for file in found if ".fp16" not in file.name and ".non_ema" not in file.name] or found
    is_sharded = all("-of-" in file.name for file in plain)
    if not plain or (len(plain) > 1 and not is_sharded):
        raise BaseModelError(
            f"the folder holds {len(plain)} files of weights",
            where=str(folder),
            allowed="one .safetensors file, or the shards of one; or a diffusers folder with model_index.json",
            remedy="name the file itself",
        )
    return plain


def _component_of(path: Path, names: list[str]) -> str:
    for place in (path, path.parent):
        if place.name in _COMPONENTS:
            return place.name
    if any(name.startswith(("down_blocks.", "mid_block.")) for name in names):
        return "unet"
    if any(name.startswith(("text_model.", "encoder.layers.")) for name in names):
        return "text_encoder"
    if any("transformer_blocks." in name for name in names):
        return "transformer"
    raise BaseModelError(
        "nothing tells which component of a model this is",
        where=str(path),
        allowed=", ".join(_COMPONENTS),
        remedy="name the component, or give a diffusers folder",
    )
