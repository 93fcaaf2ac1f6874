"""Runs the examples with fewer training steps."""

from __future__ import annotations

import runpy
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from flows.pipeline import run_pipeline
from flows.spec import load_spec
from flows.summary import summarize
from lora_engine.bases.source import resolve_base
from registry.entities import AdapterVersion
from registry.home import Home
from registry.versions.versions import Versions
from tasks.operations.export_adapter import list_saved
from tests.support.untrained import write_untrained_base

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# These have their own tests below.
TESTED_BELOW = {"continuing", "data-path", "objective", "running"}
METHODS = sorted(path for path in (EXAMPLES / "methods").glob("*.yaml") if path.stem not in TESTED_BELOW)

# `test_training_process` and `test_line` test trainings in a child process.
pytestmark = pytest.mark.usefixtures("prefect_server", "trained_here")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns one home for all examples, so that equal images are ingested, captioned and encoded once."""
    return tmp_path_factory.mktemp("examples") / "home"


def run(spec: Path, home: Path, *changes: str) -> tuple[AdapterVersion, ...]:
    """Runs an example in this process and returns all versions of its adapter."""
    opened, loaded = Home.open(home.absolute()), load_spec(spec, changes)
    result = run_pipeline(loaded, opened)
    assert {"train", "evaluate", "register"} <= {loaded.steps[name].uses for name in result.changed}
    assert not result.refusals
    assert dict(summarize(loaded, opened, result))["registry"]
    with closing(Versions(opened)) as versions:
        return versions.list(loaded.name)


def test_two_adapters_are_trained_merged_and_registered_as_one(home: Path) -> None:
    spec = EXAMPLES / "merge" / "pipeline.yaml"
    (version,) = run(spec, home, "shape.steps=4", "frame.steps=4", "report.max_pictures=1", "report.steps=2")
    assert version.aliases == ("staging",)
    assert version.card["recipe"]["weights"] == [1.0, 0.8]
    assert len(version.parents) == 2


def test_other_kinds_are_trained_merged_and_exported(home: Path) -> None:
    spec = EXAMPLES / "kinds" / "pipeline.yaml"
    (version,) = run(spec, home, "factored.steps=2", "directed.steps=2", "report.max_pictures=1", "report.steps=2")
    assert version.card["recipe"]["method"] == "ties"
    assert len(version.parents) == 2


def test_a_pipeline_runs_with_custom_objective_and_rates(home: Path) -> None:
    spec = EXAMPLES / "methods" / "objective.yaml"
    (version,) = run(
        spec, home, "adapter.steps=4", "adapter.validate_every=2", "report.max_pictures=1", "report.steps=2"
    )
    assert version.aliases == ("staging",)
    recipe = version.card["recipe"]
    assert recipe["objective"]["weighting"] == {"name": "min_snr", "gamma": 5.0}
    assert recipe["rates"]["optimiser"]["name"] == "adafactor"


def test_an_adapter_continues_another_one_with_a_larger_rank(home: Path) -> None:
    spec = EXAMPLES / "methods" / "continuing.yaml"
    changes = ("first.steps=3", "adapter.steps=1 epoch", "adapter.save_every=1 epoch")
    then = 'adapter.then=[{"steps": 1, "learning_rate": 5e-4}]'
    (version,) = run(spec, home, *changes, then, "report.max_pictures=1", "report.steps=2")
    assert version.aliases == ("staging",)
    recipe = version.card["recipe"]
    assert (recipe["rank"], recipe["steps"], recipe["then"][0]["steps"]) == (8, 4, 1)
    assert recipe["parents"] == [recipe["done"]["init"]]
    with closing(Versions(Home.open(home))) as versions:
        (saved,) = list_saved(versions, version)
    assert (saved["step"], saved["file"]) == (4, "saved/step-000004.safetensors")
    assert saved["validation_loss"] > 0


def test_augmented_images_and_captions_are_trained_on_and_encoded_once(tmp_path: Path) -> None:
    home = tmp_path / "home"  # not shared: other examples encode some of these images too
    spec = EXAMPLES / "methods" / "data-path.yaml"
    (version,) = run(spec, home, "adapter.steps=2", "report.max_pictures=1", "report.steps=2")
    assert version.aliases == ("staging",)
    assert version.card["recipe"]["captions"]["shuffle"] is True

    def encoded() -> dict[Path, int]:
        return {path: path.stat().st_ino for path in (home / "cache" / "latents").rglob("*.safetensors")}

    files = encoded()
    # Twelve images, each unchanged and in two other colors.
    assert len(files) == 36
    run(spec, home, "adapter.steps=2", "adapter.rank=2", "report.max_pictures=1", "report.steps=2")
    assert encoded() == files


@pytest.mark.parametrize("spec", METHODS, ids=lambda path: path.stem)
def test_a_pipeline_runs_with_every_method(spec: Path, home: Path) -> None:
    trained = "word" if spec.stem == "inversion" else "adapter"
    (version,) = run(spec, home, f"{trained}.steps=2", "report.max_pictures=1", "report.steps=2")
    assert version.aliases == ("staging",)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "photographs"
    shutil.copytree(EXAMPLES / "photographs", folder, ignore=shutil.ignore_patterns("images"))
    runpy.run_path(str(folder / "prepare.py"), run_name="__main__")
    for shape in ("sd15", "sdxl"):
        write_untrained_base(folder / "bases" / shape, shape)
    return folder


@pytest.mark.parametrize("base", ["tiny", "sd15", pytest.param("sdxl", marks=pytest.mark.nightly)])
def test_a_pipeline_of_photographs_runs_on_every_base(photographs: Path, home: Path, base: str) -> None:
    # Random weights with the blocks and module names of the published bases.
    untrained: tuple[str, ...] = ()
    if base != "tiny":
        untrained = (f"base=bases/{base}", "prepared.resolution=64", "report.steps=2")
        # A base in a local folder is known by its fingerprint alone.
        fingerprint = resolve_base(str(photographs / "bases" / base)).fingerprint()
        home.mkdir(exist_ok=True)
        (home / "licenses.yaml").write_text(
            f"date: 2026-11-01\nbases: [{{license: creativeml-openrail-m, fingerprints: [{fingerprint}]}}]\n"
        )
    (version,) = run(photographs / f"{base}.yaml", home, "adapter.steps=2", *untrained)
    assert version.aliases == ("staging",)
    assert len(version.card["data"]) == 9
    exported = {path.name for path in (home / "exports" / f"photographs-{base}").rglob("*") if path.is_file()}
    assert "adapter_config.json" in exported


def test_a_pipeline_of_faces_trains_on_the_photographs_with_a_face(photographs: Path, home: Path) -> None:
    (version,) = run(photographs / "faces.yaml", home, "adapter.steps=2", "report.max_pictures=1", "report.steps=2")
    assert version.aliases == ("staging",)
    assert len(version.card["data"]) == 2


# Each process imports torch again; `test_training_processes` compares two with one.
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_training_leaves_sample_images_of_every_interval(home: Path, processes: int) -> None:
    spec = EXAMPLES / "methods" / "running.yaml"
    assert load_spec(spec).steps["adapter"].running.processes == 2
    changes = ("adapter.steps=2", "adapter.samples.every=1", "report.max_pictures=1", "report.steps=2")
    (version,) = run(spec, home, f"adapter.running.processes={processes}", *changes)
    assert version.aliases == ("staging",)
    assert version.card["recipe"]["running"]["processes"] == processes
    shown = {path.parent.name for path in (home / "mlflow" / version.name).rglob("samples/*/*.png")}
    assert shown == {"step-000000", "step-000001", "step-000002"}, "MLflow shows the images of every interval"
