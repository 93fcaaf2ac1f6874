"""What came of building a version again: step by step, around them, and in the weights. Builds nothing itself."""

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
from tasks.operations.rebuild import RebuildPlan
from tasks.operations.upstream import Trace
from tasks.operations.weights import compare_weights, read_card

Verdict = Literal["identical", "within tolerance", "differs"]

TOLERANCES: Mapping[str, float] = {"fp32": 0.005, "bf16": 0.1, "fp16": 0.05}
"""Precision of the training -> the largest relative difference of all deltas together that counts as the same adapter.

See docs/versions.md for where they come from.
"""


@dataclass(frozen=True)
class Step:
    """One step, then and now.

    Args:
        name: The step.
        uses: Its kind.
        recorded: Digest of what it gave.
        rebuilt: Digest of what it gave now; None where it was not built again.
        note: Why it was not built again, or which files differ.
    """

    name: str
    uses: str
    recorded: str
    rebuilt: str | None
    note: str = ""

    @property
    def same(self) -> bool | None:
        """Whether it gave the same; None where it was not built again."""
        return None if self.rebuilt is None else self.rebuilt == self.recorded


@dataclass(frozen=True)
class EnvironmentDiff:
    """Something of the surroundings that is not as it was.

    Args:
        what: Its place in the record of the environment, such as `packages.torch`.
        before: As recorded.
        now: As it is.
        steps: The steps that it concerns.
    """

    what: str
    before: Any
    now: Any
    steps: tuple[str, ...]


@dataclass(frozen=True)
class ReproductionReport:
    """What came of it.

    Args:
        version: `name@version`.
        verdict: `identical` where the adapter file has the same bytes.
        sha256: The registered digest of the adapter file.
        rebuilt: The digest of the file that was built now.
        steps: Every step of the way, the adapter's last but for the report.
        surroundings: What differs around the work, whether or not it made a difference.
        doubts: What was known beforehand to stand against the same result.
        weights: How far the adapters lie apart, where they are not identical and both are there.
        card: What differs in what the files say of themselves.
        tolerance: What was allowed for `within tolerance`; None where the weights were not compared.
        note: Why the weights could not be compared, where they could not.
        workspace: Where everything was built, if it was kept.
    """

    version: str
    verdict: Verdict
    sha256: str
    rebuilt: str
    steps: list[Step]
    surroundings: list[EnvironmentDiff]
    doubts: list[str]
    weights: dict[str, Any] | None = None
    card: list[Change] = field(default_factory=list)
    tolerance: float | None = None
    note: str = ""
    workspace: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        whole = asdict(self) | {"steps": [asdict(step) | {"same": step.same} for step in self.steps]}
        return whole | {"workspace": str(self.workspace) if self.workspace else None}


def report_reproduction(
    version: AdapterVersion, found: Trace, plan: RebuildPlan, made: Mapping[str, Execution], stores: tuple[Store, Store]
) -> ReproductionReport:
    """Compares what was built with what is recorded; the weights only where the bytes differ.

    Args:
        version: The version.
        found: Where it comes from.
        plan: What was built of that.
        made: By step, what the workspace recorded of it.
        stores: The user's and the workspace's.
    """
    recorded, built = stores
    maker = next(name for name, step in found.steps.items() if step.output == version.artifact)
    adapter = _output(made[maker])
    digest = built.files(adapter)[version.adapter_path].sha256
    facts = ReproductionReport(
        version=version.ref,
        verdict="identical" if digest == version.sha256 else "differs",
        sha256=version.sha256,
        rebuilt=digest,
        steps=[_step(name, step, plan, made, stores) for name, step in found.steps.items()],
        surroundings=_environment_diffs(found, made),
        doubts=plan.doubts,
    )
    if facts.verdict == "identical":
        return facts
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / place / "adapter.safetensors" for place in ("recorded", "rebuilt")]
        try:
            recorded.checkout_file(version.artifact, version.adapter_path, files[0])
        except StoreError as error:
            return replace(facts, note=f"the weights cannot be compared: {error.problem}")
        built.checkout_file(adapter, version.adapter_path, files[1])
        return _with_weights(facts, files, _settings(found.steps[maker]), plan)


def _with_weights(
    facts: ReproductionReport, files: Sequence[Path], settings: Mapping[str, Any], plan: RebuildPlan
) -> ReproductionReport:
    bases = [getattr(piece.spec, "base", None) for piece in plan.pieces]
    weights = compare_weights(files[0], files[1], bases)
    tolerance = TOLERANCES[str(settings.get("precision", "fp32"))]
    whole = weights.untold == 0 and not weights.added and not weights.removed and None not in weights.words.values()
    gap = max([weights.relative or 0.0, *(gap or 0.0 for gap in weights.words.values())])
    near = whole and weights.relative is not None and gap <= tolerance
    return replace(
        facts,
        verdict="within tolerance" if near else "differs",
        weights=weights.as_json(),
        tolerance=tolerance,
        card=compare_records(read_card(files[0]), read_card(files[1])),
    )


def _step(
    name: str, step: Execution, plan: RebuildPlan, made: Mapping[str, Execution], stores: tuple[Store, Store]
) -> Step:
    recorded = _output(step)
    if name not in made:
        why = plan.left_out.get(name) or plan.taken.get(recorded.sha256, (recorded, "not needed"))[1]
        return Step(name, step.uses, recorded.sha256, None, why)
    rebuilt = _output(made[name])
    return Step(name, step.uses, recorded.sha256, rebuilt.sha256, _differing_files(recorded, rebuilt, stores))


def _differing_files(recorded: ArtifactRef, rebuilt: ArtifactRef, stores: tuple[Store, Store]) -> str:
    if recorded == rebuilt:
        return ""
    try:
        before, now = (store.files(ref) for store, ref in zip(stores, (recorded, rebuilt), strict=True))
    except StoreError as error:
        return f"its list of files is not there any more ({error.problem})"
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return f"{len(names)} of {len({*before, *now})} files differ: {', '.join(names[:4])}" + (
        ", ..." if names[4:] else ""
    )


def _environment_diffs(found: Trace, made: Mapping[str, Execution]) -> list[EnvironmentDiff]:
    steps: dict[str, list[str]] = defaultdict(list)
    changes: dict[str, Change] = {}
    for name, now in made.items():
        before = found.steps[name]
        then, current = environment_of(before), environment_of(now)
        if "compute" not in then:
            current.pop("compute", None)  # whether torch was loaded by chance says nothing of a step without tensors
        for change in compare_records(then, current):
            key = json.dumps([change.path, change.before, change.after], sort_keys=True)
            changes[key] = change
            steps[key].append(name)
    return [
        EnvironmentDiff(change.path, change.before, change.after, tuple(steps[key])) for key, change in changes.items()
    ]


def environment_of(step: Execution) -> dict[str, Any]:
    """What can change a result, without what says the same in other words."""
    told, base = dict(step.environment), step.settings.get("base", {})
    installed = told.pop("distributions", None)
    if isinstance(installed, list):
        told["packages"] = {name: version for name, _, version in (entry.partition("==") for entry in installed)}
    told["code"] = {key: value for key, value in told.get("code", {}).items() if key in ("sha256", "commit")}
    told.pop("threads", None)  # of the environment; those that torch really used are under `compute`
    return {
        **told,
        "revision": step.revision,
        "base": {key: base[key] for key in ("label", "fingerprint") if key in base},
    }


def _settings(step: Execution) -> Mapping[str, Any]:
    return dict(step.settings.get("settings", {}))


def _output(step: Execution) -> ArtifactRef:
    if step.output is None:
        raise LineageError(f"step {step.step!r} gave nothing", where=f"execution {step.id}")
    return step.output
