from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.errors import DataError


def entry(digest: str = "a" * 64, **change: Any) -> dict[str, Any]:
    plain = {"sha256": digest, "file": f"pictures/{digest[:16]}.png", "width": 4, "height": 4, "source": "a.png"}
    return {**plain, **change}


def write(folder: Path, content: Any) -> Path:
    (folder / "manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_saved_manifest_loads_equal_and_saves_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / f"{'a' * 16}.png").touch()
    manifest = Manifest(pictures=(ImageEntry(**entry(caption="ein Stern, grün")),), trigger="sks")
    manifest.save(tmp_path)
    content = (tmp_path / "manifest.json").read_bytes()
    again = Manifest.load(tmp_path)
    again.save(tmp_path)
    assert again == manifest
    assert (tmp_path / "manifest.json").read_bytes() == content


@pytest.mark.parametrize(
    "file",
    ["../../etc/passwd", "/etc/passwd", "pictures/../x.png", "pictures/x.png", "pictures/aaaaaaaaaaaaaaaa.png\n"],
)
def test_no_manifest_points_outside_its_folder(tmp_path: Path, file: str) -> None:
    with pytest.raises(DataError, match=r"pictures\.0\.file"):
        Manifest.load(write(tmp_path, {"pictures": [entry(file=file)]}))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "levels deep"),
        ({}, "pictures: Field required"),
        ({"pictures": [], "colour": 1}, "colour"),
        ({"pictures": [entry(sha256="xyz")]}, r"pictures\.0\.sha256"),
        ({"pictures": [entry(), entry(digest="a" * 16 + "b" * 48)]}, "share the file"),
        ({"pictures": [entry()], "format": 2}, "format"),
        ({"pictures": [entry()]}, "1 of 1 images are missing"),
    ],
)
def test_an_invalid_manifest_is_refused_with_the_location(tmp_path: Path, content: Any, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        Manifest.load(write(tmp_path, content))


def test_the_error_for_a_folder_without_a_manifest_names_the_fix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run ingest"):
        Manifest.load(tmp_path)


def test_modules_for_specs_and_flows_do_not_import_torch() -> None:
    modules = ("data.manifest", "data.spec", "data.caption", "evaluation.spec", "evaluation.plan", "evaluation.report")
    code = "".join(f"import lora_engine.{module}\n" for module in modules)
    code += "import sys\nprint([name for name in ('torch', 'transformers', 'diffusers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
