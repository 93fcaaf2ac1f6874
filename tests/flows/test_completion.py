"""Completion in a shell: a real shell's request through the command, for files, steps, pipelines and adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli.completion import complete_adapters, complete_files
from tests.flows.shared import Trained

TEXT = """\
name: x-${style}
matrix: {style: [a, b]}
steps: {photos: {uses: ingest, images: images/}, prepared: {uses: preprocess, dataset: photos, resolution: 32}}
"""


def completions(folder: Path, words: str, **variables: str) -> list[str]:
    """Asks as bash does: with the words of the command line and the number of the word to complete."""
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1), "_LORALINE_COMPLETE": "complete_bash"}
    completed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv[0] = 'loraline'; from flows.cli import app; app(prog_name='loraline')",
        ],
        env=os.environ | asked | variables,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in completed.stderr
    return completed.stdout.split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pipeline.yaml").write_text(TEXT)
    (tmp_path / "bad.yaml").write_text("steps: [")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "images").mkdir()
    return tmp_path


def test_a_shell_gets_verbs_files_steps_and_pipelines(folder: Path) -> None:
    assert "resolve" in completions(folder, "loraline res")
    assert completions(folder, "loraline plan p") == ["pipeline.yaml"]
    assert completions(folder, "loraline run pipeline.yaml --force p") == ["photos", "prepared"]
    assert completions(folder, "loraline run pipeline.yaml --pipeline x-") == ["x-a", "x-b"]
    assert completions(folder, "loraline run bad.yaml --pipeline x") == []


def test_files_are_those_that_can_be_pipelines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert complete_files("") == ["bad.yaml", "images/", "pipeline.yaml"]
    assert complete_files(f"{folder}/p") == [f"{folder}/pipeline.yaml"]
    assert complete_files("missing/x") == []


def test_adapters_are_those_of_the_home(trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORALINE_HOME", str(trained.home.path))
    assert complete_adapters("sm") == ["small@1", "small@staging"]
    assert complete_adapters("other") == []
    monkeypatch.setenv("LORALINE_HOME", str(tmp_path / "none"))
    assert complete_adapters("") == []
