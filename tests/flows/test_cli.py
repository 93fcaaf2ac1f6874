from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

from flows.spec import load_spec
from flows.template import write_pipeline
from tests.flows.commands import loraline_here as loraline
from tests.flows.conftest import draw_noise

Write = Callable[..., Path]

HEAVY = ("torch", "diffusers", "transformers", "mlflow", "prefect", "numpy", "sqlalchemy")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["promote", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from flows.cli import main\n"
        f"sys.argv = ['loraline', *{arguments!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "LOADED []" in done.stdout
    assert "Usage: loraline" in done.stdout


def test_a_wrong_file_is_one_line_on_stderr_and_exit_code_2(pipeline: Write, home: Path) -> None:
    path = pipeline()
    path.write_text(path.read_text().replace("resolution: 32", "resolutoin: 32"))
    done = loraline("plan", str(path), home=home)
    assert done.returncode == 2
    assert "did you mean 'resolution'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not home.exists()


def test_plan_says_why_and_writes_no_artifact(pipeline: Write, home: Path) -> None:
    done = loraline("plan", str(pipeline()), "--json", home=home)
    assert done.returncode == 0
    steps = json.loads(done.stdout)
    assert [(step["name"], step["cached"]) for step in steps] == [
        ("photos", False),
        ("prepared", False),
        ("captions", False),
    ]
    assert steps[0]["reason"] == "never ran"
    assert not list((home / "store").rglob("*/*"))


def test_an_unknown_version_says_what_there_is(home: Path) -> None:
    home.mkdir()
    (home / "store").mkdir()
    done = loraline("show", "nothing@production", home=home)
    assert done.returncode == 1
    assert "nothing" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_listing_of_an_absent_home_is_empty_and_says_how_to_begin(home: Path) -> None:
    done = loraline("list", home=home)
    assert done.returncode == 0
    assert "`loraline run`" in done.stderr
    assert "LORALINE_HOME" in done.stderr


def test_an_empty_registry_lists_as_an_empty_json_list(home: Path) -> None:
    (home / "store").mkdir(parents=True)
    done = loraline("list", "--json", home=home)
    assert json.loads(done.stdout) == []


def test_a_home_that_cannot_be_written_is_named(pipeline: Write, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    done = loraline("run", str(pipeline()), home=blocker / "home")
    assert done.returncode == 1
    assert str(blocker) in done.stderr
    assert "Traceback" not in done.stderr


def test_init_writes_a_pipeline_that_lacks_only_images(tmp_path: Path, home: Path) -> None:
    done = loraline("init", str(tmp_path / "mine"), home=home)
    assert done.returncode == 0
    path = tmp_path / "mine" / "pipeline.yaml"
    steps = load_spec(path).steps
    assert set(steps) == {"photos", "prepared", "captions", "adapter", "report", "release", "exports"}
    order = list(steps)
    for name, step in steps.items():
        needed = [order.index(target) for _, target, _ in step.references()]
        assert max(needed, default=-1) < order.index(name), "a step comes after its upstream steps"
    draw_noise(tmp_path / "mine" / "images" / "0.png", 0)
    planned = json.loads(loraline("plan", path, "--json", home=home).stdout)
    assert [step["name"] for step in planned] == order
    before = path.read_bytes()
    again = loraline("init", str(tmp_path / "mine"), home=home)
    assert again.returncode == 0
    assert path.read_bytes() == before


def test_written_pipelines_are_valid_and_relative_to_their_file(tmp_path: Path) -> None:
    images = tmp_path / "work" / "images"
    images.mkdir(parents=True)
    draw_noise(images / "0.png", 0)
    path = write_pipeline(images, "sks", "star", steps=50)
    data = yaml.safe_load(path.read_text())
    assert data["steps"]["photos"]["images"] == "images/"
    assert data["steps"]["adapter"]["steps"] == 50
    assert set(load_spec(path).steps) >= {"photos", "adapter", "report", "release", "exports"}


@pytest.mark.parametrize(
    ("base", "resolution", "checkpointing"),
    [
        ("tiny", 32, False),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, False),
        ("Tongyi-MAI/Z-Image", 1024, True),
    ],
)
def test_init_writes_the_defaults_of_the_base_even_without_a_network(
    base: str, resolution: int, checkpointing: bool, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert loraline("init", tmp_path / "mine", "--base", base, home=home).returncode == 0
    data = yaml.safe_load((tmp_path / "mine" / "pipeline.yaml").read_text())
    assert (data["base"], data["steps"]["prepared"]["resolution"]) == (base, resolution)
    assert data["steps"]["adapter"]["running"] == {"gradient_checkpointing": checkpointing}


@pytest.mark.parametrize(
    ("base", "problem"),
    [("nobody/unknown", "'nobody/unknown' is not in the local"), ("./absent", "unknown base './absent'")],
)
def test_init_with_an_unknown_base_names_it_and_writes_nothing(
    base: str, problem: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = loraline("init", tmp_path / "mine", "--base", base, home=home)
    assert done.returncode != 0
    assert problem in done.stderr
    assert not (tmp_path / "mine").exists()


def test_train_writes_the_defaults_of_the_base(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "images").mkdir()
    draw_noise(tmp_path / "images" / "0.png", 0)
    base = "black-forest-labs/FLUX.1-dev"
    done = loraline("train", tmp_path / "images", "--trigger", "sks", "--class", "star", "--base", base, home=home)
    assert "is not in the local Hugging Face cache" in done.stderr  # the run needs the weights
    adapter = yaml.safe_load((tmp_path / "sks.yaml").read_text())["steps"]["adapter"]
    assert (adapter["rank"], adapter["learning_rate"], adapter["precision"]) == (16, 1e-4, "auto")


@pytest.mark.parametrize(("trigger", "word"), [("two words", "star"), ("sks", "a:b"), ("<x>", "star")])
def test_words_that_would_break_a_prompt_are_refused(tmp_path: Path, home: Path, trigger: str, word: str) -> None:
    (tmp_path / "images").mkdir()
    done = loraline("train", str(tmp_path / "images"), "--trigger", trigger, "--class", word, home=home)
    assert done.returncode == 2
    assert "words without punctuation" in done.stderr if trigger == "sks" else "one word" in done.stderr
