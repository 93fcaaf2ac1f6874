"""Defines `Registry[T]`, the named sets of the engine: kinds, formats, families, methods, metrics, captioners, steps.

A registry reads its built-in entries and those of installed packages (plug-ins) on the first look-up, so importing it
is cheap. A plug-in declares each entry as an entry point: the group of the registry, the entry's name, and the object.
Unrelated to the package `registry`, which keeps versions of adapters.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from threading import RLock
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar, Union

from lora_engine.errors import SettingsError, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_log = logging.getLogger(__name__)

T = TypeVar("T")
E = TypeVar("E")

GROUPS = tuple(
    f"loraline.{noun}"
    for noun in (
        "captioners",
        "families",
        "formats",
        "kinds",
        "merge_methods",
        "metrics",
        "steps",
        "training_methods",
    )
)
"""The groups of entry points that plug-ins can declare."""


@dataclass(frozen=True)
class Plugin:
    """An installed package that adds entries: name and version of the distribution."""

    name: str
    version: str


class Registry(Mapping[str, T]):
    """A mapping of names to entries; entries are added and never removed.

    Args:
        noun: Name of an entry in error messages, such as `adapter kind`.
        entry: Class of the entries. Entries have a `name`.
        source: The built-in entries: a package or module whose variables of that class they are, or a function that
            adds them.
        group: Group of the plug-ins' entry points, one of `GROUPS`; empty means that there are none.
    """

    def __init__(
        self,
        noun: str,
        *,
        entry: type[Any] | None = None,
        source: str | Callable[[], object] | None = None,
        group: str = "",
    ) -> None:
        self.noun = noun
        self._class, self._source, self._group = entry, source, group
        self._entries: dict[str, T] = {}
        self._plugins: dict[str, Plugin] = {}
        self._lock, self._is_loading = RLock(), False
        self._is_complete = not (source or group)

    def add(self, name: str, entry: T) -> T:
        """Adds an entry and returns it.

        Raises:
            SettingsError: The name is taken.
        """
        if name in self._entries:
            raise SettingsError(f"{self.noun} {name!r} is registered twice", remedy="choose another name")
        self._entries[name] = entry
        return entry

    def plugin(self, name: str) -> Plugin | None:
        """Returns the plug-in that an entry is from; None for a built-in entry."""
        self._load()
        return self._plugins.get(name)

    def misfit(self, name: str, problem: str, allowed: str) -> SettingsError:
        """Returns the error of an entry that cannot be used; names its plug-in, and how to do without it."""
        plugin = self._plugins.get(name)
        where = f"plug-in {plugin.name} {plugin.version}, group {self._group}" if plugin else ""
        remedy = f"upgrade {plugin.name}, or remove it: pip uninstall {plugin.name}" if plugin else "fix the entry"
        return SettingsError(f"{self.noun} {name!r} {problem}", where=where, allowed=allowed, remedy=remedy)

    def __getitem__(self, name: str) -> T:
        """Returns the entry with that name.

        Raises:
            SettingsError: No such entry; lists the known names and the nearest match. Or a plug-in is faulty.
        """
        self._load()
        try:
            return self._entries[name]
        except KeyError:
            hint = did_you_mean(name, self._entries, "choose one of these")
            known = ", ".join(sorted(self._entries))
            raise SettingsError(f"unknown {self.noun} {name!r}", allowed=known, remedy=hint) from None

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._entries)

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def _load(self) -> None:
        if self._is_complete:
            return
        with self._lock:
            if self._is_loading or self._is_complete:  # an entry that looks up another one sees those before it
                return
            self._is_loading, before = True, (dict(self._entries), dict(self._plugins))
            try:
                self._load_source()
                for point in _entry_points().get(self._group, ()):
                    self._load_plugin(point)
                self._is_complete = True
            except BaseException:
                self._entries, self._plugins = before  # the next look-up raises the same error
                raise
            finally:
                self._is_loading = False

    def _load_source(self) -> None:
        if self._source is None:
            return
        if callable(self._source):
            self._source()
            return
        for module in _modules(self._source):
            for value in vars(module).values():
                if self._class and isinstance(value, self._class) and self._entries.get(value.name) is not value:
                    self.add(value.name, value)

    def _load_plugin(self, point: EntryPoint) -> None:
        name = point.name
        if name in self._entries:
            raise _faulty(point, f"{self.noun} {name!r} is taken", "a name that no other package uses")
        try:
            entry = point.load()
        except Exception as error:  # any error of another package's code
            problem = f"{self.noun} {name!r} cannot be imported: {type(error).__name__}: {error}"
            raise _faulty(point, problem, "an object that can be imported") from error
        if self._class is not None and not isinstance(entry, self._class):
            problem = f"{self.noun} {name!r} is a {type(entry).__qualname__}"
            raise _faulty(point, problem, f"a {self._class.__module__}.{self._class.__qualname__}")
        if getattr(entry, "name", name) != name:
            raise _faulty(point, f"{self.noun} {name!r} is named {entry.name!r}", "the entry's own name")
        self._entries[name] = entry
        self._plugins[name] = _plugin_of(point)


class Loaded(Mapping[str, T], Generic[E, T]):
    """The objects that the entries of a registry name as `module:attribute`; each is imported on its first use.

    Args:
        entries: The registry.
        load: Returns the object of an entry.
    """

    def __init__(self, entries: Registry[E], load: Callable[[E], T]) -> None:
        self.entries, self._load = entries, load
        self._objects: dict[str, T] = {}
        self._lock = RLock()

    def __getitem__(self, name: str) -> T:
        """Returns the object; raises `SettingsError` as the registry does, or if it is not what it should be."""
        entry = self.entries[name]
        with self._lock:
            if name not in self._objects:
                self._objects[name] = self._load(entry)
        return self._objects[name]

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def import_target(entries: Registry[Any], name: str, target: str) -> Any:
    """Returns the object `module:attribute` of an entry.

    Raises:
        SettingsError: It cannot be imported; names the plug-in.
    """
    module, _, attribute = target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        problem = f"cannot be imported from {target!r}: {error}"
        raise entries.misfit(name, problem, "module:attribute") from error


def spec_union(entries: Registry[Any], key: str) -> Any:
    """Returns the annotation of a setting that takes the spec of any entry: a union that `key` discriminates.

    Entries without a spec are left out.
    """
    from pydantic import Field

    specs = tuple(entry.spec for entry in entries.values() if entry.spec is not None)
    union: Any = Union[specs]  # noqa: UP007 (the members are known at run time)
    return Annotated[union, Field(discriminator=key)] if len(specs) > 1 else union


@dataclass(frozen=True)
class NameOrOptions:
    """Marks a union of specs, discriminated by `name`, for which a name alone is valid too."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Returns the union's schema behind a step that turns a name into options."""
        from pydantic_core.core_schema import no_info_before_validator_function

        return no_info_before_validator_function(_from_name, handler(source))

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Returns the union's JSON Schema with the names."""
        union = handler(core_schema)
        if "oneOf" not in union:  # of one member
            return {"anyOf": [{"type": "string"}, union]}
        return {"anyOf": [{"enum": list(union["discriminator"]["mapping"])}, *union["oneOf"]]}


def _from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def names_of(entries: Mapping[str, Any]) -> Any:
    """Returns the annotation of a setting that takes the name of an entry."""
    return Literal[tuple(entries)]


def _modules(name: str) -> Iterator[ModuleType]:
    module = import_module(name)
    yield module
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        yield import_module(f"{name}.{found.name}")


@functools.cache
def _entry_points() -> Mapping[str, list[EntryPoint]]:
    """Returns the entry points of plug-ins by group; reads the metadata of all installed packages once per process."""
    from importlib.metadata import distributions

    points: dict[str, list[EntryPoint]] = {}
    seen: set[str] = set()
    for distribution in distributions():
        # Parsing the metadata of every package would take ten times as long.
        if "[loraline." not in (distribution.read_text("entry_points.txt") or "") or distribution.name in seen:
            continue
        seen.add(distribution.name)  # of several distributions with one name, Python imports the first
        for point in distribution.entry_points:
            if point.group in GROUPS:
                points.setdefault(point.group, []).append(point)
            elif point.group.startswith("loraline."):  # misspelled, or of another release
                _log.warning("%s", _faulty(point, f"ignored: unknown group {point.group!r}", ", ".join(GROUPS)))
    return {group: sorted(found, key=lambda point: point.name) for group, found in points.items()}


def _plugin_of(point: EntryPoint) -> Plugin:
    return Plugin(point.dist.name, point.dist.version) if point.dist else Plugin("unknown", "")


def _faulty(point: EntryPoint, problem: str, allowed: str) -> SettingsError:
    plugin = _plugin_of(point)
    return SettingsError(
        problem,
        where=f"plug-in {plugin.name} {plugin.version}, entry point {point.name} = {point.value} of {point.group}",
        allowed=allowed,
        remedy=f"upgrade {plugin.name}, or remove it: pip uninstall {plugin.name}",
    )
