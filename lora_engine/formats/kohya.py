"""kohya's format (sd-scripts), which A1111, ComfyUI and most programs read: flattened names, alpha as tensors.

SD 1 and 2 are written with diffusers' names, SDXL with the original names of the U-Net; both namings are read for all.
`naming` looks flattened names up. `kohya_like` has the formats that differ from kohya's in a few names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from lora_engine.adapters import Adapter, Delta, OftDelta, OftPartsDelta
from lora_engine.catalog import formats as catalog
from lora_engine.errors import AdapterError
from lora_engine.families import families
from lora_engine.files import canonical_json
from lora_engine.formats.card import Card
from lora_engine.formats.codec import TensorCodec
from lora_engine.formats.family import is_motion
from lora_engine.formats.key_layout import KOHYA_KEYS
from lora_engine.formats.ldm_names import LAYOUTS, original_path
from lora_engine.formats.modelspec import base_version
from lora_engine.formats.naming import FLAT, MODULES, PREFIXES, PREFIXES_SDXL, STARTS, resolve_names
from lora_engine.formats.safetensors_io import BODY_SHA256, short_digest
from lora_engine.formats.transformers.names import KOHYA_EXPORT_NAMING

if TYPE_CHECKING:
    from torch import Tensor


class KohyaCodec(TensorCodec):
    """`lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight`."""

    format = catalog.KOHYA
    key_layout = KOHYA_KEYS
    transformers = KOHYA_EXPORT_NAMING
    starts: ClassVar[tuple[str, ...]] = STARTS
    original: ClassVar[Collection[str]] = [
        name for name, family in families.items() if family.unet is not None and family.unet.original
    ]
    """Families whose U-Net is written with the original names."""

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if all names have kohya's prefixes."""
        return bool(keys) and all(key.startswith(self.starts) for key in keys)

    def raw_name(self, name: str, family: str) -> str:
        """Returns the flattened name; for SDXL's U-Net, of the original path."""
        component, _, path = name.partition(".")
        if is_motion(path):
            raise AdapterError(
                f"the programs of the format {self.name!r} do not load AnimateDiff's motion modules",
                where=name,
                allowed="diffusers, peft, loraline",
                remedy="choose diffusers, whose AnimateDiff pipeline loads the file",
            )
        prefixes = PREFIXES_SDXL if family == "sdxl" else PREFIXES
        if component not in prefixes:
            raise AdapterError(
                f"the format {self.name!r} has no name for the component {component!r}",
                where=name,
                allowed=", ".join(prefixes),
                remedy="choose another format",
            )
        is_original = family in self.original and component == "unet"
        original = original_path(path, LAYOUTS[family]) if is_original else None
        return FLAT.format_name(prefixes[component], original or path)

    def _raw_modules(self, adapter: Adapter) -> Iterator[tuple[str, str, Delta]]:
        """Yields name, name in the file and delta; OFT has kohya's own form and prefix if a fused layer needs them."""
        modules = list(super()._raw_modules(adapter))
        has_parts = any(isinstance(delta, OftPartsDelta) for *_, delta in modules)
        for name, raw, delta in modules:
            if has_parts and isinstance(delta, OftDelta) and delta.alpha and delta.rescale is None:
                yield name, _oft_name(raw), OftPartsDelta((delta.blocks,), delta.alpha)
            else:
                yield name, _oft_name(raw) if isinstance(delta, OftPartsDelta) else raw, delta

    def resolve(
        self, raw: Collection[str], metadata: Mapping[str, str], known: Collection[str] | None
    ) -> dict[str, str]:
        """Returns canonical names, looked up among the base's modules or those in our own header."""
        return resolve_names(raw, metadata, known)

    def header(self, adapter: Adapter, card: Card) -> dict[str, str]:
        """Returns the `ss_*` entries that readers use, and the canonical names for Loraline."""
        kinds = {delta.kind for delta in adapter.modules.values()}
        version = base_version(adapter, card)
        header = {
            MODULES: canonical_json(list(adapter.modules)).decode(),
            "ss_network_module": "networks.lora" if kinds == {"lora"} else "lycoris.kohya",
            **rank_header(adapter),
            "ss_v2": str(version.startswith("sd_v2")),
        }
        if version:
            header["ss_base_model_version"] = version
        if card.base:
            header["ss_sd_model_name"] = card.base
        return header | _training_header(card)

    def finalize_metadata(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
        """Returns kohya's two digests, over the tensors with only the `ss_*` metadata."""
        hashed = {key: text for key, text in metadata.items() if key.startswith("ss_")}
        return {"sshs_model_hash": BODY_SHA256, "sshs_legacy_hash": short_digest(tensors, hashed)}


def _oft_name(raw: str) -> str:
    return re.sub("^lora_unet_", "oft_unet_", raw)


def rank_header(adapter: Adapter) -> dict[str, str]:
    """Returns the entries of rank and alpha, `Dynamic` if modules differ; none for kinds without them."""
    deltas = adapter.modules.values()
    return {
        **_header_entry("ss_network_dim", {delta.rank for delta in deltas}),
        **_header_entry("ss_network_alpha", {delta.alpha for delta in deltas}),
    }


def _training_header(card: Card) -> dict[str, str]:
    """Returns the entries about the training that A1111 and Civitai show: name, images, resolution, trigger word."""
    images, size = len(card.data), (card.resolution or "").partition("x")
    tags = {card.class_word or "images": {card.trigger: images}}
    entries = {
        "ss_output_name": card.title,
        "ss_clip_skip": str(card.recipe.get("clip_skip") or ""),
        "ss_zero_terminal_snr": "True" if card.recipe.get("zero_terminal_snr") is True else "",
        **_vae_header(card.recipe.get("vae")),
        "ss_num_train_images": str(images) if images else "",
        "ss_resolution": f"({size[0]}, {size[2]})" if size[2] else "",
        "ss_tag_frequency": canonical_json(tags).decode() if card.trigger and images else "",
    }
    return {key: text for key, text in entries.items() if text}


def _vae_header(vae: object) -> dict[str, str]:
    """Returns the name of another autoencoder that the adapter was trained with."""
    return {"ss_vae_name": str(vae["name"])} if isinstance(vae, Mapping) and "name" in vae else {}


def _header_entry(key: str, values: Collection[float | None]) -> dict[str, str]:
    """Returns a header entry with the value of all modules, or `Dynamic` if they differ; none if they have none."""
    if set(values) == {None}:
        return {}
    return {key: str(next(iter(values))) if len(values) == 1 else "Dynamic"}
