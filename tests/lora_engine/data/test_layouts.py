"""Folders as other programs lay them out: repeats, class images, and what is said about them; see the corpus."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lora_engine.data.earlier_layouts import is_plain, is_without_archives
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError
from tests.lora_engine.data.corpus.build import Files, build


def read(tmp_path: Path, files: Files, **settings: object) -> Manifest:
    build(tmp_path / "images", files)
    return ingest(tmp_path / "images", tmp_path / "out", IngestSettings.model_validate(settings))


def test_the_folders_of_kohya_give_repeats_words_and_class_images(tmp_path: Path) -> None:
    manifest = read(
        tmp_path,
        {
            "10_sks dog/0.png": None,
            "10_sks dog/1.png": None,
            "3_sks dog side/0.png": None,
            "1_dog/r.png": None,
            "reg/2_animal/r.png": None,
        },
        heldout=0.3,
    )
    found = {image.source: (image.repeats, image.caption, image.split == "class") for image in manifest.pictures}
    assert found == {
        "10_sks dog/0.png": (10, "sks dog", False),
        "10_sks dog/1.png": (10, "sks dog", False),
        "1_dog/r.png": (1, "dog", True),
        "3_sks dog side/0.png": (3, "sks dog side", False),
        "reg/2_animal/r.png": (2, "animal", True),
    }
    assert len(manifest.of_split("heldout")) == 1
    assert manifest.layout == (
        "kohya folders: 10 x 'sks dog' (2 images), 1 x 'dog' as class images (1 image), "
        "3 x 'sks dog side' (1 image), 2 x 'animal' as class images (1 image)"
    )


@pytest.mark.parametrize(
    ("files", "settings"),
    [
        ({"10_sks dog/0.png": None, "other.png": None}, {}),
        ({"10_sks dog/0.png": None, "1_dog/0.png": None}, {"layout": "plain"}),
        ({"0_sks dog/0.png": None}, {}),
        ({"99999_sks dog/0.png": None}, {}),
        ({"10sks dog/0.png": None}, {}),
    ],
    ids=["an image elsewhere", "plain", "no repeats", "too many repeats", "no underscore"],
)
def test_other_folders_have_no_meaning(tmp_path: Path, files: Files, settings: dict[str, object]) -> None:
    manifest = read(tmp_path, files, **settings)
    assert {(image.repeats, image.caption, image.split) for image in manifest.pictures} == {(1, "", "train")}
    assert manifest.layout is None


def test_a_folder_of_class_images_alone_is_a_dataset(tmp_path: Path) -> None:
    manifest = read(tmp_path, {"reg/1_dog/0.png": None, "reg/1_dog/1.png": None})
    assert [image.split for image in manifest.pictures] == ["train", "train"]


def test_stated_repeats_come_before_those_of_folders(tmp_path: Path) -> None:
    manifest = read(tmp_path, {"10_a b/0.png": None, "10_a b/1.png": None}, repeats={"*/0.png": 4})
    assert [image.repeats for image in manifest.pictures] == [4, 1]


def test_kohya_as_a_layout_requires_its_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="layout is kohya, but not every image is in a folder such as '10_sks dog'"):
        read(tmp_path, {"a.png": None}, layout="kohya")


def test_odd_captions_are_reported_and_images_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        manifest = read(
            tmp_path,
            {
                "a.png": None,
                "a.txt": "one",
                "a.caption": "two",
                "gone.txt": "no image",
                "metadata.jsonl": '{"file_name": "a.png", "text": "three"}\n{"file_name": "../b.png", "text": "x"}\n'
                '{"file_name": "c.png", "text": "x"}',
            },
        )
    assert [(image.source, image.caption) for image in manifest.pictures] == [("a.png", "one")]
    assert [record.getMessage() for record in caplog.records] == [
        "1 images have different captions in two places, first a.png: .txt is used, not .caption",
        "1 captions belong to no image, first gone.txt",
        "2 entries of metadata files name no image, first ../b.png in metadata.jsonl",
    ]


def test_masks_of_onetrainer_and_others_are_not_images(tmp_path: Path) -> None:
    manifest = read(
        tmp_path,
        {"a.png": None, "a-masklabel.png": None, "b.png": None, "b_mask.png": None, "red_mask.png": None},
    )
    assert {image.source: image.mask is not None for image in manifest.pictures} == {
        "a.png": True,
        "b.png": True,
        "red_mask.png": False,
    }


def test_of_equal_images_the_one_with_a_caption_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = build(tmp_path / "images", {"a.png": None, "b.txt": "red", "c.txt": "blue"})
    for name in ("b.png", "c.png"):
        (folder / name).write_bytes((folder / "a.png").read_bytes())
    with caplog.at_level(logging.WARNING):
        manifest = ingest(folder, tmp_path / "out", IngestSettings())
    assert [(image.source, image.caption) for image in manifest.pictures] == [("a.png", "red")]
    assert [item.reason for item in manifest.quarantined] == ["duplicate of a.png", "duplicate of a.png"]
    assert "a.png and c.png are the same image with different captions; 'red' is used" in caplog.text


PLAIN = [
    ["a.png", "b/c.jpg", "b/c.txt", "a.mask.png", "masks/a.png", "readme.md", "notes.txt"],
    ["10_sks dog/a.png", "b.png"],
    ["train/a.png", "train/b.png"],
]
ODD = ["a.caption", "a.json", "a.TXT", "a.png.txt", "metadata.csv", "meta_cap.json", "a.avif", "a_mask.png", "a.tif"]
NEW = [
    *(
        ["a.png", name]
        for name in ("x.tar", "x.tgz", "x.ZIP", "x.parquet", "x.arrow", "a.heic", "a.cls", "concepts.json")
    ),
    *(["a.png", name] for name in ("ai-toolkit.yaml", "multidatabackend.json", "__MACOSX/b.png")),
    ["a.png", "a.caption", "a.png.txt"],
    ["train/a.png", "test/b.png"],
]


@pytest.mark.parametrize("names", PLAIN)
def test_a_folder_that_is_read_as_before_is_plain(names: list[str]) -> None:
    assert is_plain(names)


@pytest.mark.parametrize("name", ODD)
def test_a_folder_with_a_file_that_is_read_anew_is_not_plain(name: str) -> None:
    assert not is_plain(["a.png", name])
    assert is_without_archives(["a.png", name])


@pytest.mark.parametrize("names", NEW)
def test_a_folder_that_is_read_otherwise_than_by_the_last_release_is_known_by_its_names(names: list[str]) -> None:
    assert not is_without_archives(names)
    assert not is_plain(names)


def test_kohyas_folders_are_not_plain() -> None:
    assert not is_plain(["10_sks dog/a.png", "1_dog/b.png"])
    assert is_without_archives(["10_sks dog/a.png", "1_dog/b.png"])
