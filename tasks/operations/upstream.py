"""Finds the upstream steps of a version in lineage. Reads no artifacts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from registry import queries
from registry.entities import AdapterVersion, ArtifactRef, Execution
from registry.lineage.record import Lineage
from registry.refs import split_ref
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


def resolve_version(lineage: Lineage, ref: str) -> AdapterVersion:
    """Reads a version by `name@version`, `name@alias` or name (the latest), without MLflow.

    Raises:
        UnknownName: The adapter does not exist.
        UnknownVersion: The version or alias does not exist.
    """
    with lineage.database.read() as session:
        return queries.read_version(session, *split_ref(ref))


def find_upstream_steps(lineage: Lineage, version: AdapterVersion, *, through_versions: bool = False) -> UpstreamSteps:
    """Finds all steps upstream of a version's adapter and report.

    Args:
        lineage: The lineage.
        version: The version.
        through_versions: True follows adapters that the pipeline took by `name@version`; False ends there.
    """
    search = _UpstreamSearch(lineage, version, through_versions)
    for ref in search.starts:
        search.collect(ref)
    return search.result


class _UpstreamSearch:
    """Reads all executions that can be upstream at once, then selects one maker per artifact, depth first."""

    def __init__(self, lineage: Lineage, version: AdapterVersion, through_versions: bool) -> None:
        self.result = UpstreamSteps()
        self.starts = [ref for ref in (version.artifact, version.report) if ref is not None]
        self._run, self._through = version.run_id, through_versions
        own = lineage.executions(version.run_id) if version.run_id else []
        # The step's name in this pipeline, even if the result is cached from another run.
        self._names = {step.output.sha256: step.step for step in own if step.output is not None}
        self._lineage, self._specs = lineage, dict[str, Mapping[str, Any]]()
        self._registered: dict[str, dict[str, str]] = {}
        self._same_name: defaultdict[str, int] = defaultdict(lambda: 1)
        self._makers: dict[ArtifactRef | None, list[Execution]] = defaultdict(list)
        for step in lineage.upstream_executions(self.starts, self._inputs_to_follow):
            self._makers[step.output].append(step)

    def collect(self, start: ArtifactRef) -> None:
        """Adds the steps upstream of an artifact to the result, each after its own upstream steps."""
        made = {step.output for step in self.result.steps.values()}
        path: set[str] = set()
        waiting: list[tuple[ArtifactRef, Execution | str | None]] = [(start, None)]
        while waiting:
            ref, state = waiting.pop()
            if isinstance(state, Execution):
                path.remove(ref.sha256)
                made.add(ref)
                self.result.steps[self._unique_name(self._names.get(ref.sha256, state.step))] = state
            elif ref.sha256 in self.result.sources or ref in made:
                continue
            elif state is not None:
                self.result.sources[ref.sha256] = (ref, f"registered as {state}")
            elif ref.kind == FILE:
                self.result.sources[ref.sha256] = (ref, "a kept file of the user")
            elif (maker := self._maker(ref, path)) is None:
                self.result.missing.append(f"no step is recorded that made the {ref.kind} {ref.sha256[:16]}")
            elif maker.uses == "import":
                self.result.sources[ref.sha256] = (ref, "imported")
            else:
                path.add(ref.sha256)
                waiting.append((ref, maker))
                registered = self._registered[maker.id]
                waiting += [(source, registered.get(role)) for role, source in [*maker.inputs.items()][::-1]]

    def _maker(self, ref: ArtifactRef, path: Set[str]) -> Execution | None:
        """Returns the execution that made an artifact: of the version's own run if possible, else the first."""
        makers = [
            step
            for step in self._makers[ref]
            # A step whose output equals its input (a dataset that needed no preparation) did not make it.
            if not any(source == ref or source.sha256 in path for source in step.inputs.values())
        ]
        return min(makers, key=lambda step: (step.run_id != self._run, step.started_at), default=None)

    def _inputs_to_follow(self, step: Execution) -> list[ArtifactRef]:
        registered = {} if self._through else self._registered_inputs(step)
        self._registered[step.id] = registered
        return [] if step.uses == "import" else [ref for role, ref in step.inputs.items() if role not in registered]

    def _registered_inputs(self, step: Execution) -> dict[str, str]:
        """Returns role -> `name@ref` of the inputs that the pipeline file took from the registry."""
        if step.run_id not in self._specs:
            self._specs[step.run_id] = self._lineage.run(step.run_id).spec
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
        unique = name
        while unique in self.result.steps:
            self._same_name[name] += 1
            unique = f"{name}-{self._same_name[name]}"
        return unique


def find_unkept_fields(step: Execution) -> list[str]:
    """Returns the fields of a step that named files or folders of the user that the store does not keep."""
    kept = {role for role, ref in step.inputs.items() if ref.kind == FILE}
    return sorted(set(step.settings.get("files", {})) - kept)
