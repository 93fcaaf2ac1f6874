"""Executes the code of the notebooks in this process; `make docs` executes them with Jupyter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_engine.files import sha256_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def execute(name: str) -> dict[str, Any]:
    """Runs all cells in the working folder and returns their names; a notebook has no outputs."""
    cells = [cell for cell in json.loads((EXAMPLES / name).read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"]] == []
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    return names


def test_every_cell_of_the_library_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = execute("library.ipynb")
    assert names["image"].size == (32, 32)
    assert len(names["small"].adapter.modules) == len(names["zorb"].adapter.modules) > 0
    assert names["version"].ref == "both@1"
    assert "flowchart" in capsys.readouterr().out


def test_every_cell_about_generation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = execute("generate.ipynb")
    assert names["used"] == {"zorb.safetensors": sha256_file(tmp_path / "zorb.safetensors")}
    assert names["sheet"].width > 3 * 128
    assert (names["pixels"] - names["plain"]).abs().max() > 0.05
