"""Locates each weight of a stored model in its files, by canonical name. Reads no tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from lora_engine.bases.source import resolve_base
from lora_engine.checkpoints.names import checkpoint_names, stored_name
from lora_engine.checkpoints.quantization import is_description, read_stored
from lora_engine.checkpoints.recognize import component_of, recognize
from lora_engine.checkpoints.stored_tensor import StoredTensor
from lora_engine.checkpoints.text_names import canonical_text_name, text_tensor_name
from lora_engine.checkpoints.transformer_names import OriginalTransformer, find_transformer
from lora_engine.errors import BaseModelError
from lora_engine.families import published
from lora_engine.families.layout import INDEX, read_layout
from lora_engine.families.names import TRANSFORMER

_SUFFIX = ".safetensors"
_ORIGINAL = "model.diffusion_model."
# Files of a diffusers folder that are not part of the written model.
_PICKLES = {".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx"}


@dataclass(frozen=True)
class TensorLocation:
    """The location of a weight or a bias in a file.

    Attributes:
        stored: The tensor in the file.
        name: Name of the tensor in the file.
        shape: Shape of the weight in its module.
        rows: First row and last row + 1 of this weight in the stored tensor.
        transposed: True if the file has the transpose.
        swapped: True if the halves of the rows are swapped in the file.
    """

    stored: StoredTensor
    name: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    transposed: bool = False
    swapped: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """Returns this weight in its module's shape; `tensor` is the stored tensor, of any shape with its rows."""
        part = tensor[slice(*self.rows)] if tensor.dim() else tensor
        if self.swapped:
            part = part.roll(len(part) // 2, 0)
        return (part.T if self.transposed else part).reshape(self.shape)


@dataclass(frozen=True)
class StoredModel:
    """A model in files.

    Attributes:
        path: The folder or the file that was opened.
        family: `sd`, `sdxl`, ...; empty means unknown.
        files: Each weights file, with its tensors and its metadata; scaled weights have their scale.
        others: All other files of the folder that belong to the model.
        locations: Canonical name of a tensor (`unet.conv_in.weight`) to its location.
        is_original: True for an original single file, with its own tensor names and shapes.
    """

    path: Path
    family: str
    files: Mapping[Path, tuple[Mapping[str, StoredTensor], Mapping[str, str]]]
    others: tuple[Path, ...]
    locations: Mapping[str, TensorLocation]
    is_original: bool = False

    @cached_property
    def origins(self) -> dict[str, tuple[Path, str]]:
        """Canonical name (in an original file, stored name) of every tensor to its file and its name in the file."""
        if self.is_original:
            return {
                name: (file, name)
                for file, (tensors, _) in self.files.items()
                for name in tensors
                if not is_description(name)
            }
        return {key: (location.stored.path, location.name) for key, location in self.locations.items()}

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by its key in `origins`."""
        return {key: self.files[file][0][name] for key, (file, name) in self.origins.items()}

    @cached_property
    def module_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name of every module with a weight to the shape of the weight."""
        return {
            name.removesuffix(".weight"): location.shape
            for name, location in self.locations.items()
            if name.endswith(".weight")
        }

    @property
    def is_pipeline(self) -> bool:
        """True for a diffusers folder."""
        return (self.path / INDEX).is_file()

    def fingerprint(self) -> str | None:
        """Returns the fingerprint of a diffusers folder, which reads all of it; None for other models."""
        return resolve_base(str(self.path)).fingerprint() if self.is_pipeline else None


def open_model(path: Path, *, component: str | None = None, architecture: str | None = None) -> StoredModel:
    """Opens a model: reads the headers of its files, and no tensor.

    Args:
        path: A diffusers folder; the folder of one of its components; one `.safetensors` file of a component; or an
            original single file.
        component: Component of a single file (`unet`); None means inferred from the folder's name or the tensors.
        architecture: Architecture of an original single file; None means inferred from the tensors.

    Raises:
        BaseModelError: The model does not exist, or is of an unknown layout.
        AdapterError: A file is not a safetensors file.
    """
    if not path.exists():
        raise BaseModelError("no such file or folder", where=str(path), remedy="check the path")
    if (path / INDEX).is_file():
        return _open_pipeline(path)
    if path.is_dir():
        weights = _component_files(path)
        others = tuple(sorted(file for file in path.iterdir() if _is_kept(file) and file not in weights))
        return _open_component(path, weights, others, component)
    tensors, metadata = read_stored([path])[path]
    named = {name: stored for name, stored in tensors.items() if not is_description(name)}
    transformer = None if component or architecture else find_transformer(named, str(path))
    if transformer is not None:
        return _open_transformer(path, tensors, metadata, transformer)
    if any(name.startswith(_ORIGINAL) for name in tensors):
        return _open_original(path, tensors, metadata, architecture)
    return _open_component(path, [path], (), component)


def _open_pipeline(path: Path) -> StoredModel:
    layout = read_layout(path)
    weights = [path / name for name in layout.files if name.endswith(_SUFFIX)]
    files = read_stored(weights)
    locations = _locate_all(
        (_canonical(file.parent.name, name), TensorLocation(stored, name, stored.shape, _all_rows(stored)))
        for file, (tensors, _) in files.items()
        for name, stored in tensors.items()
        if not is_description(name)
    )
    others = {path / name for name in layout.files} - set(weights)
    for name, entry in layout.index.items():
        # Components that the engine does not use (a safety checker) are copied if model_index.json names them.
        if name not in layout.pipeline.components and isinstance(entry, list) and (path / name).is_dir():
            others |= {file for file in (path / name).iterdir() if _is_kept(file)}
    return StoredModel(path, layout.family.name, files, tuple(sorted(others)), locations)


def _open_component(path: Path, weights: list[Path], others: tuple[Path, ...], component: str | None) -> StoredModel:
    files = read_stored(weights)
    names = [name for tensors, _ in files.values() for name in tensors]
    part = component or component_of(path, names)
    locations = _locate_all(
        (_canonical(part, name), TensorLocation(stored, name, stored.shape, _all_rows(stored)))
        for tensors, _ in files.values()
        for name, stored in tensors.items()
        if not is_description(name)
    )
    return StoredModel(path, "", files, others, locations)


def _open_transformer(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], transformer: OriginalTransformer
) -> StoredModel:
    locations = {
        f"{TRANSFORMER}.{entry.name}": TensorLocation(
            tensors[entry.key], entry.key, entry.shape, entry.rows, swapped=entry.swapped
        )
        for entry in transformer.tensors
    }
    for key in transformer.others:
        name, stored = text_tensor_name(transformer.family, key), tensors[key]
        if name is not None:
            locations[name] = TensorLocation(stored, key, stored.shape, _all_rows(stored))
    files = {path: (tensors, metadata)}
    return StoredModel(path, transformer.family.name, files, (), locations, is_original=True)


def _open_original(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str], architecture: str | None
) -> StoredModel:
    shapes = {name: stored.shape for name, stored in tensors.items()}
    recognized = recognize(shapes, metadata, str(path), architecture=architecture)
    locations: dict[str, TensorLocation] = {}
    for entry in checkpoint_names(recognized.architecture):
        key = stored_name(entry, tensors)
        if key is None:
            continue
        stored = tensors[key]
        rows = _all_rows(stored) if entry.change == "transposed" else entry.rows(stored.shape[0])
        shape = entry.folder_shape(stored.shape)
        canonical = f"{entry.component}.{entry.name}"
        locations[canonical] = TensorLocation(stored, key, shape, rows, entry.change == "transposed")
    family = published[recognized.architecture].family
    return StoredModel(path, family, {path: (tensors, metadata)}, (), locations, is_original=True)


def _locate_all(entries: Iterator[tuple[str, TensorLocation]]) -> dict[str, TensorLocation]:
    locations: dict[str, TensorLocation] = {}
    for name, location in entries:
        if name in locations:
            where = f"{locations[name].stored.path}, {location.stored.path}"
            raise BaseModelError(f"the tensor {name!r} is in two files", where=where, remedy="remove one of the files")
        locations[name] = location
    return locations


def _canonical(component: str, name: str) -> str:
    return f"{component}.{canonical_text_name(name) if component.startswith('text_encoder') else name}"


def _all_rows(stored: StoredTensor) -> tuple[int, int]:
    return 0, stored.shape[0] if stored.shape else 1


def _is_kept(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".") and file.suffix not in _PICKLES


def _component_files(folder: Path) -> list[Path]:
    weights = sorted(folder.glob(f"*{_SUFFIX}"))
    default = [file for file in weights if ".fp16" not in file.name and ".non_ema" not in file.name] or weights
    is_sharded = all("-of-" in file.name for file in default)
    if not default or (len(default) > 1 and not is_sharded):
        raise BaseModelError(
            f"the folder has {len(default)} weights files",
            where=str(folder),
            allowed="one .safetensors file, or the shards of one; or a diffusers folder with model_index.json",
            remedy="name the file itself",
        )
    return default
