"""Reads and writes adapters under the module names of their files, for operations that need no base family.

To resize, merge or cast an adapter, its factors suffice. If the family is unknown or not supported, its names have no
canonical form; they are then kept, as are the key layout and the header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_engine.adapters import Adapter, Delta
from lora_engine.errors import AdapterError
from lora_engine.files import FilePath
from lora_engine.formats.card import CARD, Card, card_header, read_card
from lora_engine.formats.codec import Codec
from lora_engine.formats.family import family_of
from lora_engine.formats.files import codec_of, in_file
from lora_engine.formats.key_layout import ALPHA, DIFFUSERS_KEYS, LORALINE_KEYS, LYCORIS_KEYS, KeyLayout
from lora_engine.formats.kohya import rank_header
from lora_engine.formats.lora_config import CONFIG, HEADER_ALPHAS
from lora_engine.formats.modelspec import DIGEST
from lora_engine.formats.raw_file import SUFFIX, read_raw_file
from lora_engine.formats.safetensors_io import LIMITS, write_safetensors
from lora_engine.formats.transformers.names import folded

if TYPE_CHECKING:
    import torch

NAMES_KEPT = "module names and header are kept"


@dataclass(frozen=True)
class VerbatimAdapter:
    """An adapter under the module names of its file.

    Attributes:
        adapter: The deltas by the module names in the file; without a family.
        card: The card in the header.
        metadata: The header.
        codec: The codec that read it.
        key_layout: The layout of its tensor keys; `writes_alpha` is True if the file has alpha as tensors.
        families: The families that fit; empty if none is known.
    """

    adapter: Adapter
    card: Card
    metadata: Mapping[str, str]
    codec: Codec
    key_layout: KeyLayout
    families: tuple[str, ...] = ()


def read_verbatim(path: FilePath) -> VerbatimAdapter:
    """Reads an adapter file without resolving its module names.

    Args:
        path: A file of any format but PEFT's folders, whose names are those of the model.

    Raises:
        AdapterError: The file is no valid adapter, is a PEFT folder, or also holds embeddings.
    """
    path = Path(path)
    with in_file(path):
        raw = read_raw_file(path, LIMITS)
        codec = codec_of(raw)
        unsuitable = "a PEFT folder" if codec.format.is_folder else "learned tokens" if raw.embeddings else ""
        if unsuitable:
            raise AdapterError(
                f"the base family is not known or not supported, and the file holds {unsuitable}",
                allowed="a file with an adapter alone",
                remedy="name the base that the adapter was made for (--base), or use the program that made it",
            )
        deltas = codec.read_modules(raw.tensors, raw.metadata)
        return VerbatimAdapter(
            Adapter(deltas),
            read_card(raw.metadata),
            raw.metadata,
            codec,
            _key_layout_of(raw.tensors),
            family_of(raw.metadata, deltas).possible,
        )


def read_deltas(path: FilePath) -> Mapping[str, Delta]:
    """Returns the deltas of an adapter by the module names in its file or folder; empty for embeddings alone."""
    path = Path(path)
    with in_file(path):
        raw = read_raw_file(path, LIMITS)
        return codec_of(raw).read_modules(raw.tensors, raw.metadata) if raw.tensors else {}


def write_verbatim(
    path: FilePath, original: VerbatimAdapter, adapter: Adapter, card: Card, *, dtype: torch.dtype | None = None
) -> Path:
    """Writes an adapter with the names, key layout and header of a file.

    Args:
        path: A file, or a folder.
        original: The file.
        adapter: The deltas by the file's module names.
        card: The card for the header.
        dtype: Dtype of the factors; None keeps theirs.

    Returns:
        The written file.

    Raises:
        AdapterError: The key layout or the dtype cannot hold the adapter.
    """
    path, layout = Path(path), original.key_layout
    adapter = adapter if dtype is None else adapter.to(dtype=dtype)
    tensors: dict[str, torch.Tensor] = {}
    for name, delta in adapter.modules.items():
        tensors |= layout.write(name, delta if layout.writes_alpha else _with_scale_1(name, delta))
    file = path if path.suffix == SUFFIX else path / original.codec.format.file_name
    write_safetensors(file, tensors, _header(original, tensors, adapter, card))
    return file


def _key_layout_of(tensors: Mapping[str, torch.Tensor]) -> KeyLayout:
    """Returns the layout that has all suffixes; Loraline's, which has every kind, for a mixture of layouts."""
    layouts = (LYCORIS_KEYS, DIFFUSERS_KEYS)
    fitting = (one for one in layouts if all(suffix is not None for *_, suffix in one.split(tensors)))
    has_alpha = any(name.endswith(f".{ALPHA}") for name in tensors)
    return replace(next(fitting, LORALINE_KEYS), writes_alpha=has_alpha)


def _with_scale_1(name: str, delta: Delta) -> Delta:
    # Without an alpha tensor, programs use the scale 1.
    plain = folded(name, delta)
    if plain.alpha is None or plain.alpha == plain.rank:
        return plain
    raise AdapterError(
        f"the scale of an adapter of kind {delta.kind!r} cannot be folded into its factors",
        where=name,
        allowed="lora, in a file without alpha",
        remedy="name the base that the adapter was made for (--base)",
    )


def _header(
    original: VerbatimAdapter, tensors: Mapping[str, torch.Tensor], adapter: Adapter, card: Card
) -> dict[str, str]:
    # These entries state the alpha of the original factors.
    header = {key: text for key, text in original.metadata.items() if key not in (CONFIG, CARD, *HEADER_ALPHAS)}
    ranks = {key: text for key, text in rank_header(adapter).items() if key in header}
    digest = {key: text for key, text in DIGEST.items() if key in header}
    header |= ranks | digest | card_header(card)
    digests = original.codec.finalize_metadata(tensors, header)
    return header | {key: text for key, text in digests.items() if key in header}
