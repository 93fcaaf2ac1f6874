"""What lies at a path: the tensors and metadata of an adapter's file or folder, and the embeddings beside them.

Which format they are of is not asked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.errors import AdapterError
from lora_engine.formats.cloneofsimo import numbered
from lora_engine.formats.embedding_files import COMPONENT, TOKEN, embeddings_of_file, join_embeddings
from lora_engine.formats.embeddings import Embedding, embeddings_in, take_embeddings
from lora_engine.formats.pickles import is_pickled, read_pickle
from lora_engine.formats.safetensors_io import Limits, read_safetensors

SUFFIX = ".safetensors"
CONFIG_FILE, MODEL_FILE = "adapter_config.json", "adapter_model.safetensors"
OLD_MODEL_FILE = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."
_USUAL = ("adapter.safetensors", "pytorch_lora_weights.safetensors", "lora.safetensors")
_TEXT, _TOKENS = ".text_encoder", ".ti"
_MAX_CONFIG = 1 << 24
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class RawFile:
    """What was found.

    Attributes:
        tensors: The adapter's, by their names in the file; those of a PEFT folder as `<component>/<name>`. Empty for
            embeddings alone.
        metadata: Of the file.
        embeddings: Those of the file and, where a folder was named, of the files beside it.
        files: The files that were read.
        assumed: What had to be supposed to give the tensors a meaning; empty for nothing.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    embeddings: tuple[Embedding, ...] = ()
    files: tuple[Path, ...] = ()
    assumptions: str = ""


def read_contents(path: Path, limits: Limits) -> RawFile:
    """Reads a `.safetensors` file, a pickled one (in a process that can do no harm), or a folder.

    Raises:
        AdapterError: As `read_safetensors` and `read_pickle`; or the folder does not tell which file is meant.
    """
    if path.name in (MODEL_FILE, OLD_MODEL_FILE) and (path.parent / CONFIG_FILE).is_file():
        return _read_peft(path.parent, limits)
    if not path.is_dir():
        return _read_pickled(path) if _is_pickled(path) else _read_file(path, limits)
    found = _read_peft(path, limits) if any(_parts(path)) else _read_file(_only_file(path), limits)
    beside = [file for file in sorted(path.glob(f"*{SUFFIX}")) if file not in found.files]
    lists = {file: embeddings_of_file(file) for file in beside}
    more = [embedding for embeddings in lists.values() for embedding in embeddings or ()]
    files = (*found.files, *(file for file, embeddings in lists.items() if embeddings))
    return replace(found, embeddings=tuple(join_embeddings([*found.embeddings, *more])), files=files)


def _is_pickled(path: Path) -> bool:
    # What is called .safetensors and is a pickle is refused, not read: its name is a lie.
    return path.suffix.lower() != SUFFIX and path.is_file() and is_pickled(path)


def _read_file(path: Path, limits: Limits) -> RawFile:
    return _sorted_out(*read_safetensors(path, limits), path)


def _sorted_out(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> RawFile:
    alone = embeddings_in(tensors, metadata.get(TOKEN, path.stem), metadata.get(COMPONENT, ""))
    if alone is not None:
        return RawFile({}, metadata, tuple(alone), (path,))
    rest, embeddings = take_embeddings(tensors, metadata)
    plain = {name: _plain(tensor) for name, tensor in rest.items()}
    return RawFile(plain, metadata, tuple(embeddings), (path,), _supposed_scale(plain, path))


def _supposed_scale(tensors: Mapping[str, Tensor], path: Path) -> str:
    """What is supposed of a file in PEFT's names that has its strength nowhere; the programs that read such do it too.

    Raises:
        AdapterError: It has PEFT's own file name, so that its configuration was left behind.
    """
    is_peft = bool(tensors) and all(name.startswith(PEFT_PREFIX) for name in tensors)
    if not is_peft or any(name.endswith(".alpha") for name in tensors):
        return ""
    if path.name in (MODEL_FILE, OLD_MODEL_FILE):
        raise AdapterError(
            f"the file {CONFIG_FILE!r} is missing, which says how strong the adapter is",
            allowed=f"{CONFIG_FILE} beside {MODEL_FILE}",
            remedy="name the whole folder that PEFT saved",
        )
    return f"scale 1: there is no alpha in the file, and no {CONFIG_FILE} beside it"


def _plain(tensor: Tensor) -> Tensor:
    # Every value of both float8 types is one of float16 too, so nothing is lost, and torch computes with the latter.
    return tensor.to(torch.float16) if tensor.dtype in _FLOAT8 else tensor


def _read_pickled(path: Path) -> RawFile:
    """A `.pt` of tensors by name, of an embedding, or a list as cloneofsimo saves it, with its companions."""
    content = read_pickle(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if isinstance(content, list) and content and all(isinstance(entry, Tensor) for entry in content):
        return _read_lists(path, content)
    alone = embeddings_in(content, path.name.removesuffix(path.suffix).removesuffix(_TOKENS))
    if alone is not None:
        return RawFile({}, {}, tuple(alone), (path,))
    return _sorted_out(_named(content, path), {}, path)


def _named(content: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not all(isinstance(entry, Tensor) for entry in content.values()):
        raise AdapterError(
            "the file holds neither tensors by name nor a list of them",
            where=str(path),
            allowed="an adapter of kohya's, LyCORIS' or PEFT's, cloneofsimo's list, or a textual-inversion embedding",
            remedy="name the right file",
        )
    return {str(name): tensor for name, tensor in content.items()}


def _read_lists(path: Path, weights: list[Tensor]) -> RawFile:
    """`x.pt`, and beside it `x.text_encoder.pt` and `x.ti.pt` where there are such."""
    stem = path.name.removesuffix(path.suffix)
    if stem.endswith(_TEXT):
        return RawFile(numbered(weights, "text_encoder"), {}, (), (path,))
    tensors, files = numbered(weights, "unet"), [path]
    text, tokens = (path.with_name(f"{stem}{middle}{path.suffix}") for middle in (_TEXT, _TOKENS))
    if text.is_file():
        more = read_pickle(text)
        if not isinstance(more, list) or not all(isinstance(entry, Tensor) for entry in more):
            problem, remedy = "the file holds no list of tensors", f"move it away from {path.name}"
            raise AdapterError(problem, where=str(text), allowed="what cloneofsimo saves there", remedy=remedy)
        tensors |= numbered(more, "text_encoder")
        files.append(text)
    embeddings = (embeddings_of_file(tokens) if tokens.is_file() else None) or ()
    return RawFile(tensors, {}, tuple(embeddings), (*files, *([tokens] if embeddings else [])))


def _read_peft(folder: Path, limits: Limits) -> RawFile:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    files: list[Path] = []
    for part in _parts(folder):
        prefix = "" if part == folder else f"{part.name}/"
        config = part / CONFIG_FILE
        if config.stat().st_size > _MAX_CONFIG:
            problem = f"{prefix}{CONFIG_FILE} has {config.stat().st_size} bytes"
            raise AdapterError(problem, allowed=f"at most {_MAX_CONFIG}", remedy="check the file")
        weights, inside, header = _read_weights(part, limits)
        tensors |= {f"{prefix}{key}": _plain(tensor) for key, tensor in inside.items()}
        metadata = {**header, **metadata}
        metadata[f"{prefix}{CONFIG_FILE}"] = config.read_text(encoding="utf-8", errors="replace")
        files += [config, weights]
    return RawFile(tensors, metadata, (), tuple(files))


def _read_weights(part: Path, limits: Limits) -> tuple[Path, Mapping[str, Tensor], Mapping[str, str]]:
    """The weights beside a configuration; a pickle, as PEFT saved it before 0.6, where there is nothing else."""
    pickled = part / OLD_MODEL_FILE
    if (part / MODEL_FILE).exists() or not pickled.is_file():
        return part / MODEL_FILE, *read_safetensors(part / MODEL_FILE, limits)
    return pickled, _named(read_pickle(pickled), pickled), {}


def _parts(folder: Path) -> list[Path]:
    """The folders of a PEFT adapter: the folder itself, or those in it."""
    if (folder / CONFIG_FILE).is_file():
        return [folder]
    return sorted(inner for inner in folder.iterdir() if (inner / CONFIG_FILE).is_file())


def _only_file(folder: Path) -> Path:
    for name in _USUAL:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        raise AdapterError(
            f"the folder holds {len(found)} .safetensors files",
            allowed=f"one, or {', '.join(_USUAL)}, or a PEFT folder with {CONFIG_FILE}",
            remedy="name the file itself",
        )
    return found[0]
