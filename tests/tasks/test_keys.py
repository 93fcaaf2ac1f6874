"""Cache keys stay what released versions computed, unless a revision is raised on purpose.

`python -m tests.tasks.test_keys` writes `keys.json` anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from lora_engine.catalog.formats import FORMATS, written_formats
from lora_engine.catalog.kinds import KINDS
from lora_engine.data.captioners import CAPTIONERS
from lora_engine.evaluation.metrics import METRICS
from lora_engine.files import canonical_json, sha256_bytes
from lora_engine.merging.methods import METHODS
from lora_engine.registries import Plugin, Registry
from lora_engine.settings import AddedLater, names_without_effect, without_later
from lora_engine.training.methods import methods
from lora_engine.training.specs.continuing import CHANGES
from registry.entities import ArtifactRef, Execution
from registry.lineage.record import Lineage
from tasks.digests import PathDigest
from tasks.entries import UsedEntry, changed_revisions, find_used, to_key
from tasks.job import Job
from tasks.step import STEPS, Inputs
from tasks.steps.train import Train

FROZEN = Path(__file__).with_name("keys.json")
FIX = """
Earlier results would be computed again. Choose one:
- A new option whose default means what earlier releases did: mark it with `lora_engine.settings.AddedLater`.
- The same settings give another result now: raise `revision` of the step, or of the entry (kind, method, format, ...).
- A new step or entry. In the last two cases run `python -m tests.tasks.test_keys` and commit `keys.json`.
"""
STEP_CASES: dict[str, dict[str, Any]] = {
    "ingest": {"images": "images", "consent": "consent.csv"},
    "preprocess": {"dataset": "photos", "resolution": 32},
    "caption": {"dataset": "prepared"},
    "train": {"base": "tiny", "dataset": "captions", "steps": 4},
    "merge": {"base": "tiny", "adapters": ("one", "two")},
    "convert": {"base": "tiny", "adapter": "one", "to": ("kohya",)},
    "evaluate": {"base": "tiny", "adapter": "one", "dataset": "captions", "prompts": "prompts.txt"},
    "combine": {"datasets": ("photos", "others")},
    "saved": {"adapter": "one", "at": 200},
    "register": {"name": "small", "adapter": "one", "report": "report", "alias": "staging"},
}
REFERENCES = {
    "dataset": "manifest",
    "datasets": "manifest",
    "adapter": "adapter",
    "adapters": "adapter",
    "report": "report",
}


def cases() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields name, spec and the part of its settings to compare (empty for all) of every step and entry."""
    for step, settings in STEP_CASES.items():
        yield step, {"uses": step, **settings}, ""
    for name in (name for name, kind in KINDS.items() if kind.spec):
        yield f"train kind {name}", {"uses": "train", **STEP_CASES["train"], "kind": name}, "kind"
    for name in methods:
        yield f"train method {name}", {"uses": "train", **STEP_CASES["train"], "method": name}, "method"
    for name, method in METHODS.items():
        needed = {"dataset": "captions"} if method.learn else {"rank": 2} if name == "svd" else {}
        yield f"merge {name}", {"uses": "merge", **STEP_CASES["merge"], "method": name} | needed, "options"
    for name, captioner in CAPTIONERS.items():
        chosen = {"name": name, "model": "org/name"} if captioner.models else name
        yield f"caption {name}", {"uses": "caption", **STEP_CASES["caption"], "captioner": chosen}, "captioner"
    for name in written_formats():
        yield f"convert {name}", {"uses": "convert", **STEP_CASES["convert"], "to": (name,)}, "to"


def job_of(data: Mapping[str, Any]) -> tuple[Job, Inputs]:
    """Returns a job whose files, base and inputs have made-up digests."""
    spec = STEPS[data["uses"]].spec.model_validate(data)
    files = {role: PathDigest(sha256_bytes(role.encode()), {}, {}) for role, _, _ in spec.externals()}
    base = {"label": "tiny", "fingerprint": "f" * 64} if data.get("base") else None
    inputs: dict[str, tuple[ArtifactRef, ...]] = {}
    for role, target, _ in spec.references():
        ref = ArtifactRef(REFERENCES[role], sha256_bytes(target.encode()), 1)
        inputs[role] = (*inputs.get(role, ()), ref)
    return Job("step", spec, Path(), files, base=base, entries=find_used(spec, None)), inputs


def frozen_form(data: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Returns the key, and the parts that it is made of or the settings of one entry."""
    job, inputs = job_of(data)
    parts = job.key_parts(inputs)
    return {"key": job.key(inputs), "parts": {part: parts["settings"][part]} if part else parts}


def differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """Yields the paths at which two JSON values differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted({*before, *after}):
            yield from differences(before.get(name, "absent"), after.get(name, "absent"), f"{path}.{name}".lstrip("."))
    elif before != after:
        yield f"{path}: {before!r} -> {after!r}"


CASES = {name: (data, part) for name, data, part in cases()}


@pytest.mark.parametrize("name", CASES)
def test_the_cache_key_of_known_settings_is_that_of_earlier_releases(name: str) -> None:
    frozen = json.loads(FROZEN.read_text())
    assert name in frozen, f"{name!r} has no frozen key.{FIX}"
    current = json.loads(canonical_json(frozen_form(*CASES[name])))
    changes = ", ".join(differences(frozen[name]["parts"], current["parts"])) or "a part outside of its settings"
    assert current["key"] == frozen[name]["key"], f"the cache key of {name!r} changed: {changes}.{FIX}"


def test_every_step_and_nothing_else_is_frozen() -> None:
    assert set(STEP_CASES) == set(STEPS)
    assert set(json.loads(FROZEN.read_text())) == set(CASES), FIX


class Quality(BaseModel):
    level: int = 1
    finer: Annotated[int, AddedLater()] = 3


class Improved(Train):
    quality: Annotated[Quality | None, AddedLater()] = None
    several: tuple[Quality, ...] = ()
    named: Annotated[dict[str, Quality], AddedLater()] = Field(default_factory=dict)


def test_a_setting_that_was_added_later_is_in_the_key_only_if_it_differs_from_its_default() -> None:
    data = {"uses": "train", **STEP_CASES["train"]}
    before, plain = Train.model_validate(data), Improved.model_validate(data)
    assert plain.own_settings()["quality"] is None
    assert plain.key_settings() == before.key_settings() | {"several": []}
    changed = Improved.model_validate(data | {"quality": {"finer": 3}})
    assert changed.key_settings()["quality"] == {"level": 1}
    nested = Improved.model_validate(
        data | {"several": [{"finer": 4}, {}], "named": {"a": {"finer": 5}, "b": {"level": 2}}}
    )
    assert nested.key_settings()["several"] == [{"level": 1, "finer": 4}, {"level": 1}]
    assert nested.key_settings()["named"] == {"a": {"level": 1, "finer": 5}, "b": {"level": 2}}
    assert without_later(Quality(), {"level": 1, "finer": 3}) == {"level": 1}


@pytest.mark.parametrize(
    ("change", "revision"),
    [
        ({"rank": "auto"}, 2),
        ({"steps": "auto", "schedule": "constant"}, 2),
        ({"rank": "auto", "learning_rate": "auto"}, 3),
        ({"rank": "auto", "steps": "auto", "schedule": "constant"}, 3),
        ({"rank": "auto", "best_checkpoint": {}, "schedule": "constant"}, 3),
    ],
    ids=str,
)
def test_trainings_that_score_prefixes_of_the_ranks_alone_have_a_new_revision(
    change: dict[str, Any], revision: int
) -> None:
    job, inputs = job_of({"uses": "train", **STEP_CASES["train"], **change})
    assert job.key_parts(inputs)["revision"] == revision


def test_a_setting_without_effect_is_in_the_key_with_its_default() -> None:
    data = {"uses": "train", **STEP_CASES["train"]}
    watched = {"validate_every": 5, "save_every": 5, "samples": {"every": 5, "prompts": ("a",)}}
    plain, changed = job_of(data), job_of(data | watched)
    assert changed[0].key(changed[1]) == plain[0].key(plain[1])
    assert plain[0].earlier_key(plain[1]) is None
    # Until 0.3, validations changed the key.
    settings = plain[0].key_parts(plain[1])["settings"] | {"validate_every": 5}
    old, inputs = job_of(data | {"validate_every": 5})
    parts = old.key_parts(inputs) | {"settings": settings}
    assert old.earlier_key(inputs) == sha256_bytes(canonical_json(parts)) != old.key(inputs)
    assert names_without_effect(Train) == {"samples", "validate_every", "checkpoint_every", "save_every"}
    assert names_without_effect(Train, visible=True) == {"samples", "validate_every", "save_every"}
    assert names_without_effect(Train) == {name for name, change in CHANGES.items() if change.effect == "none"}


def test_the_revision_of_an_entry_changes_the_keys_of_the_steps_that_use_it_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def key(case: str) -> str:
        job, inputs = job_of(CASES[case][0])
        return job.key(inputs)

    before = {name: key(name) for name in CASES}
    raised: list[tuple[Registry[Any], str, set[str]]] = [
        (KINDS, "lokr", {"train kind lokr"}),
        (methods, "pivotal", {"train method pivotal"}),
        (METHODS, "ties", {"merge ties"}),
        (CAPTIONERS, "template", {"caption template"}),
        (FORMATS, "peft", {"convert peft"}),
        (METRICS, "drift", {"evaluate"}),
    ]
    for registry, name, users in raised:
        with monkeypatch.context() as patch:
            patch.setitem(registry._entries, name, replace(registry[name], revision=1))
            assert {case for case in CASES if key(case) != before[case]} == users


def test_the_key_holds_the_version_of_a_plugin_only_for_entries_without_a_revision() -> None:
    old, new = Plugin("example", "1.0"), Plugin("example", "1.1")
    assert to_key([UsedEntry("metric", "sharpness", 0, old)]) == {"plugins": {"example": "1.0"}}
    for revision in (1, 2):
        entries = [[UsedEntry("metric", "sharpness", revision, plugin)] for plugin in (old, new)]
        assert to_key(entries[0]) == to_key(entries[1]) == {"revisions": {"metric sharpness": revision}}
    # A step has its revision in a part of its own.
    assert to_key([UsedEntry("step", "list", 3, new)]) == {}
    assert to_key([UsedEntry("adapter kind", "lora")]) == {}


RECORDED = {
    "of the kind": ({"entries": {"adapter kind": {"lokr": 0}}}, {"lokr"}),
    "of another kind": ({"entries": {"adapter kind": {"lora": 0}}}, set()),
    "of an earlier release, which recorded no kinds": ({}, {"lokr"}),
}


@pytest.mark.parametrize("record", RECORDED)
def test_the_revision_of_a_kind_is_in_the_keys_of_steps_that_read_adapters_of_it(
    record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, kinds = RECORDED[record]
    job, inputs = job_of({"uses": "evaluate", **STEP_CASES["evaluate"]})
    with closing(Lineage(f"sqlite:///{tmp_path / 'lineage.db'}")) as lineage:
        run = lineage.start_run("line", {})
        (adapter,) = inputs["adapter"]
        lineage.log_execution(Execution("1", run.id, "adapter", "train", "2", "0" * 64, settings, output=adapter))
        assert job.with_input_kinds(inputs, lineage).key(inputs) == job.key(inputs)
        monkeypatch.setitem(KINDS._entries, "lokr", replace(KINDS["lokr"], revision=1))
        revisions = job.with_input_kinds(inputs, lineage).key_parts(inputs).get("revisions", {})
    assert set(revisions) == {f"adapter kind {kind}" for kind in kinds}


def test_a_raised_revision_is_named() -> None:
    entries = [UsedEntry("adapter kind", "lora", 2), UsedEntry("metric", "drift"), UsedEntry("step", "train", 9)]
    assert list(changed_revisions(entries, {"entries": {"adapter kind": {"lora": 1}}})) == [
        "revision of adapter kind lora changed 1 -> 2"
    ]
    assert list(changed_revisions(entries, {})) == ["revision of adapter kind lora changed 0 -> 2"]


if __name__ == "__main__":
    forms = {name: frozen_form(*case) for name, case in CASES.items()}
    lines = (f"{json.dumps(name)}: {json.dumps(form, sort_keys=True)}" for name, form in forms.items())
    FROZEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
