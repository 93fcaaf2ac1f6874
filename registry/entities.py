"""The nouns of the registry: small frozen records without behaviour. No database, no files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from registry.errors import LineageError, StoreError, VersionError

RunStatus = Literal["RUNNING", "COMPLETED", "FAILED", "INTERRUPTED", "CRASHED"]
ExecutionStatus = Literal["COMPLETED", "CACHED", "FAILED", "INTERRUPTED"]
Action = Literal["stage", "promote", "rollback", "refuse", "override", "remove"]
"""What moves an alias, or did not; `remove` leaves it pointing at nothing."""
EventType = Literal["delete", "withdraw", "restore", "flag", "revoke", "lift", "export", "sign", "import"]
"""What else is logged: done to a version, or (revoke, lift) to a subject."""
VersionState = Literal["ACTIVE", "WITHDRAWN", "DELETED"]
SubjectKind = Literal["picture", "caption", "consent"]

NAME_RULE = "[a-z0-9][a-z0-9._-]{0,62}"
_NAME = re.compile(NAME_RULE)
_ALIAS = re.compile(r"(?!latest$|v?[0-9]+$)[a-z0-9][a-z0-9_-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def now() -> datetime:
    """The present instant, in UTC."""
    return datetime.now(UTC)


def is_digest(text: str) -> bool:
    """Whether the text is a whole lower-case hexadecimal SHA-256."""
    return _DIGEST.fullmatch(text) is not None


def check_name(name: str) -> str:
    """The name of an adapter, given back if it keeps to the rule.

    Raises:
        VersionError: It does not.
    """
    if not _NAME.fullmatch(name):
        raise VersionError(f"{name!r} cannot be the name of an adapter", allowed=f"names like {NAME_RULE}")
    return name


def check_alias(alias: str) -> str:
    """The alias, given back if it keeps to the rule (which is MLflow's too, and leaves numbers to versions).

    Raises:
        VersionError: It does not.
    """
    if not _ALIAS.fullmatch(alias):
        raise VersionError(
            f"{alias!r} cannot be an alias",
            allowed="1 to 63 characters of a-z, 0-9, _ and -, that are not a version number and not 'latest'",
        )
    return alias


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact.

    Args:
        sha256: Digest of its bytes.
        size: Number of its bytes.
    """

    sha256: str
    size: int


@dataclass(frozen=True)
class ArtifactRef:
    """A tree of files, named by its content: the only thing that steps exchange.

    Args:
        kind: What it is (manifest, adapter, report, ...).
        sha256: Digest of the canonical list of its files, which names each file's digest.
        size: Sum of the files' sizes in bytes.
    """

    kind: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.kind):
            raise StoreError(f"{self.kind!r} cannot be a kind of artifact", allowed=f"names like {NAME_RULE}")
        if not is_digest(self.sha256):
            raise StoreError(f"{self.sha256!r} is not a digest", allowed="64 lower-case hexadecimal digits")
        if self.size < 0:
            raise StoreError(f"{self.size!r} cannot be a size", allowed="0 or more bytes")

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the three fields."""
        return {"kind": self.kind, "sha256": self.sha256, "size": self.size}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ArtifactRef:
        """The reference that `to_json` wrote.

        Raises:
            StoreError: A field is missing, unknown or of another type.
        """
        if set(value) != {"kind", "sha256", "size"} or not isinstance(value["size"], int):
            raise StoreError(f"{dict(value)!r} is not a reference", allowed="{kind, sha256, size}")
        return cls(str(value["kind"]), str(value["sha256"]), value["size"])


@dataclass(frozen=True)
class Run:
    """One run of a pipeline: a process on a host, working through a spec."""

    id: str
    name: str
    spec: Mapping[str, Any]
    status: RunStatus
    pid: int
    host: str
    started_at: datetime
    ended_at: datetime | None = None
    mlflow_run_id: str | None = None


@dataclass(frozen=True)
class Execution:
    """One step of a run, as it happened.

    Args:
        id: Unique.
        run_id: The run it belongs to.
        step: Its name in the spec.
        uses: The kind of step.
        revision: Revision of the step's code.
        key: Cache key; executions with the same key make the same output.
        settings: The step's own spec.
        inputs: Role -> artifact, in order; several artifacts in one role are `role.0`, `role.1`, ...
        output: What it made, or nothing if it failed.
        status: COMPLETED did the work, CACHED found it done.
        environment: Packages, device, threads.
        seed: The seed that it ran with.
        started_at: When it began.
        ended_at: When it ended.
        error: Why it failed.
    """

    id: str
    run_id: str
    step: str
    uses: str
    revision: str
    key: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, ArtifactRef] = field(default_factory=dict)
    output: ArtifactRef | None = None
    status: ExecutionStatus = "COMPLETED"
    environment: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    started_at: datetime = field(default_factory=now)
    ended_at: datetime | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if self.status in {"COMPLETED", "CACHED"} and self.output is None:
            raise LineageError(f"step {self.step!r} is {self.status} without an output", where=f"execution {self.id}")


@dataclass(frozen=True)
class Subject:
    """Something of the outer world that an artifact holds or was made from; what a walk and a recall can start at.

    Args:
        id: Digest of a picture's original file, digest of a caption's text, or the id of a consent.
        kind: Which of them.
        label: A few words for people.
    """

    id: str
    kind: SubjectKind
    label: str


@dataclass(frozen=True)
class AdapterVersion:
    """A registered adapter: `name@version` and all that is known of it.

    Args:
        name: The adapter's name.
        version: 1, 2, 3, ... within the name.
        sha256: Digest of the adapter file itself, not of its tree.
        size: Bytes of the adapter file.
        artifact: The tree that holds the file.
        adapter_path: Where in the tree the file is.
        report: The evaluation, if there was one.
        aliases: What points at this version now, sorted.
        created_at: When it was registered.
        run_id: The run that made it, if one did.
        mlflow_run_id: Its run in MLflow, once MLflow is level.
        card: What is said about it.
        metrics: What was measured; may be nested; every number is finite.
        gates: One object a gate: metric, of, min, max, value, passed.
        passed: Whether the gates passed; None where nothing was evaluated.
        parents: `name@version` of adapters it was merged from, and other origins (base, data) as free text.
        params: The recipe as it is shown in MLflow.
        state: WITHDRAWN may no longer be promoted or handed out; DELETED keeps only its place in the record.
    """

    name: str
    version: int
    sha256: str
    size: int
    artifact: ArtifactRef
    adapter_path: str
    report: ArtifactRef | None
    aliases: tuple[str, ...]
    created_at: datetime
    run_id: str | None
    mlflow_run_id: str | None
    card: Mapping[str, Any]
    metrics: Mapping[str, Any]
    gates: Sequence[Mapping[str, Any]]
    passed: bool | None
    parents: tuple[str, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    state: VersionState = "ACTIVE"

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def gate_status(self) -> Literal["passed", "FAILED", "none set", "not run"]:
        """Returns how its gates ended; `none set` if it was evaluated without gates, `not run` if it was not."""
        if self.passed is None:
            return "not run"
        if not self.gates:
            return "none set"
        return "passed" if self.passed else "FAILED"


@dataclass(frozen=True)
class Event:
    """One entry of the append-only log; ordered by `seq`, never by the clock.

    Args:
        seq: Position in the log of the whole registry.
        name: The adapter; empty for what is done to a subject.
        alias: The alias that was moved (or, for `refuse`, that was not); empty for a deed that moves none.
        action: What was done.
        before: Version that the alias pointed at; None for none.
        after: Version that it points at since; for `refuse`, the version that did not get it; for a deed, the version
            that it was done to.
        actor: Who.
        reason: Why; for `refuse`, the reasons of the refusal.
        gates: The gates of the version at that moment.
        at: When, by the clock of the machine.
        subject: The picture or consent that it is about, if it is about one.
        details: What else belongs to it: reasons that were overridden, files that were exported.
    """

    seq: int
    name: str
    alias: str
    action: Action | EventType
    before: int | None
    after: int | None
    actor: str
    reason: str
    gates: Sequence[Mapping[str, Any]]
    at: datetime
    subject: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decision:
    """Whether something may be done, and all reasons why not.

    Args:
        allowed: Whether it may be done.
        reasons: All reasons why not.
        final: Those of the reasons that no override can set aside.
    """

    allowed: bool
    reasons: tuple[str, ...] = ()
    final: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """One finding of an audit.

    Args:
        what: What is wrong.
        where: Which file, artifact, version or alias.
        remedy: What to do.
        severity: `damage` breaks a promise; `leftover` only takes room.
    """

    what: str
    where: str
    remedy: str
    severity: Literal["damage", "leftover"] = "damage"


def to_json(value: Any) -> Any:
    """Entities, and tuples, mappings and instants of them, as plain JSON values (instants in ISO 8601, UTC)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: to_json(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(entry) for entry in value]
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    return value
