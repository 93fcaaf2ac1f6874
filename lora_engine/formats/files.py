"""Reads and inspects adapter files of any registered format. `writing` writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.adapters import Adapter, Delta, DoraDelta
from lora_engine.catalog.formats import FORMATS
from lora_engine.errors import AdapterError
from lora_engine.families.names import TRANSFORMER
from lora_engine.files import FilePath, sha256_file
from lora_engine.formats.card import Card, read_card, stated_options
from lora_engine.formats.codec import Codec, Names, codecs
from lora_engine.formats.embeddings import Embedding, check_widths
from lora_engine.formats.family import (
    FAMILY,
    FINGERPRINT,
    component_problem,
    families_of_tensors,
    family_of,
    is_motion,
    unsupported_reason,
)
from lora_engine.formats.mapped_tensor import name_of_dtype
from lora_engine.formats.raw_file import RawFile, read_raw_file
from lora_engine.formats.safetensors_io import LIMITS, Limits, Reader, map_safetensors, read_safetensors
from lora_engine.formats.unknown_names import UnknownNamesCodec


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


def read_bundle(
    path: FilePath, module_names: Names | None = None, *, limits: Limits = LIMITS, read: Reader = read_safetensors
) -> Bundle:
    """Reads an adapter as `read_adapter` does, with its embeddings; for a folder also those in its other files.

    With `map_safetensors` as `read`, the result is for looking at names, shapes and dtypes, and imports no torch.
    """
    path = Path(path)
    with in_file(path):
        return _bundle_of(read_raw_file(path, limits, read), module_names)


def check(path: FilePath, module_names: Names | None = None) -> Bundle:
    """Reads an adapter or embeddings alone for their structure, as `read_bundle` does, and imports no torch.

    Raises:
        AdapterError: As `read_bundle`, but not for a file of embeddings alone, whose bundle has no modules.
    """
    path = Path(path)
    with in_file(path):
        raw = read_raw_file(path, LIMITS, map_safetensors)
        if not raw.tensors and raw.embeddings:
            return Bundle(Adapter(), read_card(raw.metadata), raw.embeddings)
        return _bundle_of(raw, module_names)


def _bundle_of(raw: RawFile, module_names: Names | None) -> Bundle:
    check_widths(raw.embeddings, module_names)
    if not raw.tensors and raw.embeddings and FAMILY in raw.metadata:
        empty = Adapter({}, raw.metadata[FAMILY], raw.metadata.get(FINGERPRINT) or None)
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


def inspect(path: FilePath, *, read: Reader = map_safetensors) -> dict[str, Any]:
    """Describes a file as JSON values: format, family, modules, kinds, ranks, alphas, dtypes, card, metadata, digests.

    `base_options` has what the training changed of its base. Needs no base. Module names are those in the file. A file
    of embeddings alone has the format `embedding` and no modules.

    Args:
        path: The file or folder.
        read: Reads a `.safetensors` file; the default imports no torch.

    Raises:
        AdapterError: As `read_adapter`.
    """
    path = Path(path)
    with in_file(path):
        raw = read_raw_file(path, LIMITS, read)
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
        "dtypes": _count(map(name_of_dtype, factors)),
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
        "base_options": stated_options(card),
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


def _dtypes(embedding: Embedding) -> list[str]:
    return sorted({name_of_dtype(tensor) for tensor in embedding.vectors.values()})


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


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
