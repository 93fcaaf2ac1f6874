"""Finds the upstream steps of a version in lineage. Reads no artifacts."""

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
"""Kind of artifact with a kept file of the user."""


@dataclass
class UpstreamSteps:
    """The upstream steps of a version.

    Args:
        steps: Unique name -> completed execution, each after its upstream executions.
        sources: Digest -> artifact that is not followed further, and why: a file, an import or a registered version.
        missing: Artifacts without a recorded execution, as sentences.
    """

    steps: dict[str, Execution] = field(default_factory=dict)
    sources: dict[str, tuple[ArtifactRef, str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def maker(self, ref: ArtifactRef) -> Execution | None:
        """Returns the upstream step that made an artifact; None if there is none."""
        return next((step for step in self.steps.values() if step.output == ref), None)


def read_version(lineage: Lineage, ref: str) -> AdapterVersion:
    """Reads a version by `name@version`, `name@alias` or name (the latest), without MLflow.

    Raises:
        UnknownName: The adapter does not exist.
        UnknownVersion: The version or alias does not exist.
    """
    name, _, version = ref.partition("@")
    with lineage.database.read() as session:
        return queries.read_version(session, name, version or "latest")


def find_upstream_steps(lineage: Lineage, version: AdapterVersion, *, through_versions: bool = False) -> UpstreamSteps:
    """Finds all steps upstream of a version's adapter and report.

    Args:
        lineage: The lineage.
        version: The version.
        through_versions: True follows adapters that the pipeline took by `name@version`; False ends there.
    """
    walk = _UpstreamWalk(lineage, version, through_versions)
    for ref in (version.artifact, *([version.report] if version.report else [])):
        walk.follow(ref, ())
    return walk.result


class _UpstreamWalk:
    def __init__(self, lineage: Lineage, version: AdapterVersion, through_versions: bool) -> None:
        self.result = UpstreamSteps()
        self._lineage, self._version, self._through = lineage, version, through_versions
        own = lineage.executions(version.run_id) if version.run_id else []
        # The step's name in this pipeline, even if the result is cached from another run.
        self._names = {step.output.sha256: step.step for step in own if step.output is not None}
        self._specs: dict[str, Mapping[str, Any]] = {}

    def follow(self, ref: ArtifactRef, path: tuple[str, ...]) -> None:
        if ref.sha256 in self.result.sources or self.result.maker(ref) is not None:
            return
        if ref.kind == FILE:
            self._add_source(ref, "a kept file of the user")
            return
        maker = self._maker(ref, path)
        if maker is None:
            self.result.missing.append(f"no step is recorded that made the {ref.kind} {ref.sha256[:16]}")
            return
        if maker.uses == "import":
            self._add_source(ref, "imported")
            return
        registered = {} if self._through else self._registered_inputs(maker)
        for role, source in maker.inputs.items():
            if role in registered and self.result.maker(source) is None:
                self._add_source(source, f"registered as {registered[role]}")
            else:
                self.follow(source, (*path, ref.sha256))
        self.result.steps[self._unique_name(self._names.get(ref.sha256, maker.step))] = maker

    def _add_source(self, ref: ArtifactRef, reason: str) -> None:
        self.result.sources.setdefault(ref.sha256, (ref, reason))

    def _maker(self, ref: ArtifactRef, path: tuple[str, ...]) -> Execution | None:
        """Returns the execution that made an artifact: of the version's own run if possible, else the first."""
        makers = [step for step in self._lineage.executions(output=ref.sha256) if step.status == "COMPLETED"]
        seen = {*path, ref.sha256}
        # A step whose output equals its input (a dataset that needed no preparation) did not make it.
        makers = [step for step in makers if not seen & {source.sha256 for source in step.inputs.values()}]
        return min(makers, key=lambda step: (step.run_id != self._version.run_id, step.started_at), default=None)

    def _registered_inputs(self, step: Execution) -> dict[str, str]:
        """Returns role -> `name@ref` of the inputs that the pipeline file took from the registry."""
        if step.run_id not in self._specs:
            try:
                self._specs[step.run_id] = self._lineage.run(step.run_id).spec
            except LineageError:
                self._specs[step.run_id] = {}
        written = self._specs[step.run_id].get("steps", {}).get(step.step, {})
        registered = {}
        for name, value in written.items():
            values = value if isinstance(value, list) else [value]
            for position, target in enumerate(values):
                role = f"{name}.{position}" if len(values) > 1 else name
                if role in step.inputs and isinstance(target, str) and REGISTERED.fullmatch(target):
                    registered[role] = target
        return registered

    def _unique_name(self, name: str) -> str:
        unique, count = name, 1
        while unique in self.result.steps:
            count += 1
            unique = f"{name}-{count}"
        return unique


def find_unkept_fields(step: Execution) -> list[str]:
    """Returns the fields of a step that named files or folders of the user that the store does not keep."""
    kept = {role for role, ref in step.inputs.items() if ref.kind == FILE}
    return sorted(set(step.settings.get("files", {})) - kept)
