"""Determines the base family of an adapter from its header, its modules and its base."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from lora_engine.adapters import Delta, DoraDelta
from lora_engine.errors import UnknownBaseError
from lora_engine.families import families
from lora_engine.families.names import TRANSFORMER
from lora_engine.families.proof import Recognition, recognize_family, titles
from lora_engine.formats.transformers.fused import delta_shape

FAMILY = "loraline.base"
FINGERPRINT = "loraline.fingerprint"
_STATED = ("ss_base_model_version", "modelspec.architecture")
_NAME_BASE = "name the base that the adapter was made for (--base)"
# Prefixes of programs, without dots. Only with dots is it certain that `transformer` is the component.
_PREFIXES = (
    "base_model_model_",
    "lora_unet_",
    "oft_unet_",
    "lora_transformer_",
    "lycoris_",
    "model_diffusion_model_",
    "diffusion_model_",
    "transformer_",
    "unet_",
)
_UNSUPPORTED_FILES = {
    r"(unet|text_encoder):\d+:(up|down)": "an adapter in cloneofsimo's format",
    r"lycoris_.*": "an adapter with the names of LyCORIS' wrapper",
    r".*\.processor\..*_lora\..*": "an adapter in the attention processors of old diffusers",
    r"lllite_.*": "a ControlNet-LLLite, not an adapter of weights",
    r"(control_model|controlnet_\w+|input_hint_block)\..*": "a ControlNet, not an adapter of weights",
    r"(ip_adapter|image_proj)\..*": "an IP-Adapter, not an adapter of weights",
    r"(emb_params|string_to_param.*|clip_[lg])": "a textual-inversion embedding",
    r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\..*": "a full checkpoint, not an adapter",
}
_DENOISERS = ("unet", TRANSFORMER)
_COMPONENTS = (*_DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3")
_IN_TEXT_ENCODER = re.compile(r"(?:lora_te\d?_|text_encoder(?:_\d)?\.)(.+)")
_FACTOR = re.compile(
    r"\.((lora|lokr|hada|oft|boft|ia3|dora|glora)_\w+|((set|reshape)_)?weight$|[ab][12m]\.weight$"
    r"|(alpha|diff|diff_b|scale|bias|w_norm|b_norm|on_input|rescale|magnitude)$).*"
)


@dataclass(frozen=True)
class BaseFamily:
    """The base family of an adapter.

    Attributes:
        possible: The possible families: one if it is proven or stated, several if the file is ambiguous, none if it is
            unknown or contradictory.
        problem: The contradiction; empty if there is none.
        where: The place of the contradiction.
        allowed: What the place would have to be.
    """

    possible: tuple[str, ...] = ()
    problem: str = ""
    where: str = ""
    allowed: str = ""

    @property
    def name(self) -> str:
        """The family; empty if it is unknown, ambiguous or contradictory."""
        return self.possible[0] if len(self.possible) == 1 else ""

    @property
    def supported(self) -> tuple[str, ...]:
        """The possible families whose adapters are read. A name that no family has is that of a base of the user."""
        return tuple(name for name in self.possible if name not in families or families[name].is_supported)

    @property
    def note(self) -> str:
        """What a user must know about it; empty for a supported family."""
        if self.problem:
            return f"{self.problem} ({self.where}); {self.allowed}"
        if self.possible and not self.supported:
            return _unsupported(self.possible)
        return "" if len(self.possible) < 2 else f"the base is {titles(self.possible)}: they share these modules"

    def check(self, source: str) -> None:
        """Raises `UnknownBaseError` for a contradiction, and if no possible family is supported.

        Args:
            source: Location in the file.
        """
        if self.problem:
            raise UnknownBaseError(self.problem, where=self.where, allowed=self.allowed, remedy=_NAME_BASE)
        if self.possible and not self.supported:
            readable = ", ".join(family.title for family in families.values() if family.is_supported)
            raise UnknownBaseError(
                f"the adapter is {_unsupported(self.possible).removeprefix('an adapter ')}",
                where=source,
                allowed=f"adapters for {readable}",
                remedy="use it with the program that it was made for; `loraline inspect` shows its contents",
            )


def family_of(
    header: Mapping[str, str], modules: Mapping[str, Delta], base_modules: Collection[str] = ()
) -> BaseFamily:
    """Returns the base family of an adapter.

    Loraline's own header is decisive, then the base, then the proof by modules, which other headers may narrow down but
    not contradict.

    Args:
        header: Metadata of the file.
        modules: Name of the module (canonical, or as in the file) to delta.
        base_modules: Canonical names of the base's modules, if known.
    """
    if FAMILY in header:
        return BaseFamily((header[FAMILY],) if header[FAMILY] else ())
    stated, base = _stated(header), _family_of_base(base_modules)
    if base:
        return BaseFamily((stated[0],)) if stated and base not in stated else _with_base(base, modules)
    recognition = possible_families(modules)
    if recognition.problem:
        where = next(name for name in modules if flattened(name) == recognition.where)
        return BaseFamily((), recognition.problem, f"module {where!r}", recognition.allowed)
    proven = _with_text_encoders(recognition.families, modules) or _families_by_width(modules)
    if not stated:
        return BaseFamily(proven or _families_by_names((*modules, *base_modules)))
    agreed = tuple(name for name in proven if name in stated)
    if agreed or not proven:
        return BaseFamily(agreed or stated)
    key = next(key for key in _STATED if key in header)
    return BaseFamily(
        (),
        f"the header says {header[key]!r}, which is {titles(stated)}",
        f"metadata {key!r}",
        f"by its modules the adapter is for {titles(proven)}",
    )


def possible_families(modules: Mapping[str, Delta] | Iterable[str], *, by_size: bool = True) -> Recognition:
    """Returns the families of transformers that the modules prove; see `families.proof`.

    Args:
        modules: Names of the modules, to deltas if known.
        by_size: See `recognize_family`.
    """
    if isinstance(modules, Mapping):
        return recognize_family(
            {flattened(name): delta_shape(delta) for name, delta in modules.items()}, by_size=by_size
        )
    return recognize_family(dict.fromkeys(map(flattened, modules)), by_size=by_size)


def families_of_tensors(keys: Iterable[str]) -> BaseFamily:
    """Returns the possible families by the names of tensors alone; contradictions are left to the shapes."""
    return BaseFamily(possible_families(map(module_of, keys)).families)


def unsupported_reason(keys: Collection[str]) -> str | None:
    """Returns a description of a file with these tensor names if it is known but unsupported, else None."""
    family = families_of_tensors(keys)
    if family.possible and not family.supported:
        return family.note
    for key in sorted(keys):
        for pattern, description in _UNSUPPORTED_FILES.items():
            if re.fullmatch(pattern, key):
                return description
    return None


def component_problem(names: Iterable[str]) -> str:
    """Returns why no base has modules with these names, given the component first; empty if one may.

    A component has no weight of its own, and a base denoises with a U-Net or a transformer, not with both.
    """
    first: dict[str, str] = {}
    for name in names:
        component, _, path = name.partition(".")
        if not path and component in _COMPONENTS:
            return f"the module {name!r} is a whole component, not a layer"
        if component in _COMPONENTS and path.startswith((f"{component}.", "base_model.model.base_model.")):
            return f"the module {name!r} has a prefix twice, which other formats would read as another module"
        if component in _DENOISERS and path.partition(".")[0] in _DENOISERS:
            return f"the module {name!r} is of two denoisers, and no base has both"
        first.setdefault(component, name)
    if set(_DENOISERS) <= set(first):
        return f"{' and '.join(repr(first[name]) for name in _DENOISERS)} are of two denoisers, and no base has both"
    return ""


def is_motion(name: str) -> bool:
    """Returns True for a module of AnimateDiff, dotted or flattened."""
    return "motion_modules" in name


@functools.lru_cache(maxsize=1 << 15)
def flattened(name: str) -> str:
    """Returns a module name with underscores for dots and without the program's prefix."""
    flat = name.rpartition("/")[2].removeprefix(f"{TRANSFORMER}.").replace(".", "_")
    for prefix in _PREFIXES:
        if flat.startswith(prefix) and not flat.startswith("transformer_blocks_"):
            flat = flat.removeprefix(prefix)
    return flat


@functools.lru_cache(maxsize=1 << 15)  # every codec that detects a format asks for each tensor
def module_of(key: str) -> str:
    """Returns the module of a tensor, by the usual names of factors."""
    return _FACTOR.sub("", key)


def has_sdxl_modules(names: Iterable[str]) -> bool:
    """Returns True if any module exists only in SDXL."""
    unet = families["sdxl"].unet
    return unet is not None and any(name.startswith(unet.modules) for name in names)


def context_widths(modules: Mapping[str, Delta]) -> list[int]:
    """Returns the text embedding widths that the U-Net's cross attention reads, by the shapes of the factors."""
    suffixes = (".attn2.to_k", ".attn2.to_v")
    deltas = (delta for name, delta in modules.items() if name.startswith("unet.") and name.endswith(suffixes))
    weights = ((delta.inner if isinstance(delta, DoraDelta) else delta).weight_shape for delta in deltas)
    return [shape[1] for shape in weights if shape is not None]


def _stated(header: Mapping[str, str]) -> tuple[str, ...]:
    texts = [re.sub(r"[-. ]", "_", header[key].partition("/")[0].lower()) for key in _STATED if key in header]
    return tuple(
        name
        for name, family in families.items()
        if family.header and any(re.fullmatch(family.header, text) for text in texts)
    )


def _family_of_base(names: Collection[str]) -> str:
    """Returns the supported family of a base with a transformer; empty if there is none or the names are of several."""
    own = [name for name in names if name.startswith(f"{TRANSFORMER}.")]
    possible = [name for name in possible_families(own, by_size=False).families if families[name].is_supported]
    return possible[0] if len(possible) == 1 else ""


def _with_base(base: str, modules: Mapping[str, Delta]) -> BaseFamily:
    # The shapes are compared with those of the base, which may have any size.
    possible = possible_families(modules, by_size=False).families
    return BaseFamily((base,) if not possible or base in possible else possible)


def _families_by_width(modules: Mapping[str, Delta]) -> tuple[str, ...]:
    """Returns the families whose U-Net reads text embeddings of a width in the file."""
    widths = set(context_widths(modules))
    return tuple(name for name, family in families.items() if family.unet and widths & set(family.unet.widths))


def _with_text_encoders(possible: tuple[str, ...], names: Iterable[str]) -> tuple[str, ...]:
    """Returns the families that have the file's text encoders; all of them if none has, or the file changes none."""
    paths = [match[1].replace(".", "_") for name in names if (match := _IN_TEXT_ENCODER.fullmatch(name))]
    fitting = tuple(
        name
        for name in possible
        if all(any(text.names.find(path, "_") for text in families[name].text.values()) for path in paths)
    )
    return fitting or possible


def _families_by_names(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the family that canonical names show: by a text encoder that no other has in this place, or by SDXL's."""
    listed = list(names)
    for component, _, path in (name.partition(".") for name in listed if name.startswith("text_encoder")):
        own = [
            name
            for name, family in families.items()
            if component in family.text and family.text[component].names.find_canonical(path) is not None
        ]
        if len(own) == 1:
            return tuple(own)
    return ("sdxl",) if has_sdxl_modules(listed) else ()


def _unsupported(possible: Collection[str]) -> str:
    names = ", ".join(possible)
    plural = "a base family that is" if len(possible) == 1 else "base families that are"
    return f"an adapter for {titles(possible)} ({names}), {plural} not supported"
