"""Reads `delivery.yaml` of a home: the targets that hold the adapters of an alias."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from string import Formatter
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_engine.documents import read_document
from lora_engine.errors import did_you_mean
from lora_engine.files import expand_home, is_file_name
from registry.errors import VersionError
from registry.home import Home
from registry.policy.licenses import describe_problems
from registry.refs import NAME_RULE, check_alias
from tasks.errors import SpecError

DELIVERY_FILE = "delivery.yaml"
DeliveryLayout = Literal["comfyui", "a1111", "huggingface"]
_KEYS = "targets, on_revocation"
_DEFAULT_FILES = {"huggingface": "{name}"}
_SUFFIX = ".safetensors"


def _alias(text: str) -> str:
    try:
        return check_alias(text)
    except VersionError as error:
        raise ValueError(str(error)) from None


class DeliveryTarget(BaseModel):
    """A folder or bucket that holds the adapters of an alias.

    Attributes:
        name: Its name in messages, manifests and the log.
        alias: The alias whose versions it holds.
        adapters: Names of adapters, or patterns such as `style-*`.
        to: A folder, or a URL that fsspec knows, such as `s3://bucket/folder`; a relative path starts from the home.
        layout: The program that reads it.
        file: Path in the target, with `{name}` and optionally `{version}`: a file, or for `huggingface` a folder. Empty
            means `{name}.safetensors` or `{name}`.
        keep: Versions of each adapter to keep, 1 to 1000; more than 1 needs `{version}` in `file`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=f"^{NAME_RULE}$")]
    alias: Annotated[str, AfterValidator(_alias)] = "production"
    adapters: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    to: Annotated[str, Field(min_length=1)]
    layout: DeliveryLayout
    file: str = ""
    keep: Annotated[int, Field(ge=1, le=1000)] = 1

    @model_validator(mode="after")
    def _check_file(self) -> Self:
        fields = self._fields()
        if "name" not in fields:
            raise ValueError(f"file {self.template!r} has no {{name}}, so all adapters would have the same path")
        if self.keep > 1 and "version" not in fields:
            raise ValueError(f"keep {self.keep} needs {{version}} in file; {self.template!r} holds one version")
        if self.layout != "huggingface" and not self.template.endswith(_SUFFIX):
            raise ValueError(f"file {self.template!r} does not end in {_SUFFIX}")
        if not all(map(is_file_name, self.path_of("a", 1).split("/"))):
            raise ValueError(f"file {self.template!r} is no relative path inside of the target")
        return self

    def _fields(self) -> set[str]:
        try:
            parts = list(Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(f"file {self.template!r} is no template: {error}") from None
        fields = {field for _, field, _, _ in parts if field is not None}
        has_options = any(options or conversion for _, _, options, conversion in parts)
        if has_options or not fields <= {"name", "version"}:
            raise ValueError(f"file {self.template!r} may have {{name}} and {{version}} only")
        return fields

    @property
    def template(self) -> str:
        """Returns `file`, or its default for the layout."""
        return self.file or _DEFAULT_FILES.get(self.layout, f"{{name}}{_SUFFIX}")

    def path_of(self, name: str, version: int) -> str:
        """Returns the path of a version in the target."""
        return self.template.format(name=name, version=version)

    def matches(self, name: str) -> bool:
        """Returns True if the target holds adapters of this name."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)


class DeliverySettings(BaseModel):
    """The file.

    Attributes:
        targets: The targets.
        on_revocation: `retrain` starts the retraining of adapters that a revocation affects, in the flow `deliver`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: tuple[DeliveryTarget, ...] = ()
    on_revocation: Literal["nothing", "retrain"] = "nothing"

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        counts = Counter(target.name for target in self.targets)
        repeated = sorted(name for name, count in counts.items() if count > 1)
        if repeated:
            raise ValueError(f"several targets have the name {repeated[0]!r}")
        return self

    def select(self, target: str | None) -> tuple[DeliveryTarget, ...]:
        """Returns the target of a name, or all targets.

        Raises:
            SpecError: No target has the name.
        """
        chosen = tuple(entry for entry in self.targets if target in {None, entry.name})
        if target is not None and not chosen:
            names = [entry.name for entry in self.targets]
            raise SpecError(
                f"no target {target!r}",
                where=DELIVERY_FILE,
                allowed=", ".join(names) or "none",
                remedy=did_you_mean(target, names, "add it to the file"),
            )
        return chosen


def read_delivery(home: Home) -> DeliverySettings:
    """Returns the delivery settings of a home; no targets without a file.

    Raises:
        SpecError: The file is not YAML, or has unknown or invalid keys; names all of them.
    """
    path = home.path / DELIVERY_FILE
    document = read_document(path, SpecError, allowed=_KEYS, optional=True)
    try:
        return DeliverySettings.model_validate(document.data)
    except ValidationError as error:
        raise SpecError(
            describe_problems(error, document),
            where=document.where(error.errors()[0]["loc"]),
            allowed=f"{_KEYS}; in a target: {', '.join(DeliveryTarget.model_fields)}",
            remedy="fix the file (see docs/delivery.md)",
        ) from error


def locate_target(home: Home, target: DeliveryTarget) -> str:
    """Returns the URL of a target, or the absolute path of its folder."""
    if "://" in target.to:
        return target.to
    return str(home.path / expand_home(target.to))
