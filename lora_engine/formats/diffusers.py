"""diffusers' format (`load_lora_weights`): canonical names with PEFT's factors, and the scale in `up`.

diffusers stores alpha in the header. ComfyUI ignores it and uses scale 1, and diffusers 0.42 itself replaces mixed
alphas by the most common one. Files are therefore written without alpha; the header's alpha is only read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from lora_engine.adapters import Adapter, Delta, DoraDelta, LoraDelta, canonical_name
from lora_engine.catalog import formats as catalog
from lora_engine.errors import AdapterError
from lora_engine.formats.card import Card
from lora_engine.formats.codec import AlphaRule, Names, TensorCodec
from lora_engine.formats.key_layout import DIFFUSERS_KEYS, LYCORIS_KEYS, KeyLayout
from lora_engine.formats.key_layouts.lora import with_scaled_bias
from lora_engine.formats.lora_config import CONFIG, alpha_of, check_one_kind, parse_config
from lora_engine.formats.native import COMPONENTS
from lora_engine.formats.transformers.names import BARE, folded, folded_lora, is_transformer

if TYPE_CHECKING:
    from torch import Tensor

# First levels of a U-Net, for files saved from the U-Net alone.
_UNET = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "conv_out.", "time_embedding.", "add_embedding.")
# Old names in a module's path to the current ones; applied in order.
_OLD = (
    (r"^(\w+)\.base_model\.model\.", r"\1."),
    (r"\.processor\.to_", ".to_"),
    # AnimateDiff's own names of its motion modules.
    (r"(\.motion_modules\.\d+)\.temporal_transformer\.", r"\1."),
    (r"(\.motion_modules\..+)\.attention_blocks\.0\.", r"\1.attn1."),
    (r"(\.motion_modules\..+)\.attention_blocks\.1\.", r"\1.attn2."),
    (r"(\.attn\d?)\.to_out$", r"\1.to_out.0"),
    (r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj"),
)


class DiffusersCodec(TensorCodec):
    """`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight`."""

    format = catalog.DIFFUSERS
    embeddings: ClassVar[str] = "diffusers"
    keeps_alpha: ClassVar[bool] = False
    key_layout = KeyLayout("diffusers", writes_alpha=False, extends=DIFFUSERS_KEYS, also=(DIFFUSERS_KEYS, LYCORIS_KEYS))

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if all names begin with a component or a transformer's blocks, and some have known suffixes."""
        if all(key.startswith(BARE) for key in keys):
            return is_transformer(keys) and self.key_layout.matches(keys)
        return all(key.startswith((*COMPONENTS, *_UNET)) for key in keys) and DIFFUSERS_KEYS.matches(keys)

    def resolve(
        self, raw: Collection[str], metadata: Mapping[str, str], known: Collection[str] | None
    ) -> dict[str, str]:
        """Returns the same names with the level `text_model` restored and attention processors removed."""
        parts = ((name, *_current_name(name).split(".", 1)) for name in raw)
        return {name: canonical_name(component, path) for name, component, path in parts}

    def alpha_rule(self, metadata: Mapping[str, str]) -> AlphaRule:
        """Returns the rule that reads alpha from the header's `LoraConfig`, whose keys begin with the component."""
        if CONFIG not in metadata:
            return super().alpha_rule(metadata)
        where = f"metadata {CONFIG!r}"
        whole = parse_config(metadata[CONFIG], where)

        def alpha(raw: str, rank: int | None) -> float | None:
            component, _, path = raw.partition(".")
            prefix = f"{component}."
            config = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
            return alpha_of(config, path, rank, where)

        return alpha

    def to_supported(self, adapter: Adapter) -> Adapter:
        """Returns the adapter with Tucker cores multiplied out and scales folded into `up`."""
        modules = {name: _folded(name, without_core(delta)) for name, delta in adapter.modules.items()}
        return replace(adapter, modules={name: with_scaled_bias(delta) for name, delta in modules.items()})

    def encode(
        self, adapter: Adapter, card: Card | None = None, names: Names | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the tensors and the metadata.

        Raises:
            AdapterError: A kind that diffusers does not load, such as LoHa, LoKr and full differences.
        """
        for name, delta in adapter.modules.items():
            if delta.kind not in self.key_layout.factor_keys:
                raise AdapterError(
                    f"the format cannot hold an adapter of kind {delta.kind!r}, because diffusers does not load it",
                    where=name,
                    allowed=", ".join(self.key_layout.factor_keys),
                    remedy="choose another format, such as loraline, kohya or peft",
                )
        return super().encode(adapter, card, names)

    def header(self, adapter: Adapter, card: Card) -> dict[str, str]:
        """Returns the header that `save_lora_weights` writes.

        Raises:
            AdapterError: A component has modules of several kinds.
        """
        components: dict[str, dict[str, Delta]] = {}
        for name, delta in adapter.modules.items():
            component, _, path = name.partition(".")
            components.setdefault(component, {})[path] = delta
        for component, modules in components.items():
            check_one_kind(modules, component)
        return {"format": "pt"}


def _current_name(name: str) -> str:
    name = f"unet.{name}" if name.startswith(_UNET) else name
    for pattern, replacement in _OLD:
        name = re.sub(pattern, replacement, name)
    return name


def without_core(delta: Delta) -> Delta:
    """Returns a LoRA (or the one in a DoRA) with its Tucker core multiplied out; any other delta unchanged."""
    if isinstance(delta, DoraDelta) and isinstance(delta.inner, LoraDelta):
        return delta.with_inner(delta.inner.without_core())
    return delta.without_core() if isinstance(delta, LoraDelta) else delta


def _folded(name: str, delta: Delta) -> Delta:
    if isinstance(delta, DoraDelta) and isinstance(delta.inner, LoraDelta):
        return delta.with_inner(folded_lora(name, delta.inner))
    return folded(name, delta)
