"""Maps the module names of diffusion transformers in files to canonical names and back.

Reading accepts every known prefix. Writing uses one `ExportNaming` per format. The families' tables (`dit`, `flux`,
`sd3`) hold the names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from lora_engine.adapters import Adapter, Delta, LoraDelta
from lora_engine.errors import AdapterError
from lora_engine.formats.key_layout import DIFFUSERS, KeyLayout
from lora_engine.formats.transformers.dit import (
    TEXT_NAMES,
    TRANSFORMER,
    Shapes,
    Target,
    TransformerNames,
    transformer_names,
)
from lora_engine.formats.transformers.fused import delta_shape
from lora_engine.formats.transformers.unsupported import flattened, is_qwen_attention, unsupported, unsupported_family
from lora_engine.formats.validate import is_finite

# Prefix of a transformer's module names to the separator after it; the first match counts.
_SEPARATORS = {
    "base_model.model.": ".",
    "model.diffusion_model.": ".",
    "diffusion_model.": ".",
    "transformer.": ".",
    "lora_unet_": "_",
    "lora_transformer_": "_",
    "lycoris_": "_",
    "": ".",
}
_T5 = {"text_encoder_2.encoder.block.": "flux", "text_encoder_3.": "sd3"}  # canonical names
BARE = ("transformer_blocks.", "single_transformer_blocks.")
"""Prefixes of diffusers' names without a component."""
_NUMBERED = re.compile(r"lora_te([123]?)_(.+)")
_NAMED = re.compile(r"(?:text_encoders\.)?(clip_l|clip_g|t5(?:xxl)?)\.(?:transformer\.)?(.+)")
_INITIATIVE = re.compile(rf"{TRANSFORMER}\.(double|single|joint)_blocks\.\d+\.")
_HEADER = {
    "flux": re.compile(r"flux([-_.]?(1|dev|schnell).*|/.*)?", re.IGNORECASE),
    "sd3": re.compile(r"(sd[-_.]?|stable[-_.]diffusion[-_.]v?)3.*", re.IGNORECASE),
}


def is_aitoolkit(keys: Collection[str]) -> bool:
    """Returns True for ai-toolkit's names of transformers: ComfyUI's names with only PEFT's factors."""
    factors = (".lora_A.weight", ".lora_B.weight")
    return (
        bool(keys)
        and all(key.startswith("diffusion_model.") and key.endswith(factors) for key in keys)
        and is_transformer(keys)
    )


def is_transformer(keys: Collection[str]) -> bool:
    """Returns True if any tensor belongs to a diffusion transformer, supported or not."""
    return bool(transformer_family(keys))


def is_initiative(keys: Collection[str]) -> bool:
    """Returns True for the Open Model Initiative's names: original names below diffusers' component."""
    starts = (f"{TRANSFORMER}.", "clip_l.", "clip_g.", "t5.")
    return all(key.startswith(starts) for key in keys) and any(_INITIATIVE.match(key) for key in keys)


def transformer_family(names: Mapping[str, Delta] | Collection[str]) -> str:
    """Returns the transformer family of modules, supported or not; empty if it cannot be determined.

    Args:
        names: Module names in the file, or canonical ones; as a mapping to deltas, their widths decide if the names do
            not.
    """
    family = unsupported_family(names)
    if family:
        return family
    plain = {flattened(name): name for name in names}
    for table in transformer_names.values():
        if any(re.fullmatch(table.mark, name) for name in plain):
            return table.name
    for component, t5_family in _T5.items():
        if any(name.startswith(component) for name in names):
            return t5_family
    width = _attention_width(plain, names) if isinstance(names, Mapping) else None
    if is_qwen_attention(names, width):
        return "qwen_image"
    return next((table.name for table in transformer_names.values() if width in table.widths), "")


def family_from_header(header: Mapping[str, str]) -> str:
    """Returns the transformer family in a header's kohya or ModelSpec entries; empty if there is none."""
    entries = [header[key] for key in ("ss_base_model_version", "modelspec.architecture") if key in header]
    return next((family for family, form in _HEADER.items() if any(form.fullmatch(text) for text in entries)), "")


def refuse_unsupported(family: str, source: str) -> None:
    """Raises `AdapterError` if the family is known to be unsupported; the error names it."""
    if family in unsupported:
        titles = ", ".join(table.title for table in transformer_names.values())
        raise AdapterError(
            f"the adapter is for {unsupported[family].title} ({family}), a base family that is not supported",
            where=source,
            allowed=f"adapters for Stable Diffusion 1, 2, XL, {titles}",
            remedy="use it with the program that it was made for; `loraline inspect` shows its contents",
        )


@dataclass(frozen=True)
class FoundModule:
    """A module of a file that belongs to a transformer or to one of its text encoders.

    Attributes:
        family: Names of the family.
        target: The diffusers modules that it corresponds to.
        component: Component of the target's paths.
    """

    family: TransformerNames
    target: Target
    component: str

    def deltas(self, delta: Delta, where: str, shapes: Shapes) -> Iterator[tuple[str, Delta]]:
        """Yields the canonical names of the module's parts, and their deltas."""
        if self.target.original:
            yield from self.family.deltas_of(self.target, delta, where, shapes)
        else:
            yield f"{self.component}.{self.target.parts[0]}", delta


def find_modules(raw: Collection[str], family: str) -> dict[str, FoundModule]:
    """Returns the modules of a file that are in the families' tables; empty for a base that is no transformer.

    Args:
        raw: Module names in the file.
        family: Family of the base, empty if unknown; diffusers' names of double blocks are the same in all families.
    """
    if family in transformer_names:
        candidates = [transformer_names[family]]
    elif any(flattened(name).startswith("transformer_blocks_") for name in raw):
        candidates = list(transformer_names.values())
    else:
        return {}
    return {name: module for name in raw if (module := _find_in(name, candidates)) is not None}


def _find_in(raw: str, candidates: Collection[TransformerNames]) -> FoundModule | None:
    return next(filter(None, (_find(raw, family) for family in candidates)), None)


def _find(raw: str, family: TransformerNames) -> FoundModule | None:
    numbered, named = _NUMBERED.fullmatch(raw), _NAMED.fullmatch(raw)
    if numbered:
        return _find_text(family, numbered[2], "_", int(numbered[1] or 1))
    if named:
        return _find_text(family, named[2], ".", 0, "t5xxl" if named[1] == "t5" else named[1])
    component, _, rest = raw.partition(".")
    if component in family.text:
        return _find_text(family, rest, ".", 0, family.text[component])
    prefix = next(prefix for prefix in _SEPARATORS if raw.startswith(prefix))
    separator, path = _SEPARATORS[prefix], raw.removeprefix(prefix)
    target = family.names.find(path, separator)
    canonical = family.names.find_canonical(path, separator)
    if canonical is not None and (target is None or prefix == "transformer."):
        return FoundModule(family, Target((canonical,)), TRANSFORMER)
    return None if target is None else FoundModule(family, target, TRANSFORMER)


def _find_text(family: TransformerNames, path: str, separator: str, number: int, role: str = "") -> FoundModule | None:
    # Programs disagree on T5's number (2 or 3), so T5 is recognized by its names.
    for position, (component, encoder) in enumerate(family.text.items(), 1):
        if encoder == role or (not role and (position == number or encoder == "t5xxl")):
            canonical = TEXT_NAMES[encoder].find_canonical(path, separator)
            if canonical is not None:
                return FoundModule(family, Target((canonical,)), component)
    return None


def _attention_width(plain: Mapping[str, str], deltas: Mapping[str, Delta]) -> int | None:
    attention = re.compile(r"transformer_blocks_\d+_(attn_(to_[qkv]|add_[qkv]_proj)|norm1(_context)?_linear)")
    shapes = (delta_shape(deltas[name]) for flat, name in plain.items() if attention.fullmatch(flat))
    return next((shape[1] for shape in shapes if shape is not None), None)


@dataclass(frozen=True)
class ExportNaming:
    """The module names that a format writes for transformers and their text encoders.

    Attributes:
        prefixes: Prefix by role (`transformer`, and the roles in `TEXT_NAMES`). `{number}` is replaced by the number
            of the text encoder in its family, `{component}` by its name.
        original: True for the transformer's original names; the parts of fused layers are then fused.
        separator: Text between the levels of a path.
        key_layout: Key layout for these modules; None uses the format's.
        folded: True if the scale is folded into `up`, for readers that ignore alpha.
    """

    prefixes: Mapping[str, str]
    original: bool = True
    separator: str = "_"
    key_layout: KeyLayout | None = None
    folded: bool = False

    def applies_to(self, adapter: Adapter) -> bool:
        """Returns True if the adapter is for a transformer."""
        return adapter.base in transformer_names or any(name.startswith(f"{TRANSFORMER}.") for name in adapter.modules)

    def raw_modules(self, adapter: Adapter) -> list[tuple[str, Delta]]:
        """Returns the names in the file and the deltas.

        Raises:
            AdapterError: A component or module has no name in the format, parts cannot be fused exactly, or the family
                cannot be determined.
        """
        components: dict[str, dict[str, Delta]] = {}
        for name, delta in adapter.modules.items():
            component, _, path = name.partition(".")
            components.setdefault(component, {})[path] = folded(name, delta) if self.folded else delta
        family = self._family(adapter) if self.original or set(components) > {TRANSFORMER} else None
        raw: list[tuple[str, Delta]] = []
        for component, modules in components.items():
            prefix = self._prefix(component, family)
            deltas = family.originals(modules) if family and self.original and component == TRANSFORMER else modules
            raw += [(prefix + path.replace(".", self.separator), delta) for path, delta in deltas.items()]
        return raw

    def _prefix(self, component: str, family: TransformerNames | None) -> str:
        role = TRANSFORMER if component == TRANSFORMER else (family.text.get(component, "") if family else "")
        if role not in self.prefixes:
            raise AdapterError(
                f"the format has no name for the component {component!r} of such a base",
                where=component,
                allowed=", ".join(self.prefixes),
                remedy="choose another format",
            )
        number = 1 + list(family.text).index(component) if family and component != TRANSFORMER else 0
        return self.prefixes[role].format(number=number, component=component)

    def _family(self, adapter: Adapter) -> TransformerNames:
        family = adapter.base or transformer_family(adapter.modules)
        if family in transformer_names:
            return transformer_names[family]
        raise AdapterError(
            f"the family of the adapter is unknown{f' (it states {family!r})' if family else ''}",
            where=next(iter(adapter.modules), ""),
            allowed=", ".join(transformer_names),
            remedy="name the base that the adapter was made for",
        )


def folded(name: str, delta: Delta) -> Delta:
    """Returns a LoRA with its scale folded into `up`, so alpha equals the rank; any other delta unchanged.

    Raises:
        AdapterError: A value would overflow.
    """
    return folded_lora(name, delta) if isinstance(delta, LoraDelta) else delta


def folded_lora(name: str, delta: LoraDelta) -> LoraDelta:
    """Returns the LoRA with its scale folded into `up`; raises as `folded`."""
    if delta.scale == 1.0:
        return delta
    up = delta.up.mul(delta.scale)  # computed in at least float32, rounded once
    if abs(delta.scale) > 1.0 and not is_finite(up):  # a smaller scale cannot overflow
        raise AdapterError(
            f"the scale {delta.scale!r} cannot be folded into {delta.up.dtype}: a value would overflow",
            where=name,
            remedy="write the adapter in float32",
        )
    return replace(delta, up=up, alpha=float(delta.rank))


KOHYA_EXPORT_NAMING = ExportNaming(
    {TRANSFORMER: "lora_unet_", "clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5xxl": "lora_te3_"}
)
ONETRAINER_EXPORT_NAMING = ExportNaming(
    {TRANSFORMER: "lora_transformer_", **dict.fromkeys(TEXT_NAMES, "lora_te{number}_")}, original=False
)
AITOOLKIT_EXPORT_NAMING = ExportNaming(
    {TRANSFORMER: "transformer.", **dict.fromkeys(TEXT_NAMES, "{component}.")},
    original=False,
    separator=".",
    key_layout=DIFFUSERS.limited("ai-toolkit", ("lora",)),
    folded=True,
)
LYCORIS_EXPORT_NAMING = ExportNaming(
    {TRANSFORMER: "lycoris_", **dict.fromkeys(TEXT_NAMES, "lora_te{number}_")}, original=False
)
COMFYUI_EXPORT_NAMING = ExportNaming(
    {TRANSFORMER: "diffusion_model.", **{role: f"text_encoders.{role}.transformer." for role in TEXT_NAMES}},
    separator=".",
)
