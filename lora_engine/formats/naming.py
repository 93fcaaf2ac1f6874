"""Other programs' names of modules, flattened or in the original numbering, and back to canonical names.

The dots of a flattened name are gone, and original numbers mean other modules in other families, so a name is looked up
in a table that is made of the modules of a base, never taken apart.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from lora_engine.adapters.tree import near_names
from lora_engine.errors import AdapterError
from lora_engine.formats.family import FAMILY, has_sdxl_modules
from lora_engine.formats.ldm_names import LAYOUTS, original_path
from lora_engine.formats.unsupported import unsupported_reason

MODULES = "loraline.modules"
"""Metadata key: the canonical names of the file's modules, which we write for ourselves."""
PREFIXES: Mapping[str, str] = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
PREFIXES_SDXL: Mapping[str, str] = {**PREFIXES, "text_encoder": "lora_te1"}
STARTS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "oft_unet_")


@dataclass(frozen=True, eq=False)
class ModuleNaming:
    """How files name the modules of a component: what precedes the path, and what its levels are joined with.

    Attributes:
        prefixes: Component to every prefix that some program gives it.
        joint: Between prefix and path, and between the levels of the path.
    """

    prefixes: Mapping[str, tuple[str, ...]]
    separator: str

    def spell(self, prefix: str, path: str) -> str:
        """The name of a module; without a prefix, the path alone."""
        spelt = path.replace(".", self.separator)
        return f"{prefix}{self.separator}{spelt}" if prefix else spelt


# LyCORIS' wrapper is around one module, whichever it is; kohya's own OFT has a prefix for itself.
FLAT = ModuleNaming(
    {
        "unet": ("lora_unet", "lycoris", "oft_unet"),
        "text_encoder": ("lora_te", "lora_te1", "lycoris"),
        "text_encoder_2": ("lora_te2", "lycoris"),
    },
    "_",
)
# ComfyUI's, the Open Model Initiative's (`clip_l`), and OneTrainer's, inside and in its original layout (no prefix).
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
# SD 2 has every module that SD 1 has, under the same names, and more layers in its text encoder.
_PUBLISHED = {"sd": "sd2", "sdxl": "sdxl"}
_VERSIONS = {"sd": "sd_", "sdxl": "sdxl_"}  # of `ss_base_model_version`


def resolve_names(
    raw: Collection[str], metadata: Mapping[str, str], known: Collection[str] | None, naming: ModuleNaming = FLAT
) -> dict[str, str]:
    """Canonical name of each of a file's module names.

    Args:
        raw: The file's names.
        metadata: Of the file; our own header lists canonical names.
        known: Canonical names of the base's modules. None takes the header's list, or else a published architecture
            in which all of the names are found and which leaves no doubt.
        naming: How the file names modules.

    Raises:
        AdapterError: A name that the base has not, or that stands for several modules, or no base to look it up in.
    """
    names = listed_modules(metadata) if known is None else known
    if names is None:
        reason = unsupported_reason(raw)
        found = None if reason else _published(raw, metadata.get("ss_base_model_version", ""), naming)
        if found is not None:
            return dict(found)
        raise AdapterError(
            f"the file is {reason}; that base is not supported" if reason else "a base is needed to read the names",
            where=f"module {min(raw)!r}",
            allowed="names that are looked up among the modules of a base",
            remedy="name the base that the adapter was made for",
        )
    table = name_table(names, is_sdxl=has_sdxl_modules(names) or metadata.get(FAMILY) == "sdxl", naming=naming)
    lost = [name for name in raw if name not in table]
    if lost:
        reason = unsupported_reason(raw)
        raise AdapterError(
            f"{len(lost)} of {len(raw)} modules are not in the base, the first is {lost[0]!r}"
            + (f"; the file is {reason}" if reason else ""),
            where=f"module {lost[0]!r}",
            allowed=near_names(lost[0], table),
            remedy="name the base that the adapter was made for",
        )
    return {name: _one(name, table[name]) for name in raw}


def name_table(names: Collection[str], *, is_sdxl: bool, naming: ModuleNaming = FLAT) -> dict[str, set[str]]:
    """Every name that programs give the modules of a base, to the canonical names that it may stand for."""
    table: dict[str, set[str]] = {}
    for name in names:
        for spelt in _spellings(name, is_sdxl=is_sdxl, naming=naming):
            table.setdefault(spelt, set()).add(name)
    return table


def listed_modules(metadata: Mapping[str, str]) -> list[str] | None:
    """The canonical names that our own header lists; None where it lists none."""
    try:
        names = json.loads(metadata.get(MODULES, "null"))
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list and names else None


def _spellings(name: str, *, is_sdxl: bool, naming: ModuleNaming) -> Iterator[str]:
    component, _, path = name.partition(".")
    original = original_path(path, LAYOUTS["sdxl" if is_sdxl else "sd"]) if component == "unet" else None
    # Programs that took the names from transformers 5 lack the level.
    short = path.removeprefix(_LEVEL) if component.startswith("text_encoder") else path
    for prefix in naming.prefixes.get(component, ()):
        for spelt in {path, short, original or path}:
            yield naming.spell(prefix, spelt)


def _one(spelt: str, names: set[str]) -> str:
    if len(names) > 1:
        allowed = ", ".join(sorted(names))
        raise AdapterError(
            "the flattened name stands for several modules of the base",
            where=f"module {spelt!r}",
            allowed=f"one of {allowed}",
            remedy="convert the adapter to a format with dotted names",
        )
    return next(iter(names))


def _published(raw: Collection[str], version: str, naming: ModuleNaming) -> Mapping[str, str] | None:
    """The names by way of the published architectures, where exactly one reading of all of them is possible."""
    wanted = [family for family in _PUBLISHED if version.startswith(_VERSIONS[family])] or list(_PUBLISHED)
    readings = []
    for family in wanted:
        table = _published_table(family, naming)
        if all(len(table.get(name, ())) == 1 for name in raw):
            readings.append({name: next(iter(table[name])) for name in raw})
    return readings[0] if readings and all(reading == readings[0] for reading in readings) else None


@functools.cache
def _published_table(family: str, naming: ModuleNaming) -> dict[str, set[str]]:
    # The architectures import diffusers, which only files without a base and without our header need.
    from lora_engine.bases.published import published_module_shapes

    return name_table(published_module_shapes(_PUBLISHED[family]), is_sdxl=family == "sdxl", naming=naming)
