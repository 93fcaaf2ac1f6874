"""Maps other programs' module names (flattened, or with the original numbering) to canonical names.

A flattened name has lost its dots, and an original block number means different modules in different families.
Names are therefore looked up in a table built from the modules of a base. They are never parsed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from lora_engine.adapters.module_names import near_names
from lora_engine.adapters.published import published_module_shapes
from lora_engine.documents import parse_json
from lora_engine.errors import AdapterError, UnknownBaseError
from lora_engine.families import families
from lora_engine.formats.family import FAMILY, has_sdxl_modules, unsupported_reason
from lora_engine.formats.ldm_names import LAYOUTS, original_path

MODULES = "loraline.modules"
"""Metadata key under which Loraline writes the canonical names of the file's modules."""
PREFIXES: Mapping[str, str] = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
PREFIXES_SDXL: Mapping[str, str] = {**PREFIXES, "text_encoder": "lora_te1"}
STARTS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "oft_unet_")


@dataclass(frozen=True, eq=False)
class ModuleNaming:
    """A scheme of module names: the prefixes of each component, and the separator between path levels.

    Attributes:
        prefixes: Component to every prefix that a known program writes for it.
        separator: Text between prefix and path, and between the levels of the path.
    """

    prefixes: Mapping[str, tuple[str, ...]]
    separator: str

    def format_name(self, prefix: str, path: str) -> str:
        """Returns the module name in this scheme; an empty prefix gives the path alone."""
        written = path.replace(".", self.separator)
        return f"{prefix}{self.separator}{written}" if prefix else written


# LyCORIS' wrapper has one prefix for every component. kohya's own OFT has its own prefix.
FLAT = ModuleNaming(
    {
        "unet": ("lora_unet", "lycoris", "oft_unet"),
        "text_encoder": ("lora_te", "lora_te1", "lycoris"),
        "text_encoder_2": ("lora_te2", "lycoris"),
    },
    "_",
)
# Prefixes of ComfyUI, of the Open Model Initiative (`clip_l`), and of OneTrainer (its original layout has no prefix).
DOTTED = ModuleNaming(
    {
        "unet": ("diffusion_model", "model.diffusion_model", "unet", "unet.base_model.model", "lora_unet", ""),
        "text_encoder": (
            *("text_encoders.clip_l.transformer", "text_encoders.clip_h.transformer", "clip_l"),
            *("text_encoder", "text_encoder.base_model.model", "lora_te", "lora_te1"),
        ),
        "text_encoder_2": (
            *("text_encoders.clip_g.transformer", "clip_g"),
            *("text_encoder_2", "text_encoder_2.base_model.model", "lora_te2"),
        ),
    },
    ".",
)
_LEVEL = "text_model."


def resolve_names(
    raw: Collection[str], metadata: Mapping[str, str], known: Collection[str] | None, naming: ModuleNaming = FLAT
) -> dict[str, str]:
    """Returns the canonical name of each module name of a file.

    Args:
        raw: Module names in the file.
        metadata: Metadata of the file; Loraline's own header lists canonical names.
        known: Canonical names of the base's modules. None uses the list in the header, or else the published
            architectures, if they contain all names and agree on them.
        naming: Naming scheme of the file.

    Raises:
        AdapterError: A name is not in the base or matches several modules.
        UnknownBaseError: No base is known.
    """
    names = listed_modules(metadata) if known is None else known
    if names is None:
        reason = unsupported_reason(raw)
        published = None if reason else _published(raw, metadata.get("ss_base_model_version", ""), naming)
        if published is not None:
            return dict(published)
        raise UnknownBaseError(
            f"the file is {reason}; that base is not supported" if reason else "a base is needed to read the names",
            where=f"module {min(raw)!r}",
            allowed="module names of a base",
            remedy="name the base that the adapter was made for",
        )
    table = name_table(names, is_sdxl=has_sdxl_modules(names) or metadata.get(FAMILY) == "sdxl", naming=naming)
    unmatched = [name for name in raw if name not in table]
    if unmatched:
        reason = unsupported_reason(raw)
        raise AdapterError(
            f"{len(unmatched)} of {len(raw)} modules are not in the base, the first is {unmatched[0]!r}"
            + (f"; the file is {reason}" if reason else ""),
            where=f"module {unmatched[0]!r}",
            allowed=near_names(unmatched[0], table),
            remedy="name the base that the adapter was made for",
        )
    return {name: _single(name, table[name]) for name in raw}


def name_table(names: Collection[str], *, is_sdxl: bool, naming: ModuleNaming = FLAT) -> Mapping[str, AbstractSet[str]]:
    """Returns, for every name that programs write for a base's modules, the canonical names that it may mean."""
    return _name_table(tuple(names), is_sdxl, naming)


@functools.lru_cache(maxsize=8)
def _name_table(names: tuple[str, ...], is_sdxl: bool, naming: ModuleNaming) -> Mapping[str, AbstractSet[str]]:
    """Builds the table; the same base reads many files."""
    table: dict[str, set[str]] = {}
    for name in names:
        for written in _written_names(name, is_sdxl=is_sdxl, naming=naming):
            table.setdefault(written, set()).add(name)
    return table


def listed_modules(metadata: Mapping[str, str]) -> list[str] | None:
    """Returns the canonical names listed in Loraline's own header, or None without such a list."""
    where = f"metadata {MODULES!r}"
    names = parse_json(metadata.get(MODULES, "null"), where, AdapterError, remedy="save or download the adapter again")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise AdapterError("not a list of module names", where=where, remedy="save or download the adapter again")
    return names or None


def _written_names(name: str, *, is_sdxl: bool, naming: ModuleNaming) -> Iterator[str]:
    component, _, path = name.partition(".")
    original = original_path(path, LAYOUTS["sdxl" if is_sdxl else "sd"]) if component == "unet" else None
    # transformers 5 has no level `text_model`, so files written with it lack it too.
    short = path.removeprefix(_LEVEL) if component.startswith("text_encoder") else path
    for prefix in naming.prefixes.get(component, ()):
        for written in {path, short, original or path}:
            yield naming.format_name(prefix, written)


def _single(written: str, names: AbstractSet[str]) -> str:
    if len(names) > 1:
        allowed = ", ".join(sorted(names))
        raise AdapterError(
            "the flattened name matches several modules of the base",
            where=f"module {written!r}",
            allowed=f"one of {allowed}",
            remedy="convert the adapter to a format with dotted names",
        )
    return next(iter(names))


def _published(raw: Collection[str], version: str, naming: ModuleNaming) -> Mapping[str, str] | None:
    """Returns the canonical names if the published architectures give exactly one reading of all names, else None."""
    names = {name: family.header for name, family in families.items() if family.unet is not None}
    stated = [name for name, pattern in names.items() if re.fullmatch(pattern, version)]
    readings = []
    for family in stated or names:
        table = _published_table(family, naming)
        if all(len(table.get(name, ())) == 1 for name in raw):
            readings.append({name: next(iter(table[name])) for name in raw})
    return readings[0] if readings and all(reading == readings[0] for reading in readings) else None


@functools.cache
def _published_table(family: str, naming: ModuleNaming) -> Mapping[str, AbstractSet[str]]:
    unet = families[family].unet
    shapes = published_module_shapes(unet.published) if unet else {}
    return name_table(shapes, is_sdxl=family == "sdxl", naming=naming)
