"""Loraline's own format, used in the store: canonical module names, LyCORIS' factor keys, and always alpha.

The parts of a fused layer that are rows of one Kronecker product share its factors: the first part has them, and the
header names it for the others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, ClassVar

from lora_engine.adapters import Adapter, LokrDelta, same_delta
from lora_engine.catalog import formats as catalog
from lora_engine.documents import parse_json
from lora_engine.errors import AdapterError
from lora_engine.files import canonical_json
from lora_engine.formats.card import Card
from lora_engine.formats.codec import Names, Part, TensorCodec
from lora_engine.formats.key_layout import ALPHA, DIFFUSERS_KEYS, LORALINE_KEYS
from lora_engine.formats.transformers.fused_lokr import rows_of
from lora_engine.formats.validate import ROWS

if TYPE_CHECKING:
    from torch import Tensor

COMPONENTS = ("unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "transformer.")
_SHARED = "loraline.shared"


class NativeCodec(TensorCodec):
    """`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_down.weight`."""

    format = catalog.LORALINE
    key_layout = LORALINE_KEYS
    embeddings: ClassVar[str] = "bundle"

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if all names begin with a component, some have LyCORIS' suffixes, and none only diffusers'."""
        if not all(key.startswith(COMPONENTS) for key in keys) or not LORALINE_KEYS.matches(keys):
            return False
        return not DIFFUSERS_KEYS.matches([key for key, _, suffix in LORALINE_KEYS.split(keys) if suffix is None])

    def encode(
        self, adapter: Adapter, card: Card | None = None, names: Names | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the tensors and the metadata; shared factors only once."""
        tensors, metadata = super().encode(adapter, card, names)
        sources = _shared_products(adapter)
        if not sources:
            return tensors, metadata
        own = {f"{name}.{suffix}" for name in sources for suffix in (ROWS, ALPHA, "dora_scale")}
        written = {
            key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] not in sources or key in own
        }
        return written, {**metadata, _SHARED: canonical_json(sources).decode()}

    def _parts(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Part]:
        return super()._parts(_with_shared(tensors, metadata), metadata)


def _shared_products(adapter: Adapter) -> dict[str, str]:
    """Returns the modules whose product is that of an earlier module, to that module."""
    sources: dict[str, str] = {}
    first: dict[object, list[tuple[str, LokrDelta]]] = {}
    for name, delta in adapter.modules.items():
        rows = rows_of(delta)
        if rows is not None:
            # Files have hundreds of products; those that differ in a few values are not compared in full.
            sample = tuple(
                (key, factor.shape, *factor.flatten()[:8].tolist()) for key, factor in rows.factors().items()
            )
            alike = first.setdefault(sample, [])
            source = next((other for other, whole in alike if same_delta(whole, rows.whole)), None)
            if source is None:
                alike.append((name, rows.whole))
            else:
                sources[name] = source
    return sources


def _with_shared(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Mapping[str, Tensor]:
    """Returns the tensors with those that modules take from others.

    Raises:
        AdapterError: The header's entry is no mapping of names.
    """
    if _SHARED not in metadata:
        return tensors
    remedy = "save or download the adapter again"
    sources = parse_json(metadata[_SHARED], f"metadata {_SHARED!r}", AdapterError, remedy=remedy)
    if not isinstance(sources, dict) or not all(isinstance(source, str) for source in sources.values()):
        raise AdapterError(
            "the entry is no mapping of module names",
            where=f"metadata {_SHARED!r}",
            remedy=remedy,
        )
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.rpartition(".")
        modules.setdefault(name, {})[suffix] = tensor
    return {
        **{f"{name}.{suffix}": tensor for name in sources for suffix, tensor in modules.get(sources[name], {}).items()},
        **tensors,
    }
