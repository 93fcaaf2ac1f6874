"""Maps the module names of diffusion transformers in files to canonical names and back.

Reading accepts every known prefix. Writing uses one `ExportNaming` per format. The families hold the names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from lora_engine.adapters import Adapter, Delta, LoraDelta
from lora_engine.errors import AdapterError
from lora_engine.families import Family
from lora_engine.families.family import TextEncoder, Written
from lora_engine.families.names import TRANSFORMER, Target
from lora_engine.families.proof import has_known_modules
from lora_engine.finite import is_finite
from lora_engine.formats.family import flattened, module_of, possible_families
from lora_engine.formats.key_layout import DIFFUSERS_KEYS, KeyLayout
from lora_engine.formats.transformers.dit import Shapes, deltas_of, originals, table_of, transformers

# Prefix of a transformer's module names to the separator after it; the first match counts.
_SEPARATORS = {
    "base_model.model.": ".",
    "model.diffusion_model.": ".",
    "diffusion_model.": ".",
    "transformer.": ".",
    "lora_unet_": "_",
    "lora_transformer_": "_",
    "oft_unet_": "_",
    "lycoris_": "_",
    "": ".",
}
_BLOCKS = [blocks for family in transformers() for blocks in table_of(family).blocks]
BARE = tuple(dict.fromkeys(f"{blocks.canonical}." for blocks in _BLOCKS))
"""Beginnings of diffusers' names without a component."""
BARE_ORIGINAL = tuple(dict.fromkeys(f"{blocks.original}." for blocks in _BLOCKS))
"""Beginnings of original names without a component."""
_ENCODERS = {
    role: encoder
    for family in transformers()
    for encoder in family.text.values()
    for role in (encoder.role, *encoder.aliases)
}
_NUMBERED = re.compile(r"lora_te([123]?)_(.+)")
_NAMED = re.compile(rf"(?:text_encoders\.)?({'|'.join(_ENCODERS)})\.(?:transformer\.)?(.+)")
# A list of blocks that diffusers calls the same does not show which of the two names a file has.
_RENAMED = dict.fromkeys(f"{blocks.original}." for blocks in _BLOCKS if blocks.original != blocks.canonical)
_INITIATIVE = re.compile(rf"{TRANSFORMER}\.({'|'.join(map(re.escape, _RENAMED))})\d+\.")


def is_aitoolkit(keys: Collection[str]) -> bool:
    """Returns True for ai-toolkit's names of transformers: ComfyUI's names with only PEFT's factors."""
    factors = (".lora_A.weight", ".lora_B.weight")
    return (
        bool(keys)
        and all(key.startswith("diffusion_model.") and key.endswith(factors) for key in keys)
        and is_transformer(keys)
    )


def is_transformer(keys: Iterable[str]) -> bool:
    """Returns True if any tensor belongs to a diffusion transformer, supported or not."""
    return has_known_modules(flattened(module_of(key)) for key in keys)


def is_initiative(keys: Collection[str]) -> bool:
    """Returns True for the Open Model Initiative's names: original names below diffusers' component."""
    starts = (f"{TRANSFORMER}.", "clip_l.", "clip_g.", "t5.")
    return all(key.startswith(starts) for key in keys) and any(_INITIATIVE.match(key) for key in keys)


@dataclass(frozen=True)
class FoundModule:
    """A module of a file that belongs to a transformer or to one of its text encoders.

    Attributes:
        family: The family whose names it has.
        target: The diffusers modules that it corresponds to.
        component: Component of the target's paths.
    """

    family: Family
    target: Target
    component: str

    def deltas(self, delta: Delta, where: str, shapes: Shapes) -> Iterator[tuple[str, Delta]]:
        """Yields the canonical names of the module's parts, and their deltas."""
        if self.target.original:
            yield from deltas_of(self.family, self.target, delta, where, shapes)
        else:
            yield f"{self.component}.{self.target.parts[0]}", delta


def find_modules(raw: Iterable[str], families: Collection[str]) -> dict[str, FoundModule]:
    """Returns the modules of a file that are in the tables of a family; empty for a base that is no transformer.

    Args:
        raw: Module names in the file.
        families: The possible families of the base; those that share all names agree on their meaning.
    """
    candidates = [family for family in transformers() if family.name in families]
    return {name: module for name in raw if (module := _find_in(name, candidates)) is not None}


def _find_in(raw: str, candidates: Collection[Family]) -> FoundModule | None:
    return next(filter(None, (_find(raw, family) for family in candidates)), None)


def _find(raw: str, family: Family) -> FoundModule | None:
    numbered, named = _NUMBERED.fullmatch(raw), _NAMED.fullmatch(raw)
    if numbered:
        return _find_text(family, numbered[2], "_", number=int(numbered[1] or 1))
    if named:
        encoder = _ENCODERS[named[1]]
        return _find_text(family, named[2].removeprefix(encoder.level), ".", encoder)
    component, _, rest = raw.partition(".")
    if component in family.text:
        return _find_text(family, rest, ".", family.text[component])
    prefix = next(prefix for prefix in _SEPARATORS if raw.startswith(prefix))
    separator, path = _SEPARATORS[prefix], raw.removeprefix(prefix)
    target = table_of(family).find(path, separator)
    canonical = table_of(family).find_canonical(path, separator)
    if canonical is not None and (target is None or prefix == "transformer."):
        return FoundModule(family, Target((canonical,)), TRANSFORMER)
    return None if target is None else FoundModule(family, target, TRANSFORMER)


def _find_text(
    family: Family, path: str, separator: str, encoder: TextEncoder | None = None, number: int = 0
) -> FoundModule | None:
    # Programs disagree on T5's number (2 or 3), so it is recognized by its names.
    for position, (component, candidate) in enumerate(family.text.items(), 1):
        is_numbered = position == number or candidate.kohya == "lora_te3_"
        if candidate == encoder or (encoder is None and is_numbered):
            canonical = candidate.names.find_canonical(path, separator)
            if canonical is not None:
                return FoundModule(family, Target((canonical,)), component)
    return None


@dataclass(frozen=True)
class ExportNaming:
    """The module names that a format writes for transformers and their text encoders.

    Attributes:
        format: Name of the format, by which families declare other names (`Family.written`).
        transformer: Prefix of the transformer's names, and whether they are the original ones.
        text: Prefix of a text encoder's names, with `{number}` and `{component}` in its family, and `{kohya}`, `{role}`
            and `{level}` of the encoder.
        key_layout: Key layout for these modules; None uses the format's.
        folded: True if the scale is folded into `up`, for readers that ignore alpha.
    """

    format: str
    transformer: Written
    text: str
    key_layout: KeyLayout | None = None
    folded: bool = False

    def applies_to(self, adapter: Adapter) -> bool:
        """Returns True if the adapter is for a transformer."""
        is_named = adapter.base in [family.name for family in transformers()]
        return is_named or any(name.startswith(f"{TRANSFORMER}.") for name in adapter.modules)

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
        needs_family = self.transformer.original or set(components) > {TRANSFORMER}
        family = _family_of(adapter, required=needs_family)
        raw: list[tuple[str, Delta]] = []
        for component, modules in components.items():
            if component == TRANSFORMER:
                written = family.written.get(self.format, self.transformer) if family else self.transformer
                deltas = originals(family, modules) if family and written.original else modules
                raw += _joined(written.prefix, deltas)
            else:
                raw += _joined(self._text_prefix(component, family), modules)
        return raw

    def _text_prefix(self, component: str, family: Family | None) -> str:
        if family is None or component not in family.text:
            raise AdapterError(
                f"the format has no name for the component {component!r} of such a base",
                where=component,
                allowed=", ".join((TRANSFORMER, *(family.text if family else ()))),
                remedy="choose another format",
            )
        encoder, number = family.text[component], 1 + list(family.text).index(component)
        return self.text.format(
            number=number, component=component, kohya=encoder.kohya, role=encoder.role, level=encoder.level
        )


def _joined(prefix: str, modules: Mapping[str, Delta]) -> Iterator[tuple[str, Delta]]:
    separator = "." if prefix.endswith(".") else "_"
    return ((prefix + path.replace(".", separator), delta) for path, delta in modules.items())


def _family_of(adapter: Adapter, *, required: bool) -> Family | None:
    possible = [adapter.base] if adapter.base else list(possible_families(adapter.modules).families)
    for family in transformers():
        if possible == [family.name]:
            return family
    if not required:
        return None
    stated = f" (it states {adapter.base!r})" if adapter.base else ""
    raise AdapterError(
        f"the family of the adapter is {'ambiguous' if len(possible) > 1 else 'unknown'}{stated}",
        where=next(iter(adapter.modules), ""),
        allowed=", ".join(possible if len(possible) > 1 else [family.name for family in transformers()]),
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


_NUMBERED_TEXT = "lora_te{number}_"
KOHYA_EXPORT_NAMING = ExportNaming("kohya", Written("lora_unet_", original=True), "{kohya}")
ONETRAINER_EXPORT_NAMING = ExportNaming("onetrainer", Written("lora_transformer_", original=False), _NUMBERED_TEXT)
AITOOLKIT_EXPORT_NAMING = ExportNaming(
    "aitoolkit",
    Written("transformer.", original=False),
    "{component}.",
    key_layout=DIFFUSERS_KEYS.limited("ai-toolkit", ("lora",)),
    folded=True,
)
LYCORIS_EXPORT_NAMING = ExportNaming("lycoris", Written("lycoris_", original=False), _NUMBERED_TEXT)
COMFYUI_EXPORT_NAMING = ExportNaming(
    "comfyui", Written("diffusion_model.", original=True), "text_encoders.{role}.transformer.{level}"
)
