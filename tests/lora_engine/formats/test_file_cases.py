"""Files in the forms that programs and users really write: each is read with its family and kinds, or refused."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from lora_engine.bases.structure import base_module_shapes
from lora_engine.errors import AdapterError
from lora_engine.formats import read_bundle

FOLDER = Path(__file__).resolve().parents[3] / "../shared/cases/formats"
AMBIGUOUS = "they share these modules"
READ = {
    "c01": ("", {"lora"}, AMBIGUOUS),
    "c02": ("", {"lora"}, AMBIGUOUS),
    "c03": ("sdxl", {"lora"}, ""),
    "c04": ("", {"lora"}, ""),
    "c05": ("z_image", {"lora"}, ""),
    "c06": ("z_image", {"lokr"}, ""),
    "c09": ("", {"lora"}, AMBIGUOUS),
    "c10": ("flux", {"lora"}, ""),
    "c12": ("", {"full", "lora"}, ""),
    "c13": ("", {"lora"}, AMBIGUOUS),
    "c14": ("sd3", {"lora"}, ""),
    "c15": ("", {"lora"}, ""),
    "c16": ("", {"lora"}, ""),
    "c17": ("", {"lora"}, ""),
    "c18": ("", {"lora"}, ""),
    "c19": ("", {"dora"}, ""),
    "c20": ("", {"lora"}, AMBIGUOUS),
    "c21": ("", {"lokr-rows"}, AMBIGUOUS),
    "c22": ("sdxl", {"lora"}, ""),
    "c23": ("", {"lora"}, AMBIGUOUS),
    "c24": ("", {"lora"}, AMBIGUOUS),
    "c27": ("", {"lora"}, ""),
    "c29": ("", {"lora"}, "alpha is 0 in 1 of 2 modules"),
    "c30": ("", {"lora"}, ""),
    "c31": ("", {"lora"}, AMBIGUOUS),
    "c32": ("", {"lora"}, "lora_alpha"),
    "c33": ("", {"oft"}, AMBIGUOUS),
    "c34": ("", {"dora"}, ""),
    "c35": ("", {"lora"}, ""),
    "c37": ("sdxl", {"lora"}, ""),
    "c38": ("flux", {"loha"}, ""),
    "c40": ("sd", {"lora"}, ""),
    "c46": ("", {"lora"}, AMBIGUOUS),
    "c52": ("flux", {"lora"}, ""),
    "c53": ("", {"lora"}, ""),
}
"""Family (empty if it is ambiguous, or a U-Net's part), kinds, and a text in the assumptions."""
REFUSED = {
    "c07": "flux2",
    "c08": "flux2",
    "c25": "chroma",
    "c26": "wan",
    "c36": "a base is needed",
    "c42": "flux2",
    "c44": "aura_flow",
    "c45": "ltx2",
    "c49": "the base's weight",
    "c50": "flux2",
}
UNBUILT = {"c51"}  # it builds on a case that is not in the folder
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the cases are not beside this checkout")


def _case(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """Returns the file of a case, and the base that its first lines name."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    [source] = FOLDER.glob(f"{name}_*.py")
    import_module(source.stem).build(tmp_path / "case.safetensors")
    base = re.search(r"^# base: (\w+)", source.read_text(), re.MULTILINE)
    return tmp_path / "case.safetensors", base[1] if base else ""


def test_every_case_has_an_expectation() -> None:
    assert {path.stem[:3] for path in FOLDER.glob("c*.py")} == {*READ, *REFUSED, *UNBUILT}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_with_its_family_and_kinds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(_case(name, tmp_path, monkeypatch)[0])
    family, kinds, assumed = READ[name]
    assert (bundle.adapter.base, {delta.kind for delta in bundle.adapter.modules.values()}) == (family, kinds)
    assert assumed in bundle.assumptions
    assert bool(assumed) == bool(bundle.assumptions)


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_for_no_supported_base_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, base = _case(name, tmp_path, monkeypatch)
    with pytest.raises(AdapterError, match=REFUSED[name]):
        read_bundle(file, base_module_shapes(base) if base else None)
