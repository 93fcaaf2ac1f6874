"""The wheel holds the packages with their data, and nothing else. `make wheel` installs it and runs a pipeline."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flows", "tasks", "lora_engine", "registry")
FILES = ("pyproject.toml", "README.md", "LICENSE")
DATA = (
    "lora_engine/bases/tiny/weights/unet/diffusion_pytorch_model.safetensors",
    "lora_engine/data/blazeface/full_range.safetensors",
    "lora_engine/evaluation/report.html",
    "registry/policy/licenses.yaml",
)


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(tmp_path: Path) -> None:
    # A build writes into its source folder.
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in (*FILES, "tests/test_wheel.py", "tools/smoke_wheel.sh", "docs/library.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    files = {
        path.relative_to(tmp_path).as_posix()
        for name in PACKAGES
        for path in (tmp_path / name).rglob("*")
        if path.is_file()
    }
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", build], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (archive.read(name) for name in archive.namelist() if name.endswith("/entry_points.txt"))
    assert names == files
    assert names >= set(DATA)
    assert b"loraline = flows.cli:start" in entry_points
