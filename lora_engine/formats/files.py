"""Adapter files: reading, writing and looking into them, in any registered format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta
from lora_engine.errors import AdapterError
from lora_engine.files import atomic_write, canonical_json, sha256_file
from lora_engine.formats.card import GENERATED, Card, card_header, read_card
from lora_engine.formats.codec import Codec, Names, codecs
from lora_engine.formats.embedding_files import embedding_forms, write_embeddings
from lora_engine.formats.embeddings import Embedding, check_widths, embed
from lora_engine.formats.family import FAMILY, FINGERPRINT, family_of
from lora_engine.formats.kohya import KohyaCodec
from lora_engine.formats.modelspec import DIGEST, model_spec
from lora_engine.formats.raw_file import CONFIG_FILE, SUFFIX, RawFile, read_contents
from lora_engine.formats.safetensors_io import LIMITS, Limits, write_safetensors
from lora_engine.formats.transformers.names import dit_family
from lora_engine.formats.unsupported import unsupported_reason


@dataclass(frozen=True)
class Bundle:
    """What a file of an adapter holds.

    Attributes:
        adapter: The adapter; without modules where words alone were learned.
        card: What the header says of it.
        embeddings: The words that were learned with it, sorted by token.
        assumed: What had to be supposed, since the file does not say it; empty for nothing.
    """

    adapter: Adapter
    card: Card
    embeddings: tuple[Embedding, ...] = ()
    assumptions: str = ""


def read_adapter(
    path: str | PathLike[str], module_names: Names | None = None, *, limits: Limits = LIMITS
) -> tuple[Adapter, Card]:
    """Reads an adapter of any format; the format is told by the tensors' names.

    Args:
        path: A `.safetensors` file, a `.pt` (read by a process that can do no harm), or a folder (PEFT's, or one with a
            single adapter in it).
        module_names: The base's canonical module names, which names without dots or with original numbers need unless
            the published architectures leave no doubt; as a mapping to weight shapes (`adapters.module_shapes`), the
            shapes are checked too.
        limits: How much the file may claim.

    Raises:
        AdapterError: It is no adapter, damaged, of an unknown kind or form, or does not fit; names the file, the
            tensor, the rule and a remedy.
    """
    bundle = read_bundle(path, module_names, limits=limits)
    if not bundle.adapter.modules:
        raise AdapterError(
            f"the file holds the word {bundle.embeddings[0].token!r} alone, and no adapter",
            where=str(path),
            remedy="name an adapter; words alone can be drawn with, evaluated, registered and converted",
        )
    return bundle.adapter, bundle.card


def read_bundle(path: str | PathLike[str], module_names: Names | None = None, *, limits: Limits = LIMITS) -> Bundle:
    """As `read_adapter`, with the embeddings that lie in the file, or beside it where a folder is named."""
    path = Path(path)
    with _in_file(path):
        found = read_contents(path, limits)
        check_widths(found.embeddings, module_names)
        if not found.tensors and found.embeddings and FAMILY in found.metadata:
            nothing = Adapter({}, found.metadata[FAMILY], found.metadata.get(FINGERPRINT))
            return Bundle(nothing, read_card(found.metadata), found.embeddings)
        codec = _codec_of(found)
        adapter = codec.decode(found.tensors, found.metadata, module_names)
        return Bundle(adapter, read_card(found.metadata), found.embeddings, found.assumptions)


def write_adapter(
    path: str | PathLike[str],
    adapter: Adapter,
    *,
    format: str = "loraline",  # noqa: A002 (what it is called in every spec and on the command line)
    card: Card | None = None,
    dtype: torch.dtype | None = None,
    embeddings: Sequence[Embedding] = (),
    module_names: Names | None = None,
) -> list[Path]:
    """Writes an adapter; the same adapter and card give the same bytes.

    Args:
        path: A file that ends in `.safetensors`, or a folder, which gets the format's usual file names.
        adapter: The adapter.
        format: Name of a codec.
        card: What the header says of it.
        dtype: Dtype of the factors and embeddings; None keeps them.
        embeddings: Words that were learned with it. They go into the file or into files of their own beside it, as the
            program does whose format it is. Words without an adapter (one without modules) go where a format has files
            for them, and into our own.
        module_names: The base's modules with their shapes, for formats that count through them (cloneofsimo's).

    Returns:
        The files that were written, those of the embeddings last.

    Raises:
        AdapterError: The format or the dtype cannot hold the adapter, or it has no modules.
        SettingsError: No such format.
    """
    path, codec = Path(path), codecs[format]
    if not adapter.modules and not _holds_words_alone(codec, embeddings):
        raise AdapterError("the adapter has no modules", where=str(path), remedy="check where it comes from")
    if codec.is_folder and path.suffix == SUFFIX:
        remedy = "give a path without .safetensors"
        raise AdapterError(f"the format {format!r} is a folder", where=str(path), allowed="a folder", remedy=remedy)
    stated, words = card or Card(), [_cast(embedding, dtype) for embedding in embeddings]
    is_beside = codec.embeddings in embedding_forms
    if is_beside and not adapter.modules:
        return write_embeddings(path.parent if path.suffix == SUFFIX else path, words, codec.embeddings)
    tensors, needed = codec.encode(adapter if dtype is None else adapter.to(dtype=dtype), stated, module_names)
    if words and not is_beside:
        inside, flags = embed(codec.embeddings, words)
        tensors, needed = {**tensors, **inside}, {**needed, **flags}
    ours = {**needed, **model_spec(adapter, stated, kohya_names=isinstance(codec, KohyaCodec)), **card_header(stated)}
    header = _header(codec, tensors, stated, ours)
    if codec.is_folder:
        files = list(_write_folder(path, codec.file_name, tensors, header))
    else:
        files = [path if path.suffix == SUFFIX else path / codec.file_name]
        write_safetensors(files[0], tensors, header)
    if words and is_beside:
        files += write_embeddings(path.parent if path.suffix == SUFFIX else path, words, codec.embeddings)
    return files


def inspect(path: str | PathLike[str]) -> dict[str, Any]:
    """What a file is, as JSON values: format, family, modules, kinds, ranks, alphas, dtypes, card, metadata, digests.

    Needs no base; module names are the file's own where they cannot be told otherwise. A file of embeddings alone has
    the format `embedding` and no modules.

    Raises:
        AdapterError: As `read_adapter`.
    """
    path = Path(path)
    with _in_file(path):
        found = read_contents(path, LIMITS)
        is_adapter = bool(found.tensors) or not found.embeddings
        codec = detect_codec(found.tensors, found.metadata) if is_adapter else None
        note = unsupported_reason(found.tensors)
        modules, fault = _modules_of(codec, found, is_foreign=note is not None)
        card = read_card(found.metadata)
    deltas, metadata = list(modules.values()), found.metadata
    factors = [factor for delta in deltas for factor in delta.factors().values()]
    return {
        "format": codec.name if codec else "embedding",
        "family": family_of(metadata, modules) or dit_family(found.tensors),
        "fingerprint": metadata.get(FINGERPRINT),
        "note": f"{note}; {fault}" if fault else note,
        "assumed": found.assumptions or None,
        "modules": list(modules),
        "kinds": _count(delta.kind for delta in deltas),
        "ranks": _count(delta.rank for delta in deltas),
        "alphas": _count(delta.alpha for delta in deltas),
        "dtypes": _count(str(factor.dtype).removeprefix("torch.") for factor in factors),
        "parameters": sum(factor.numel() for factor in factors),
        "embeddings": [
            {"token": word.token, "vectors": word.count, "widths": word.widths, "dtypes": _dtypes(word)}
            for word in found.embeddings
        ],
        "card": card.model_dump(exclude={"extra"}),
        "metadata": dict(sorted(metadata.items())),
        "files": {str(file.relative_to(_folder_of(path))): sha256_file(file) for file in sorted(found.files)},
        "size": sum(file.stat().st_size for file in found.files),
    }


def _modules_of(codec: Codec | None, found: RawFile, *, is_foreign: bool) -> tuple[Mapping[str, Delta], str]:
    """The deltas; of a base that is not supported, what keeps them from being read, in their place."""
    if codec is None:
        return {}, ""
    try:
        return codec.read_modules(found.tensors, found.metadata), ""
    except AdapterError as error:
        if not is_foreign:
            raise
        return {}, f"its factors are not read either: {error}"


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
    reason = unsupported_reason(keys)
    raise AdapterError(
        f"the file is {reason}, which is not read" if reason else "the tensors' names are of no known adapter format",
        where=f"tensor {min(keys)!r}",
        allowed=", ".join(codecs),
        remedy="convert the adapter with the program that made it, or name the right file",
    )


def _holds_words_alone(codec: Codec, embeddings: Sequence[Embedding]) -> bool:
    return bool(embeddings) and (codec.embeddings in embedding_forms or codec.name == "loraline")


def _codec_of(found: RawFile) -> Codec:
    if not found.tensors and found.embeddings:
        raise AdapterError(
            f"the file is a textual-inversion embedding ({found.embeddings[0].token!r}), not an adapter",
            allowed="an adapter, perhaps with embeddings",
            remedy="put it where the program looks for embeddings; `loraline inspect` shows what it holds",
        )
    return detect_codec(found.tensors, found.metadata)


def _cast(embedding: Embedding, dtype: torch.dtype | None) -> Embedding:
    return Embedding(embedding.token, {name: tensor.to(dtype=dtype) for name, tensor in embedding.vectors.items()})


def _dtypes(embedding: Embedding) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in embedding.vectors.values()})


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _header(codec: Codec, tensors: Mapping[str, Tensor], card: Card, ours: Mapping[str, str]) -> dict[str, str]:
    # What a foreign header said of its base and its architecture was true of these weights; what it said of ranks not.
    kept = {key: text for key, text in card.extra.items() if key not in ours or key.startswith("modelspec.")}
    told = {key: text for key, text in card.extra.items() if key in ("ss_base_model_version", "ss_v2")}
    generated = sorted(key for key in ours if key not in kept and key not in told and not key.startswith("loraline."))
    header = {**ours, **kept, **told, GENERATED: canonical_json(generated).decode()}
    header |= codec.finalize_metadata(tensors, header)
    return header if codec.is_folder else header | DIGEST


def _write_folder(
    folder: Path, file_name: str, tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> Iterator[Path]:
    beside = {key: text for key, text in header.items() if key.endswith(CONFIG_FILE)}
    shared = {key: text for key, text in header.items() if key not in beside}
    for key, text in sorted(beside.items()):
        part = key.removesuffix(CONFIG_FILE)
        inside = {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
        write_safetensors(folder / part / file_name, inside, {**shared, **DIGEST})
        atomic_write(folder / key, text.encode())
        yield folder / part / file_name
        yield folder / key


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
        raise error.at(where) from error
