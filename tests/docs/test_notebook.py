"""Executes the code of the notebook in this process; `make docs` executes it with Jupyter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "library.ipynb"


def test_every_cell_runs_and_the_notebook_has_no_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"]] == []
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["image"].size == (32, 32)
    assert len(names["small"].adapter.modules) == len(names["zorb"].adapter.modules) > 0
    assert names["version"].ref == "both@1"
    assert "flowchart" in capsys.readouterr().out
