"""Tests single captions changed in the user's folder: by the verb, with undo, inside of the folder only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_engine.errors import DataError
from lora_engine.files import canonical_json, sha256_file
from registry.errors import Refused
from registry.home import Home
from registry.store.artifacts import open_store
from tasks.operations.caption_edits import edit_caption, undo_caption
from tasks.operations.dataset_sheet import dataset_roots, find_folders, list_datasets, read_sheet, require_folder
from tasks.operations.report import read_manifest
from tests.flows.commands import loraline_here, say
from tests.flows.shared import Trained, draw_noise


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Returns a folder with two images, one of which has a caption in UTF-16."""
    folder = tmp_path / "images"
    folder.mkdir()
    draw_noise(folder / "a.png", 1)
    draw_noise(folder / "b.png", 2)
    (folder / "b.txt").write_bytes("größer\n".encode("utf-16"))
    return folder


@pytest.fixture
def opened(home: Path) -> Home:
    return Home.open(home)


def test_a_caption_is_written_and_restored_byte_for_byte_by_the_verb(images, home):
    before = (images / "b.txt").read_bytes()
    assert say("recaption", images, "b.png", "--text", "a  red\tring", home=home) == "b.txt: 'größer' -> 'a red ring'\n"
    assert (images / "b.txt").read_bytes() == b"a red ring\n"
    say("recaption", images, "a.png", "--text", "a star", home=home)
    assert sorted(path.name for path in images.iterdir()) == ["a.png", "a.txt", "b.png", "b.txt"]
    undone = json.loads(say("recaption", images, "--undo", "--json", home=home))
    assert undone == {"source": "a.png", "file": "a.txt", "before": "a star", "after": None}
    say("recaption", images, "--undo", home=home)
    assert (images / "b.txt").read_bytes() == before
    assert not (images / "a.txt").exists()
    nothing = loraline_here("recaption", images, "--undo", home=home)
    assert (nothing.returncode, "no change of a caption is known" in nothing.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("c.png", "--text", "x"), "no image 'c.png'"),
        (("../images/a.png", "--text", "x"), "no image"),
        (("b.txt", "--text", "x"), "no image"),
        (("a.png", "--text", " "), "the caption is empty"),
        (("a.png", "--text", "x" * 2001), "2,001 characters"),
        (("a.png", "--text", "a\x1b[31mring"), "control characters"),
        (("a.png",), "nothing to write"),
        (("a.png", "--undo"), "nothing to write"),
    ],
)
def test_what_is_no_caption_of_an_image_is_refused(images, home, arguments, problem):
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    refused = loraline_here("recaption", images, *arguments, home=home)
    assert refused.returncode != 0
    assert problem in refused.stderr
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before


def test_no_link_leads_an_edit_out_of_the_folder(images, opened, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("precious")
    (images / "a.txt").symlink_to(outside / "mine.txt")
    with pytest.raises(DataError, match="is a link"):
        edit_caption(opened, images, "a.png", "x")
    draw_noise(outside / "c.png", 3)
    (images / "c.png").symlink_to(outside / "c.png")
    with pytest.raises(DataError, match="leads out of the folder"):
        edit_caption(opened, images, "c.png", "x")
    (images / "sub").symlink_to(outside)
    with pytest.raises(DataError, match="no image"):
        edit_caption(opened, images, "sub/c.png", "x")
    assert sorted(path.name for path in outside.iterdir()) == ["c.png", "mine.txt"]
    assert (outside / "mine.txt").read_text() == "precious"


def test_a_caption_or_an_image_that_changed_meanwhile_is_not_overwritten(images, opened):
    with pytest.raises(DataError, match="the caption is now 'größer'"):
        edit_caption(opened, images, "b.png", "mine", expected="")
    edit_caption(opened, images, "b.png", "mine", expected="größer", sha256=sha256_file(images / "b.png"))
    with pytest.raises(DataError, match="another one than in the dataset"):
        edit_caption(opened, images, "b.png", "x", sha256="0" * 64)
    (images / "b.txt").write_text("by hand")
    with pytest.raises(DataError, match="changed by others since"):
        undo_caption(opened, images)
    assert (images / "b.txt").read_text() == "by hand"


def test_editing_needs_a_role_that_may_train(images, opened):
    (opened.path / "policy.yaml").write_text("roles: {t: {may: [train], members: [ann]}}\n")
    edit_caption(opened, images, "a.png", "x", actor="ann")
    for change in (
        lambda: edit_caption(opened, images, "a.png", "y", actor="eve"),
        lambda: undo_caption(opened, images, actor="eve"),
    ):
        with pytest.raises(Refused, match="eve has no role that may train"):
            change()
    assert (images / "a.txt").read_text() == "x\n"


def test_a_dataset_finds_its_folder_below_the_configured_ones_only(trained: Trained):
    home, project = trained.home, trained.spec.parent
    (entry,) = list_datasets(home)
    assert (entry.pipeline, entry.step) == ("small", "photos")
    manifest = read_manifest(home, entry.artifact)
    assert dataset_roots(home) == []
    assert find_folders(home, manifest) == []
    (home.path / "loraline.yaml").write_text(f"datasets: [{json.dumps(str(project))}]\n")
    configured = Home.open(home.path)
    assert find_folders(configured, manifest) == [project / "images"]
    (project / "images" / "0.png").rename(project / "images" / "x.png")
    draw_noise(project / "images" / manifest.pictures[0].source, 99)
    assert find_folders(configured, manifest) == []
    for folder in (project.parent, Path("/"), project / "none", project / ".." / ".."):
        with pytest.raises(DataError, match="cannot be changed"):
            require_folder(configured, str(folder))
    assert all(image.locked for image in read_sheet(configured, entry.artifact, None))


def test_the_sheet_shows_the_captions_that_the_next_run_uses(trained: Trained):
    (entry,) = list_datasets(trained.home)
    images = trained.spec.parent / "images"
    edit_caption(trained.home, images, "2.png", "a blue ring")
    sheet = {image.entry.source: image for image in read_sheet(trained.home, entry.artifact, images)}
    assert (sheet["2.png"].caption, sheet["2.png"].is_changed, sheet["2.png"].locked) == ("a blue ring", True, "")
    assert not any(image.is_changed for name, image in sheet.items() if name != "2.png")
    (images / "3.txt").write_bytes(b"\x00\x01\x02\x00\x81")
    locked = {image.entry.source: image.locked for image in read_sheet(trained.home, entry.artifact, images)}
    assert "not text" in locked["3.png"]


def test_several_captions_of_an_image_are_shown_and_not_edited(trained: Trained):
    (entry,) = list_datasets(trained.home)
    store = open_store(trained.home)
    manifest = read_manifest(trained.home, entry.artifact)
    first, *others = manifest.pictures
    several = manifest.model_copy(
        update={"pictures": (first.model_copy(update={"caption": "one", "alternatives": ("two",)}), *others)}
    )
    changed = store.put_files("manifest", {"manifest.json": canonical_json(several.model_dump(mode="json"))})
    images = trained.spec.parent / "images"
    (images / first.source).with_suffix(".txt").write_text("one\ntwo\n")
    (shown, *_) = read_sheet(trained.home, changed, images)
    assert (shown.caption, shown.is_changed) == ("one", False)
    assert shown.locked == "it has 2 captions; change their file yourself"
