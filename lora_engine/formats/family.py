"""Determines the base family of an adapter from its header and module names."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from lora_engine.adapters import Delta, DoraDelta, FullDelta, LohaDelta, LokrDelta, LoraDelta
from lora_engine.formats.transformers.names import family_from_header, transformer_family

FAMILY = "loraline.base"
FINGERPRINT = "loraline.fingerprint"

# Width of the text embeddings that cross attention reads.
_CONTEXT = {768: "sd", 1024: "sd", 2048: "sdxl"}
_VERSIONS = {"sdxl": "sdxl", "sd_xl": "sdxl", "sd_v1": "sd", "sd_v2": "sd", "sd_1": "sd", "sd_2": "sd"}
_ONLY_SDXL = ("text_encoder_2.", "unet.add_embedding.")


def family_of(header: Mapping[str, str], modules: Mapping[str, Delta], base_modules: Collection[str] = ()) -> str:
    """Returns the family, or an empty string if it cannot be determined.

    Args:
        header: Metadata of the file.
        modules: Canonical name to delta.
        base_modules: Canonical names of the base's modules, if known.
    """
    if FAMILY in header:
        return header[FAMILY]
    version = header.get("ss_base_model_version", "")
    families = [family for prefix, family in _VERSIONS.items() if version.startswith(prefix)]
    if families:
        return families[0]
    transformer = family_from_header(header) or transformer_family(base_modules) or transformer_family(modules)
    if transformer:
        return transformer
    if has_sdxl_modules([*modules, *base_modules]):
        return "sdxl"
    return next(filter(None, (_CONTEXT.get(width) for width in context_widths(modules))), "")


def has_sdxl_modules(names: Collection[str]) -> bool:
    """Returns True if any module exists only in SDXL."""
    return any(name.startswith(_ONLY_SDXL) for name in names)


def context_widths(modules: Mapping[str, Delta]) -> list[int]:
    """Returns the text embedding widths that the U-Net's cross attention reads, by the shapes of the factors."""
    suffixes = (".attn2.to_k", ".attn2.to_v")
    deltas = (delta for name, delta in modules.items() if name.startswith("unet.") and name.endswith(suffixes))
    return [width for delta in deltas if (width := _inputs(delta)) is not None]


def _inputs(delta: Delta) -> int | None:
    if isinstance(delta, DoraDelta):
        return _inputs(delta.inner)
    if isinstance(delta, LoraDelta):
        return delta.down.shape[1]
    if isinstance(delta, LohaDelta | LokrDelta):
        return delta.sides[1]
    return delta.diff.shape[1] if isinstance(delta, FullDelta) and delta.diff is not None else None
