"""The `Codec` protocol: a format as module naming x factor spelling, both ways over the one canonical adapter.

`TensorCodec` is what the codecs share; each format is a small file of its own. No format knows another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

from torch import Tensor

from lora_engine.adapters import Adapter, Delta
from lora_engine.adapters.tree import near_names
from lora_engine.errors import AdapterError
from lora_engine.formats.card import Card
from lora_engine.formats.family import FAMILY, FINGERPRINT, family_of
from lora_engine.formats.key_layout import Group, KeyLayout, group_tensors
from lora_engine.formats.transformers.names import ExportNaming, find_modules, refuse_unsupported
from lora_engine.formats.transformers.unsupported import unsupported_family
from lora_engine.formats.unsupported import unsupported_reason
from lora_engine.formats.validate import check_delta, validate_tensors
from lora_engine.registries import Registry

Names = Iterable[str] | Mapping[str, Sequence[int]]
"""A base's canonical module names; as a mapping, with the shapes of their weights, which are then checked."""
AlphaRule = Callable[[str, int | None], float | None]
"""From a module's name in the file and its rank to its alpha, where the alpha is not among the tensors."""


class Codec(Protocol):
    """A file format, both ways.

    Attributes:
        name: What users call it.
        file_name: What a file is called where only a folder is named.
        is_folder: Whether an adapter is a folder of files. Tensor names then read `<folder>/<name>`, and the metadata
            holds further files as `<folder>/<file name>`; in the folder itself there is no slash.
        embeddings: Where the embeddings of an adapter go: a name among `embedding_forms`, in whose form they are
            written beside it; or `bundle`, `clip` or `tokens`, tensors of the same file (see `embeddings.embed`).
        families: The base families that it is for; empty for any.
    """

    name: ClassVar[str]
    file_name: ClassVar[str]
    is_folder: ClassVar[bool]
    embeddings: ClassVar[str]
    families: ClassVar[tuple[str, ...]]

    def detect(self, keys: Collection[str], metadata: Mapping[str, str]) -> bool:
        """Whether a file with these tensor names is of this format."""
        ...

    def read_modules(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Delta]:
        """The deltas by the file's own module names; needs no base."""
        ...

    def decode(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: Names | None = None) -> Adapter:
        """The adapter of a file's tensors and metadata.

        Raises:
            AdapterError: The file is not whole, does not fit the base, or needs one to be named.
        """
        ...

    def encode(
        self, adapter: Adapter, card: Card | None = None, names: Names | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and the metadata that a reader of this format needs.

        Args:
            adapter: The adapter.
            card: What the header says of it.
            names: The base's modules, for formats that count through them.

        Raises:
            AdapterError: The format cannot hold the adapter.
        """
        ...

    def finalize_metadata(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
        """What the complete metadata lack yet, such as digests of the tensors."""
        ...

    def is_lossless(self, adapter: Adapter) -> bool:
        """Whether decoding what `encode` gives is the very same adapter, not only one of the same meaning."""
        ...


codecs: Registry[Codec] = Registry("adapter format")


@dataclass(frozen=True)
class Part:
    """One module of a file: its tensors and what they mean."""

    group: Group
    delta: Delta


class TensorCodec:
    """What codecs share that keep an adapter in tensors named `<module><dot><suffix>`."""

    name: ClassVar[str]
    file_name: ClassVar[str] = "adapter.safetensors"
    is_folder: ClassVar[bool] = False
    embeddings: ClassVar[str] = "kohya"
    families: ClassVar[tuple[str, ...]] = ()
    keeps_alpha: ClassVar[bool] = True
    """Whether alpha goes into the file; if not, the scale goes into a factor."""
    style: ClassVar[KeyLayout]
    transformers: ClassVar[ExportNaming | None] = None
    """How the modules of diffusion transformers are written, where not as `raw_name` says."""

    def raw_name(self, name: str, family: str) -> str:
        """What the file calls a module."""
        return name

    def resolve(
        self, raw: Mapping[str, Delta], metadata: Mapping[str, str], known: Collection[str] | None
    ) -> dict[str, str]:
        """Canonical name of each of the file's module names; `known` are the base's, where a base was named."""
        return {name: name for name in raw}

    def alpha_rule(self, metadata: Mapping[str, str]) -> AlphaRule:
        """Where alpha comes from for modules without an alpha tensor; None is the kind's default."""
        return lambda raw, rank: None

    def to_supported(self, adapter: Adapter) -> Adapter:
        """An adapter of the same meaning that the format can hold."""
        return adapter

    def header(self, adapter: Adapter, card: Card) -> dict[str, str]:
        """Metadata beyond the family and the fingerprint of the base."""
        return {}

    def finalize_metadata(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
        """Nothing more."""
        return {}

    def is_lossless(self, adapter: Adapter) -> bool:
        """Whether nothing had to be changed for the format."""
        if self.to_supported(adapter) != adapter:
            return False
        special = self.transformers
        # What is put together is taken apart again by its zeros, which a factor may have had before.
        return special is None or not special.applies_to(adapter) or self.decode(*self.encode(adapter)) == adapter

    def read_modules(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Delta]:
        """The deltas by the file's own module names."""
        return {raw: part.delta for raw, part in self._parts(tensors, metadata).items()}

    def decode(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], names: Names | None = None) -> Adapter:
        """The adapter of a file's tensors and metadata."""
        if FAMILY not in metadata:
            refuse_unsupported(unsupported_family(tensors) or "", f"tensor {min(tensors)!r}")
        parts = self._parts(tensors, metadata)
        shapes = names if isinstance(names, Mapping) else {}
        known = None if names is None else dict.fromkeys(names)
        deltas = {raw: part.delta for raw, part in parts.items()}
        family = family_of(metadata, deltas, known or ())
        refuse_unsupported(family, _source(next(iter(parts.values()))))
        modules: dict[str, Delta] = {}
        for raw, name, delta in self._normalized(deltas, metadata, family, known, shapes):
            part, shape = parts[raw], shapes.get(name)
            if known is not None and name not in known:
                raise _unknown(_source(part), name, known, unsupported_reason(tensors))
            if name in modules:
                problem = f"the module {name!r} is in the file twice, under two names"
                raise AdapterError(problem, where=_source(part), remedy="remove one of the two from the file")
            if shape is not None:
                check_delta(delta, partial(_sources, part), shape)
            modules[name] = delta if shape is None else delta.reshaped_for(shape)
        return Adapter(modules, family or family_of(metadata, modules, known or ()), metadata.get(FINGERPRINT))

    def encode(
        self, adapter: Adapter, card: Card | None = None, names: Names | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and the metadata."""
        ready = self.to_supported(adapter)
        tensors: dict[str, Tensor] = {}
        for name, raw, delta in self._named(ready):
            try:
                written = self._style_for(ready).write(raw, delta)
            except AdapterError as error:
                raise error.at(error.where or name) from error
            if not tensors.keys().isdisjoint(written):
                problem = f"the module {name!r} has the same name in this format as another one"
                raise AdapterError(problem, where=next(iter(written)), remedy="choose another format")
            tensors |= written
        base = {FAMILY: adapter.base, FINGERPRINT: adapter.fingerprint}
        return tensors, self.header(ready, card or Card()) | {key: text for key, text in base.items() if text}

    def _normalized(
        self,
        deltas: Mapping[str, Delta],
        metadata: Mapping[str, str],
        family: str,
        known: Collection[str] | None,
        shapes: Mapping[str, Sequence[int]],
    ) -> Iterator[tuple[str, str, Delta]]:
        """The file's name, canonical name and delta of each module; a fused layer of the file is several modules."""
        found = find_modules(deltas, family)
        for raw, there in found.items():
            for name, delta in there.deltas(deltas[raw], f"module {raw!r}", shapes):
                yield raw, name, delta
        rest = {raw: delta for raw, delta in deltas.items() if raw not in found}
        for raw, name in (self.resolve(rest, metadata, known) if rest else {}).items():
            yield raw, name, deltas[raw]

    def _named(self, adapter: Adapter) -> Iterator[tuple[str, str, Delta]]:
        """Name, the file's name and delta of each module; fused layers are put together."""
        if self.transformers is not None and self.transformers.applies_to(adapter):
            yield from ((raw, raw, delta) for raw, delta in self.transformers.raw_modules(adapter))
            return
        for name, delta in adapter.modules.items():
            yield name, self.raw_name(name, adapter.base), delta

    def _style_for(self, adapter: Adapter) -> KeyLayout:
        special = self.transformers
        return special.style if special and special.style and special.applies_to(adapter) else self.style

    def _parts(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Part]:
        validate_tensors(tensors)
        rule = self.alpha_rule(metadata)
        parts: dict[str, Part] = {}
        for group in group_tensors(tensors, self.style):
            delta = group.read(tensors)
            if "alpha" not in group.keys:
                alpha = rule(group.module, delta.rank)
                delta = delta if alpha is None else group.read(tensors, alpha)
            parts[group.module] = Part(group, delta)
        return parts


def _sources(part: Part) -> Mapping[str, str]:
    return part.group.sources


def _source(part: Part) -> str:
    return f"tensor {next(iter(part.group.keys.values()))!r}"


def _unknown(source: str, name: str, known: Collection[str], reason: str | None) -> AdapterError:
    return AdapterError(
        f"the base has no module {name!r}{f'; the file is {reason}' if reason else ''}",
        where=source,
        allowed=near_names(name, known),
        remedy="name the base that the adapter was made for",
    )
