"""`Registry`: the public face of a home, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora_engine.files import FilePath
from registry.entities import AdapterVersion, Event
from registry.home import Home
from registry.lineage.record import Lineage
from registry.lineage.walk import Direction, Walk
from registry.policy.conditions import require_policy
from registry.refs import split_ref
from registry.versions import deletion, promotion
from registry.versions.versions import Versions


@dataclass(frozen=True, repr=False)
class RegisteredVersion:
    """A version of an adapter, with the registry that it is in.

    Attributes:
        version: The metadata as they were when it was looked up.
        versions: The open registry.
        alias: The alias that it was looked up by, whose policy each use asks; empty for none.
    """

    version: AdapterVersion
    versions: Versions = field(compare=False)
    alias: str = field(default="", compare=False)

    def __repr__(self) -> str:
        return repr(self.version).replace("Adapter", "Registered", 1)

    @property
    def ref(self) -> str:
        """The unambiguous name: `name@number`."""
        return self.version.ref

    @property
    def card(self) -> Mapping[str, Any]:
        """The card: license, trigger, base, recipe."""
        return self.version.card

    def read(self) -> bytes:
        """Returns the bytes of the adapter file, verified against the registered digest.

        Raises:
            DamagedBlob: The bytes differ.
            GoneVersion: The version was withdrawn or deleted.
            Refused: The version does not meet the policy of the alias that it was looked up by.
        """
        self._require_policy()
        return self.versions.read_adapter(self.version)

    def checkout(self, path: FilePath) -> Path:
        """Copies the adapter file to a path, verified and in one atomic step, and returns the path."""
        target = Path(path)
        self._require_policy()
        self.versions.checkout_adapter(self.version, target)
        return target

    def lineage(self, direction: Direction = "up") -> Walk:
        """Returns the graph of what the version was made from (`up`) or what was made from it (`down`)."""
        return self.versions.lineage.walk(self.ref, direction)

    def _require_policy(self) -> None:
        if self.alias:
            require_policy(self.versions, self.version, self.alias)


class Registry:
    """Versions of adapters in a home; made by `Registry.open`, and a context manager that closes it.

    It reads no tensors: `tasks.operations.import_adapter`, which `loraline import` uses, validates a file first.
    """

    def __init__(self, versions: Versions) -> None:
        self.versions = versions

    @classmethod
    def open(cls, home: FilePath = ".loraline", *, create: bool = True) -> Registry:
        """Opens the registry of a home.

        Args:
            home: The folder; made where it is missing.
            create: False refuses a folder that is not a home yet.

        Raises:
            HomeError: The folder is not a home, is not writable, or a newer release wrote its database.
        """
        return cls(Versions(Home.open(home, create=create)))

    @property
    def home(self) -> Home:
        """The home."""
        return self.versions.home

    @property
    def lineage(self) -> Lineage:
        """Runs, steps and artifacts of the home."""
        return self.versions.lineage

    def register(
        self,
        name: str,
        file: FilePath,
        *,
        license: str | None = None,  # noqa: A002 (the name of the field everywhere)
        card: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        gates: Sequence[Mapping[str, Any]] = (),
        parents: Sequence[str] = (),
        alias: str | None = None,
    ) -> RegisteredVersion:
        """Registers a file as the next version of a name; the same bytes keep their number.

        Args:
            name: Name of the adapter: lower-case letters, digits, `.`, `_` and `-`.
            file: The adapter file; its bytes are copied into the store.
            license: SPDX identifier, or a name of the table of licenses.
            card: Further metadata, as JSON values: `trigger`, `base`, ...
            metrics: Measured values, as JSON values.
            gates: Gates that were checked: `metric`, `of`, `min`, `max`, `value`, `passed` each.
            parents: `name@number` of the adapters that it was merged from.
            alias: An alias to give it where the policy of the alias allows; a refusal is logged.

        Raises:
            VersionError: The name or a number is not valid.
            StoreError: The file cannot be read.
        """
        source = Path(file)
        artifact = self.versions.store.put_files("adapter", {source.name: source})
        passed = all(gate.get("passed") for gate in gates) if gates else None
        version = self.versions.register(
            name,
            artifact,
            source.name,
            card=card,
            metrics=metrics,
            gates=gates,
            passed=passed,
            parents=parents,
            declared=license,
            alias_request=alias,
        )
        return RegisteredVersion(version, self.versions)

    def promote(
        self,
        version: RegisteredVersion | str,
        to: str,
        *,
        reason: str,
        expect: int | str | None = None,
        override: bool = False,
    ) -> RegisteredVersion:
        """Moves an alias to a version where its policy allows, and returns the version as it is now.

        Args:
            version: The version, or `name@number`, `name@alias`.
            to: The alias, such as `production`.
            reason: Why; recorded in the log.
            expect: Number of the version, or at least 8 digits of its sha256, that was reviewed; None accepts any.
            override: True sets the policy's reasons aside where the policy permits it; they are recorded.

        Raises:
            Refused: The policy does not allow it; lists every reason.
            Conflict: Another process moved the alias meanwhile, or the version is not the expected one.
        """
        name, ref = split_ref(version if isinstance(version, str) else version.ref)
        event = promotion.promote(
            self.versions, name, ref, to, reason=reason, expected_source=expect, override=override
        )
        return self[f"{name}@{event.after}"]

    def rollback(self, name: str, alias: str = "production", *, reason: str = "rollback") -> RegisteredVersion | None:
        """Moves an alias back to the version before; returns that version, or None where nothing held it before."""
        event = promotion.rollback(self.versions, name, alias, reason=reason)
        return None if event.after is None else self[f"{name}@{event.after}"]

    def withdraw(self, version: RegisteredVersion | str, *, reason: str, expect: int | str | None = None) -> Event:
        """Withdraws a version: it can no longer be read, and its aliases are removed.

        Args:
            version: The version, or `name@number`, `name@alias`.
            reason: Why; recorded in the log.
            expect: Number of the version, or at least 8 digits of its sha256, that was reviewed; None accepts any.

        Raises:
            Refused: A protected alias points at it.
            Conflict: The version is not the expected one.
        """
        name, ref = split_ref(version if isinstance(version, str) else version.ref)
        return deletion.withdraw(self.versions, name, ref, reason=reason, expect=expect)

    def history(self, name: str, alias: str | None = None) -> Sequence[Event]:
        """Returns the events of a name, oldest first."""
        return promotion.history(self.versions, name, alias)

    def list(self, name: str | None = None) -> tuple[RegisteredVersion, ...]:
        """Returns the versions of a name, or of all names, without deleted ones."""
        return tuple(RegisteredVersion(version, self.versions) for version in self.versions.list(name))

    def close(self) -> None:
        """Closes the database."""
        self.versions.close()

    def __getitem__(self, ref: str) -> RegisteredVersion:
        """Returns the version that `name@number`, `name@alias` or `name` (its latest) names.

        Raises:
            UnknownName: No such adapter.
            UnknownVersion: No such number or alias.
        """
        name, of = split_ref(ref)
        version = self.versions.show(name, of)
        return RegisteredVersion(version, self.versions, of if of in version.aliases else "")

    def __iter__(self) -> Iterator[RegisteredVersion]:
        return iter(self.list())

    def __len__(self) -> int:
        return len(self.versions.list())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Registry {str(self.home.path)!r}, {len(self)} versions>"
