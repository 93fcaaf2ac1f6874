"""Defines the `Codec` protocol: a file format encodes and decodes the canonical `Adapter`.

A format is a module naming plus a key layout. `TensorCodec` is the shared base class. Each has an entry in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Protocol

from lora_engine.adapters import Adapter, Delta
from lora_engine.adapters.module_names import near_names
from lora_engine.catalog.formats import FORMATS, Format
from lora_engine.errors import AdapterError
from lora_engine.families import families
from lora_engine.families.names import TRANSFORMER
from lora_engine.formats.card import Card
from lora_engine.formats.family import (
    FAMILY,
    FINGERPRINT,
    component_problem,
    families_of_tensors,
    family_of,
    unsupported_reason,
)
from lora_engine.formats.key_groups import Group, group_tensors
from lora_engine.formats.key_layout import ALPHA, KeyLayout
from lora_engine.formats.lora_config import HEADER_ALPHAS, header_alpha
from lora_engine.formats.transformers.names import ExportNaming, find_modules
from lora_engine.formats.validate import check_delta, validate_tensors
from lora_engine.registries import Loaded, import_target

if TYPE_CHECKING:
    from torch import Tensor

Names = Iterable[str] | Mapping[str, Sequence[int]]
"""Canonical module names of a base; as a mapping to weight shapes, the shapes are checked too."""
AlphaRule = Callable[[str, int | None], float | None]
"""From a module's name in the file and its rank to its alpha, for modules without an alpha tensor."""


class Codec(Protocol):
    """A file format for reading and writing adapters.

    Attributes:
        format: Its entry in `FORMATS`: name, file names, what it holds.
        key_layout: Layout of its tensor keys; its factor keys are the kinds that the format holds.
        embeddings: Where embeddings are written. A name in `embedding_forms`: in separate files of that form;
            `bundle`, `clip` or `tokens`: as tensors in the same file (see `embeddings.embed`).
    """

    format: ClassVar[Format]
    key_layout: ClassVar[KeyLayout]
    embeddings: ClassVar[str]

    @property
    def name(self) -> str:
        """Name that users type."""
        ...

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Returns True if a file with these tensor names is in this format."""
        ...

    def read_modules(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Delta]:
        """Returns the deltas by the module names in the file; needs no base."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: Names | None = None) -> Adapter:
        """Returns the adapter of a file's tensors and metadata.

        Raises:
            AdapterError: The file is incomplete, does not fit the base, or needs a base to read its names.
        """
        ...

    def encode(
        self, adapter: Adapter, card: Card | None = None, names: Names | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the tensors and the metadata that a reader of this format needs.

        Args:
            adapter: The adapter.
            card: Its card, for the header.
            names: The base's modules, for formats that number modules.

        Raises:
            AdapterError: The format cannot hold the adapter.
        """
        ...

    def finalize_metadata(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
        """Returns metadata entries that need the complete file, such as digests of the tensors."""
        ...

    def is_lossless(self, adapter: Adapter) -> bool:
        """Returns True if decoding the encoded adapter gives equal factors, not only the same delta weights."""
        ...


def _codec(entry: Format) -> Codec:
    found = import_target(FORMATS, entry.name, entry.codec)
    if not isinstance(found, type) or getattr(found, "format", None) is not entry:
        problem = f"names {entry.codec!r}, which is no codec of this entry"
        raise FORMATS.misfit(entry.name, problem, "a Codec class whose `format` is the entry")
    codec: Codec = found()
    return codec


codecs: Mapping[str, Codec] = Loaded(FORMATS, _codec)
"""The codec of each format in `FORMATS`."""


@dataclass(frozen=True)
class Part:
    """One module of a file: its tensors and its delta."""

    group: Group
    delta: Delta


class TensorCodec:
    """Base class of codecs whose tensor keys are `<module>.<suffix>`."""

    format: ClassVar[Format]
    embeddings: ClassVar[str] = "kohya"
    keeps_alpha: ClassVar[bool] = True
    """True if the file stores alpha; otherwise the scale is folded into a factor."""
    key_layout: ClassVar[KeyLayout]
    transformers: ClassVar[ExportNaming | None] = None
    """Names of transformer modules for export; None uses `raw_name`."""

    @property
    def name(self) -> str:
        """Name that users type."""
        return self.format.name

    def raw_name(self, name: str, family: str) -> str:
        """Returns the name of a module in the file."""
        return name

    def resolve(
        self, raw: Mapping[str, Delta], metadata: Mapping[str, str], known: Collection[str] | None
    ) -> dict[str, str]:
        """Returns the canonical name of each module name; `known` are the base's names, None without a base."""
        return {name: name for name in raw}

    def alpha_rule(self, metadata: Mapping[str, str]) -> AlphaRule:
        """Returns the rule for modules without an alpha tensor; a result of None means the kind's default."""
        alpha = header_alpha(metadata)
        return lambda raw, rank: None if rank is None else alpha

    def to_supported(self, adapter: Adapter) -> Adapter:
        """Returns an adapter with the same delta weights that the format can hold."""
        return adapter

    def header(self, adapter: Adapter, card: Card) -> dict[str, str]:
        """Returns metadata beyond the family and the fingerprint of the base."""
        return {}

    def finalize_metadata(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
        """Returns no further entries."""
        return {}

    def is_lossless(self, adapter: Adapter) -> bool:
        """Returns True if the format stores the adapter unchanged."""
        if self.to_supported(adapter) != adapter:
            return False
        special = self.transformers
        # Reading splits a fused layer at the zeros of `up`, and a factor may have had zeros of its own.
        return special is None or not special.applies_to(adapter) or self.decode(*self.encode(adapter)) == adapter

    def read_modules(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Delta]:
        """Returns the deltas by the module names in the file."""
        return {raw: part.delta for raw, part in self._parts(tensors, metadata).items()}

    def decode(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: Names | None = None) -> Adapter:
        """Returns the adapter of a file's tensors and metadata."""
        parts = self._supported_parts(tensors, metadata)
        shapes = names if isinstance(names, Mapping) else {}
        known = None if names is None else dict.fromkeys(names)
        deltas = {raw: part.delta for raw, part in parts.items()}
        family = family_of(metadata, deltas, known or ())
        family.check(_source(next(iter(parts.values()))))
        _check_components(parts, deltas)
        modules: dict[str, Delta] = {}
        for raw, name, delta in self._normalized(deltas, metadata, family.possible, known, shapes):
            part, shape = parts[raw], shapes.get(name)
            if known is not None and name not in known:
                raise _unknown(_source(part), name, known, unsupported_reason(tensors))
            if name in modules:
                problem = f"the module {name!r} is in the file twice, under two names"
                raise AdapterError(problem, where=_source(part), remedy="remove one of the two from the file")
            if shape is not None:
                check_delta(delta, partial(_sources, part), shape)
            modules[name] = delta if shape is None else delta.reshaped_for(shape)
        _check_components(parts, modules)
        if twice := next((name for name in modules if name.partition(".")[2].startswith("base_model.")), None):
            problem = f"the module {twice!r} has PEFT's prefix in its name, without which other formats would read it"
            raise AdapterError(problem, where=_source(next(iter(parts.values()))), remedy="use another file")
        if not family.possible:
            family = family_of(metadata, modules, known or ())
        _check_denoiser(family.name, modules, parts)
        return Adapter(modules, family.name, metadata.get(FINGERPRINT) or None)

    def encode(
        self, adapter: Adapter, card: Card | None = None, names: Names | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns the tensors and the metadata."""
        ready = self.to_supported(adapter)
        tensors: dict[str, Tensor] = {}
        for name, raw, delta in self._raw_modules(ready):
            try:
                written = self._key_layout_for(ready).write(raw, delta)
            except AdapterError as error:
                raise error.at(error.where or name) from error
            if not tensors.keys().isdisjoint(written):
                problem = f"the module {name!r} has the same name in this format as another module"
                raise AdapterError(problem, where=next(iter(written)), remedy="choose another format")
            tensors |= written
        base = {FAMILY: adapter.base, FINGERPRINT: adapter.fingerprint}
        return tensors, self.header(ready, card or Card()) | {key: text for key, text in base.items() if text}

    def _normalized(
        self,
        deltas: Mapping[str, Delta],
        metadata: Mapping[str, str],
        families: Collection[str],
        known: Collection[str] | None,
        shapes: Mapping[str, Sequence[int]],
    ) -> Iterator[tuple[str, str, Delta]]:
        """Yields name in the file, canonical name and delta of each module; splits fused layers into their modules."""
        matches = find_modules(deltas, families)
        for raw, module in matches.items():
            for name, delta in module.deltas(deltas[raw], f"module {raw!r}", shapes):
                yield raw, name, delta
        rest = {raw: delta for raw, delta in deltas.items() if raw not in matches}
        for raw, name in (self.resolve(rest, metadata, known) if rest else {}).items():
            yield raw, name, deltas[raw]

    def _raw_modules(self, adapter: Adapter) -> Iterator[tuple[str, str, Delta]]:
        """Yields name, name in the file and delta of each module; fuses the parts of fused layers."""
        if self.transformers is not None and self.transformers.applies_to(adapter):
            yield from ((raw, raw, delta) for raw, delta in self.transformers.raw_modules(adapter))
            return
        for name, delta in adapter.modules.items():
            yield name, self.raw_name(name, adapter.base), delta

    def _key_layout_for(self, adapter: Adapter) -> KeyLayout:
        special = self.transformers
        return special.key_layout if special and special.key_layout and special.applies_to(adapter) else self.key_layout

    def _supported_parts(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Part]:
        """Returns the parts; if they cannot be read, the names may show that the base family is not supported."""
        try:
            return self._parts(tensors, metadata)
        except AdapterError:
            if FAMILY not in metadata:
                families_of_tensors(tensors).check(f"tensor {min(tensors)!r}")
            raise

    def _parts(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Part]:
        validate_tensors(tensors)
        if any(name.endswith(f".{ALPHA}") for name in tensors):  # the header's alpha is for files without
            metadata = {key: text for key, text in metadata.items() if key not in HEADER_ALPHAS}
        rule = self.alpha_rule(metadata)
        parts: dict[str, Part] = {}
        for group in group_tensors(tensors, self.key_layout):
            delta = group.read(tensors)
            if ALPHA not in group.keys:
                alpha = rule(group.module, delta.rank)
                delta = delta if alpha is None else group.read(tensors, alpha)
            parts[group.module] = Part(group, delta)
        return parts


def _sources(part: Part) -> Mapping[str, str]:
    return part.group.sources


def _source(part: Part) -> str:
    return f"tensor {next(iter(part.group.keys.values()))!r}"


def _check_components(parts: Mapping[str, Part], names: Iterable[str]) -> None:
    if problem := component_problem(names):
        raise AdapterError(problem, where=_source(next(iter(parts.values()))), remedy="use another file")


def _check_denoiser(name: str, modules: Iterable[str], parts: Mapping[str, Part]) -> None:
    """Raises an error for modules of a transformer in a family with a U-Net, which no format could read again.

    Raises:
        AdapterError: Names the module.
    """
    wrong = next((module for module in modules if module.startswith(f"{TRANSFORMER}.")), None)
    if wrong is not None and name in families and families[name].unet is not None:
        title = families[name].title
        problem = f"the module {wrong!r} is of a transformer, and the base is {title}, which has a U-Net"
        raise AdapterError(problem, where=_source(next(iter(parts.values()))), remedy="use another file")


def _unknown(source: str, name: str, known: Collection[str], reason: str | None) -> AdapterError:
    return AdapterError(
        f"the base has no module {name!r}{f'; the file is {reason}' if reason else ''}",
        where=source,
        allowed=near_names(name, known),
        remedy="name the base that the adapter was made for",
    )
