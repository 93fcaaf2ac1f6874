from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError

Add = Callable[..., Path]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_manifest_of_a_folder_is_sorted_by_name(images: Path, tmp_path: Path, add_image: Add) -> None:
    second = add_image("b.png", caption="a red\nstar ")
    add_image("A.JPG")
    add_image("sub/c.webp")
    (images / "readme.md").write_text("skipped")
    (images / ".hidden.png").write_text("skipped")
    manifest = ingest(images, tmp_path / "out", IngestSettings())
    assert [image.source for image in manifest.pictures] == ["A.JPG", "b.png", "sub/c.webp"]
    assert manifest.quarantined == ()
    assert manifest.pictures[1].caption == "a red star"
    assert manifest.pictures[1].sha256 == hashlib.sha256(second.read_bytes()).hexdigest()
    assert (manifest.pictures[1].width, manifest.pictures[1].height) == (40, 32)
    assert Manifest.load(tmp_path / "out") == manifest


def test_a_broken_image_is_quarantined(images: Path, tmp_path: Path, add_image: Add) -> None:
    for number in range(5):
        add_image(f"{number}.png")
    cut = add_image("cut.png")
    cut.write_bytes(cut.read_bytes()[:200])
    manifest = ingest(images, tmp_path / "out", IngestSettings())
    assert len(manifest.pictures) == 5
    assert [item.source for item in manifest.quarantined] == ["cut.png"]
    assert manifest.quarantined[0].reason.startswith("is broken")


def test_everything_in_the_folder_is_used_or_quarantined(images: Path, tmp_path: Path, add_image: Add) -> None:
    good = add_image("good.png")
    add_image("tall.png", height=64)
    (images / "copy.png").write_bytes(good.read_bytes())
    (images / "text.png").write_text("no")
    (images / "paper.pdf").write_bytes(b"%PDF-1.4")
    (images / "empty.jpg").touch()
    (images / "link.png").symlink_to("/etc/hostname")
    (images / "etc").symlink_to("/etc", target_is_directory=True)
    os.mkfifo(images / "pipe.png")
    (images / "evil\x1b[31m\n.png").write_text("no")
    (images / os.fsdecode(b"bad\xff.png")).write_text("no")
    manifest = ingest(images, tmp_path / "out", IngestSettings())
    reasons = {item.source: item.reason for item in manifest.quarantined}
    assert len(manifest.pictures) + len(reasons) == len(list(images.iterdir())) == 11
    assert reasons["good.png"] == "duplicate of copy.png"
    assert "leads out of the folder" in reasons["link.png"]
    assert "leads out of the folder" in reasons["etc"]
    assert "not a regular file" in reasons["pipe.png"]
    assert "evil\\x1b[31m\\n.png" in reasons
    assert all(text.isprintable() for item in manifest.quarantined for text in (item.source, item.reason))


def test_the_same_folder_gives_the_same_bytes_with_any_number_of_threads(
    images: Path, tmp_path: Path, add_image: Add, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        add_image(f"{number}.png", caption=f"image {number}")
    reported: list[tuple[int, int]] = []
    for out, threads in (("one", 1), ("two", 4)):
        monkeypatch.setattr("lora_engine.parallel.count_cores", lambda: threads)  # noqa: B023
        settings = IngestSettings(heldout=0.5)
        ingest(images, tmp_path / out, settings, progress=lambda done, total, values: reported.append((done, total)))
    assert reported == [(done, 4) for done in range(1, 5)] * 2
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    assert len(folder_bytes(tmp_path / "one")) == 5


@pytest.mark.parametrize(
    ("count", "fraction", "heldout"), [(10, 0.0, 0), (10, 0.3, 3), (3, 0.01, 1), (2, 0.9, 1), (1, 0.5, 0)]
)
def test_both_splits_have_images(
    images: Path, tmp_path: Path, add_image: Add, *, count: int, fraction: float, heldout: int
) -> None:
    for number in range(count):
        add_image(f"{number}.png")
    manifest = ingest(images, tmp_path / "out", IngestSettings(heldout=fraction))
    assert len(manifest.of_split("heldout")) == heldout
    assert len(manifest.of_split("train")) == count - heldout


def test_the_held_out_images_do_not_depend_on_names(images: Path, tmp_path: Path, add_image: Add) -> None:
    paths = [add_image(f"{number}.png") for number in range(6)]
    before = ingest(images, tmp_path / "before", IngestSettings(heldout=0.5))
    for path in paths:
        path.rename(path.with_name(f"z{9 - int(path.stem)}.png"))
    after = ingest(images, tmp_path / "after", IngestSettings(heldout=0.5))
    assert {p.sha256 for p in before.of_split("heldout")} == {p.sha256 for p in after.of_split("heldout")}


def test_a_folder_without_a_usable_image_is_refused_with_counts_and_reasons(images: Path, tmp_path: Path) -> None:
    for number in range(5):
        (images / f"{number}.png").write_text("no")
    with pytest.raises(DataError, match=r"none of the 5 files can be used .* first 0\.png: is not a readable image"):
        ingest(images, tmp_path / "out", IngestSettings())
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_empty_and_a_missing_folder_are_refused_with_their_path(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{images}: the folder has no images"):
        ingest(images, tmp_path / "out", IngestSettings())
    with pytest.raises(DataError, match=f"{tmp_path / 'gone'}: there is no such folder.* Fix: name the folder"):
        ingest(tmp_path / "gone", tmp_path / "out", IngestSettings())
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file, not a folder"):
        ingest(tmp_path / "file", tmp_path / "out", IngestSettings())


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (b"\x89PNG\r\n\x1a\n\x00\x00", "is not text"),
        (b"x" * 2_001, "has 2,001 characters"),
        (b"x" * 1_000_000, "is too long; allowed: 65,536 bytes"),
    ],
)
def test_an_unusable_caption_is_reported_and_its_image_used(
    images: Path, tmp_path: Path, add_image: Add, *, caption: bytes, reason: str
) -> None:
    add_image("good.png", caption="fine")
    add_image("odd.png").with_suffix(".txt").write_bytes(caption)
    manifest = ingest(images, tmp_path / "out", IngestSettings())
    assert [(image.source, image.caption) for image in manifest.pictures] == [("good.png", "fine"), ("odd.png", "")]
    assert manifest.quarantined[0].source == "odd.txt"
    assert reason in manifest.quarantined[0].reason


def test_control_and_direction_characters_are_removed_from_captions(
    images: Path, tmp_path: Path, add_image: Add
) -> None:
    add_image("a.png", caption="\ufeffa \x1b[31mred\x00 \u202estar\t on\r\nblue\u2028 <lora:x:1>")
    manifest = ingest(images, tmp_path / "out", IngestSettings())
    assert manifest.pictures[0].caption == "a [31mred star on blue <lora:x:1>"


def test_a_caption_that_links_out_of_the_folder_is_not_read(images: Path, tmp_path: Path, add_image: Add) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    add_image("a.png").with_suffix(".txt").symlink_to(tmp_path / "secret.txt")
    add_image("b.png")
    manifest = ingest(images, tmp_path / "out", IngestSettings())
    assert [image.caption for image in manifest.pictures] == ["", ""]
    assert [(item.source, "leads out of" in item.reason) for item in manifest.quarantined] == [("a.txt", True)]
    assert b"secret" not in (tmp_path / "out" / "manifest.json").read_bytes()


def test_consent_is_recorded_with_its_image(
    images: Path, tmp_path: Path, add_image: Add, caplog: pytest.LogCaptureFixture
) -> None:
    add_image("a.png")
    add_image("sub/b.png")
    table = tmp_path / "consent.csv"
    table.write_text("file,consent,note\nsub/b.png,C-17,ok\ngone.png,C-18,\n")
    manifest = ingest(images, tmp_path / "out", IngestSettings(), consent=table)
    assert [image.consent for image in manifest.pictures] == [None, "C-17"]
    assert "gone.png" in caplog.text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"name,id\na.png,1\n", "csv:2: the row needs a file and a consent id"),
        (b"file,consent\na.png,1\na.png,2\n", "csv:3, column 1 .file.: the row repeats the file 'a.png'"),
        (b"file,consent\na.png,\n", "csv:2"),
        (b"\xff\xff", "not UTF-8"),
    ],
)
def test_an_invalid_consent_file_is_refused(
    images: Path, tmp_path: Path, add_image: Add, *, content: bytes, problem: str
) -> None:
    add_image("a.png")
    table = tmp_path / "consent.csv"
    table.write_bytes(content)
    with pytest.raises(DataError, match=problem):
        ingest(images, tmp_path / "out", IngestSettings(), consent=table)
    with pytest.raises(DataError, match="no such consent file"):
        ingest(images, tmp_path / "out", IngestSettings(), consent=tmp_path / "gone.csv")
