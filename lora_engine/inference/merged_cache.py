"""Keeps merged weights between compositions, so that the same adapters on the same base are not merged again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from lora_engine.adapters import Adapter
from lora_engine.adapters.merged_weights import MergedWeights
from lora_engine.bases.base import BaseModel

CACHE_BYTES = 1 << 30

_Key = tuple[tuple[int, frozenset[str]], ...]


@dataclass(frozen=True)
class _Entry:
    """Merged weights, and the adapters that they are made of, whose identities are its key."""

    adapters: tuple[Adapter, ...]
    merged: MergedWeights


class MergedCache:
    """Merged weights of the latest compositions of one base. Between compositions the base has its own weights.

    Args:
        base: The model.
        max_bytes: Bytes of all entries between compositions, the least recent of which are dropped; and, while a
            composition is open, of its weights for earlier multipliers beside the current ones. 0 keeps nothing.
    """

    def __init__(self, base: BaseModel, max_bytes: int = CACHE_BYTES) -> None:
        self._base, self._max_bytes = base, max_bytes
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()

    @property
    def held_bytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.merged.held_bytes for entry in self._entries.values())

    def forget(self, adapter: Adapter) -> None:
        """Drops all entries with an adapter."""
        for key in [key for key, entry in self._entries.items() if any(one is adapter for one in entry.adapters)]:
            del self._entries[key]

    @contextmanager
    def merged(self, adapters: Sequence[Adapter], names: Sequence[Collection[str]]) -> Iterator[MergedWeights]:
        """Yields adapters that are merged into the base, and removes them at the end.

        Args:
            adapters: The adapters; the same objects as before are found again.
            names: Modules of each that are merged.

        Raises:
            AdapterError: See `MergedWeights`.
        """
        key = tuple((id(adapter), frozenset(own)) for adapter, own in zip(adapters, names, strict=True))
        entry = self._entries.pop(key, None)
        if entry is None or not entry.merged.is_removed():
            parts = [part_of(adapter, own) for adapter, own in zip(adapters, names, strict=True)]
            entry = _Entry(tuple(adapters), MergedWeights(self._base, parts, kept_bytes=self._max_bytes))
        with entry.merged:
            yield entry.merged
        self._entries[key] = entry
        while self._entries and self.held_bytes > self._max_bytes:
            self._entries.popitem(last=False)


def part_of(adapter: Adapter, names: Collection[str]) -> Adapter:
    """Returns the adapter with some of its modules alone."""
    return replace(adapter, modules={name: delta for name, delta in adapter.modules.items() if name in names})
