"""Runs the commands of docs/tour.md in one process; `test_line` runs the command as a process."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.flows.commands import loraline_here

ROOT = Path(__file__).resolve().parents[2]


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "tour.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


SHORT = {
    "steps: 40": "steps: 6",
    "steps: 6\n    max_pictures: 4": "steps: 1\n    max_pictures: 1",
    "clip_i_paired: {min: 0.02}": "validation_loss: {max: 10.0}",
}
"""Changes of the tour's pipeline that save time: few steps teach nothing, so another gate has to pass."""


@pytest.mark.usefixtures("prefect_server", "trained_here")
@pytest.mark.parametrize("changes", [SHORT, pytest.param({}, marks=pytest.mark.nightly)], ids=["short", "as shown"])
def test_every_command_of_the_tour_does_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str]
) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    spec = tmp_path / "examples" / "tour" / "pipeline.yaml"
    for old, new in changes.items():
        assert old in spec.read_text()
        spec.write_text(spec.read_text().replace(old, new))
    monkeypatch.chdir(tmp_path)
    output = {}
    for line in commands():
        program, *words = shlex.split(line, comments=True)
        assert program == "loraline"
        done = loraline_here(*words, home=tmp_path / "home")
        assert (done.returncode != 0) == ("# refused" in line), f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr, line
        # Of a repeated command, the last output counts.
        output[line] = done.stdout + done.stderr
    assert len(output) > 20
    text = "\n".join(output.values())
    assert "verdict   identical" in text
    assert "crescent@production -> version 1: removed" in text
    assert "its consent 'C-2' was revoked" in text
    assert "crescent@3" in output["loraline run examples/tour/pipeline.yaml"]
    assert output["loraline list --all"].count("WITHDRAWN") == 2
    assert "production" in output["loraline list --all"]
    assert "Everything agrees" in output["loraline fsck"]
    assert output["loraline lineage crescent@production --format mermaid"].startswith("flowchart LR\n")
    for name in ("card.html", "crescent.safetensors", "backups"):
        assert (tmp_path / name).exists()
