"""How files spell factors: a `KeyLayout` is a family of suffixes (LyCORIS', PEFT's), with one `FactorKeys` for each kind.

A new kind adds its spellings to the styles that can hold it, in a file of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from lora_engine.adapters import Delta, kinds
from lora_engine.errors import AdapterError
from lora_engine.formats.validate import check_delta
from lora_engine.registries import Registry

ALPHA = "alpha"
_BESIDE = {"weight": "on_input"}
"""Suffixes that are too common to tell anything, to the suffix that must stand beside them."""


class FactorKeys(Protocol):
    """How one kind's factors are spelt in one style.

    Attributes:
        kind: Name of the kind.
        suffixes: Every suffix that it may read, without that of alpha.
    """

    @property
    def kind(self) -> str: ...  # noqa: D102

    @property
    def suffixes(self) -> Collection[str]: ...  # noqa: D102

    def missing(self, suffixes: Collection[str]) -> str | None:
        """A suffix that these lack to be a whole module, or None."""
        ...

    def factor(self, suffix: str) -> str:
        """The factor that a suffix stands for."""
        ...

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """The delta of tensors by suffix."""
        ...

    def write(self, delta: Delta) -> dict[str, Tensor]:
        """Tensors by suffix, without alpha."""
        ...


@dataclass(frozen=True)
class TableFactorKeys:
    """A spelling that is a mere table.

    Attributes:
        kind: Name of the kind.
        names: Factor to the suffix that is written, and read.
        aliases: Other suffixes that are read, to their factor.
        optional: Factors that may be missing.
    """

    kind: str
    names: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)
    optional: Collection[str] = ()

    @cached_property
    def suffixes(self) -> Collection[str]:
        """Every suffix that is read."""
        return frozenset(self._factors)

    def factor(self, suffix: str) -> str:
        """The factor that a suffix stands for."""
        return self._factors[suffix]

    @cached_property
    def _factors(self) -> Mapping[str, str]:
        return {**{name: factor for factor, name in self.names.items()}, **self.aliases}

    def missing(self, suffixes: Collection[str]) -> str | None:
        """The first suffix of the table whose factor is not there, or None."""
        there = {self.factor(suffix) for suffix in suffixes} | set(self.optional)
        return next((name for factor, name in self.names.items() if factor not in there), None)

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """The delta of tensors by suffix."""
        return kinds[self.kind].from_factors({self.factor(name): tensor for name, tensor in tensors.items()}, alpha)

    def write(self, delta: Delta) -> dict[str, Tensor]:
        """Tensors by suffix, without alpha."""
        return {self.names[factor]: tensor for factor, tensor in delta.factors().items()}


@dataclass(frozen=True)
class KeyLayout:
    """A family of suffixes.

    Attributes:
        name: What it is called in messages.
        writes_alpha: Whether alpha goes into the file as a tensor; it is read in any case.
        spellings: FactorKeys by kind.
        also: Styles whose spellings are read too, and never written.
        rewrites: Patterns of names to the form in which the suffixes are the table's, applied in turn.
    """

    name: str
    writes_alpha: bool
    spellings: Registry[FactorKeys] = field(default_factory=lambda: Registry("spelling"))
    also: tuple[KeyLayout, ...] = ()
    rewrites: tuple[tuple[str, str], ...] = ()

    def add(self, spelling: FactorKeys) -> None:
        """Registers a kind's spelling."""
        self.spellings.add(spelling.kind, spelling)

    @property
    def suffixes(self) -> set[str]:
        """Every suffix that some kind may read, and that of alpha."""
        return {ALPHA, *(suffix for spelling in self.readable for suffix in spelling.suffixes)}

    @property
    def readable(self) -> list[FactorKeys]:
        """Every spelling that is read: the style's own first."""
        return [*self.spellings.values(), *(spelling for style in self.also for spelling in style.readable)]

    def limited(self, name: str, chosen: Collection[str], also: tuple[KeyLayout, ...] = ()) -> KeyLayout:
        """A style of its own name that writes some of this one's kinds, and reads what this one and `also` read."""
        return KeyLayout(name, self.writes_alpha, _Chosen(self.spellings, chosen), (self, *also))

    def split(self, keys: Collection[str]) -> Iterator[tuple[str, str, str | None]]:
        """Each key with its module and the longest suffix of this style that it ends in; None where there is none."""
        known, there = self.suffixes, set(keys)
        rewrites = [(re.compile(old), new) for style in (self, *self.also) for old, new in style.rewrites]
        for key in keys:
            plain = key
            for pattern, replacement in rewrites:
                plain = pattern.sub(replacement, plain)
            suffix = _suffix_of(plain, known)
            module = plain if suffix is None else plain[: -len(suffix) - 1]
            if suffix in _BESIDE and f"{module}.{_BESIDE[suffix]}" not in there:
                module, suffix = plain, None
            yield key, module, suffix

    def matches(self, keys: Collection[str]) -> bool:
        """Whether some key ends in a factor of this style."""
        return any(suffix not in (None, ALPHA) for _, _, suffix in self.split(keys))

    def write(self, module: str, delta: Delta) -> dict[str, Tensor]:
        """The tensors of one module, by key.

        Raises:
            AdapterError: The style cannot spell the kind.
        """
        if delta.kind not in self.spellings:
            raise AdapterError(
                f"the format cannot hold an adapter of kind {delta.kind!r}",
                where=module,
                allowed=", ".join(self.spellings),
                remedy="choose another format",
            )
        tensors = self.spellings[delta.kind].write(delta)
        if self.writes_alpha and delta.alpha is not None:
            tensors[ALPHA] = alpha_tensor(delta.alpha, next(iter(tensors.values())).dtype)
        return {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}


@dataclass(frozen=True)
class Group:
    """The tensors of one module in a file: suffix to key, and the spelling that reads them."""

    module: str
    keys: Mapping[str, str]
    spelling: FactorKeys

    @property
    def sources(self) -> dict[str, str]:
        """Factor, or `alpha`, to the key of its tensor."""
        return {name if name == ALPHA else self.spelling.factor(name): key for name, key in self.keys.items()}

    def read(self, tensors: Mapping[str, Tensor], default_alpha: float | None = None) -> Delta:
        """The delta, checked; `default_alpha` is taken where the file has no alpha tensor for the module.

        Raises:
            AdapterError: The factors do not agree; names the tensor.
        """
        parts = {suffix: tensors[key] for suffix, key in self.keys.items() if suffix != ALPHA}
        alpha = default_alpha
        if ALPHA in self.keys:
            stored = tensors[self.keys[ALPHA]]
            if stored.numel() != 1:
                problem, where = f"alpha has the shape {list(stored.shape)}", f"tensor {self.keys[ALPHA]!r}"
                raise AdapterError(problem, where=where, allowed="one number", remedy="check the file")
            alpha = float(stored.item())
        delta = self.spelling.read(parts, alpha)
        check_delta(delta, lambda: self.sources)
        return delta


def group_tensors(keys: Collection[str], style: KeyLayout) -> Iterator[Group]:
    """The modules of a file, sorted by name.

    Raises:
        AdapterError: A tensor that is no factor of any kind, or a module that lacks one; names the tensor.
    """
    modules: dict[str, dict[str, str]] = {}
    for key, module, suffix in style.split(sorted(keys)):
        if suffix is None:
            raise _unknown_key(key, style)
        found = modules.setdefault(module, {})
        if suffix in found:
            raise _twice(key)
        found[suffix] = key
    # Files hold thousands of modules of a few forms.
    spellings: dict[frozenset[str], FactorKeys] = {}
    for module, found in sorted(modules.items()):
        form = frozenset(found)
        if form not in spellings:
            spellings[form] = _spelling_of(found, style)
        yield Group(module, found, spellings[form])


def _suffix_of(key: str, known: Collection[str]) -> str | None:
    rest = key
    while "." in rest:
        rest = rest.partition(".")[2]
        if rest in known:
            return rest
    return None


def _spelling_of(found: Mapping[str, str], style: KeyLayout) -> FactorKeys:
    there = [suffix for suffix in found if suffix != ALPHA]
    first = found[there[0] if there else ALPHA]
    able = [spelling for spelling in style.readable if set(there) <= set(spelling.suffixes)]
    if not able:
        raise _unknown_key(first, style, f" together with {', '.join(repr(found[suffix]) for suffix in there[1:])}")
    lacks = {spelling.missing(there): spelling for spelling in able}
    if None in lacks:
        spelling = lacks[None]
        if len({spelling.factor(suffix) for suffix in there}) == len(there):
            return spelling
        raise _twice(first)
    raise AdapterError(
        f"the module has no {next(iter(lacks))!r} beside it",
        where=f"tensor {first!r}",
        allowed="every factor of a module in the same file",
        remedy="save or download the adapter again",
    )


def _twice(key: str) -> AdapterError:
    return AdapterError(
        "the module has one factor twice, in two spellings",
        where=f"tensor {key!r}",
        allowed="one tensor for each factor",
        remedy="remove one of the spellings",
    )


def _unknown_key(key: str, style: KeyLayout, beside: str = "") -> AdapterError:
    suffixes = sorted(style.suffixes - {ALPHA})
    return AdapterError(
        f"this is no factor of a kind that {style.name} names are known for ({', '.join(_names(style))}){beside}",
        where=f"tensor {key!r}",
        allowed=f"names that end in {', '.join(suffixes)} or {ALPHA}",
        remedy="convert the adapter with the program that made it",
    )


def _names(style: KeyLayout) -> list[str]:
    return list(dict.fromkeys(spelling.kind for spelling in style.readable))


class _Chosen(Registry[FactorKeys]):
    """Some entries of another registry, also those that are registered there later."""

    def __init__(self, source: Registry[FactorKeys], chosen: Collection[str]) -> None:
        super().__init__(source.noun)
        self._source, self._chosen = source, tuple(chosen)

    def __getitem__(self, name: str) -> FactorKeys:
        return self._source[name] if name in self._chosen else super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        return name in self._chosen and name in self._source

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._source if name in self._chosen)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Extended(Registry[FactorKeys]):
    """The entries of another registry, also those that are registered there later, and some more."""

    def __init__(self, source: Registry[FactorKeys]) -> None:
        super().__init__(source.noun)
        self._source = source

    def __getitem__(self, name: str) -> FactorKeys:
        return self._source[name] if name in self._source else super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        return name in self._source or super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        yield from self._source
        yield from super().__iter__()

    def __len__(self) -> int:
        return len(self._source) + super().__len__()


def alpha_tensor(alpha: float, dtype: torch.dtype) -> Tensor:
    """Alpha as a 0-d tensor: in the factors' dtype where that holds it exactly, else in float32, else in float64."""
    for candidate in (dtype, torch.float32):
        tensor = torch.tensor(alpha, dtype=candidate)
        if tensor.item() == alpha:
            return tensor
    return torch.tensor(alpha, dtype=torch.float64)


LYCORIS = KeyLayout("LyCORIS", writes_alpha=True)
LORALINE = KeyLayout("Loraline", writes_alpha=True, spellings=_Extended(LYCORIS.spellings))
"""LyCORIS' spellings, and our own of the kinds that LyCORIS does not know."""
DIFFUSERS = KeyLayout(
    "diffusers",
    writes_alpha=False,
    rewrites=(
        # The attention processors of old diffusers, and what ComfyUI reads alike: `to_q_lora.down.weight`.
        (r"_lora\.(up|down)\.weight$", r".lora.\1.weight"),
        (r"_lora\.alpha$", ".alpha"),
        # The name of PEFT's adapter, where somebody saved the live model's names.
        (r"\.lora_(A|B)\.(?!weight$|bias$)[^.]+\.(weight|bias)$", r".lora_\1.\2"),
    ),
)
PEFT = KeyLayout("PEFT", writes_alpha=False)
