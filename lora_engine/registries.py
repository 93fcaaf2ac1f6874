"""Defines `Registry[T]`, the named sets of the engine: kinds, codecs, families, methods, metrics.

Unrelated to the package `registry`, which keeps versions of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from lora_engine.errors import SettingsError, did_you_mean

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """A mapping of names to entries; entries are added and never removed.

    Args:
        noun: Name of an entry in error messages, such as `adapter kind`.
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Adds an entry and returns it.

        Raises:
            SettingsError: The name is taken.
        """
        if name in self._entries:
            raise SettingsError(f"{self.noun} {name!r} is registered twice", remedy="choose another name")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        """Returns the entry with that name.

        Raises:
            SettingsError: No such entry; lists the known names and the nearest match.
        """
        try:
            return self._entries[name]
        except KeyError:
            hint = did_you_mean(name, self._entries, "choose one of these")
            known = ", ".join(sorted(self._entries))
            raise SettingsError(f"unknown {self.noun} {name!r}", allowed=known, remedy=hint) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
