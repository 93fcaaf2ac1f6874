"""Writes adapters to files in any registered format."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.adapters import Adapter, LokrDelta
from lora_engine.errors import AdapterError
from lora_engine.files import FilePath, atomic_write, canonical_json, write_within
from lora_engine.finite import is_finite, not_finite
from lora_engine.formats.card import GENERATED, Card, card_header
from lora_engine.formats.codec import Codec, Names, codecs
from lora_engine.formats.embedding_files import check_token_files, embedding_contents, embedding_forms, write_contents
from lora_engine.formats.embeddings import Embedding, embed
from lora_engine.formats.kohya import KohyaCodec
from lora_engine.formats.modelspec import DIGEST, model_spec
from lora_engine.formats.raw_file import CONFIG_FILE, SUFFIX
from lora_engine.formats.safetensors_io import write_safetensors
from lora_engine.formats.transformers.fused_lokr import rows_of, with_exact_rows
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)
_GROWTH = 2.0  # above it, a conversion warns


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
        AdapterError: The format or the dtype cannot hold the adapter, a value is NaN or infinite, it has no modules, or
            the file of a token would replace another; nothing is written.
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
    tokens = [_cast_embedding(embedding, dtype) for embedding in embeddings]
    has_own_files = codec.embeddings in embedding_forms
    folder = path.parent if path.suffix == SUFFIX else path
    # Made first, because it refuses: nothing is written then.
    token_files = embedding_contents(tokens, codec.embeddings) if has_own_files else {}
    is_named = output_name and codec.format.is_renamable
    file_name = f"{output_name}{SUFFIX}" if is_named else codec.format.file_name
    file = path if path.suffix == SUFFIX else path / file_name
    check_token_files(folder, token_files, file if adapter.modules and not codec.format.is_folder else None)
    if has_own_files and not adapter.modules:
        return write_contents(folder, token_files, card.license)
    cast = _cast(adapter, dtype, path)
    tensors, metadata = _encode(codec, cast, card, module_names)
    _check_encoded(path, codec, cast, tensors, card, module_names)
    if tokens and not has_own_files:
        token_tensors, flags = embed(codec.embeddings, tokens)
        tensors, metadata = {**tensors, **token_tensors}, {**metadata, **flags}
    if output_name and isinstance(codec, KohyaCodec):
        metadata = {**metadata, "ss_output_name": output_name}
    ours = {**metadata, **model_spec(adapter, card, kohya_names=isinstance(codec, KohyaCodec)), **card_header(card)}
    header = _header(codec, tensors, card, ours)
    with write_within(folder):
        if codec.format.is_folder:
            files = list(_write_folder(path, codec.format.file_name, tensors, header))
        else:
            files = [file]
            # checked above, before the first of several files
            write_safetensors(files[0], tensors, header, finite=False)
    if token_files:
        files += write_contents(folder, token_files, card.license)
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


def _holds_only_embeddings(codec: Codec, embeddings: Sequence[Embedding]) -> bool:
    return bool(embeddings) and (codec.embeddings in embedding_forms or codec.name == "loraline")


def _cast(adapter: Adapter, dtype: torch.dtype | None, path: Path) -> Adapter:
    """Returns the adapter in a dtype, after checking alphas and factors; the error names file, module and factor."""
    for name, delta in adapter.modules.items():
        if delta.alpha is not None and not math.isfinite(delta.alpha):
            problem, where = f"alpha is {delta.alpha!r}", f"{path}: module {name!r}"
            raise AdapterError(problem, where=where, allowed="a finite number", remedy="set a finite alpha")
    if dtype is not None:
        try:
            return adapter.to(dtype=dtype)
        except AdapterError as error:
            raise error.at(f"{path}: {error.where}") from error
    for name, delta in adapter.modules.items():
        for key, factor in delta.factors().items():
            if not is_finite(factor):
                raise not_finite(f"{path}: module {name!r}, factor {key!r}", factor)
    return adapter


def _check_encoded(
    path: Path, codec: Codec, adapter: Adapter, tensors: Mapping[str, Tensor], card: Card, names: Names | None
) -> None:
    """Raises an error for a tensor that the format computed from finite factors, and that is not finite."""
    checked = {f.data_ptr(): f.numel() for delta in adapter.modules.values() for f in delta.factors().values()}
    for name, tensor in tensors.items():
        is_factor = tensor.numel() > 0 and checked.get(tensor.data_ptr()) == tensor.numel()
        if not is_factor and tensor.is_floating_point() and not is_finite(tensor):
            wide = _encode(codec, adapter.to(dtype=torch.float64), card, names)[0]
            raise not_finite(f"{path}: tensor {name!r}", tensor, wide.get(name))


def _cast_embedding(embedding: Embedding, dtype: torch.dtype | None) -> Embedding:
    vectors = {name: tensor.to(dtype=dtype) for name, tensor in embedding.vectors.items()}
    for name, tensor in vectors.items():
        if not is_finite(tensor):
            raise not_finite(f"embedding {embedding.token!r}, vectors of {name}", tensor, embedding.vectors[name])
    return Embedding(embedding.token, vectors)


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
        write_safetensors(folder / part / file_name, part_tensors, {**shared, **DIGEST}, finite=False)
        atomic_write(folder / key, text.encode())
        yield folder / part / file_name
        yield folder / key
