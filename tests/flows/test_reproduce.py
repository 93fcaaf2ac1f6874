"""Reproduces versions from lineage alone: a merge of registered versions, and a training."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from flows.cli import app
from lora_engine.errors import InterruptedRun
from lora_engine.merging.methods import METHODS
from registry.entities import AdapterVersion
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from registry.store.tables import ExecutionRow, Table
from tasks.errors import NotReproducible
from tasks.operations.reproduce import find_recipe, reproduce
from tasks.operations.reproduction_report import TOLERANCES, ReproductionReport
from tasks.progress import StepEvent, clear_stop, listening, request_stop
from tests.flows.conftest import draw_noise
from tests.flows.made import make_merge, run_line
from tests.flows.shared import Trained

Rewrite = Callable[[Callable[[dict[str, Any]], None]], None]


@pytest.fixture(autouse=True)
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    patch = pytest.MonkeyPatch()
    patch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
    folder = tmp_path_factory.mktemp("merge")
    make_merge(folder)
    patch.undo()
    return folder


@pytest.fixture
def merged(first: Path, tmp_path: Path) -> tuple[Home, AdapterVersion]:
    """Returns a home for this test, and its version `both@1`, which merges `one@1` and `two@1`."""
    shutil.copytree(first / "home", tmp_path / "home")
    home = Home.open(tmp_path / "home")
    with closing(Lineage(home.lineage_url)) as lineage:
        from tasks.operations.upstream import resolve_version

        return home, resolve_version(lineage, "both@1")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yields the parent folder of workspaces; asserts at the end that none is left."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    # Libraries have caches there too.
    assert list(folder.glob("loraline-*")) == []


@pytest.fixture
def rewrite(merged: tuple[Home, AdapterVersion]) -> Rewrite:
    """Returns a function that edits the recorded execution of the step `mix`."""

    def change(edit: Callable[[dict[str, Any]], None]) -> None:
        with closing(Lineage(merged[0].lineage_url)) as lineage, lineage.database.write() as session:
            row = session.scalars(select(ExecutionRow).where(ExecutionRow.step == "mix")).one()
            values = {name: getattr(row, name) for name in ("settings", "environment", "revision")}
            values = json.loads(json.dumps(values))
            edit(values)
            for name, value in values.items():
                setattr(row, name, value)

    return change


def build(home: Home, ref: str = "both@1", **options: Any) -> ReproductionReport:
    return reproduce(home, find_recipe(home, ref, **options))


def content_of(home: Home) -> dict[str, Any]:
    """Returns all rows of the home's database and the digests of its store."""
    with closing(Lineage(home.lineage_url)) as lineage, lineage.database.read() as session:
        rows = {
            name: sorted(map(str, session.execute(table.select()).all()))
            for name, table in Table.metadata.tables.items()
        }
    return rows | {"blobs": list(open_store(home).blobs.digests())}


def test_a_merge_of_registered_versions_is_rebuilt_to_the_byte_without_changes_of_the_home(
    merged: tuple[Home, AdapterVersion], temporary: Path
) -> None:
    home, version = merged
    before = content_of(home)
    report = build(home)
    assert (report.verdict, report.rebuilt) == ("identical", version.sha256)
    assert [(step.name, step.same) for step in report.steps] == [("mix", True)]
    assert report.environment_diffs == []
    assert content_of(home) == before


def test_a_database_outside_the_home_is_not_written_to(
    merged: tuple[Home, AdapterVersion], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORALINE_DATABASE_URL", merged[0].lineage_url)
    before = content_of(merged[0])
    assert build(merged[0]).verdict == "identical"
    assert content_of(merged[0]) == before


def test_the_recorded_number_of_threads_is_used_and_another_number_is_reported(
    merged: tuple[Home, AdapterVersion], temporary: Path, rewrite: Rewrite, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    threads = torch.get_num_threads()
    rewrite(lambda values: values["environment"]["compute"].update(threads=threads + 1))
    assert build(merged[0]).environment_diffs == []
    assert torch.get_num_threads() == threads

    monkeypatch.setattr("tasks.operations.rebuild.recorded_threads", lambda _step: threads)
    (diff,) = build(merged[0]).environment_diffs
    assert (diff.what, diff.before, diff.now, diff.steps) == ("compute.threads", threads + 1, threads, ("mix",))


def test_another_version_of_a_package_is_reported(
    merged: tuple[Home, AdapterVersion], temporary: Path, rewrite: Rewrite
) -> None:
    def age(values: dict[str, Any]) -> None:
        values["environment"]["distributions"] = ["torch==1.0"]

    rewrite(age)
    report = build(merged[0])
    assert report.verdict == "identical"
    (torch_row,) = [diff for diff in report.environment_diffs if diff.what == "packages.torch"]
    assert torch_row.before == "1.0"
    assert torch_row.now.startswith("2.")


def test_a_raised_revision_of_a_merge_method_is_a_reason_against_the_rebuild(
    merged: tuple[Home, AdapterVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_recipe(merged[0], "both@1").plan.warnings == []
    monkeypatch.setitem(METHODS._entries, "svd", replace(METHODS["svd"], revision=1))
    with pytest.raises(NotReproducible, match="step 'mix': revision of merge method svd changed 0 -> 1"):
        find_recipe(merged[0], "both@1")


@pytest.mark.parametrize(
    ("weight", "verdict", "code"), [(0.5 * (1 + 1e-3), "within tolerance", 0), (0.9, "differs", 1)]
)
def test_the_verdict_on_different_weights_depends_on_their_distance(
    merged: tuple[Home, AdapterVersion],
    temporary: Path,
    rewrite: Rewrite,
    monkeypatch: pytest.MonkeyPatch,
    weight: float,
    verdict: str,
    code: int,
) -> None:
    rewrite(lambda values: values["settings"]["settings"].update(weights=[1.0, weight]))
    monkeypatch.setenv("LORALINE_HOME", str(merged[0].path))
    result = CliRunner().invoke(app, ["reproduce", "both@1", "--json"])
    assert result.exit_code == code, result.output
    report = json.loads(result.stdout)
    assert report["verdict"] == verdict
    assert (report["weights"]["relative"] <= TOLERANCES["fp32"]) == (code == 0)
    assert report["sha256"] != report["rebuilt"]
    assert "recipe.weights" in [change["path"] for change in report["card"]]


def test_a_damaged_or_missing_source_is_refused_with_its_digest(merged: tuple[Home, AdapterVersion]) -> None:
    home, _ = merged
    plan = find_recipe(home, "both@1").plan
    ref = next(iter(plan.reused.values()))[0]
    store = open_store(home)
    digest = store.files(ref)["adapter.safetensors"].sha256
    (blob,) = home.store.rglob(digest)
    blob.chmod(0o644)
    blob.write_bytes(b"\0" + blob.read_bytes()[1:])
    with pytest.raises(NotReproducible, match=f"adapter {ref.sha256[:12]}.*digest"):
        find_recipe(home, "both@1")
    blob.unlink()
    with pytest.raises(NotReproducible, match="gone"):
        find_recipe(home, "both@1")


def test_a_step_that_is_missing_in_lineage_is_named(merged: tuple[Home, AdapterVersion], rewrite: Rewrite) -> None:
    home, version = merged
    with closing(Lineage(home.lineage_url)) as lineage, lineage.database.write() as session:
        session.scalars(select(ExecutionRow).where(ExecutionRow.step == "mix")).one().status = "FAILED"
    with pytest.raises(
        NotReproducible, match=f"no step is recorded that made the adapter {version.artifact.sha256[:16]}"
    ):
        find_recipe(home, "both@1")


def test_another_base_is_refused_with_both_fingerprints_unless_forced(
    merged: tuple[Home, AdapterVersion], temporary: Path, rewrite: Rewrite
) -> None:
    rewrite(lambda values: values["settings"]["base"].update(fingerprint="0" * 64))
    with pytest.raises(
        NotReproducible, match=r"'tiny' with fingerprint 0000000000000000 .*tiny has fingerprint [1-9a-f]"
    ):
        find_recipe(merged[0], "both@1")
    with pytest.raises(NotReproducible, match="--force-differences"):
        find_recipe(merged[0], "both@1", base="tiny")
    report = build(merged[0], base="tiny", force=True)
    assert len(report.warnings) == 1
    assert [diff.what for diff in report.environment_diffs] == ["base.fingerprint"]


def test_a_step_of_another_revision_is_refused_unless_forced(
    merged: tuple[Home, AdapterVersion], temporary: Path, rewrite: Rewrite
) -> None:
    rewrite(lambda values: values.update(revision="0"))
    with pytest.raises(NotReproducible, match="revision 0 of merge"):
        find_recipe(merged[0], "both@1")
    assert "revision" in [diff.what for diff in build(merged[0], force=True).environment_diffs]


def test_an_imported_version_is_refused_with_the_reason(merged: tuple[Home, AdapterVersion]) -> None:
    with pytest.raises(NotReproducible, match="imported from a file"):
        find_recipe(merged[0], "one@1")


def test_a_stop_removes_the_workspace(merged: tuple[Home, AdapterVersion], temporary: Path) -> None:
    workspaces = []

    def stop(event: StepEvent) -> None:
        if event.kind == "started":
            workspaces.extend(temporary.glob("loraline-*"))
            request_stop()
            raise KeyboardInterrupt

    recipe = find_recipe(merged[0], "both@1")
    try:
        with listening(stop), pytest.raises((KeyboardInterrupt, InterruptedRun)):
            reproduce(merged[0], recipe)
    finally:
        clear_stop()
    assert [workspace.exists() for workspace in workspaces] == [False]


def test_a_workspace_that_is_kept_holds_the_same_artifact(
    merged: tuple[Home, AdapterVersion], temporary: Path, tmp_path: Path
) -> None:
    home, version = merged
    keep = tmp_path / "kept"
    reproduce(home, find_recipe(home, "both@1"), keep=keep)
    assert open_store(Home.open(keep)).verify(version.artifact) == []
    with pytest.raises(FileExistsError):
        reproduce(home, find_recipe(home, "both@1"), keep=keep)


@pytest.mark.usefixtures("trained_here")
def test_a_training_is_rebuilt_to_the_byte_without_images_prompts_and_pipeline(
    trained: Trained, tmp_path: Path, temporary: Path
) -> None:
    home, version = trained.home, trained.version()
    moved = tmp_path / "moved"
    (trained.spec.parent / "images").rename(moved)
    trained.spec.unlink()
    (trained.spec.parent / "prompts.txt").unlink()

    before = content_of(home)
    report = build(home, "small@1")
    assert (report.verdict, report.rebuilt) == ("identical", version.sha256)
    states = {step.name: step.same for step in report.steps}
    assert states == {"photos": None, "prepared": True, "captions": True, "adapter": True, "report": True}
    assert content_of(home) == before

    recipe = find_recipe(home, "small@1", given={"photos.images": moved})
    assert recipe.plan.steps[0].name == "photos"
    draw_noise(moved / "more.png", 9)
    with pytest.raises(NotReproducible, match="differs from the files that step 'photos' read as images"):
        find_recipe(home, "small@1", given={"photos.images": moved})


@pytest.mark.usefixtures("trained_here")
def test_an_ingest_with_a_consent_file_is_rebuilt_at_the_revision_of_its_settings(trained: Trained) -> None:
    images, consent = trained.spec.parent / "images", trained.spec.parent / "consent.csv"
    consent.write_text("file,consent\n" + "".join(f"{path.name},c-1\n" for path in images.iterdir()))
    text = trained.spec.read_text().replace("images: images/,", "images: images/, consent: consent.csv,")
    trained.spec.write_text(text.replace("steps: 12,", "steps: 1,"))
    version = run_line(trained.spec, trained.home)
    recipe = find_recipe(trained.home, version.ref, given={"photos.images": images, "photos.consent": consent})
    assert recipe.plan.steps[0].recorded.revision == "4"
    assert recipe.plan.warnings == []
