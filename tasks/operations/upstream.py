"""`trace`: what a version was made of, step by step, by lineage alone. Reads records, never bytes; runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from registry import queries
from registry.entities import AdapterVersion, ArtifactRef, Execution
from registry.errors import LineageError
from registry.lineage.record import Lineage
from tasks.spec import REGISTERED

FILE = "file"
"""The kind of artifact that keeps one of the user's files as it was."""


@dataclass
class Trace:
    """Where a version comes from.

    Args:
        steps: By a name of its own each, the executions that really made something, each after all that it took from.
        taken: Digest -> the artifact and why the trace ends there: what came from outside, or has a name of its own.
        missing: What lineage does not know although it must.
    """

    steps: dict[str, Execution] = field(default_factory=dict)
    taken: dict[str, tuple[ArtifactRef, str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def maker(self, ref: ArtifactRef) -> Execution | None:
        """The step that made an artifact, if the trace goes through it."""
        return next((step for step in self.steps.values() if step.output == ref), None)


def read_version(lineage: Lineage, ref: str) -> AdapterVersion:
    """The version that `name@version`, `name@alias` or a name alone (its latest) means; MLflow is not touched.

    Raises:
        UnknownName: No such adapter.
        UnknownVersion: No such number or alias.
    """
    name, _, version = ref.partition("@")
    with lineage.database.read() as session:
        return queries.read_version(session, name, version or "latest")


def trace(lineage: Lineage, version: AdapterVersion, *, through_versions: bool = False) -> Trace:
    """Follows a version's adapter and report back to what came from outside.

    Args:
        lineage: The record.
        version: The version.
        through_versions: Whether to go on through adapters that the pipeline took by name (`name@version`).
    """
    tracer = _Tracer(lineage, version, through_versions)
    for ref in (version.artifact, *([version.report] if version.report else [])):
        tracer.follow(ref, ())
    return tracer.found


class _Tracer:
    def __init__(self, lineage: Lineage, version: AdapterVersion, through_versions: bool) -> None:
        self.found = Trace()
        self._lineage, self._version, self._through = lineage, version, through_versions
        own = lineage.executions(version.run_id) if version.run_id else []
        # What the pipeline called a step, also where another run's result was taken for it.
        self._names = {step.output.sha256: step.step for step in own if step.output is not None}
        self._specs: dict[str, Mapping[str, Any]] = {}

    def follow(self, ref: ArtifactRef, path: tuple[str, ...]) -> None:
        if ref.sha256 in self.found.taken or self.found.maker(ref) is not None:
            return
        if ref.kind == FILE:
            self._take(ref, "a file of the user, as it was")
            return
        maker = self._maker(ref, path)
        if maker is None:
            self.found.missing.append(f"no step is recorded that made the {ref.kind} {ref.sha256[:16]}")
            return
        if maker.uses == "import":
            self._take(ref, "imported")
            return
        named = {} if self._through else self._taken_by_name(maker)
        for role, source in maker.inputs.items():
            if role in named and self.found.maker(source) is None:
                self._take(source, f"registered as {named[role]}")
            else:
                self.follow(source, (*path, ref.sha256))
        self.found.steps[self._free_name(self._names.get(ref.sha256, maker.step))] = maker

    def _take(self, ref: ArtifactRef, why: str) -> None:
        self.found.taken.setdefault(ref.sha256, (ref, why))

    def _maker(self, ref: ArtifactRef, path: tuple[str, ...]) -> Execution | None:
        """The execution that did the work: of the version's own run if it did, else the first of all."""
        made = [each for each in self._lineage.executions(output=ref.sha256) if each.status == "COMPLETED"]
        seen = {*path, ref.sha256}
        # A step may give what it took (a dataset that needed no preparation); that is not where it comes from.
        made = [each for each in made if not seen & {source.sha256 for source in each.inputs.values()}]
        return min(made, key=lambda each: (each.run_id != self._version.run_id, each.started_at), default=None)

    def _taken_by_name(self, step: Execution) -> dict[str, str]:
        """Role -> `name@ref` of the inputs that the pipeline file took from the registry."""
        if step.run_id not in self._specs:
            try:
                self._specs[step.run_id] = self._lineage.run(step.run_id).spec
            except LineageError:
                self._specs[step.run_id] = {}
        written = self._specs[step.run_id].get("steps", {}).get(step.step, {})
        named = {}
        for name, value in written.items():
            values = value if isinstance(value, list) else [value]
            for position, target in enumerate(values):
                role = f"{name}.{position}" if len(values) > 1 else name
                if role in step.inputs and isinstance(target, str) and REGISTERED.fullmatch(target):
                    named[role] = target
        return named

    def _free_name(self, name: str) -> str:
        taken, free, count = self.found.steps, name, 1
        while free in taken:
            count += 1
            free = f"{name}-{count}"
        return free


def reads_outside(step: Execution) -> list[str]:
    """The fields of a step that named the user's files or folders, but for those that the store keeps."""
    kept = {role for role, ref in step.inputs.items() if ref.kind == FILE}
    return sorted(set(step.settings.get("files", {})) - kept)
