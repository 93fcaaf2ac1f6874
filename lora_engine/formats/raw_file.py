"""Reads the raw file or folder of an adapter: tensors, metadata and embeddings, before any format is detected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.documents import decode
from lora_engine.errors import AdapterError
from lora_engine.formats.cloneofsimo import numbered
from lora_engine.formats.dtypes import FLOAT8
from lora_engine.formats.embedding_files import COMPONENT, TOKEN, embeddings_of_file, join_embeddings
from lora_engine.formats.embeddings import Embedding, embeddings_in, take_embeddings
from lora_engine.formats.lora_config import CONFIG, HEADER_ALPHAS, header_alpha
from lora_engine.formats.mapped_tensor import name_of_dtype
from lora_engine.formats.pickles import is_pickled, read_pickle
from lora_engine.formats.safetensors_io import Limits, Reader, check_tensor_name, read_safetensors
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
CONFIG_FILE, MODEL_FILE = "adapter_config.json", "adapter_model.safetensors"
OLD_MODEL_FILE = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."
_USUAL = ("adapter.safetensors", "pytorch_lora_weights.safetensors", "lora.safetensors")
_TEXT, _TOKENS = ".text_encoder", ".ti"
_ALPHA, _SCALE = ".alpha", ".scale"
_DOWN = ("lora_down.weight", "lora_A.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
"""Suffixes of factors with one row per rank."""
_MAX_CONFIG = 1 << 24


@dataclass(frozen=True)
class RawFile:
    """The contents of an adapter's file or folder.

    Attributes:
        tensors: Tensors of the adapter by key; in a PEFT folder as `<component>/<name>`. Empty if the file has only
            embeddings.
        metadata: Metadata of the file.
        embeddings: Embeddings in the file; for a folder also those in other files of the folder.
        files: The files that were read.
        assumptions: What was assumed because the file does not state it; empty if nothing.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    embeddings: tuple[Embedding, ...] = ()
    files: tuple[Path, ...] = ()
    assumptions: str = ""


def read_raw_file(path: Path, limits: Limits, read: Reader = read_safetensors) -> RawFile:
    """Reads a `.safetensors` file, a pickled file (in a sandboxed process), or a folder.

    Args:
        path: The file or folder.
        limits: Limits on what it may claim.
        read: Reads a `.safetensors` file; `map_safetensors` is for recognition and imports no torch.

    Raises:
        AdapterError: As `read_safetensors` and `read_pickle`; or the folder holds no unambiguous adapter file.
    """
    if path.name in (MODEL_FILE, OLD_MODEL_FILE) and (path.parent / CONFIG_FILE).is_file():
        return _read_peft(path.parent, limits, read)
    if not path.is_dir():
        return _read_pickled(path) if _is_pickled(path) else _read_file(path, limits, read)
    main = _read_peft(path, limits, read) if any(_parts(path)) else _read_file(_only_file(path), limits, read)
    others = [file for file in sorted(path.glob(f"*{SUFFIX}")) if file not in main.files]
    by_file = {file: embeddings_of_file(file, read) for file in others}
    embeddings = [embedding for entries in by_file.values() for embedding in entries or ()]
    files = (*main.files, *(file for file, entries in by_file.items() if entries))
    return replace(main, embeddings=tuple(join_embeddings([*main.embeddings, *embeddings])), files=files)


def _is_pickled(path: Path) -> bool:
    # A pickle named .safetensors is refused, not read: its name hides that it can run code.
    return path.suffix.lower() != SUFFIX and path.is_file() and is_pickled(path)


def _read_file(path: Path, limits: Limits, read: Reader) -> RawFile:
    return _separate(*read(path, limits), path)


def _separate(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> RawFile:
    alone = embeddings_in(tensors, metadata.get(TOKEN, path.stem), metadata.get(COMPONENT, ""))
    if alone is not None:
        return RawFile({}, metadata, tuple(alone), (path,))
    rest, embeddings = take_embeddings(tensors, metadata)
    plain, scaled = _with_alphas({name: _plain(tensor) for name, tensor in rest.items()})
    assumed = "; ".join(filter(None, [scaled, _assumed_scale(plain, metadata, path)]))
    return RawFile(plain, metadata, tuple(embeddings), (path,), assumed)


def _with_alphas(tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], str]:
    """Returns the tensors with alpha for the scale of a module, as A1111 and SD.Next read it, and says so.

    There, a `scale` replaces alpha / rank (extensions-builtin/Lora/network.py, `calc_scale`).
    """
    alphas: dict[str, Tensor] = {}
    for name in tensors:
        module = name.removesuffix(_SCALE)
        down = next((tensors[key] for end in _DOWN if (key := f"{module}.{end}") in tensors), None)
        if module != name and down is not None and tensors[name].numel() == 1:
            alphas[module] = tensors[name].double() * down.shape[0]
    if not alphas:
        return tensors, ""
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if name.rpartition(".")[0] not in alphas or not name.endswith((_SCALE, _ALPHA))
    }
    kept |= {f"{module}{_ALPHA}": alpha for module, alpha in alphas.items()}
    return (
        kept,
        f"the tensor 'scale' of {len(alphas)} modules instead of alpha, as in A1111; ComfyUI and diffusers ignore it",
    )


def _assumed_scale(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> str:
    """Returns the assumption for a file without alpha tensors: the header's alpha, or scale 1 for PEFT's names.

    Raises:
        AdapterError: It has PEFT's own file name, so its configuration is missing.
    """
    is_peft = bool(tensors) and all(name.startswith(PEFT_PREFIX) for name in tensors)
    if any(name.endswith(_ALPHA) for name in tensors):
        return ""
    alpha = None if CONFIG in metadata else header_alpha(metadata)
    if alpha is not None:
        names = " and ".join(repr(key) for key in HEADER_ALPHAS if key in metadata)
        return f"alpha {alpha:g}, from the header ({names}); ComfyUI and diffusers ignore it and use scale 1"
    if not is_peft:
        return ""
    if path.name in (MODEL_FILE, OLD_MODEL_FILE):
        raise AdapterError(
            f"the file {CONFIG_FILE!r} is missing, which holds the scale of the adapter",
            allowed=f"{CONFIG_FILE} beside {MODEL_FILE}",
            remedy="give the path of the folder that PEFT saved",
        )
    return f"scale 1: there is no alpha in the file, and no {CONFIG_FILE} beside it"


def _plain(tensor: Tensor) -> Tensor:
    # float16 holds every value of both float8 types, and torch cannot compute in float8.
    return tensor.half() if name_of_dtype(tensor) in FLOAT8 else tensor


def _read_pickled(path: Path) -> RawFile:
    """Reads a `.pt`: tensors by name, an embedding, or cloneofsimo's list with its companion files."""
    content = read_pickle(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if isinstance(content, list) and content and all(isinstance(entry, torch.Tensor) for entry in content):
        return _read_lists(path, content)
    alone = embeddings_in(content, path.name.removesuffix(path.suffix).removesuffix(_TOKENS))
    if alone is not None:
        return RawFile({}, {}, tuple(alone), (path,))
    return _separate(_state_dict(content, path), {}, path)


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not all(isinstance(entry, torch.Tensor) for entry in content.values()):
        raise AdapterError(
            "the file holds neither tensors by name nor a list of tensors",
            where=str(path),
            allowed="an adapter of kohya's, LyCORIS' or PEFT's, cloneofsimo's list, or a textual-inversion embedding",
            remedy="give the path of the right file",
        )
    for name in content:
        check_tensor_name(path, str(name))
    return {str(name): tensor for name, tensor in content.items()}


def _read_lists(path: Path, weights: list[Tensor]) -> RawFile:
    """Reads cloneofsimo's `x.pt`, with `x.text_encoder.pt` and `x.ti.pt` if they exist."""
    stem = path.name.removesuffix(path.suffix)
    if stem.endswith(_TEXT):
        return RawFile(numbered(weights, "text_encoder"), {}, (), (path,))
    tensors, files = numbered(weights, "unet"), [path]
    text, tokens = (path.with_name(f"{stem}{middle}{path.suffix}") for middle in (_TEXT, _TOKENS))
    if text.is_file():
        text_weights = read_pickle(text)
        if not isinstance(text_weights, list) or not all(isinstance(entry, torch.Tensor) for entry in text_weights):
            problem, remedy = "the file holds no list of tensors", f"move it away from {path.name}"
            raise AdapterError(problem, where=str(text), allowed="the list that cloneofsimo saves", remedy=remedy)
        tensors |= numbered(text_weights, "text_encoder")
        files.append(text)
    embeddings = (embeddings_of_file(tokens) if tokens.is_file() else None) or ()
    return RawFile(tensors, {}, tuple(embeddings), (*files, *([tokens] if embeddings else [])))


def _read_peft(folder: Path, limits: Limits, read: Reader) -> RawFile:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    files: list[Path] = []
    for part in _parts(folder):
        prefix = "" if part == folder else f"{part.name}/"
        config = part / CONFIG_FILE
        if config.stat().st_size > _MAX_CONFIG:
            problem = f"{prefix}{CONFIG_FILE} has {config.stat().st_size} bytes"
            raise AdapterError(problem, allowed=f"at most {_MAX_CONFIG}", remedy="check the file")
        weights, part_tensors, header = _read_weights(part, limits, read)
        tensors |= {f"{prefix}{key}": _plain(tensor) for key, tensor in part_tensors.items()}
        metadata = {**header, **metadata}
        metadata[f"{prefix}{CONFIG_FILE}"] = decode(config.read_bytes(), str(config), AdapterError)
        files += [config, weights]
    return RawFile(tensors, metadata, (), tuple(files))


def _read_weights(part: Path, limits: Limits, read: Reader) -> tuple[Path, Mapping[str, Tensor], Mapping[str, str]]:
    """Reads the weights beside a configuration; falls back to the pickle that PEFT saved before 0.6."""
    pickled = part / OLD_MODEL_FILE
    if (part / MODEL_FILE).exists() or not pickled.is_file():
        return part / MODEL_FILE, *read(part / MODEL_FILE, limits)
    return pickled, _state_dict(read_pickle(pickled), pickled), {}


def _parts(folder: Path) -> list[Path]:
    """Returns the folders of a PEFT adapter: the folder itself, or its subfolders."""
    if (folder / CONFIG_FILE).is_file():
        return [folder]
    return sorted(inner for inner in folder.iterdir() if (inner / CONFIG_FILE).is_file())


def _only_file(folder: Path) -> Path:
    for name in _USUAL:
        if (folder / name).is_file():
            return folder / name
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if len(files) != 1:
        raise AdapterError(
            f"the folder holds {len(files)} .safetensors files",
            allowed=f"one, or {', '.join(_USUAL)}, or a PEFT folder with {CONFIG_FILE}",
            remedy="give the path of the file",
        )
    return files[0]
