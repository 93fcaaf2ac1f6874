"""kohya's format (sd-scripts), which A1111, ComfyUI and nearly all others read: flattened names, alpha as tensors.

SD 1 and 2 with diffusers' names, SDXL with the original names of the U-Net. Flattened names are resolved through a
table made of the base's modules, never split.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import ClassVar

from torch import Tensor

from lora_engine.adapters import Adapter
from lora_engine.adapters.tree import near_names
from lora_engine.errors import AdapterError
from lora_engine.files import canonical_json
from lora_engine.formats.card import Card
from lora_engine.formats.codec import TensorCodec, codecs
from lora_engine.formats.family import FAMILY, context_widths, has_sdxl_modules
from lora_engine.formats.foreign import foreign_reason
from lora_engine.formats.safetensors_io import digests
from lora_engine.formats.sgm import sgm_path
from lora_engine.formats.spelling import LYCORIS

MODULES = "loraline.modules"
_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
_PREFIXES_SDXL = {**_PREFIXES, "text_encoder": "lora_te1"}
_STARTS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
_ARCHITECTURES = {
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base/lora",
    "sd_v2": "stable-diffusion-v2-512/lora",
    "sd_v1": "stable-diffusion-v1/lora",
}


class KohyaCodec(TensorCodec):
    """`lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight`."""

    name: ClassVar[str] = "kohya"
    style = LYCORIS

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether all names begin as kohya's do."""
        return bool(keys) and all(key.startswith(_STARTS) for key in keys)

    def raw_name(self, name: str, family: str) -> str:
        """The flattened name; for SDXL's U-Net, of the original path."""
        component, _, path = name.partition(".")
        prefixes = _PREFIXES_SDXL if family == "sdxl" else _PREFIXES
        if component not in prefixes:
            raise AdapterError(
                f"kohya's format has no name for the component {component!r}",
                where=name,
                allowed=", ".join(prefixes),
                remedy="choose another format",
            )
        original = sgm_path(path) if family == "sdxl" and component == "unet" else None
        return _flat(prefixes[component], original or path)

    def resolve(
        self, raw: Collection[str], metadata: Mapping[str, str], known: Collection[str] | None
    ) -> dict[str, str]:
        """Canonical names by way of a table of the base's modules, or of those that our own header lists."""
        reason = foreign_reason(raw)
        names = _listed(metadata) if known is None else known
        if names is None:
            raise AdapterError(
                f"the file is {reason}; that base is not supported" if reason else "a base is needed to read the names",
                where=f"module {min(raw)!r}",
                allowed="kohya's flattened names, resolved through the modules of a base",
                remedy="name the base that the adapter was made for",
            )
        table = _table(names, is_sdxl=has_sdxl_modules(names) or metadata.get(FAMILY) == "sdxl")
        lost = [name for name in raw if name not in table]
        if lost:
            raise AdapterError(
                f"{len(lost)} of {len(raw)} modules are not in the base, the first is {lost[0]!r}"
                + (f"; the file is {reason}" if reason else ""),
                where=f"module {lost[0]!r}",
                allowed=near_names(lost[0], table),
                remedy="name the base that the adapter was made for",
            )
        return {name: _one(name, table[name]) for name in raw}

    def header(self, adapter: Adapter, card: Card) -> dict[str, str]:
        """The `ss_*` that readers look for, `modelspec.*`, and the canonical names for ourselves."""
        ranks = {delta.rank for delta in adapter.modules.values()}
        alphas = {delta.alpha for delta in adapter.modules.values()}
        kinds = {delta.kind for delta in adapter.modules.values()}
        version = _version(adapter)
        header = {
            MODULES: canonical_json(list(adapter.modules)).decode(),
            "ss_network_module": "networks.lora" if kinds == {"lora"} else "lycoris.kohya",
            "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
            "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
            "ss_v2": str(version == "sd_v2"),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        }
        if version:
            header |= {"ss_base_model_version": version, "modelspec.architecture": _ARCHITECTURES[version]}
        if card.base:
            header["ss_sd_model_name"] = card.base
        return header | ({"ss_output_name": card.title} if card.title else {})

    def seal(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
        """Kohya's two digests: over the tensors with the `ss_*` metadata alone."""
        whole, short = digests(tensors, {key: text for key, text in metadata.items() if key.startswith("ss_")})
        return {"sshs_model_hash": whole, "sshs_legacy_hash": short}


def _flat(prefix: str, path: str) -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def _spellings(name: str, *, is_sdxl: bool) -> Iterator[str]:
    """Every flattened name that programs give a module of this canonical name."""
    component, _, path = name.partition(".")
    for prefix in {prefixes.get(component) for prefixes in (_PREFIXES, _PREFIXES_SDXL)} - {None}:
        yield _flat(str(prefix), path)
    original = sgm_path(path) if is_sdxl and component == "unet" else None
    if original:
        yield _flat(_PREFIXES["unet"], original)


def _table(names: Collection[str], *, is_sdxl: bool) -> dict[str, set[str]]:
    table: dict[str, set[str]] = {}
    for name in names:
        for flat in _spellings(name, is_sdxl=is_sdxl):
            table.setdefault(flat, set()).add(name)
    return table


def _one(flat: str, names: set[str]) -> str:
    if len(names) > 1:
        allowed = ", ".join(sorted(names))
        raise AdapterError(
            "the flattened name stands for several modules of the base",
            where=f"module {flat!r}",
            allowed=f"one of {allowed}",
            remedy="convert the adapter to a format with dotted names",
        )
    return next(iter(names))


def _listed(metadata: Mapping[str, str]) -> list[str] | None:
    """The canonical names that our own header lists; None where it lists none."""
    try:
        names = json.loads(metadata.get(MODULES, "null"))
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list and names else None


def _version(adapter: Adapter) -> str:
    if adapter.base == "sdxl":
        return "sdxl_base_v1-0"
    if adapter.base != "sd":
        return ""
    return "sd_v2" if 1024 in context_widths(adapter.modules) else "sd_v1"


codecs.add(KohyaCodec.name, KohyaCodec())
