"""What the code knows about a family is in the folder of the family."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("flows", "tasks", "registry", "lora_engine")
FOLDER = ROOT / "lora_engine" / "families"
OTHERS = {
    "lora_engine/catalog/formats.py": "the title of XLabs' format",
    "lora_engine/families/__init__.py": "the line that imports the folder",
}
TRANSLATION = "flows/coming_from/"
"""Options of other trainers have the names of families, and mean something else for some."""


def test_a_family_is_named_in_its_folder_and_two_other_files() -> None:
    own = {*(FOLDER / "flux").rglob("*.py"), FOLDER / "flux2.py"}  # FLUX.2 is a family of its own
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*.py")} - own
    named = {str(path.relative_to(ROOT)) for path in files if "flux" in path.read_text()}
    assert {name for name in named if not name.startswith(TRANSLATION)} == OTHERS.keys()
