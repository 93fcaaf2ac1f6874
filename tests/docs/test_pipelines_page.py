"""The page about pipeline files: its files load, and its commands run on the example that it names."""

from __future__ import annotations

import re
import shlex
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from flows.pipeline import run_pipeline
from flows.spec import load_pipelines, pipeline_names, read_unexpanded
from registry.home import Home
from registry.versions.versions import Versions
from tests.flows.commands import loraline_here, say

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "pipelines.md").read_text()
STUDIO = ROOT / "examples" / "studio"
NAMES = ("bow", "claw", "grin", "horn", "moon", "sickle")


@pytest.mark.parametrize(
    "command", re.findall(r"^loraline ((?:resolve|plan|schema).*?)(?: +#.*)?$", PAGE, re.MULTILINE)
)
def test_each_command_works(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    completed = loraline_here(*shlex.split(command), home=tmp_path / "home")
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout


def test_each_file_of_the_page_expands(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    overlay, parameters, matrix = blocks
    (tmp_path / "base.yaml").write_text(f"name: x\nsteps: {{exports: {{}}, report: {{}}}}\n{parameters}")
    (tmp_path / "overlay.yaml").write_text(overlay)
    document = read_unexpanded(tmp_path / "overlay.yaml")
    assert document.data["steps"] == {"report": {"max_pictures": 2}}
    assert document.data["parameters"]["length"] == {"default": 20}
    (tmp_path / "matrix.yaml").write_text(matrix)
    assert pipeline_names(tmp_path / "matrix.yaml") == ("bow-r4", "bow-r8", "claw-r4", "moon-r4", "moon-r8", "horn-r2")
    assert yaml.safe_load(parameters)["parameters"].keys() == {"rank", "kind", "trigger", "length"}


@pytest.mark.parametrize("name", ["base", "staging", "production"])
def test_each_file_of_the_studio_has_six_pipelines(name: str) -> None:
    specs = load_pipelines(STUDIO / f"{name}.yaml")
    assert tuple(spec.name for spec in specs) == NAMES
    assert all({"train", "register"} <= {step.uses for step in spec.steps.values()} for spec in specs)


def test_the_overlays_of_the_studio_differ_where_they_say() -> None:
    (staging,) = load_pipelines(STUDIO / "staging.yaml", names=["moon"])
    (production,) = load_pipelines(STUDIO / "production.yaml", names=["moon"])
    assert production.steps.keys() - staging.steps.keys() == {"exports"}
    assert (staging.steps["adapter"].model_dump()["steps"], production.steps["adapter"].model_dump()["steps"]) == (
        8,
        140,
    )
    assert production.steps["report"].model_dump()["gates"]
    assert staging.steps["adapter"].model_dump()["kind"]["name"] == "dora"


@pytest.mark.usefixtures("prefect_server", "trained_here")
def test_the_studio_trains_and_stages_six_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, images = tmp_path / "home", tmp_path / "images"
    images.mkdir()
    for image in sorted((ROOT / "examples" / "zorb" / "images").glob("*.png"))[:6]:
        shutil.copy(image, images)
    monkeypatch.setenv("STUDIO_IMAGES", str(images))
    printed = say("run", STUDIO / "staging.yaml", "--param", "length=2", home=home)
    for number, name in enumerate(NAMES, start=1):
        assert f"{name} ({number} of 6: style={name}" in printed
    assert printed.count("steps     4 ran, 2 cached") == 5  # photos and prepared are those of the first pipeline
    opened = Home.open(home)
    with closing(Versions(opened)) as versions:
        assert {version.ref: version.aliases for version in versions.list()} == {
            f"{name}@1": ("staging",) for name in NAMES
        }
    for spec in load_pipelines(STUDIO / "staging.yaml", parameters={"length": 2}):
        assert run_pipeline(spec, opened).changed == {}
