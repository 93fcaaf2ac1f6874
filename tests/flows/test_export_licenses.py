"""Tests that files which leave by the step and the verb `convert` state the inherited license."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from flows.spec import load_spec
from lora_engine.catalog.formats import written_formats
from lora_engine.formats import Card
from lora_engine.formats.safetensors_io import read_header
from registry.home import Home
from registry.lineage.record import Lineage
from registry.policy.licenses import read_licenses
from registry.store.artifacts import open_store
from tasks.execution import execute, find_hit
from tasks.job import Job, prepare_job
from tasks.step import Inputs
from tests.flows.commands import say
from tests.flows.made import bring_in, run_line, write_random

LINE = """\
name: both
base: tiny
seed: 7
steps:
  mix: {uses: merge, adapters: [nc@1, free@1]}
  release: {uses: register, adapter: mix}
  exports: {uses: convert, adapter: mix, to: [FORMATS]}
"""
INHERITED = "Apache-2.0 AND CC-BY-NC-4.0 AND ISC"


@pytest.fixture
def opened(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Returns a home with `nc@1` and `free@1`; the file of `free@1` states another license than its import."""
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
    opened = Home.open(home)
    bring_in(opened, write_random(tmp_path / "nc.safetensors", 0), "nc", license_id="cc-by-nc-4.0")
    stated = write_random(tmp_path / "free.safetensors", 1, card=Card(license="MIT"))
    bring_in(opened, stated, "free", license_id="isc")
    return opened


@pytest.fixture
def converted(opened: Home, tmp_path: Path) -> Iterator[tuple[Job, Inputs, Lineage]]:
    """Yields the step `exports` of a pipeline that ran, with its inputs."""
    path = tmp_path / "line.yaml"
    path.write_text(LINE.replace("FORMATS", ", ".join(written_formats())))
    version = run_line(path, opened)
    spec = load_spec(path)
    with closing(Lineage(opened.lineage_url)) as lineage:
        inputs = {"adapter": (version.artifact,)}
        yield (
            prepare_job("exports", spec.steps["exports"], spec.folder).with_input_kinds(inputs, lineage),
            inputs,
            lineage,
        )


def licenses_of(folder: Path) -> dict[str, str | None]:
    return {
        path.relative_to(folder).as_posix(): read_header(path)[1].get("modelspec.license")
        for path in folder.rglob("*.safetensors")
    }


def test_every_format_of_the_step_states_the_licenses_of_everything_upstream(
    opened: Home, converted: tuple[Job, Inputs, Lineage], tmp_path: Path
) -> None:
    job, inputs, lineage = converted
    store = open_store(opened)
    hit, reason = find_hit(job, inputs, opened, store, lineage)
    assert hit is not None, reason
    store.checkout(hit.ref, tmp_path / "out")
    stated = licenses_of(tmp_path / "out")
    assert {name.partition("/")[0] for name in stated} == set(written_formats())
    assert set(stated.values()) == {INHERITED}
    assert json.loads((tmp_path / "out" / "license.json").read_bytes())["license"] == INHERITED


def test_files_are_written_again_when_the_inherited_license_changes(
    opened: Home, converted: tuple[Job, Inputs, Lineage], tmp_path: Path
) -> None:
    job, inputs, lineage = converted
    fingerprint = read_licenses().bases[-1].fingerprints[0]
    table = f"date: 2026-11-01\nbases: [{{license: MIT, hub: [tiny], fingerprints: [{fingerprint}]}}]\n"
    (opened.path / "licenses.yaml").write_text(table)
    store = open_store(opened)
    hit, reason = find_hit(job, inputs, opened, store, lineage)
    assert (hit, reason) == (None, "what it relied on in the registry changed")
    run = lineage.start_run("again", {})
    again = execute(job, inputs, opened, run.id)
    store.checkout(again.ref, tmp_path / "out")
    assert set(licenses_of(tmp_path / "out").values()) == {"CC-BY-NC-4.0 AND ISC AND MIT"}
    assert find_hit(job, inputs, opened, store, lineage)[0] is not None


def test_the_verb_states_the_inherited_license_of_a_version_and_that_of_a_file(opened: Home, tmp_path: Path) -> None:
    say("convert", "free@1", "--to", "kohya", "-o", tmp_path / "version", home=opened.path)
    say("convert", tmp_path / "free.safetensors", "--to", "kohya", "-o", tmp_path / "file", home=opened.path)
    assert set(licenses_of(tmp_path / "version").values()) == {"Apache-2.0 AND ISC"}
    assert set(licenses_of(tmp_path / "file").values()) == {"MIT"}
