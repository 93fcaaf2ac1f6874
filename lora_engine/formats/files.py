"""Reads, writes and inspects adapter files in any registered format."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, Delta, DoraDelta, LokrDelta
from lora_engine.catalog.formats import FORMATS
from lora_engine.errors import AdapterError
from lora_engine.families.names import TRANSFORMER
from lora_engine.files import FilePath, atomic_write, canonical_json, sha256_file
from lora_engine.formats.card import GENERATED, Card, card_header, read_card
from lora_engine.formats.codec import Codec, Names, codecs
from lora_engine.formats.embedding_files import embedding_forms, write_embeddings
from lora_engine.formats.embeddings import Embedding, check_widths, embed
from lora_engine.formats.family import (
    FAMILY,
    FINGERPRINT,
    component_problem,
    families_of_tensors,
    family_of,
    is_motion,
    unsupported_reason,
)
from lora_engine.formats.kohya import KohyaCodec
from lora_engine.formats.modelspec import DIGEST, model_spec
from lora_engine.formats.raw_file import CONFIG_FILE, SUFFIX, RawFile, read_raw_file
from lora_engine.formats.safetensors_io import LIMITS, Limits, write_safetensors
from lora_engine.formats.transformers.fused_lokr import rows_of, with_exact_rows
from lora_engine.formats.unknown_names import UnknownNamesCodec

_log = logging.getLogger(__name__)
_GROWTH = 2.0  # above it, a conversion warns


@dataclass(frozen=True)
class Bundle:
    """The contents of an adapter file.

    Attributes:
        adapter: The adapter; has no modules if the file holds only embeddings.
        card: The card in the header.
        embeddings: The learned tokens, sorted by token.
        assumptions: What was assumed because the file does not state it; empty if nothing.
    """

    adapter: Adapter
    card: Card
    embeddings: tuple[Embedding, ...] = ()
    assumptions: str = ""


def read_adapter(path: FilePath, module_names: Names | None = None, *, limits: Limits = LIMITS) -> tuple[Adapter, Card]:
    """Reads an adapter of any format; the tensor names determine the format.

    Args:
        path: A `.safetensors` file, a `.pt` (read by a sandboxed process), or a folder (PEFT's, or one with a single
            adapter).
        module_names: The base's canonical module names. Flattened or original names need them, unless the published
            architectures agree. As a mapping to weight shapes (`adapters.module_shapes`), shapes are checked too.
        limits: Limits on what the file may claim.

    Raises:
        AdapterError: The file is no adapter, damaged, of an unknown kind or format, or does not fit the base; names
            the file, the tensor, the rule and a fix.
    """
    bundle = read_bundle(path, module_names, limits=limits)
    if not bundle.adapter.modules:
        raise AdapterError(
            f"the file holds only the embedding {bundle.embeddings[0].token!r}, and no adapter",
            where=str(path),
            remedy="name an adapter; embeddings alone can be used to generate, evaluate, register and convert",
        )
    return bundle.adapter, bundle.card


def read_bundle(path: FilePath, module_names: Names | None = None, *, limits: Limits = LIMITS) -> Bundle:
    """Reads an adapter as `read_adapter` does, with its embeddings; for a folder also those in its other files."""
    path = Path(path)
    with in_file(path):
        raw = read_raw_file(path, limits)
        check_widths(raw.embeddings, module_names)
        if not raw.tensors and raw.embeddings and FAMILY in raw.metadata:
            empty = Adapter({}, raw.metadata[FAMILY], raw.metadata.get(FINGERPRINT))
            return Bundle(empty, read_card(raw.metadata), raw.embeddings)
        adapter = codec_of(raw).decode(raw.tensors, raw.metadata, module_names)
        notes = [raw.assumptions, _switched_off(adapter.modules), _unproven(adapter, raw.metadata)]
        assumptions = "; ".join(filter(None, notes))
        return Bundle(adapter, read_card(raw.metadata), raw.embeddings, assumptions)


def _switched_off(modules: Mapping[str, Delta]) -> str:
    """Returns how many modules have alpha 0, by which a difference of a rank has no effect; empty for none."""
    off = [name for name, delta in modules.items() if delta.alpha == 0 and delta.rank and delta.kind != DoraDelta.kind]
    return f"alpha is 0 in {len(off)} of {len(modules)} modules, which have no effect: {off[0]!r}" if off else ""


def _unproven(adapter: Adapter, metadata: Mapping[str, str]) -> str:
    """Returns what the file leaves open about the family; the modules of a U-Net name no family, and need none."""
    if any(map(is_motion, adapter.modules)):
        return "the modules are AnimateDiff's motion modules; bases without them do not have these"
    if adapter.base:
        return ""
    family = family_of(metadata, adapter.modules)
    is_unknown = not family.possible and TRANSFORMER in adapter.components
    return "the base family is unknown: no family has these modules" if is_unknown else family.note


def write_adapter(
    path: FilePath,
    adapter: Adapter,
    *,
    format: str = "loraline",  # noqa: A002 (the name in every spec and on the command line)
    card: Card | None = None,
    dtype: torch.dtype | None = None,
    embeddings: Sequence[Embedding] = (),
    module_names: Names | None = None,
    output_name: str | None = None,
) -> list[Path]:
    """Writes an adapter; the same adapter and card give the same bytes.

    Args:
        path: A file that ends in `.safetensors`, or a folder, which gets the format's default file names.
        adapter: The adapter.
        format: Name of a codec.
        card: Its card, for the header.
        dtype: Dtype of the factors and embeddings; None keeps theirs.
        embeddings: Tokens that were learned with it. The format decides whether they go into the same file or into
            separate files. Embeddings without modules need a format with embedding files, or `loraline`.
        module_names: The base's modules with their shapes, for formats that number modules (`numbers_modules`).
        output_name: Name by which programs show the file: its title without one in the card, `ss_output_name` in
            kohya's formats, and in a folder the name of the file if the format allows any (`is_renamable`).

    Returns:
        The written files, those of the embeddings last.

    Raises:
        AdapterError: The format or the dtype cannot hold the adapter, or it has no modules.
        SettingsError: No such format.
    """
    path, codec = Path(path), codecs[format]
    if not adapter.modules and not _holds_only_embeddings(codec, embeddings):
        raise AdapterError("the adapter has no modules", where=str(path), remedy="train or import it again")
    if codec.format.is_folder and path.suffix == SUFFIX:
        remedy = "give a path without .safetensors"
        raise AdapterError(f"the format {format!r} is a folder", where=str(path), allowed="a folder", remedy=remedy)
    card = card or Card()
    card = card if card.title else card.model_copy(update={"title": output_name or ""})
    tokens = [_cast(embedding, dtype) for embedding in embeddings]
    has_own_files = codec.embeddings in embedding_forms
    if has_own_files and not adapter.modules:
        return write_embeddings(path.parent if path.suffix == SUFFIX else path, tokens, codec.embeddings)
    tensors, metadata = _encode(codec, adapter if dtype is None else adapter.to(dtype=dtype), card, module_names)
    if tokens and not has_own_files:
        token_tensors, flags = embed(codec.embeddings, tokens)
        tensors, metadata = {**tensors, **token_tensors}, {**metadata, **flags}
    if output_name and isinstance(codec, KohyaCodec):
        metadata = {**metadata, "ss_output_name": output_name}
    ours = {**metadata, **model_spec(adapter, card, kohya_names=isinstance(codec, KohyaCodec)), **card_header(card)}
    header = _header(codec, tensors, card, ours)
    if codec.format.is_folder:
        files = list(_write_folder(path, codec.format.file_name, tensors, header))
    else:
        is_named = output_name and codec.format.is_renamable
        file_name = f"{output_name}{SUFFIX}" if is_named else codec.format.file_name
        files = [path if path.suffix == SUFFIX else path / file_name]
        write_safetensors(files[0], tensors, header)
    if tokens and has_own_files:
        files += write_embeddings(path.parent if path.suffix == SUFFIX else path, tokens, codec.embeddings)
    return files


def _encode(
    codec: Codec, adapter: Adapter, card: Card, names: Names | None
) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    """Returns tensors and metadata; rows of Kronecker products that the format cannot hold get other exact forms."""
    try:
        return codec.encode(adapter, card, names)
    except AdapterError as error:
        if all(rows_of(delta) is None for delta in adapter.modules.values()):
            raise
        problem = error
    for kinds in ([LokrDelta.kind], []):
        try:
            tensors, metadata = codec.encode(with_exact_rows(adapter, kinds), card, names)
        except AdapterError as error:
            problem = error
            continue
        _warn_of_growth(codec, adapter, tensors)
        return tensors, metadata
    raise problem


def _warn_of_growth(codec: Codec, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    shared = {id(factor): factor for delta in adapter.modules.values() for factor in delta.factors().values()}
    before, after = (sum(tensor.nbytes for tensor in group.values()) for group in (shared, tensors))
    if after > _GROWTH * before:
        _log.warning(
            "the format %r has no fused layers for Kronecker products: %.1f MB become %.1f MB."
            " Fix: approximate them (--approximate), or choose a format with the original names, such as comfyui.",
            codec.name,
            before / 1e6,
            after / 1e6,
        )


def inspect(path: FilePath) -> dict[str, Any]:
    """Describes a file as JSON values: format, family, modules, kinds, ranks, alphas, dtypes, card, metadata, digests.

    Needs no base. Module names are those in the file. A file of embeddings alone has the format `embedding` and no
    modules.

    Raises:
        AdapterError: As `read_adapter`.
    """
    path = Path(path)
    with in_file(path):
        raw = read_raw_file(path, LIMITS)
        is_adapter = bool(raw.tensors) or not raw.embeddings
        codec = detect_codec(raw.tensors, raw.metadata) if is_adapter else None
        note = unsupported_reason(raw.tensors)
        modules, problem = _modules_of(codec, raw, is_unsupported=note is not None)
        family = family_of(raw.metadata, modules) if modules else families_of_tensors(raw.tensors)
        card = read_card(raw.metadata)
        motion = "an adapter for AnimateDiff's motion modules" if any(map(is_motion, modules)) else ""
    deltas, metadata = list(modules.values()), raw.metadata
    factors = {id(factor): factor for delta in deltas for factor in delta.factors().values()}.values()
    return {
        "format": codec.name if codec else "embedding",
        "family": family.name,
        "families": list(family.possible),
        "fingerprint": metadata.get(FINGERPRINT),
        "note": "; ".join(filter(None, [note or family.note, motion, problem, component_problem(modules)])) or None,
        "assumed": "; ".join(filter(None, [raw.assumptions, _switched_off(modules)])) or None,
        "modules": list(modules),
        "kinds": _count(delta.kind for delta in deltas),
        "ranks": _count(delta.rank for delta in deltas),
        "alphas": _count(delta.alpha for delta in deltas),
        "dtypes": _count(str(factor.dtype).removeprefix("torch.") for factor in factors),
        "parameters": sum(factor.numel() for factor in factors),
        "embeddings": [
            {
                "token": embedding.token,
                "vectors": embedding.count,
                "widths": embedding.widths,
                "dtypes": _dtypes(embedding),
            }
            for embedding in raw.embeddings
        ],
        "card": card.model_dump(exclude={"extra"}),
        "metadata": dict(sorted(metadata.items())),
        "files": {str(file.relative_to(_folder_of(path))): sha256_file(file) for file in sorted(raw.files)},
        "size": sum(file.stat().st_size for file in raw.files),
    }


def _modules_of(codec: Codec | None, raw: RawFile, *, is_unsupported: bool) -> tuple[Mapping[str, Delta], str]:
    """Returns the deltas, and for an unsupported base the problem that prevents reading them."""
    if codec is None:
        return {}, ""
    try:
        return codec.read_modules(raw.tensors, raw.metadata), ""
    except AdapterError as error:
        if not is_unsupported:
            raise
        return {}, f"its factors are not read either: {error}"


def detect_codec(tensors: Iterable[str], metadata: Mapping[str, str]) -> Codec:
    """Returns the codec that reads a file with these tensor names.

    A file of known factors under unknown module names gets a codec that only reads the factors, named `unknown`.

    Raises:
        AdapterError: No codec does; gives the reason if the format is known but unsupported.
    """
    keys = list(tensors)
    if not keys:
        raise AdapterError("the file holds no tensors", remedy="save or download the adapter again")
    for name in sorted(codecs, key=lambda name: FORMATS[name].precedence):
        if codecs[name].detect(keys, metadata):
            return codecs[name]
    unknown = UnknownNamesCodec()
    if unknown.detect(keys, metadata):
        return unknown
    reason = unsupported_reason(keys)
    raise AdapterError(
        f"the file is {reason}, which is not supported"
        if reason
        else "unknown adapter format: no supported key layout matches",
        where=f"tensor {min(keys)!r}",
        allowed=", ".join(codecs),
        remedy="convert the adapter with the program that made it, or give the path of the right file",
    )


def _holds_only_embeddings(codec: Codec, embeddings: Sequence[Embedding]) -> bool:
    return bool(embeddings) and (codec.embeddings in embedding_forms or codec.name == "loraline")


def codec_of(raw: RawFile) -> Codec:
    """Returns the codec that reads the adapter of a file.

    Raises:
        AdapterError: The file holds only an embedding, or no codec reads it.
    """
    if not raw.tensors and raw.embeddings:
        raise AdapterError(
            f"the file is a textual-inversion embedding ({raw.embeddings[0].token!r}), not an adapter",
            allowed="an adapter, perhaps with embeddings",
            remedy="put it into the embeddings folder of your program; `loraline inspect` shows its contents",
        )
    return detect_codec(raw.tensors, raw.metadata)


def _cast(embedding: Embedding, dtype: torch.dtype | None) -> Embedding:
    return Embedding(embedding.token, {name: tensor.to(dtype=dtype) for name, tensor in embedding.vectors.items()})


def _dtypes(embedding: Embedding) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in embedding.vectors.values()})


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _header(codec: Codec, tensors: Mapping[str, Tensor], card: Card, ours: Mapping[str, str]) -> dict[str, str]:
    # Another program's entries about base and architecture still hold for these weights; its entries on ranks may not.
    carried = {key: text for key, text in card.extra.items() if key not in ours or key.startswith("modelspec.")}
    versions = {key: text for key, text in card.extra.items() if key in ("ss_base_model_version", "ss_v2")}
    carried |= versions
    generated = sorted(key for key in ours if key not in carried and not key.startswith("loraline."))
    header = {**ours, **carried, GENERATED: canonical_json(generated).decode()}
    header |= codec.finalize_metadata(tensors, header)
    return header if codec.format.is_folder else header | DIGEST


def _write_folder(
    folder: Path, file_name: str, tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> Iterator[Path]:
    configs = {key: text for key, text in header.items() if key.endswith(CONFIG_FILE)}
    shared = {key: text for key, text in header.items() if key not in configs}
    for key, text in sorted(configs.items()):
        part = key.removesuffix(CONFIG_FILE)
        part_tensors = {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
        write_safetensors(folder / part / file_name, part_tensors, {**shared, **DIGEST})
        atomic_write(folder / key, text.encode())
        yield folder / part / file_name
        yield folder / key


def _count(values: Iterable[object]) -> dict[str, int]:
    return dict(sorted(Counter(str(value) for value in values).items()))


@contextmanager
def in_file(path: Path) -> Iterator[None]:
    """Prefixes the location in an error with the file's path."""
    try:
        yield
    except AdapterError as error:
        if error.where.startswith(str(path)):
            raise
        where = f"{path}: {error.where}" if error.where else str(path)
        raise error.at(where) from error
