"""Defines the base of step specs: settings, typed references to other steps, and files of the user."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_engine.families import Family
from lora_engine.settings import key_form, names_without_effect, without_later

_Settings = TypeVar("_Settings", bound=BaseModel)
REGISTERED = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]{0,62})@(?P<ref>[A-Za-z0-9][A-Za-z0-9._-]{0,62})")
"""Reference to a registered adapter: `name@version` or `name@alias`."""
STEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
"""Name of a step."""


SAVED = re.compile(rf"(?P<step>{STEP_NAME.pattern})@step-(?P<at>[1-9][0-9]{{0,6}})")
"""Reference to an adapter that a step of the file saved on the way: `STEP@step-N`."""


def is_path(value: str) -> bool:
    """Returns True if a reference is neither the name of a step, nor an adapter that it saved, nor a registered one."""
    return not any(pattern.fullmatch(value) for pattern in (REGISTERED, STEP_NAME, SAVED))


@dataclass(frozen=True)
class Input:
    """Marks a field whose value names a step, or a registered adapter, that produces an artifact of this kind.

    With `or_file`, a value that is no such name is the path of a file, as if marked `External("file", kept=True)`.
    """

    kind: str
    or_file: bool = False


ExternalKind = Literal["file", "folder", "folder or archive"]


@dataclass(frozen=True)
class External:
    """Marks a field whose value is a path, relative to the pipeline file; its content enters the cache key.

    The store keeps a copy of a file that is `kept`, so that the step can be reproduced without the user's file.
    """

    what: ExternalKind
    kept: bool = False


class StepSpec(BaseModel):
    """Base class of step specs; frozen, forbids unknown keys.

    Attributes:
        timeout: Limit of each attempt in seconds; the step is stopped then. None means no limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    uses: str
    timeout: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None

    def references(self) -> Iterator[tuple[str, str, str]]:
        """Yields (field, name of the step or `name@version`, kind of artifact) for each reference."""
        for field, marker in marked_fields(type(self), Input):
            value = getattr(self, field)
            names = [] if value is None else [value] if isinstance(value, str) else value
            for name in names:
                if not (marker.or_file and is_path(name)):
                    yield field, name, marker.kind

    def externals(self) -> Iterator[tuple[str, str, ExternalKind]]:
        """Yields (field, path as written, kind of path) for each path that is set."""
        for field, marker in marked_fields(type(self), External):
            value = getattr(self, field)
            if value is not None:
                yield field, value, marker.what
        for field in self._files_by_input():
            yield field, getattr(self, field), "file"

    def kept_files(self) -> dict[str, str]:
        """Returns field -> path as written, of the files that the store keeps."""
        fields = [field for field, marker in marked_fields(type(self), External) if marker.kept]
        fields += self._files_by_input()
        return {field: getattr(self, field) for field in fields if getattr(self, field) is not None}

    def may_be_absent(self, field: str) -> bool:
        """Returns True if the step also runs without the registered versions that a reference field names."""
        del field
        return False

    def _files_by_input(self) -> list[str]:
        markers = [field for field, marker in marked_fields(type(self), Input) if marker.or_file]
        return [field for field in markers if getattr(self, field) is not None and is_path(getattr(self, field))]

    def own_settings(self) -> dict[str, Any]:
        """Returns the settings: all fields but references, paths and `timeout`."""
        return self.model_dump(mode="json", exclude=self._outside())

    def key_settings(self) -> dict[str, Any]:
        """Returns the settings that enter the cache key; see `key_form`.

        The base and its autoencoder are left out, because their fingerprints enter the key.
        """
        return _without_base(key_form(self, self.own_settings()))

    def earlier_key_settings(self) -> dict[str, Any]:
        """Returns the settings in the cache keys of releases before 0.4: settings without effect have their values."""
        return _without_base(without_later(self, self.own_settings()))

    @classmethod
    def family_defaults(cls, families: Collection[Family]) -> dict[str, Any]:
        """Returns the defaults of settings that depend on the families of the bases in a pipeline."""
        del families
        return {}

    @classmethod
    def without_effect(cls, *, visible: bool = False) -> set[str]:
        """Returns the names of the settings that change no byte of the result's main file.

        With `visible`, only of those that ask for something beside it.
        """
        return names_without_effect(cls, visible=visible)

    def with_settings(self, recorded: Mapping[str, Any]) -> Self | None:
        """Returns this spec with recorded settings, completed with today's defaults; None if they are not valid now."""
        try:
            return type(self).model_validate(self.model_dump(include=self._outside()) | dict(recorded))
        except ValidationError:
            return None

    @classmethod
    def _outside(cls) -> set[str]:
        references, paths = marked_fields(cls, Input), marked_fields(cls, External)
        return {"timeout", *(field for field, _ in references), *(field for field, _ in paths)}

    def narrow(self, settings: type[_Settings]) -> _Settings:
        """Returns the fields of the engine's settings class."""
        return settings.model_validate(self.model_dump(include=set(settings.model_fields)))


def _without_base(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ("base", "vae")}


Marker = TypeVar("Marker", Input, External)


def marked_fields(spec: type[StepSpec], marker: type[Marker]) -> Iterator[tuple[str, Marker]]:
    """Yields (field, its marker) for each field of a spec with a marker of this class."""
    for name, field in spec.model_fields.items():
        for item in field.metadata:
            if isinstance(item, marker):
                yield name, item
