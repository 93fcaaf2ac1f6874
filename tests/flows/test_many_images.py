"""Ten thousand images: flat memory, and a second run that decodes none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ingest import only_ingest, peak_memory
from lora_engine.data.decoders import Decoders
from lora_engine.data.images import encode_png
from lora_engine.errors import DataError
from lora_engine.files import sha256_bytes
from registry.entities import ArtifactRef
from registry.home import Home
from registry.store.artifacts import open_store
from tests.flows.commands import loraline_here, say
from tests.lora_engine.data.conftest import make_image

SPEC = """\
name: many
base: tiny
steps:
  photos: {uses: ingest, images: images/}
"""


def draw(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").write_bytes(encode_png(make_image(48, 40, number)))
    return folder


@pytest.mark.nightly
def test_the_memory_of_ingest_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    few, many = draw(tmp_path / "few", 1_250), draw(tmp_path / "many", 10_000)
    # Their entries and prints take 5 KiB each: 40 MiB of 8,750 images. Decoded they would take 6 KiB more.
    assert peak_memory(many, only_ingest) - peak_memory(few, only_ingest) < 60


@pytest.mark.parametrize("count", [5, pytest.param(10_000, marks=pytest.mark.nightly)])
@pytest.mark.usefixtures("prefect_server")
def test_a_second_run_decodes_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    folder, spec, home = draw(tmp_path / "images", count), tmp_path / "many.yaml", tmp_path / "home"
    spec.write_text(SPEC)
    first = json.loads(say("run", spec, "--json", home=home))["outcomes"]["photos"]

    def refuse(*_: object, **__: object) -> Iterator[tuple[dict[str, object], bytes]]:
        raise DataError("an image is decoded")

    monkeypatch.setattr(Decoders, "request", refuse)
    again = json.loads(say("run", spec, "--json", home=home))["outcomes"]["photos"]
    assert (first["cached"], again["cached"]) == (False, True)
    assert first["ref"] == again["ref"]
    (folder / "another.png").write_bytes(encode_png(make_image(48, 40, count)))
    changed = loraline_here("run", spec, home=home)
    assert f"{count} images, captions: {count} none; 1 quarantined" in changed.stdout
    assert "an image is decoded" in changed.stdout + changed.stderr


def manifest_of(run: str, home: Path) -> str:
    ref = ArtifactRef(**json.loads(run)["outcomes"]["photos"]["ref"])
    return open_store(Home.open(home)).read(ref, "manifest.json").decode()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that children decode."""
    names: list[str] = []
    request = Decoders.request

    def record(self: Decoders, operation: str, path: Path, root: Path, **options: Any) -> Iterator[Any]:
        names.append(path.name)
        return request(self, operation, path, root, **options)

    monkeypatch.setattr(Decoders, "request", record)
    return names


@pytest.mark.usefixtures("prefect_server")
def test_after_a_change_only_new_images_are_decoded(tmp_path: Path, decoded: list[str]) -> None:
    folder, spec, home = draw(tmp_path / "images", 4), tmp_path / "many.yaml", tmp_path / "home"
    transparent = make_image(48, 40, 9).convert("RGBA")
    transparent.putalpha(make_image(48, 40, 8).convert("L"))
    transparent.save(folder / "clear.webp", lossless=True)
    (folder / "broken.png").write_bytes(b"no image")
    spec.write_text(SPEC)

    def run(*arguments: str, into: Path = home) -> str:
        decoded.clear()
        return say("run", spec, "--json", *arguments, home=into)

    run()
    assert sorted(decoded) == ["0.png", "1.png", "2.png", "3.png", "broken.png", "clear.webp"]
    (folder / "0.png").unlink()
    (folder / "1.txt").write_text("a caption")
    (folder / "3.png").rename(folder / "renamed.png")
    (folder / "new.png").write_bytes(encode_png(make_image(48, 40, 7)))
    changed = manifest_of(run(), home)
    assert sorted(decoded) == ["broken.png", "new.png"], "what could not be used is tried again"
    assert changed == manifest_of(run(into=tmp_path / "other"), tmp_path / "other")
    assert len(decoded) == 6
    run("--set", "photos.alpha=mask")
    assert len(decoded) == 6
    (folder / "1.txt").unlink()
    again = manifest_of(run("--set", "photos.alpha=mask"), home)
    assert decoded == ["broken.png"]
    assert json.loads(again)["pictures"][2]["mask"].startswith("masks/")
    (home / "cache" / "decoded").joinpath(*[p.name for p in (home / "cache" / "decoded").iterdir()]).write_text("{")
    (folder / "2.txt").write_text("another caption")
    run("--set", "photos.alpha=mask")
    assert len(decoded) == 6, "a damaged file of the cache is written again"


@pytest.mark.usefixtures("prefect_server")
def test_a_damaged_image_of_the_store_is_decoded_again(tmp_path: Path, decoded: list[str]) -> None:
    folder, spec, home = draw(tmp_path / "images", 2), tmp_path / "many.yaml", tmp_path / "home"
    spec.write_text(SPEC)
    first = manifest_of(say("run", spec, "--json", home=home), home)
    png = sha256_bytes((folder / "0.png").read_bytes())
    (path,) = (path for path in (home / "store").rglob("*") if path.name == png or path.name == png[2:])
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (folder / "1.txt").write_text("a caption")
    decoded.clear()
    again = manifest_of(say("run", spec, "--json", home=home), home)
    assert decoded == ["0.png"]
    assert json.loads(again)["pictures"][0] == json.loads(first)["pictures"][0]
