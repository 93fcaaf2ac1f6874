"""Plans a pipeline: which steps would run and why; executes nothing.

A run follows its plan: it reuses the verified results and runs the remaining steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flows.spec import PipelineSpec
from registry.entities import ArtifactRef
from registry.home import Home
from registry.lineage.record import Lineage
from registry.policy.revocations import read_revoked
from registry.store.artifacts import Store, open_store
from tasks.adoption import Adoption, find_adoption, find_changes, find_unmet
from tasks.errors import SpecError
from tasks.execution import NO_RESULT, find_hit
from tasks.job import Job, Outcome, prepare_job
from tasks.operations.compared import find_compared
from tasks.spec import REGISTERED, StepSpec
from tasks.step import Inputs

Sources = Mapping[str, tuple[ArtifactRef | str, ...]]
"""Reference field -> input artifacts; an input that does not exist yet is the name of the step that makes it."""


@dataclass(frozen=True)
class PlannedStep:
    """One step of a plan.

    Attributes:
        job: The step, with digests of the user's files.
        sources: Its inputs.
        reason: Why it would run; `cached` if it would not.
        outcome: The verified earlier result; None if the step would run.
        adoption: The verified result with another key that can be adopted; None if there is none.
        force: True if it runs even if it is cached.
    """

    job: Job
    sources: Sources
    reason: str
    outcome: Outcome | None = None
    adoption: Adoption | None = None
    force: bool = False

    @property
    def name(self) -> str:
        """Returns the step's name in the pipeline."""
        return self.job.name

    @property
    def cached(self) -> bool:
        """Returns True if the step would not run."""
        return self.outcome is not None

    @property
    def inputs(self) -> Inputs:
        """Returns the input artifacts that exist already."""
        return {
            role: tuple(source for source in sources if isinstance(source, ArtifactRef))
            for role, sources in self.sources.items()
        }


@dataclass(frozen=True)
class Plan:
    """The steps of a run.

    Attributes:
        name: The pipeline's name.
        source: Data of the pipeline file, with overrides applied.
        steps: The steps, each after its upstream steps.
    """

    name: str
    source: Mapping[str, Any]
    steps: Sequence[PlannedStep]

    @property
    def hits(self) -> dict[str, Outcome]:
        """Returns the verified cached results by step."""
        return {step.name: step.outcome for step in self.steps if step.outcome is not None}


def plan_pipeline(spec: PipelineSpec, home: Home, *, force: Collection[str] = (), adopt: bool = False) -> Plan:
    """Plans a run; reads the user's files and every cached artifact once.

    Args:
        spec: The pipeline.
        home: The home with all state.
        force: Names of steps to run even if they are cached.
        adopt: True plans as if every result that can be adopted were cached.

    Raises:
        RegistryError: A registered adapter in the spec does not exist, or the home cannot be read.
    """
    lineage = Lineage(home.lineage_url)
    try:
        revoked = read_revoked(lineage)
        planner = _Planner(spec.name, home, open_store(home), lineage, adopt)
        planned: dict[str, PlannedStep] = {}
        for name, step in spec.steps.items():
            sources, absent = _find_sources(step, planned, home)
            job = prepare_job(name, step, spec.folder, revoked, concurrency=spec.concurrency)
            job = replace(job, absent=absent)
            planned[name] = planner.plan(PlannedStep(job, sources, "forced", force=name in force))
    finally:
        lineage.close()
    return Plan(spec.name, spec.source, tuple(planned.values()))


def registered_adapter(target: str, home: Home) -> ArtifactRef:
    """Returns the adapter artifact of `name@version` or `name@alias`.

    Raises:
        SpecError: The text is not such a reference.
        RegistryError: The version does not exist, or may not be used.
    """
    match = REGISTERED.fullmatch(target)
    if match is None:
        raise SpecError(f"{target!r} is neither a step nor name@version")
    from registry.versions.versions import Versions

    versions = Versions(home)
    try:
        # The same checks as for an export: bytes, state and signature.
        return versions.get(match["name"], match["ref"]).artifact
    finally:
        versions.close()


def _find_sources(step: StepSpec, planned: Mapping[str, PlannedStep], home: Home) -> tuple[Sources, dict[str, str]]:
    """Returns the inputs of a step, and the registered versions that it can do without and that are not there."""
    sources: dict[str, tuple[ArtifactRef | str, ...]] = {}
    absent: dict[str, str] = {}
    for role, target, _ in step.references():
        if target not in planned and step.may_be_absent(role):
            candidate = next((ref for ref in sources.get("adapter", ()) if isinstance(ref, ArtifactRef)), None)
            compared = find_compared(target, home, candidate)
            if isinstance(compared, str):
                absent[target] = compared
                continue
            source: ArtifactRef | str = compared
        else:
            source = _source(target, planned, home)
        sources[role] = (*sources.get(role, ()), source)
    return sources, absent


def _source(target: str, planned: Mapping[str, PlannedStep], home: Home) -> ArtifactRef | str:
    if target not in planned:
        return registered_adapter(target, home)
    outcome = planned[target].outcome
    return target if outcome is None else outcome.ref


@dataclass(frozen=True)
class _Planner:
    pipeline: str
    home: Home
    store: Store
    lineage: Lineage
    adopt: bool
    verified: set[str] = field(default_factory=set)
    """Digests of blobs that were verified already: artifacts share files, and each is read once."""

    def plan(self, step: PlannedStep) -> PlannedStep:
        """Returns the step with its cached result, or with the reason why it would run."""
        if step.force:
            return step
        upstream = [source for sources in step.sources.values() for source in sources if isinstance(source, str)]
        if upstream:
            reason = f"takes from {' and '.join(dict.fromkeys(upstream))}, which will run"
            return replace(step, reason=_with_cost(reason, step.job))
        job, inputs = step.job.with_input_kinds(step.inputs, self.lineage), step.inputs
        hit, reason = find_hit(job, inputs, self.home, self.store, self.lineage, self.verified)
        if reason != NO_RESULT:
            described = reason if hit is None else self._describe_hit(job, hit, reason)
            return replace(step, job=job, reason=described, outcome=hit)
        adoption = find_adoption(job, inputs, self.home, self.store, self.lineage, self.verified)
        if adoption is None:
            return replace(step, job=job, reason=self._what_changed(job, inputs))
        if self.adopt:
            return replace(step, job=job, reason=adoption.reason, outcome=adoption.outcome, adoption=adoption)
        return replace(step, job=job, reason=f"adoptable: {adoption.reason}", adoption=adoption)

    def _what_changed(self, job: Job, inputs: Inputs) -> str:
        last = self.lineage.last_execution(self.pipeline, job.name)
        changes = [] if last is None else [*find_changes(job, inputs, last)]
        reason = "never ran" if last is None else "; ".join(changes) or "no result has its cache key"
        progress = self._describe_progress(job, inputs)
        return _with_cost(f"{reason}; {progress}" if progress else reason, job)

    def _describe_progress(self, job: Job, inputs: Inputs) -> str:
        if job.kind.describe_progress is None:
            return ""
        attempt = self.lineage.last_attempt(self.pipeline, job.name)
        return job.kind.describe_progress(job.spec, job.origin(inputs), self.home, attempt.key if attempt else None)

    def _describe_hit(self, job: Job, hit: Outcome, reason: str) -> str:
        """Returns `reason`, and which settings without effect on the result it was made with, if they are others."""
        if not job.spec.without_effect():
            return reason
        makers = [maker for maker in self.lineage.executions(output=hit.ref.sha256) if maker.status == "COMPLETED"]
        unmet = find_unmet(job, makers[0]) if makers else []
        return f"{reason}; made with {', '.join(unmet)}: --force {job.name} repeats it" if unmet else reason


def _with_cost(reason: str, job: Job) -> str:
    """Returns `reason`, and the work that a run adds by itself."""
    cost = "" if job.kind.describe_cost is None else job.kind.describe_cost(job.spec)
    return f"{reason}; {cost}" if cost else reason
