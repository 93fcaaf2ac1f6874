"""How the formats name the modules of diffusion transformers: prefix, separator, original names or diffusers'.

Reading takes every prefix that is seen in files; writing is one `ExportNaming` a format. The names themselves are in the
families' tables (`dit`, `flux`, `sd3`).
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
    Place,
    Shapes,
    TransformerNames,
    transformer_names,
)
from lora_engine.formats.transformers.fused import delta_shape
from lora_engine.formats.transformers.unsupported import flattened, is_qwen_attention, unsupported, unsupported_family
from lora_engine.formats.validate import is_finite

# What stands before the path of a transformer's module, and what then separates its parts; the first that fits counts.
_BEFORE = {
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
"""How names in diffusers begin that have no component before them."""
_NUMBERED = re.compile(r"lora_te([123]?)_(.+)")
_NAMED = re.compile(r"(?:text_encoders\.)?(clip_l|clip_g|t5(?:xxl)?)\.(?:transformer\.)?(.+)")
_INITIATIVE = re.compile(rf"{TRANSFORMER}\.(double|single|joint)_blocks\.\d+\.")
_HEADER = {
    "flux": re.compile(r"flux([-_.]?(1|dev|schnell).*|/.*)?", re.IGNORECASE),
    "sd3": re.compile(r"(sd[-_.]?|stable[-_.]diffusion[-_.]v?)3.*", re.IGNORECASE),
}


def is_aitoolkit(keys: Collection[str]) -> bool:
    """Whether tensors are named as ai-toolkit names transformers': ComfyUI's names with PEFT's factors alone."""
    factors = (".lora_A.weight", ".lora_B.weight")
    return (
        bool(keys)
        and all(key.startswith("diffusion_model.") and key.endswith(factors) for key in keys)
        and is_dit(keys)
    )


def is_dit(keys: Collection[str]) -> bool:
    """Whether some tensors are a diffusion transformer's, of a supported family or another."""
    return bool(dit_family(keys))


def is_initiative(keys: Collection[str]) -> bool:
    """Whether tensors are named as the Open Model Initiative has it: original names below diffusers' component."""
    starts = (f"{TRANSFORMER}.", "clip_l.", "clip_g.", "t5.")
    return all(key.startswith(starts) for key in keys) and any(_INITIATIVE.match(key) for key in keys)


def dit_family(names: Mapping[str, Delta] | Collection[str]) -> str:
    """The family of transformers that modules belong to, supported or not; empty where nothing tells it.

    Args:
        names: Names of modules, the file's own or canonical ones; as a mapping, with their deltas, whose widths count
            where the names do not tell.
    """
    stranger = unsupported_family(names)
    if stranger:
        return stranger
    plain = {flattened(name): name for name in names}
    for dit in transformer_names.values():
        if any(re.fullmatch(dit.mark, name) for name in plain):
            return dit.name
    for component, family in _T5.items():
        if any(name.startswith(component) for name in names):
            return family
    width = _attention_width(plain, names) if isinstance(names, Mapping) else None
    if is_qwen_attention(names, width):
        return "qwen_image"
    return next((dit.name for dit in transformer_names.values() if width in dit.widths), "")


def family_from_header(header: Mapping[str, str]) -> str:
    """The family of transformers that a file's header names, in kohya's or ModelSpec's words; empty for none."""
    said = [header[key] for key in ("ss_base_model_version", "modelspec.architecture") if key in header]
    return next((family for family, form in _HEADER.items() if any(form.fullmatch(text) for text in said)), "")


def refuse_unsupported(family: str, source: str) -> None:
    """Does nothing for an adapter of a family that may be supported.

    Raises:
        AdapterError: The family is one that is not; names it.
    """
    if family in unsupported:
        raise AdapterError(
            f"the adapter is for {unsupported[family].title} ({family}), a base family that is not supported",
            where=source,
            allowed=f"adapters for Stable Diffusion 1, 2, XL, {', '.join(dit.title for dit in transformer_names.values())}",
            remedy="use it with the program that it was made for; `loraline inspect` shows what it holds",
        )


@dataclass(frozen=True)
class Found:
    """A module of a file in a transformer or one of its text encoders.

    Attributes:
        dit: The family.
        place: Where it is.
        component: Whose path that is.
    """

    dit: TransformerNames
    place: Place
    component: str

    def deltas(self, delta: Delta, where: str, shapes: Shapes) -> Iterator[tuple[str, Delta]]:
        """The canonical names that the module stands for, and their deltas."""
        if self.place.original:
            yield from self.dit.deltas_of(self.place, delta, where, shapes)
        else:
            yield f"{self.component}.{self.place.parts[0]}", delta


def find_modules(raw: Collection[str], family: str) -> dict[str, Found]:
    """The modules of a file that the families' tables know; empty for a file of another kind of base.

    Args:
        raw: The file's names of modules.
        family: Of the base, as far as it is told; double blocks in diffusers' names are the same in all families.
    """
    if family in transformer_names:
        candidates = [transformer_names[family]]
    elif any(flattened(name).startswith("transformer_blocks_") for name in raw):
        candidates = list(transformer_names.values())
    else:
        return {}
    return {name: found for name in raw for found in [_find_in(name, candidates)] if found is not None}


def _find_in(raw: str, candidates: Collection[TransformerNames]) -> Found | None:
    return next(filter(None, (_find(raw, dit) for dit in candidates)), None)


def _find(raw: str, dit: TransformerNames) -> Found | None:
    numbered, named = _NUMBERED.fullmatch(raw), _NAMED.fullmatch(raw)
    if numbered:
        return _find_text(dit, numbered[2], "_", int(numbered[1] or 1))
    if named:
        return _find_text(dit, named[2], ".", 0, "t5xxl" if named[1] == "t5" else named[1])
    component, _, rest = raw.partition(".")
    if component in dit.text:
        return _find_text(dit, rest, ".", 0, dit.text[component])
    prefix = next(prefix for prefix in _BEFORE if raw.startswith(prefix))
    separator, path = _BEFORE[prefix], raw.removeprefix(prefix)
    place = dit.names.find(path, separator)
    canonical = dit.names.find_canonical(path, separator)
    if canonical is not None and (place is None or prefix == "transformer."):
        return Found(dit, Place((canonical,)), TRANSFORMER)
    return None if place is None else Found(dit, place, TRANSFORMER)


def _find_text(dit: TransformerNames, path: str, separator: str, number: int, role: str = "") -> Found | None:
    # Programs disagree on T5's number (2 or 3), so T5 is told by its names.
    for position, (component, here) in enumerate(dit.text.items(), 1):
        if here == role or (not role and (position == number or here == "t5xxl")):
            canonical = TEXT_NAMES[here].find_canonical(path, separator)
            if canonical is not None:
                return Found(dit, Place((canonical,)), component)
    return None


def _attention_width(plain: Mapping[str, str], deltas: Mapping[str, Delta]) -> int | None:
    wanted = re.compile(r"transformer_blocks_\d+_(attn_(to_[qkv]|add_[qkv]_proj)|norm1(_context)?_linear)")
    shapes = (delta_shape(deltas[name]) for flat, name in plain.items() if wanted.fullmatch(flat))
    return next((shape[1] for shape in shapes if shape is not None), None)


@dataclass(frozen=True)
class ExportNaming:
    """How a format names the modules of transformers and of their text encoders.

    Attributes:
        prefixes: By component's role (`transformer`, and those of `TEXT_NAMES`); `{place}` stands for the number of
            the text encoder in its family, `{component}` for its name.
        original: Whether the transformer has its original names; fused layers are then put together.
        separator: Between the parts of a path.
        style: How factors are spelt, where that differs from the format's usual way.
        folded: Whether the scale goes into `up`, for readers that know no alpha.
    """

    prefixes: Mapping[str, str]
    original: bool = True
    separator: str = "_"
    style: KeyLayout | None = None
    folded: bool = False

    def applies_to(self, adapter: Adapter) -> bool:
        """Whether an adapter is for a transformer."""
        return adapter.base in transformer_names or any(name.startswith(f"{TRANSFORMER}.") for name in adapter.modules)

    def raw_modules(self, adapter: Adapter) -> list[tuple[str, Delta]]:
        """The file's names and deltas.

        Raises:
            AdapterError: A component or module that has no name here, parts that cannot be put together exactly, or
                a family that nothing tells.
        """
        components: dict[str, dict[str, Delta]] = {}
        for name, delta in adapter.modules.items():
            component, _, path = name.partition(".")
            components.setdefault(component, {})[path] = folded(name, delta) if self.folded else delta
        dit = self._dit(adapter) if self.original or set(components) > {TRANSFORMER} else None
        named: list[tuple[str, Delta]] = []
        for component, modules in components.items():
            prefix = self._prefix(component, dit)
            deltas = dit.originals(modules) if dit and self.original and component == TRANSFORMER else modules
            named += [(prefix + path.replace(".", self.separator), delta) for path, delta in deltas.items()]
        return named

    def _prefix(self, component: str, dit: TransformerNames | None) -> str:
        role = TRANSFORMER if component == TRANSFORMER else (dit.text.get(component, "") if dit else "")
        if role not in self.prefixes:
            raise AdapterError(
                f"the format has no name for the component {component!r} of such a base",
                where=component,
                allowed=", ".join(self.prefixes),
                remedy="choose another format",
            )
        place = 1 + list(dit.text).index(component) if dit and component != TRANSFORMER else 0
        return self.prefixes[role].format(place=place, component=component)

    def _dit(self, adapter: Adapter) -> TransformerNames:
        family = adapter.base or dit_family(adapter.modules)
        if family in transformer_names:
            return transformer_names[family]
        raise AdapterError(
            f"nothing tells which family the adapter is for{f' (it says {family!r})' if family else ''}",
            where=next(iter(adapter.modules), ""),
            allowed=", ".join(transformer_names),
            remedy="name the base that the adapter was made for",
        )


def folded(name: str, delta: Delta) -> Delta:
    """A LoRA with its scale in `up`, so that alpha is the rank; any other delta as it is.

    Raises:
        AdapterError: A value would overflow.
    """
    return folded_lora(name, delta) if isinstance(delta, LoraDelta) else delta


def folded_lora(name: str, delta: LoraDelta) -> LoraDelta:
    """As `folded`, for a LoRA."""
    if delta.scale == 1.0:
        return delta
    up = delta.up.mul(delta.scale)  # in float32 at least, and rounded once
    if abs(delta.scale) > 1.0 and not is_finite(up):  # a smaller scale makes nothing larger
        raise AdapterError(
            f"the scale {delta.scale!r} cannot be folded into {delta.up.dtype}: a value would overflow",
            where=name,
            remedy="write the adapter in float32",
        )
    return replace(delta, up=up, alpha=float(delta.rank))


KOHYA_DIT = ExportNaming(
    {TRANSFORMER: "lora_unet_", "clip_l": "lora_te1_", "clip_g": "lora_te2_", "t5xxl": "lora_te3_"}
)
ONETRAINER_DIT = ExportNaming(
    {TRANSFORMER: "lora_transformer_", **dict.fromkeys(TEXT_NAMES, "lora_te{place}_")}, original=False
)
AITOOLKIT_DIT = ExportNaming(
    {TRANSFORMER: "transformer.", **dict.fromkeys(TEXT_NAMES, "{component}.")},
    original=False,
    separator=".",
    style=DIFFUSERS.limited("ai-toolkit", ("lora",)),
    folded=True,
)
LYCORIS_DIT = ExportNaming({TRANSFORMER: "lycoris_", **dict.fromkeys(TEXT_NAMES, "lora_te{place}_")}, original=False)
COMFYUI_DIT = ExportNaming(
    {TRANSFORMER: "diffusion_model.", **{role: f"text_encoders.{role}.transformer." for role in TEXT_NAMES}},
    separator=".",
)
