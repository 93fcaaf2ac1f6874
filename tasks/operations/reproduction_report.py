"""Reports the differences of a rebuilt version and its record: by step, in the environment and in the weights."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from registry.entities import AdapterVersion, ArtifactRef, Execution
from registry.errors import LineageError, StoreError
from registry.store.artifacts import Store
from tasks.operations.changes import Change, compare_records
from tasks.operations.rebuild_plan import RebuildPlan
from tasks.operations.upstream import UpstreamSteps
from tasks.operations.weights import compare_weights, read_file_card
from tasks.warnings import WARNINGS

Verdict = Literal["identical", "within tolerance", "differs"]

TOLERANCES: Mapping[str, float] = {"fp32": 0.005, "bf16": 0.1, "fp16": 0.05}
"""Precision of the training -> maximum relative difference of all deltas together that is within tolerance.

docs/versions.md explains the values.
"""
_JSON_KEYS = {"environment_diffs": "surroundings", "warnings": "doubts"}


@dataclass(frozen=True)
class StepComparison:
    """The recorded and the rebuilt output of a step.

    Args:
        name: The step's name.
        uses: Its kind.
        recorded: Digest of the recorded output.
        rebuilt: Digest of the rebuilt output; None means that the step was not rebuilt.
        note: Why it was not rebuilt, or which files differ.
    """

    name: str
    uses: str
    recorded: str
    rebuilt: str | None
    note: str = ""

    @property
    def same(self) -> bool | None:
        """Returns True if both outputs are equal; None if the step was not rebuilt."""
        return None if self.rebuilt is None else self.rebuilt == self.recorded


@dataclass(frozen=True)
class EnvironmentDiff:
    """A difference of the environment.

    Args:
        what: Key in the recorded environment, such as `packages.torch`.
        before: The recorded value.
        now: The current value.
        steps: The affected steps.
    """

    what: str
    before: Any
    now: Any
    steps: tuple[str, ...]


@dataclass(frozen=True)
class ReproductionReport:
    """Result of a reproduction.

    Args:
        version: `name@version`.
        verdict: `identical` if the adapter file has the same bytes.
        sha256: Registered digest of the adapter file.
        rebuilt: Digest of the rebuilt file.
        steps: The upstream steps, that of the adapter last except for the report's.
        environment_diffs: Differences of the environment, whether or not they changed the result.
        warnings: Reasons, known before the rebuild, why the result may differ.
        weights: Comparison of the weights; None if the files are identical or one is missing.
        card: Differences of the files' cards.
        tolerance: Maximum relative difference for `within tolerance`; None if the weights were not compared.
        note: Why the weights could not be compared; empty if they could.
        workspace: Folder of the kept workspace; None if it was removed.
    """

    version: str
    verdict: Verdict
    sha256: str
    rebuilt: str
    steps: list[StepComparison]
    environment_diffs: list[EnvironmentDiff]
    warnings: list[str]
    weights: dict[str, Any] | None = None
    card: list[Change] = field(default_factory=list)
    tolerance: float | None = None
    note: str = ""
    workspace: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """Returns all of it as JSON values."""
        values = {_JSON_KEYS.get(name, name): value for name, value in asdict(self).items()}
        values["steps"] = [asdict(step) | {"same": step.same} for step in self.steps]
        return values | {"workspace": str(self.workspace) if self.workspace else None}


def report_reproduction(
    version: AdapterVersion,
    upstream: UpstreamSteps,
    plan: RebuildPlan,
    executions: Mapping[str, Execution],
    stores: tuple[Store, Store],
) -> ReproductionReport:
    """Compares the rebuilt steps with the recorded ones; compares the weights only if the bytes differ.

    Args:
        version: The version.
        upstream: The steps that made it.
        plan: The plan of the rebuild.
        executions: Step -> its execution in the workspace.
        stores: The user's store and that of the workspace.
    """
    recorded, rebuilt = stores
    maker = next(name for name, step in upstream.steps.items() if step.output == version.artifact)
    adapter = _output(executions[maker])
    digest = rebuilt.files(adapter)[version.adapter_path].sha256
    report = ReproductionReport(
        version=version.ref,
        verdict="identical" if digest == version.sha256 else "differs",
        sha256=version.sha256,
        rebuilt=digest,
        steps=[_compare_step(name, step, plan, executions, stores) for name, step in upstream.steps.items()],
        environment_diffs=_environment_diffs(upstream, executions),
        warnings=plan.warnings,
    )
    if report.verdict == "identical":
        return report
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / folder / "adapter.safetensors" for folder in ("recorded", "rebuilt")]
        try:
            recorded.checkout_file(version.artifact, version.adapter_path, files[0])
        except StoreError as error:
            return replace(report, note=f"the weights cannot be compared: {error.problem}")
        rebuilt.checkout_file(adapter, version.adapter_path, files[1])
        return _with_weights(report, files, plan)


def _with_weights(report: ReproductionReport, files: Sequence[Path], plan: RebuildPlan) -> ReproductionReport:
    bases = [getattr(step.spec, "base", None) for step in plan.steps]
    weights = compare_weights(files[0], files[1], bases)
    recorded, rebuilt = (read_file_card(file) for file in files)
    # The card has the precision that was used; the settings may leave it to the device.
    tolerance = TOLERANCES[str(recorded["recipe"].get("precision", "fp32"))]
    comparable = (
        weights.untold == 0 and not weights.added and not weights.removed and None not in weights.words.values()
    )
    gap = max([weights.relative or 0.0, *(gap or 0.0 for gap in weights.words.values())])
    is_close = comparable and weights.relative is not None and gap <= tolerance
    return replace(
        report,
        verdict="within tolerance" if is_close else "differs",
        weights=weights.as_json(),
        tolerance=tolerance,
        card=compare_records(recorded, rebuilt),
    )


def _compare_step(
    name: str, step: Execution, plan: RebuildPlan, executions: Mapping[str, Execution], stores: tuple[Store, Store]
) -> StepComparison:
    recorded = _output(step)
    if name not in executions:
        reason = plan.skipped.get(name) or plan.reused.get(recorded.sha256, (recorded, "not needed"))[1]
        return StepComparison(name, step.uses, recorded.sha256, None, reason)
    rebuilt = _output(executions[name])
    note = _differing_files(recorded, rebuilt, stores)
    return StepComparison(name, step.uses, recorded.sha256, rebuilt.sha256, note)


def _differing_files(recorded: ArtifactRef, rebuilt: ArtifactRef, stores: tuple[Store, Store]) -> str:
    if recorded == rebuilt:
        return ""
    try:
        before, now = (store.files(ref) for store, ref in zip(stores, (recorded, rebuilt), strict=True))
    except StoreError as error:
        return f"its list of files is gone ({error.problem})"
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return f"{len(names)} of {len({*before, *now})} files differ: {', '.join(names[:4])}" + (
        ", ..." if names[4:] else ""
    )


def _environment_diffs(upstream: UpstreamSteps, executions: Mapping[str, Execution]) -> list[EnvironmentDiff]:
    steps: dict[str, list[str]] = defaultdict(list)
    changes: dict[str, Change] = {}
    for name, execution in executions.items():
        recorded, current = environment_of(upstream.steps[name]), environment_of(execution)
        if "compute" not in recorded:
            current.pop("compute", None)  # a step without tensors does not depend on whether torch is loaded
        for change in compare_records(recorded, current):
            key = json.dumps([change.path, change.before, change.after], sort_keys=True)
            changes[key] = change
            steps[key].append(name)
    return [
        EnvironmentDiff(change.path, change.before, change.after, tuple(steps[key])) for key, change in changes.items()
    ]


def environment_of(step: Execution) -> dict[str, Any]:
    """Returns the parts of a step's environment that can change a result, without duplicates."""
    environment, base = dict(step.environment), step.settings.get("base", {})
    installed = environment.pop("distributions", None)
    if isinstance(installed, list):
        packages = (entry.partition("==") for entry in installed)
        environment["packages"] = {name: version for name, _, version in packages}
    code = environment.get("code", {})
    environment["code"] = {key: value for key, value in code.items() if key in ("sha256", "commit")}
    environment.pop(WARNINGS, None)
    environment.pop("threads", None)  # the variable; `compute` has the threads that torch used
    return {
        **environment,
        "revision": step.revision,
        "base": {key: base[key] for key in ("label", "fingerprint") if key in base},
    }


def _output(step: Execution) -> ArtifactRef:
    if step.output is None:
        raise LineageError(f"step {step.step!r} has no output", where=f"execution {step.id}")
    return step.output
