"""Read-only formats of FLUX.1 adapters that use the original code's names without a prefix.

They are Black Forest Labs' control adapters (`FLUX.1-Depth-dev-lora`, `FLUX.1-Canny-dev-lora`) and XLabs'.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lora_engine.adapters import Adapter, Delta
from lora_engine.catalog import formats as catalog
from lora_engine.errors import AdapterError
from lora_engine.families.names import TRANSFORMER
from lora_engine.formats.card import Card
from lora_engine.formats.codec import Names, TensorCodec
from lora_engine.formats.key_layout import DIFFUSERS_KEYS, LYCORIS_KEYS, KeyLayout, TableFactorKeys
from lora_engine.formats.transformers.dit import transformers
from lora_engine.formats.transformers.names import FoundModule

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = r"(?:(?:model\.)?diffusion_model\.|transformer\.)?"
_BLOCKS = r"(?:double|single)_blocks\.\d+\."


class ReadOnlyCodec(TensorCodec):
    """Base class of formats that are only read: one program writes them, and its users can read other formats."""

    def encode(
        self, adapter: Adapter, card: Card | None = None, names: Names | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Raises an error.

        Raises:
            AdapterError: Always; the format is only read.
        """
        raise AdapterError(
            f"the format {self.name!r} can only be read",
            allowed=", ".join(sorted(catalog.written_formats())),
            remedy="choose comfyui, which reads the same names",
        )

    def is_lossless(self, adapter: Adapter) -> bool:
        """Returns False."""
        return False


_BFL = KeyLayout("Black Forest Labs", writes_alpha=False)
_BFL.add(
    TableFactorKeys("lora", {"down": "lora_A.weight", "up": "lora_B.weight", "bias": "lora_B.bias"}, optional=("bias",))
)
_BFL.add(TableFactorKeys("replacement", {"value": "scale"}))


class BflCodec(ReadOnlyCodec):
    """`double_blocks.0.img_attn.qkv.lora_A.weight`, `lora_B.bias`, and `query_norm.scale` of norms.

    There is no alpha: the scale is always 1. The `scale` of a norm replaces the base's.
    """

    format = catalog.BFL
    key_layout = KeyLayout("Black Forest Labs", writes_alpha=False, also=(_BFL, DIFFUSERS_KEYS, LYCORIS_KEYS))

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if any name begins with the original blocks, and none is of a processor."""
        return any(re.match(_BLOCKS, key) for key in keys) and not any(".processor." in key for key in keys)


class XlabsCodec(ReadOnlyCodec):
    """`double_blocks.0.processor.qkv_lora1.down.weight`: 1 is the image stream, 2 the text stream; no alpha."""

    format = catalog.XLABS
    key_layout = KeyLayout(
        "XLabs",
        writes_alpha=False,
        also=(
            KeyLayout(
                "XLabs",
                writes_alpha=False,
                rewrites=((r"_lora(\d?)\.(up|down)\.weight$", r"_lora\1.factor.\2.weight"),),
            ),
        ),
    )

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if all names are of processors of the original blocks."""
        return all(re.match(rf"{_PREFIX}{_BLOCKS}processor\.", key) for key in keys)

    def _normalized(
        self,
        deltas: Mapping[str, Delta],
        metadata: Mapping[str, str],
        families: Collection[str],
        known: Collection[str] | None,
        shapes: Mapping[str, Sequence[int]],
    ) -> Iterator[tuple[str, str, Delta]]:
        family, table = next((f, f.other_names[self.name]) for f in transformers() if self.name in f.other_names)
        for raw, delta in deltas.items():
            target = table.find(re.sub(rf"^{_PREFIX}", "", raw))
            if target is None:
                raise AdapterError(
                    f"XLabs' adapters have no module {raw!r}",
                    where=f"module {raw!r}",
                    allowed=", ".join(name for blocks in table.blocks for name in blocks.modules),
                    remedy="check where the file comes from",
                )
            for name, part in FoundModule(family, target, TRANSFORMER).deltas(delta, f"module {raw!r}", shapes):
                yield raw, name, part


XlabsCodec.key_layout.also[0].add(TableFactorKeys("lora", {"down": "factor.down.weight", "up": "factor.up.weight"}))
