"""Maps tensor keys to factors: a `KeyLayout` (LyCORIS, PEFT, ...) has one `FactorKeys` per adapter kind.

The entry of a kind in `KINDS` has its tensor names by layout, or names the module that adds its factor keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from threading import RLock
from typing import TYPE_CHECKING, Protocol

from lora_engine.adapters import Delta, kinds
from lora_engine.catalog.kinds import KINDS, Kind
from lora_engine.errors import AdapterError
from lora_engine.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

ALPHA = "alpha"
_REQUIRES = {"weight": "on_input"}
"""Suffixes that are too common to identify a layout, to the suffix that the same module must also have."""


class FactorKeys(Protocol):
    """The tensor key suffixes of one kind's factors in one key layout.

    Attributes:
        kind: Name of the kind.
        suffixes: Every suffix that is read, without alpha's.
    """

    @property
    def kind(self) -> str: ...  # noqa: D102

    @property
    def suffixes(self) -> Collection[str]: ...  # noqa: D102

    def missing(self, suffixes: Collection[str]) -> str | None:
        """Returns a suffix that is missing for a complete module, or None."""
        ...

    def factor(self, suffix: str) -> str:
        """Returns the name of the factor with this suffix."""
        ...

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta of tensors by suffix."""
        ...

    def write(self, delta: Delta) -> dict[str, Tensor]:
        """Returns tensors by suffix, without alpha."""
        ...


@dataclass(frozen=True)
class TableFactorKeys:
    """Factor keys given by a literal table.

    Attributes:
        kind: Name of the kind.
        names: Factor to its suffix, for reading and writing.
        aliases: Further suffixes that are read, to their factor.
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
        """Returns the name of the factor with this suffix."""
        return self._factors[suffix]

    @cached_property
    def _factors(self) -> Mapping[str, str]:
        return {**{name: factor for factor, name in self.names.items()}, **self.aliases}

    def missing(self, suffixes: Collection[str]) -> str | None:
        """Returns the first suffix of the table whose factor is missing, or None."""
        present = {self.factor(suffix) for suffix in suffixes} | set(self.optional)
        return next((name for factor, name in self.names.items() if factor not in present), None)

    def read(self, tensors: Mapping[str, Tensor], alpha: float | None) -> Delta:
        """Returns the delta of tensors by suffix."""
        return kinds[self.kind].from_factors({self.factor(name): tensor for name, tensor in tensors.items()}, alpha)

    def write(self, delta: Delta) -> dict[str, Tensor]:
        """Returns tensors by suffix, without alpha."""
        return {self.names[factor]: tensor for factor, tensor in delta.factors().items()}


@dataclass(frozen=True)
class KeyLayout:
    """A layout of tensor keys: module name, separator, and a suffix per factor.

    Attributes:
        name: Name in messages.
        writes_alpha: True if alpha is written as a tensor; it is always read.
        also: Layouts that are also read, and never written.
        rewrites: (pattern, replacement) pairs that normalize keys before the suffix is looked up; applied in order.
        extends: The layout whose factor keys it has, too.
        kinds: The kinds that it is limited to; empty means all.
        own: Factor keys of its own, by kind; `dora of loha` for a kind within DoRA.
        read_only: Factor keys that are read and never written.
    """

    name: str
    writes_alpha: bool
    also: tuple[KeyLayout, ...] = ()
    rewrites: tuple[tuple[str, str], ...] = ()
    extends: KeyLayout | None = None
    kinds: Collection[str] = ()
    own: dict[str, FactorKeys] = field(default_factory=dict)
    read_only: list[FactorKeys] = field(default_factory=list)

    def add(self, keys: FactorKeys, name: str = "") -> None:
        """Adds the factor keys of a kind; `name` replaces the kind's."""
        self.own[name or keys.kind] = keys

    @property
    def factor_keys(self) -> Mapping[str, FactorKeys]:
        """The factor keys by kind, in the order of `KINDS` whichever module was imported first."""
        load_factor_keys()
        keys = {**({} if self.extends is None else self.extends.factor_keys), **self.own}
        order = {kind: position for position, kind in enumerate(KINDS)}
        names = sorted(keys, key=lambda name: (order[name.partition(" ")[0]], name))
        return {name: keys[name] for name in names if not self.kinds or name in self.kinds}

    @property
    def suffixes(self) -> set[str]:
        """Every suffix that any kind reads, and alpha's."""
        return {ALPHA, *(suffix for keys in self.readable for suffix in keys.suffixes)}

    @property
    def readable(self) -> list[FactorKeys]:
        """All factor keys that are read, the layout's own first."""
        written = self.factor_keys.values()  # first, because it loads all factor keys
        extended = [] if self.extends is None else self.extends.read_only
        return [*written, *self.read_only, *extended, *(keys for layout in self.also for keys in layout.readable)]

    def limited(self, name: str, chosen: Collection[str], also: tuple[KeyLayout, ...] = ()) -> KeyLayout:
        """Returns a layout that writes only the `chosen` kinds of this one, and reads what this one and `also` read."""
        return KeyLayout(name, self.writes_alpha, (self, *also), extends=self, kinds=tuple(chosen))

    def split(self, keys: Collection[str]) -> Iterator[tuple[str, str, str | None]]:
        """Yields each key with its module and its longest suffix in this layout (None if no suffix matches)."""
        known, present = self.suffixes, set(keys)
        rewrites = [(re.compile(old), new) for layout in (self, *self.also) for old, new in layout.rewrites]
        for key in keys:
            plain = key
            for pattern, replacement in rewrites:
                plain = pattern.sub(replacement, plain)
            suffix = _suffix_of(plain, known)
            module = plain if suffix is None else plain[: -len(suffix) - 1]
            if suffix in _REQUIRES and f"{module}.{_REQUIRES[suffix]}" not in present:
                module, suffix = plain, None
            yield key, module, suffix

    def matches(self, keys: Collection[str]) -> bool:
        """Returns True if any key ends in a factor suffix of this layout."""
        return any(suffix not in (None, ALPHA) for _, _, suffix in self.split(keys))

    def write(self, module: str, delta: Delta) -> dict[str, Tensor]:
        """Returns the tensors of one module by key.

        Raises:
            AdapterError: The layout has no factor keys for the kind.
        """
        factor_keys = self.factor_keys
        if delta.kind not in factor_keys:
            raise AdapterError(
                f"the format cannot hold an adapter of kind {delta.kind!r}",
                where=module,
                allowed=", ".join(factor_keys),
                remedy="choose another format",
            )
        tensors = factor_keys[delta.kind].write(delta)
        if self.writes_alpha and delta.alpha is not None:
            tensors[ALPHA] = alpha_tensor(delta.alpha, next(iter(tensors.values())).dtype)
        return {f"{module}.{suffix}": tensor for suffix, tensor in tensors.items()}


def _suffix_of(key: str, known: Collection[str]) -> str | None:
    rest = key
    while "." in rest:
        rest = rest.partition(".")[2]
        if rest in known:
            return rest
    return None


def alpha_tensor(alpha: float, dtype: torch.dtype) -> Tensor:
    """Returns alpha as a 0-d tensor in the first of `dtype`, float32 and float64 that holds it exactly."""
    for candidate in (dtype, torch.float32):
        tensor = torch.tensor(alpha, dtype=candidate)
        if tensor.item() == alpha:
            return tensor
    return torch.tensor(alpha, dtype=torch.float64)


LYCORIS_KEYS = KeyLayout("LyCORIS", writes_alpha=True)
LORALINE_KEYS = KeyLayout("Loraline", writes_alpha=True, extends=LYCORIS_KEYS)
"""LyCORIS' layout, plus Loraline's own keys for kinds that LyCORIS does not have."""
DIFFUSERS_KEYS = KeyLayout(
    "diffusers",
    writes_alpha=False,
    rewrites=(
        # Attention processors of old diffusers, which ComfyUI reads too: `to_q_lora.down.weight`.
        (r"_lora\.(up|down)\.weight$", r".lora.\1.weight"),
        (r"_lora\.alpha$", ".alpha"),
        # Files saved from the live model carry the name of PEFT's adapter.
        (r"\.lora_(A|B)\.(?!weight$|bias$)[^.]+\.(weight|bias)$", r".lora_\1.\2"),
    ),
)
KOHYA_KEYS = KeyLayout("kohya", writes_alpha=True, extends=LYCORIS_KEYS, also=(DIFFUSERS_KEYS,))
"""LyCORIS' layout, plus the keys of kohya's own kinds; files with PEFT's factors are read, too."""
PEFT_KEYS = KeyLayout("PEFT", writes_alpha=False)
KEY_LAYOUTS: Mapping[str, KeyLayout] = {
    layout.name: layout for layout in (LYCORIS_KEYS, LORALINE_KEYS, KOHYA_KEYS, DIFFUSERS_KEYS, PEFT_KEYS)
}
"""The layouts that entries of `KINDS` name."""
_lock, _loaded = RLock(), set[str]()


def load_factor_keys() -> None:
    """Adds the factor keys of all kinds to the layouts, once.

    Raises:
        SettingsError: A plug-in's kind names a layout or a module that does not exist.
    """
    with _lock:
        for name in KINDS if len(_loaded) < len(KINDS) else ():
            if name not in _loaded:
                _loaded.add(name)  # first, because its module may look up the keys of another kind
                try:
                    _add_factor_keys(KINDS[name])
                except BaseException:
                    _loaded.remove(name)
                    raise


def _add_factor_keys(kind: Kind) -> None:
    if isinstance(kind.keys, str):
        try:
            import_module(kind.keys)
        except ImportError as error:
            raise KINDS.misfit(kind.name, f"has no module of keys {kind.keys!r}: {error}", "a module") from error
        return
    for layout, names in kind.keys.items():
        if layout not in KEY_LAYOUTS:
            raise KINDS.misfit(kind.name, f"names the key layout {layout!r}", ", ".join(KEY_LAYOUTS))
        KEY_LAYOUTS[layout].add(TableFactorKeys(kind.name, names))
