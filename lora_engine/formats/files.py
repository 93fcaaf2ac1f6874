"""Adapter files: reading, writing and looking into them, in any registered format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.adapters import Adapter
from lora_engine.errors import AdapterError
from lora_engine.files import atomic_write, canonical_json, sha256_file
from lora_engine.formats.card import GENERATED, Card, card_header, read_card
from lora_engine.formats.codec import Codec, Names, codecs
from lora_engine.formats.family import FINGERPRINT, family_of
from lora_engine.formats.foreign import foreign_reason
from lora_engine.formats.safetensors_io import LIMITS, Limits, read_safetensors, write_safetensors

SUFFIX = ".safetensors"
_CONFIG_FILE, _MODEL_FILE = "adapter_config.json", "adapter_model.safetensors"
_USUAL = ("adapter.safetensors", "pytorch_lora_weights.safetensors")
_MAX_CONFIG = 1 << 24


def read_adapter(path: Path, module_names: Names | None = None, *, limits: Limits = LIMITS) -> tuple[Adapter, Card]:
    """Reads an adapter of any format; the format is told by the tensors' names.

    Args:
        path: A `.safetensors` file, or a folder (PEFT's, or one with a single adapter in it).
        module_names: The base's canonical module names, which kohya's names need; as a mapping to weight shapes
            (`adapters.module_shapes`), the shapes are checked too.
        limits: How much the file may claim.

    Raises:
        AdapterError: It is no adapter, damaged, of an unknown kind or form, or does not fit; names the file, the
            tensor, the rule and a remedy.
    """
    with _in_file(path):
        tensors, metadata = _read(path, limits)
        codec = detect_codec(tensors, metadata)
        return codec.decode(tensors, metadata, module_names), read_card(metadata)


def write_adapter(
    path: Path,
    adapter: Adapter,
    *,
    format: str = "loraline",  # noqa: A002 (what it is called in every spec and on the command line)
    card: Card | None = None,
    dtype: torch.dtype | None = None,
) -> list[Path]:
    """Writes an adapter; the same adapter and card give the same bytes.

    Args:
        path: A file that ends in `.safetensors`, or a folder, which gets the format's usual file names.
        adapter: The adapter.
        format: Name of a codec.
        card: What the header says of it.
        dtype: Dtype of the factors; None keeps them.

    Returns:
        The files that were written.

    Raises:
        AdapterError: The format or the dtype cannot hold the adapter, or it has no modules.
        SettingsError: No such format.
    """
    codec = codecs[format]
    if not adapter.modules:
        raise AdapterError("the adapter has no modules", where=str(path), remedy="check where it comes from")
    if codec.is_folder and path.suffix == SUFFIX:
        remedy = "give a path without .safetensors"
        raise AdapterError(f"the format {format!r} is a folder", where=str(path), allowed="a folder", remedy=remedy)
    stated = card or Card()
    tensors, needed = codec.encode(adapter if dtype is None else adapter.to(dtype=dtype), stated)
    header = _header(codec, tensors, stated, needed)
    if not codec.is_folder:
        file = path if path.suffix == SUFFIX else path / codec.file_name
        write_safetensors(file, tensors, header)
        return [file]
    return list(_write_folder(path, codec.file_name, tensors, header))


def inspect(path: Path) -> dict[str, Any]:
    """What a file is, as JSON values: format, family, modules, kinds, ranks, alphas, dtypes, card, metadata, digests.

    Needs no base; module names are the file's own where they cannot be told otherwise.

    Raises:
        AdapterError: As `read_adapter`.
    """
    with _in_file(path):
        tensors, metadata = _read(path, LIMITS)
        codec = detect_codec(tensors, metadata)
        modules = codec.read_modules(tensors, metadata)
        card = read_card(metadata)
    deltas = list(modules.values())
    factors = [factor for delta in deltas for factor in delta.factors().values()]
    files = sorted(_files(path))
    return {
        "format": codec.name,
        "family": family_of(metadata, modules),
        "fingerprint": metadata.get(FINGERPRINT),
        "note": foreign_reason(tensors),
        "modules": list(modules),
        "kinds": _count(delta.kind for delta in deltas),
        "ranks": _count(delta.rank for delta in deltas),
        "alphas": _count(delta.alpha for delta in deltas),
        "dtypes": _count(str(factor.dtype).removeprefix("torch.") for factor in factors),
        "parameters": sum(factor.numel() for factor in factors),
        "embeddings": [],
        "card": card.model_dump(exclude={"extra"}),
        "metadata": dict(sorted(metadata.items())),
        "files": {str(file.relative_to(path)) if file != path else file.name: sha256_file(file) for file in files},
        "size": sum(file.stat().st_size for file in files),
    }


def detect_codec(tensors: Iterable[str], metadata: Mapping[str, str]) -> Codec:
    """The codec that reads a file with these tensor names.

    Raises:
        AdapterError: None does; with the reason where the form is known.
    """
    keys = list(tensors)
    if not keys:
        raise AdapterError("the file holds no tensors", remedy="save or download the adapter again")
    for codec in codecs.values():
        if codec.detect(keys, metadata):
            return codec
    reason = foreign_reason(keys)
    raise AdapterError(
        f"the file is {reason}, which is not read" if reason else "the tensors' names are of no known adapter format",
        where=f"tensor {min(keys)!r}",
        allowed=", ".join(codecs),
        remedy="convert the adapter with the program that made it, or name the right file",
    )


def _header(codec: Codec, tensors: Mapping[str, Tensor], card: Card, needed: Mapping[str, str]) -> dict[str, str]:
    ours = {**needed, **card_header(card)}
    # What a foreign header said of its base and its architecture was true of these weights; what it said of ranks not.
    kept = {key: text for key, text in card.extra.items() if key not in ours or key.startswith("modelspec.")}
    told = {key: text for key, text in card.extra.items() if key in ("ss_base_model_version", "ss_v2")}
    generated = sorted(key for key in ours if key not in kept and key not in told and not key.startswith("loraline."))
    header = {**ours, **kept, **told, GENERATED: canonical_json(generated).decode()}
    return header | codec.seal(tensors, header)


def _write_folder(
    folder: Path, file_name: str, tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> Iterator[Path]:
    beside = {key: text for key, text in header.items() if key.endswith(_CONFIG_FILE)}
    shared = {key: text for key, text in header.items() if key not in beside}
    for key, text in sorted(beside.items()):
        part = key.removesuffix(_CONFIG_FILE)
        inside = {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
        write_safetensors(folder / part / file_name, inside, shared)
        atomic_write(folder / key, text.encode())
        yield folder / part / file_name
        yield folder / key


def _read(path: Path, limits: Limits) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.name == _MODEL_FILE and (path.parent / _CONFIG_FILE).is_file():
        return _read_folder(path.parent, limits)
    if not path.is_dir():
        return read_safetensors(path, limits)
    if any(_parts(path)):
        return _read_folder(path, limits)
    return read_safetensors(_only_file(path), limits)


def _read_folder(folder: Path, limits: Limits) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for part in _parts(folder):
        prefix = "" if part == folder else f"{part.name}/"
        config = part / _CONFIG_FILE
        if config.stat().st_size > _MAX_CONFIG:
            problem = f"{prefix}{_CONFIG_FILE} has {config.stat().st_size} bytes"
            raise AdapterError(problem, allowed=f"at most {_MAX_CONFIG}", remedy="check the file")
        inside, header = read_safetensors(part / _MODEL_FILE, limits)
        tensors |= {f"{prefix}{key}": tensor for key, tensor in inside.items()}
        metadata = header | metadata
        metadata[f"{prefix}{_CONFIG_FILE}"] = config.read_text(encoding="utf-8", errors="replace")
    return tensors, metadata


def _parts(folder: Path) -> list[Path]:
    """The folders of a PEFT adapter: the folder itself, or those in it."""
    if (folder / _CONFIG_FILE).is_file():
        return [folder]
    return sorted(inner for inner in folder.iterdir() if (inner / _CONFIG_FILE).is_file())


def _only_file(folder: Path) -> Path:
    for name in _USUAL:
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        raise AdapterError(
            f"the folder holds {len(found)} .safetensors files",
            allowed=f"one, or {', '.join(_USUAL)}, or a PEFT folder with {_CONFIG_FILE}",
            remedy="name the file itself",
        )
    return found[0]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    parts = _parts(path)
    names = (_CONFIG_FILE, _MODEL_FILE)
    return [part / name for part in parts for name in names] if parts else [_only_file(path)]


def _count(values: Iterable[object]) -> dict[str, int]:
    return dict(sorted(Counter(str(value) for value in values).items()))


@contextmanager
def _in_file(path: Path) -> Iterator[None]:
    """Puts the file's name before the place that an error names."""
    try:
        yield
    except AdapterError as error:
        if error.where.startswith(str(path)):
            raise
        where = f"{path}: {error.where}" if error.where else str(path)
        raise AdapterError(error.problem, where=where, allowed=error.allowed, remedy=error.remedy) from error
