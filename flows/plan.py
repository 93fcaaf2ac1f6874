"""Plans a pipeline: which steps would run and why; executes nothing.

A run follows its plan: it reuses the verified results and runs the remaining steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flows.refusals import nearest
from flows.selection import ALL_STEPS, Selection, sources_of, upstream_steps
from flows.spec import PipelineSpec
from lora_engine.bases.hub import downloads
from registry.entities import ArtifactRef
from registry.home import Home
from registry.lineage.record import Lineage
from registry.policy.revocations import read_revoked
from registry.store.artifacts import Store, open_store
from tasks.adoption import Adoption, find_adoption, find_changes, find_unmet
from tasks.condition import explain_unmet, parse_condition, read_condition_report
from tasks.digests import PathDigest
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
        skipped: True if its condition is not met, or a step that it takes from is skipped.
        condition: The step whose report decides at run time whether it runs; None if nothing is left to decide.
    """

    job: Job
    sources: Sources
    reason: str
    outcome: Outcome | None = None
    adoption: Adoption | None = None
    force: bool = False
    skipped: bool = False
    condition: str | None = None

    @property
    def name(self) -> str:
        """Returns the step's name in the pipeline."""
        return self.job.name

    @property
    def cached(self) -> bool:
        """Returns True if the step has a result and would not run."""
        return self.outcome is not None

    @property
    def runs(self) -> bool:
        """Returns True if the step would run, or if that depends on a condition."""
        return not (self.cached or self.skipped)

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
        selection: The steps that a partial run was limited to.
    """

    name: str
    source: Mapping[str, Any]
    steps: Sequence[PlannedStep]
    selection: Selection = ALL_STEPS

    @property
    def skipped(self) -> dict[str, str]:
        """Returns the steps that are known to be skipped -> why."""
        return {step.name: step.reason for step in self.steps if step.skipped}

    @property
    def hits(self) -> dict[str, Outcome]:
        """Returns the verified cached results by step."""
        return {step.name: step.outcome for step in self.steps if step.outcome is not None}


def plan_pipeline(
    spec: PipelineSpec,
    home: Home,
    *,
    force: Collection[str] = (),
    adopt: bool = False,
    selection: Selection = ALL_STEPS,
    download: bool = True,
) -> Plan:
    """Plans a run; reads the user's files and every cached artifact once.

    Args:
        spec: The pipeline.
        home: The home with all state.
        force: Names of steps to run even if they are cached.
        adopt: True plans as if every result that can be adopted were cached.
        selection: The steps of a partial run; the steps that they take from must be cached.
        download: False plans steps whose models are not on this machine without them.

    Raises:
        RegistryError: A registered adapter in the spec does not exist, or the home cannot be read.
        SpecError: The selection is not possible, or a result that it needs is not cached.
    """
    (plan,) = plan_pipelines([spec], home, force=force, adopt=adopt, selection=selection, download=download)
    return plan


def plan_pipelines(
    specs: Iterable[PipelineSpec],
    home: Home,
    *,
    force: Collection[str] = (),
    adopt: bool = False,
    selection: Selection = ALL_STEPS,
    download: bool = True,
) -> list[Plan]:
    """Plans runs of several pipelines as `plan_pipeline`; opens the home, and reads each file and blob, once."""
    lineage = Lineage(home.lineage_url)
    try:
        revoked, store, verified = read_revoked(lineage), open_store(home), set[str]()
        digests: dict[Path, PathDigest] = {}
        plans = []
        for spec in specs:
            planner = _Planner(spec.name, home, store, lineage, adopt, verified)
            chosen = selection.choose(spec.steps)
            _check_forced(force, chosen)
            planned: dict[str, PlannedStep] = {}
            for name in (name for name in spec.steps if name in upstream_steps(chosen, spec.steps)):
                sources, absent = _find_sources(spec.steps[name], planned, home)
                with downloads(allowed=download):
                    job = prepare_job(
                        name, spec.steps[name], spec.folder, revoked, concurrency=spec.concurrency, digests=digests
                    )
                step = PlannedStep(replace(job, absent=absent), sources, "forced", force=name in force)
                planned[name] = planner.decide(step, planned)
            _refuse_missing([step for name, step in planned.items() if name not in chosen])
            steps = tuple(step for name, step in planned.items() if name in chosen)
            plans.append(Plan(spec.name, spec.source, steps, selection))
    finally:
        lineage.close()
    return plans


def _check_forced(force: Collection[str], chosen: Collection[str]) -> None:
    for name in sorted(set(force) - set(chosen)):
        raise SpecError(f"step {name!r} is not among the selected steps", where="--force", **nearest(name, chosen))


def _refuse_missing(steps: Sequence[PlannedStep]) -> None:
    """Raises if a step that is left out has no cached result."""
    missing = [step for step in steps if step.runs]
    if missing:
        listed = ", ".join(f"{step.name} ({step.reason})" for step in missing)
        raise SpecError(
            f"the selected steps need results that are not cached: {listed}",
            where="--from" if len(missing) > 1 else f"step {missing[0].name!r}",
            remedy=f"run them first: --to {missing[-1].name}",
        )


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

    def decide(self, step: PlannedStep, planned: Mapping[str, PlannedStep]) -> PlannedStep:
        """Returns the planned step: skipped, dependent on a condition, cached, or with the reason why it would run."""
        spec = step.job.spec
        for source in sources_of(spec, planned):
            if planned[source].skipped:
                return replace(step, reason=f"takes from {source}, which is skipped", skipped=True)
        if spec.when is None:
            return self.plan(step)
        condition = parse_condition(spec.when)
        if condition.step not in planned:  # a trial of a sweep ends before some steps
            raise SpecError(f"{step.name}.when is about {condition.step!r}, which this run leaves out")
        outcome = planned[condition.step].outcome
        if outcome is None:
            job = step.job if step.force else step.job.with_input_kinds(step.inputs, self.lineage)
            reason = _with_cost(f"runs if {condition.text}", job)
            return replace(step, job=job, reason=reason, condition=condition.step)
        unmet = explain_unmet(condition, read_condition_report(self.store, outcome.ref))
        return replace(step, reason=unmet, skipped=True) if unmet else self.plan(step)

    def plan(self, step: PlannedStep) -> PlannedStep:
        """Returns the step with its cached result, or with the reason why it would run."""
        if step.force:
            return replace(step, reason=_with_download(step.reason, step.job))
        upstream = [source for sources in step.sources.values() for source in sources if isinstance(source, str)]
        if upstream or step.job.undownloaded:
            names = " and ".join(dict.fromkeys(upstream))
            reason = f"takes from {names}, which will run" if upstream else "its result cannot be looked up"
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
    reason = _with_download(reason, job)
    cost = "" if job.kind.describe_cost is None else job.kind.describe_cost(job.spec)
    return f"{reason}; {cost}" if cost else reason


def _with_download(reason: str, job: Job) -> str:
    """Returns `reason`, and the model that a run downloads."""
    return f"{reason}; {job.undownloaded}" if job.undownloaded else reason
