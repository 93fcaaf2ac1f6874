"""Building again what lineage describes, in a workspace of its own: what is needed for it, and the work itself.

The user's folders and pipeline file are not read, and nothing is written outside the workspace. What the result says
is `tasks.operations.reproduce`'s business.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError

from lora_engine.compute import threads
from lora_engine.errors import BaseModelError
from registry.entities import AdapterVersion, ArtifactRef, Execution
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import Store, open_store
from tasks.digests import digest_path
from tasks.execution import execute
from tasks.job import Job, prepare_job
from tasks.operations.upstream import FILE, Trace, reads_outside
from tasks.spec import StepSpec
from tasks.step import STEPS

NAME_OF_BASE = "base"


@dataclass(frozen=True)
class RebuildStep:
    """One step to build again.

    Args:
        name: The step.
        recorded: What lineage says of it.
        spec: Its settings, with the names of its inputs left open.
        files: Path field -> what stands for the user's file or folder.
    """

    name: str
    recorded: Execution
    spec: StepSpec
    files: Mapping[str, Path | ArtifactRef]


@dataclass
class RebuildPlan:
    """What building again needs, and what stands against it.

    Args:
        pieces: The steps, each after all that it takes from.
        taken: Digest -> the artifact and why it is taken from the store as it is.
        left_out: Step -> why it is not built again although lineage knows it.
        reasons: Why it cannot be done at all.
        doubts: Why the result cannot be expected to be the same; done only where that is asked for.
    """

    pieces: list[RebuildStep] = field(default_factory=list)
    taken: dict[str, tuple[ArtifactRef, str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def prepare(
    found: Trace, store: Store, version: AdapterVersion, *, given: Mapping[str, Path], base: str | None
) -> RebuildPlan:
    """Looks at every step for what it needs; reads what is taken from the store, and changes nothing.

    Args:
        found: Where the version comes from.
        store: The user's store.
        version: The version; its evaluation is left out where the user's files for it were not kept.
        given: `step.field` -> a file or folder of the user that a step read; counts only with the recorded content.
        base: Where the base is; None looks where it was.
    """
    told = RebuildPlan(taken=dict(found.taken), reasons=list(found.missing))
    for name, step in found.steps.items():
        outside = [role for role in reads_outside(step) if f"{name}.{role}" not in given]
        if outside and not step.inputs and step.output is not None:
            told.taken[step.output.sha256] = (step.output, f"{step.uses} read files of the user")
        elif outside and step.output == version.report:
            told.left_out[name] = f"the user's {' and '.join(outside)} were not kept"
        elif outside:
            told.reasons += [f"step {name!r} read a {role} of the user, which was not kept" for role in outside]
        elif step.uses not in STEPS:
            told.reasons.append(f"step {name!r} is of kind {step.uses!r}, which this release does not have")
        else:
            _add_piece(told, name, step, given, base, version.card.get("base_fingerprint"))
    used = {ref.sha256 for piece in told.pieces for ref in piece.recorded.inputs.values()}
    told.taken = {digest: entry for digest, entry in told.taken.items() if digest in used}
    for ref, _ in told.taken.values():
        told.reasons += [f"{problem.where}: {problem.what}" for problem in store.verify(ref)]
    return told


def _add_piece(
    told: RebuildPlan,
    name: str,
    step: Execution,
    given: Mapping[str, Path],
    base: str | None,
    fingerprint: str | None,
) -> None:
    kind = STEPS[step.uses]
    if step.revision != str(kind.revision):
        told.doubts.append(f"step {name!r} ran as revision {step.revision} of {step.uses}; it is {kind.revision} now")
    files: dict[str, Path | ArtifactRef] = {role: ref for role, ref in step.inputs.items() if ref.kind == FILE}
    for role in reads_outside(step):
        path = given[f"{name}.{role}"]
        if not path.exists() or digest_path(path).sha256 != step.settings["files"][role]:
            told.reasons.append(f"{path} does not hold what step {name!r} read as {role}")
        files[role] = path.resolve()
    values = dict(step.settings.get("settings", {}))
    if values.get(NAME_OF_BASE) is not None:
        values[NAME_OF_BASE] = _find_base(told, name, step, base, fingerprint)
    try:
        spec = kind.spec.model_validate(values | _open_ends(kind.spec, step) | dict.fromkeys(files, "."))
    except ValidationError as error:
        told.reasons.append(f"the settings of step {name!r} are no longer understood ({error.errors()[0]['msg']})")
        return
    told.pieces.append(RebuildStep(name, step, spec, files))


def _open_ends(spec: type[StepSpec], step: Execution) -> dict[str, Any]:
    """A value for every reference of a step, as many as it took."""
    ends: dict[str, Any] = {}
    for role, ref in step.inputs.items():
        name = role.partition(".")[0]
        if ref.kind == FILE:
            continue
        if get_origin(spec.model_fields[name].annotation) is tuple:
            ends[name] = (*ends.get(name, ()), "recorded")
        else:
            ends[name] = "recorded"
    return ends


def _find_base(told: RebuildPlan, name: str, step: Execution, given: str | None, fingerprint: str | None) -> str:
    """The base with the recorded fingerprint; where there is none, a reason says which was looked for."""
    from lora_engine.bases.source import resolve_base

    known = step.settings.get("base", {})
    wanted, written = known.get("fingerprint", fingerprint), str(step.settings["settings"][NAME_OF_BASE])
    looked: list[str] = []
    for place in dict.fromkeys([given] if given else [known.get("path"), known.get("label"), written]):
        if place is None:
            continue
        try:
            found = resolve_base(place).fingerprint()
        except BaseModelError as error:
            looked.append(f"{place}: {error.problem}")
            continue
        if wanted is None or found == wanted:
            return str(place)
        looked.append(f"{place} has fingerprint {found[:16]}")
    asked = f"the base {known.get('label', written)!r} with fingerprint {str(wanted)[:16]} of step {name!r} is not here"
    reason = f"{asked} ({'; '.join(looked)})"
    if given and any("has fingerprint" in each for each in looked):
        told.doubts.append(reason)
        return given
    told.reasons.append(f"{reason}; name its place with --base")
    return written


def rebuild(plan: RebuildPlan, store: Store, home: Home, run: tuple[str, Mapping[str, Any]]) -> dict[str, Execution]:
    """Builds every piece, each from what was built before it, and gives what was recorded of that.

    Args:
        plan: What to build.
        store: The user's store; what is taken comes from here, verified.
        home: The workspace.
        run: Name and spec of the run, for the workspace's own record.

    Raises:
        EngineError, RegistryError, OSError: What a step raised.
    """
    own, lineage = open_store(home), Lineage(home.lineage_url)
    try:
        for ref, _ in plan.taken.values():
            _copy(ref, store, own, home)
        run_id = lineage.start_run(*run).id
        made: dict[str, ArtifactRef] = {}
        for piece in plan.pieces:
            inputs: dict[str, tuple[ArtifactRef, ...]] = {}
            for role, ref in piece.recorded.inputs.items():
                if ref.kind != FILE:
                    name = role.partition(".")[0]
                    inputs[name] = (*inputs.get(name, ()), made.get(ref.sha256, ref))
            with threads(recorded_threads(piece.recorded)):
                outcome = execute(_job(piece, own, home), inputs, home, run_id)
            if piece.recorded.output is not None:
                made[piece.recorded.output.sha256] = outcome.ref
        lineage.finish_run(run_id, "COMPLETED")
        return {each.step: each for each in lineage.executions(run_id)}
    finally:
        lineage.close()


def recorded_threads(step: Execution) -> int | None:
    """With how many threads a step computed, as far as it is known."""
    told = str(step.environment.get("compute", {}).get("threads") or step.environment.get("threads") or "")
    return int(told) if told.isdecimal() and int(told) else None


def _copy(ref: ArtifactRef, source: Store, target: Store, home: Home) -> None:
    with tempfile.TemporaryDirectory(dir=home.work) as name:
        folder = Path(name) / "artifact"
        source.checkout(ref, folder)
        target.put(ref.kind, folder)


def _job(piece: RebuildStep, store: Store, home: Home) -> Job:
    folder = home.path / "files" / piece.name
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, str] = {}
    for role, source in piece.files.items():
        if isinstance(source, ArtifactRef):
            (name,) = store.files(source)
            store.checkout_file(source, name, folder / name)
            paths[role] = name
        else:
            paths[role] = str(source)
    job = prepare_job(piece.name, piece.spec.model_copy(update=paths), folder)
    # What was left out as revoked then is left out again, whatever is revoked now.
    return replace(job, excluded=tuple(piece.recorded.settings.get("excluded", ())))
