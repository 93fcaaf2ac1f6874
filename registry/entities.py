"""The registry's data classes: frozen, without database or file access."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from registry.errors import LineageError, StoreError
from registry.refs import NAME_RULE
from registry.store.damaged import DamagedCell

RunStatus = Literal["RUNNING", "COMPLETED", "FAILED", "INTERRUPTED", "CRASHED"]
ExecutionStatus = Literal["COMPLETED", "CACHED", "ADOPTED", "FAILED", "INTERRUPTED"]
Action = Literal["stage", "promote", "rollback", "refuse", "override", "remove"]
"""Events of an alias; `refuse` leaves it unchanged, `remove` leaves it pointing at nothing."""
EventType = Literal[
    "register",
    "endorse",
    "compare",
    "vote",
    "delete",
    "withdraw",
    "restore",
    "flag",
    "revoke",
    "lift",
    "export",
    "recall",
    "sign",
    "import",
    "refuse",
    "link",
]
"""Events that move no alias: of a version (recall: a delivery target does not have it any more), of a subject (revoke,
lift, refuse of an import), or of the log (link: older rows got links). `compare` prepares a set of pairs of
images for votes. `register` is logged where roles, approvals or votes need to know who registered a version."""
VersionState = Literal["ACTIVE", "WITHDRAWN", "DELETED"]
SubjectKind = Literal["picture", "caption", "consent"]
RevocationKind = Literal["picture", "consent", "version", "artifact", "file", "base", "digest"]
"""`digest` is one that nothing had when it was revoked: it is blocked, whatever it is the digest of."""
ContentKind = Literal["deltas", "embedding", "none"]
"""`none` marks an artifact in which no adapter can be read."""
FOREIGN = "foreign"
"""Kind of the artifact with the original bytes of an imported file."""
RESULT = "result"
"""Kind of the artifact that describes files outside of the store: exports, and what verbs made from versions."""
ADAPTER_KINDS = ("adapter", "export", FOREIGN, RESULT)
"""Kinds of artifacts with adapters."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


def now() -> datetime:
    """Returns the current time in UTC."""
    return datetime.now(UTC)


def is_digest(text: str) -> bool:
    """Returns True if the text is a full lower-case hexadecimal SHA-256."""
    return _DIGEST.fullmatch(text) is not None


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact.

    Args:
        sha256: Digest of its bytes.
        size: Its size in bytes.
    """

    sha256: str
    size: int


@dataclass(frozen=True)
class ArtifactRef:
    """A reference to a tree of files by its content; the only thing that steps exchange.

    Args:
        kind: Kind of artifact: manifest, adapter, report, ...
        sha256: Digest of the canonical list of its files, which holds each file's digest.
        size: Sum of the files' sizes in bytes.
    """

    kind: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME_RULE, self.kind):
            raise StoreError(f"invalid artifact kind {self.kind!r}", allowed=f"names that match {NAME_RULE}")
        if not is_digest(self.sha256):
            raise StoreError(f"{self.sha256!r} is not a digest", allowed="64 lower-case hexadecimal digits")
        if self.size < 0:
            raise StoreError(f"invalid artifact size {self.size!r}", allowed="0 or more bytes")

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object with the three fields."""
        return {"kind": self.kind, "sha256": self.sha256, "size": self.size}


@dataclass(frozen=True)
class Run:
    """One run of a pipeline: a process on a host that executes a spec."""

    id: str
    name: str
    spec: Mapping[str, Any] = field(repr=False)
    status: RunStatus
    pid: int
    host: str
    started_at: datetime
    ended_at: datetime | None = None
    mlflow_run_id: str | None = None


@dataclass(frozen=True)
class Execution:
    """One execution of a step in a run.

    Args:
        id: Unique id.
        run_id: The run that it belongs to.
        step: Name of the step in the spec.
        uses: The kind of step.
        revision: Revision of the step's code.
        key: Cache key; executions with the same key have the same output.
        settings: The step's own spec.
        inputs: Role -> artifact, in order; several artifacts in one role are `role.0`, `role.1`, ...
        output: The artifact that it wrote; None if it failed.
        status: COMPLETED did the work, CACHED reused an earlier output with the same key, ADOPTED one with another key;
            `settings` then has its execution and key under `adopted`.
        environment: Packages, device, threads; under `warnings` the texts of all warnings.
        seed: Random seed; None if the step uses none.
        started_at: Start time.
        ended_at: End time.
        error: Error message; None if it did not fail.
    """

    id: str
    run_id: str
    step: str
    uses: str
    revision: str
    key: str = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)
    inputs: Mapping[str, ArtifactRef] = field(default_factory=dict, repr=False)
    output: ArtifactRef | None = None
    status: ExecutionStatus = "COMPLETED"
    environment: Mapping[str, Any] = field(default_factory=dict, repr=False)
    seed: int | None = None
    started_at: datetime = field(default_factory=now)
    ended_at: datetime | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if self.status in {"COMPLETED", "CACHED", "ADOPTED"} and self.output is None:
            raise LineageError(f"step {self.step!r} is {self.status} without an output", where=f"execution {self.id}")


@dataclass(frozen=True)
class Subject:
    """An image, a caption or a consent that an artifact contains or was made from; a walk or a revocation starts at it.

    Args:
        id: Digest of an image's original file, digest of a caption's text, or the id of a consent.
        kind: The kind of subject.
        label: Short readable name.
    """

    id: str
    kind: SubjectKind
    label: str


@dataclass(frozen=True, repr=False)
class AdapterVersion:
    """A registered adapter, `name@version`, and its metadata.

    Args:
        name: The adapter's name.
        version: 1, 2, 3, ... within the name.
        sha256: Digest of the adapter file itself, not of its tree.
        size: Size of the adapter file in bytes.
        artifact: The tree that holds the file.
        adapter_path: Path of the file in the tree.
        report: The evaluation report; None if it was not evaluated.
        aliases: Aliases that point at this version, sorted.
        created_at: Time of registration.
        run_id: The run that made it; None if no run did.
        mlflow_run_id: Its run in MLflow; None until MLflow is in sync.
        card: License, trigger, base and other metadata.
        metrics: Measured values; may be nested; every number is finite.
        gates: One object per gate: metric, of, min, max, value, passed.
        passed: True if all gates passed; None if it was not evaluated.
        parents: `name@version` of adapters it was merged from, and other origins (base, data) as free text.
        params: The recipe that MLflow shows.
        state: WITHDRAWN cannot be promoted or read; DELETED keeps only its row and number.
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

    def __repr__(self) -> str:
        aliases = f" {','.join(self.aliases)}" if self.aliases else ""
        return f"<AdapterVersion {self.ref}{aliases} sha256:{self.sha256[:12]}>"

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def gate_status(self) -> Literal["passed", "FAILED", "none set", "not run"]:
        """The result of its gates; `none set` if it was evaluated without gates, `not run` if it was not evaluated."""
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
        name: The adapter; empty for an event of a subject.
        alias: The alias that was moved, or whose move was refused; empty for an event that moves no alias.
        action: The kind of event.
        before: Version that the alias pointed at before; None if it pointed at nothing.
        after: Version that the alias points at since; for `refuse`, the refused version; without an alias, the version
            that the event is about.
        actor: The user.
        reason: The reason given; for `refuse`, the reasons of the refusal.
        gates: The gates of the version at that time.
        at: Time by the machine's clock.
        subject: The image or consent that the event is about; empty for none.
        details: Further data: overridden reasons, exported files; `actor`: how the user was established.
        previous: Digest of the event before it.
        digest: Its digest; see `registry.store.chain`.
    """

    seq: int
    name: str
    alias: str
    action: Action | EventType
    before: int | None
    after: int | None
    actor: str
    reason: str
    gates: Sequence[Mapping[str, Any]] = field(repr=False)
    at: datetime
    subject: str = ""
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)
    previous: str = field(default="", repr=False)
    digest: str = field(default="", repr=False)


@dataclass(frozen=True)
class Decision:
    """The result of a policy: allowed or not, with all reasons.

    Args:
        allowed: True if the operation is allowed.
        reasons: All reasons against it.
        final: The reasons that cannot be overridden.
        warnings: What does not prevent it, and is shown and recorded.
    """

    allowed: bool
    reasons: tuple[str, ...] = ()
    final: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problem:
    """One finding of an audit.

    Args:
        what: The fault.
        where: The file, artifact, version or alias.
        remedy: The fix, as an imperative.
        severity: `damage` violates an invariant; `warning` needs a decision; `leftover` only uses disk space.
    """

    what: str
    where: str
    remedy: str
    severity: Literal["damage", "warning", "leftover"] = "damage"


def to_json(value: Any) -> Any:
    """Converts entities, and tuples and mappings of them, to JSON values; times become ISO 8601 in UTC."""
    if dataclasses.is_dataclass(value) and not isinstance(value, DamagedCell) and not isinstance(value, type):
        return {entry.name: to_json(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(entry) for entry in value]
    if isinstance(value, DamagedCell):
        return str(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    return value
