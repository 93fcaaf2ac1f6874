"""Tests that an exported folder or file is verified with public keys alone, and that every change is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.flows.commands import loraline_here, say
from tests.flows.made import register_zorb, sign_zorb

SIGNED = {"adapter.safetensors", "model-card.md", "model-card.html", "provenance.json", "ml-bom.json"}
SECOND = "signature-"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with `out` (an export with records), a file with records, and two public keys."""
    folder = tmp_path_factory.mktemp("exports")
    home = sign_zorb(folder)
    say("export", "zorb@1", "--to", "kohya", "-o", folder / "out", "--with-records", home=home)
    say("export", "zorb@1", "--to", "diffusers", "-o", folder / "z.safetensors", "--with-records", home=home)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """Returns a copy of the exports and the public keys, without the home."""
    return Path(shutil.copytree(made, tmp_path / "far", ignore=shutil.ignore_patterns("home", "release", "review")))


def verify(path: Path, *keys: Path, code: int = 0) -> dict[str, object]:
    arguments = [argument for key in keys for argument in ("--key", key)]
    # No home: the verb may not even look for one.
    done = loraline_here("verify", path, *arguments, "--json", home=path.parent / "no home")
    assert done.returncode == code, done.stdout + done.stderr
    assert not (path.parent / "no home").exists()
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize(
    "path",
    [
        "out",
        "out/records",
        "out/zorb-v1.safetensors",
        "z.safetensors",
        "z-records",
        "z-records/adapter.safetensors",
        "out/records/ml-bom.json",
    ],
)
def test_an_export_is_verified_with_keys_alone(folder: Path, path: str) -> None:
    result = verify(folder / path, folder / "release.pub", folder / "review.pub")
    assert (result["version"], result["signed_by"], result["findings"]) == ("zorb@1", ["release", "review"], [])
    assert set(result["signed"]) - {name for name in result["signed"] if "log-head" in name} == SIGNED  # type: ignore[call-overload]
    assert result["holds"]
    shown = loraline_here("verify", folder / path, "--key", folder / "release.pub", home=folder / "no home")
    assert shown.returncode == 0
    assert "signed with the key release" in shown.stdout
    assert "no signature covers these" in shown.stdout


def test_each_given_key_must_have_signed(folder: Path, tmp_path: Path) -> None:
    say("keys", "new", tmp_path / "other", "--without-passphrase", home=tmp_path / "home")
    result = verify(folder / "out", folder / "release.pub", tmp_path / "other.pub", code=1)
    assert result["findings"] == ["no valid signature of the key 'other'"]
    only = verify(folder / "out", tmp_path / "other.pub", code=1)
    assert (only["signed"], only["signed_by"]) == ({}, [])
    assert len(only["notes"]) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(SIGNED))
def test_a_changed_file_is_named(folder: Path, name: str) -> None:
    path = folder / "out" / "records" / name
    path.write_bytes(path.read_bytes() + b" ")
    result = verify(folder / "out", folder / "release.pub", code=1)
    assert any(f"{name}: signed with digest" in finding for finding in result["findings"])  # type: ignore[attr-defined]
    path.unlink()
    missing = verify(folder / "out", folder / "release.pub", code=1)
    assert any(f"{name}: signed with digest" in finding for finding in missing["findings"])  # type: ignore[attr-defined]


def test_added_replaced_and_missing_files_are_named(folder: Path) -> None:
    key, records = folder / "release.pub", folder / "out" / "records"
    (records / "adapter_model.bin").write_bytes(b"more")
    assert verify(records, key, code=1)["findings"] == ["adapter_model.bin: no valid signature covers it"]
    (records / "adapter_model.bin").unlink()
    exported = folder / "out" / "zorb-v1.safetensors"
    exported.write_bytes(exported.read_bytes()[:-1] + b"x")
    (finding,) = verify(exported, key, code=1)["findings"]  # type: ignore[misc]
    assert finding.startswith("zorb-v1.safetensors: exported.json has digest")
    exported.unlink()
    assert "the file is missing" in str(verify(folder / "out", key, code=1)["findings"])
    assert verify(records, key)["holds"], "the signed files do not need the exported ones"
    shutil.copy(records / "adapter.safetensors", folder / "out" / "other.safetensors")
    result = verify(folder / "out" / "other.safetensors", key, code=1)
    assert "other.safetensors: neither a valid signature nor the statement of the export has it" in str(result)


def test_a_path_without_signatures_or_key_is_refused(folder: Path, tmp_path: Path) -> None:
    key = folder / "release.pub"
    for path, message in ((tmp_path / "gone", "no such file"), (tmp_path, "no signature beside it")):
        done = loraline_here("verify", path, "--key", key, home=tmp_path / "home")
        assert done.returncode == 2
        assert message in done.stderr
    done = loraline_here("verify", folder / "out", home=tmp_path / "home")
    assert done.returncode == 2
    assert "is a path" in done.stderr


def test_signatures_of_another_version_are_named(folder: Path, made: Path) -> None:
    """The second signature is of the same files under another name."""
    home = made / "home"
    records, second = folder / "out" / "records", folder / "second"
    register_zorb(made, "twin")
    say("sign", "twin@1", "--key", made / "review", home=home)
    say("records", "twin@1", "-o", second, "--with-adapter", home=home)
    for file in records.glob(f"{SECOND}*"):
        shutil.copy(second / "signature.json", file)
    result = verify(records, folder / "release.pub", folder / "review.pub", code=1)
    assert "no valid signature of the key 'review'" in result["findings"]  # type: ignore[operator]
