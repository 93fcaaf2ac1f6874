"""The tour of docs/tour.md, command by command, as a reader would type it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "tour.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.slow
@pytest.mark.whole
def test_every_command_of_the_tour_does_what_the_page_says(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    environment = os.environ | {"LORALINE_HOME": str(tmp_path / "home")}
    said = {}
    for line in commands():
        _, *words = shlex.split(line, comments=True)
        done = subprocess.run(
            [sys.executable, "-c", "from flows.cli import main; main()", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert (done.returncode != 0) == ("# refused" in line), f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        said[line] = done.stdout + done.stderr
    told = "\n".join(said.values())
    assert "verdict   identical" in told
    assert "crescent@production -> version 1: removed" in told
    assert "its consent 'C-2' was revoked" in told
    assert said["loraline list --all"].count("WITHDRAWN") == 2
    assert "production" in said["loraline list --all"]
    assert "Everything agrees" in said["loraline fsck"]
    for name in ("lineage.svg", "card.html", "crescent.safetensors", "backups"):
        assert (tmp_path / name).exists()
