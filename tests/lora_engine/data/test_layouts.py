"""Folders as other programs lay them out: captions, repeats and class images."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from lora_engine.data.ingest import ingest
from lora_engine.data.layout import is_plain
from lora_engine.data.manifest import Manifest
from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError
from tests.lora_engine.data.conftest import make_image

Files = Mapping[str, str | bytes | None]
"""Name -> text, bytes, or None for an image."""


def build(root: Path, files: Files) -> Path:
    for number, (name, content) in enumerate(files.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            make_image(20, 16, seed=number).save(path, format="PNG")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read(tmp_path: Path, files: Files, **settings: object) -> Manifest:
    build(tmp_path / "images", files)
    return ingest(tmp_path / "images", tmp_path / "out", IngestSettings.model_validate(settings))


CAPTIONS: dict[str, tuple[Files, dict[str, tuple[str, str | None]]]] = {
    "txt": ({"a.png": None, "a.txt": "red"}, {"a.png": ("red", None)}),
    "TXT in capitals": ({"a.png": None, "a.TXT": "red"}, {"a.png": ("red", None)}),
    "image ending in capitals": ({"a.PNG": None, "A.txt": "red"}, {"a.PNG": ("red", None)}),
    "kohya's caption": ({"a.png": None, "a.caption": "red"}, {"a.png": ("red", ".caption")}),
    "gallery-dl": ({"a.png": None, "a.png.txt": "red"}, {"a.png": ("red", None)}),
    "json with a caption": ({"a.png": None, "a.json": '{"caption": "red"}'}, {"a.png": ("red", ".json")}),
    "json with tags": ({"a.png": None, "a.png.json": '{"tags": ["red", "star"]}'}, {"a.png": ("red, star", ".json")}),
    "json with both": (
        {"a.png": None, "a.json": '{"caption": "a star", "tags": "red, big"}'},
        {"a.png": ("a star, red, big", ".json")},
    ),
    "booru": ({"a.png": None, "a.json": '{"tag_string": "red star"}'}, {"a.png": ("red star", ".json")}),
    "json without a caption": ({"a.png": None, "a.json": '{"width": 3}'}, {"a.png": ("", None)}),
    "json that is a list": ({"a.png": None, "a.json": "[1]"}, {"a.png": ("", None)}),
    "txt before caption": ({"a.png": None, "a.txt": "one", "a.caption": "two"}, {"a.png": ("one", None)}),
    "an empty txt": ({"a.png": None, "a.txt": " \n", "a.caption": "two"}, {"a.png": ("two", ".caption")}),
    "two images of one stem": (
        {"a.png": None, "a.jpg": None, "a.txt": "both"},
        {"a.jpg": ("both", None), "a.png": ("both", None)},
    ),
    "stems that differ in case": (
        {"A.png": None, "a.png": None, "A.txt": "upper", "a.txt": "lower"},
        {"A.png": ("upper", None), "a.png": ("lower", None)},
    ),
    "dots in the stem": ({"a.b.png": None, "a.b.txt": "red"}, {"a.b.png": ("red", None)}),
    "UTF-8 with a mark": ({"a.png": None, "a.txt": "\ufeffgrün".encode()}, {"a.png": ("grün", None)}),
    "UTF-16": ({"a.png": None, "a.txt": "grün".encode("utf-16")}, {"a.png": ("grün", None)}),
    "UTF-16 big-endian": ({"a.png": None, "a.txt": "\ufeffgrün".encode("utf-16-be")}, {"a.png": ("grün", None)}),
    "UTF-16 without a mark": ({"a.png": None, "a.txt": "green".encode("utf-16-le")}, {"a.png": ("green", None)}),
    "UTF-32": ({"a.png": None, "a.txt": "grün".encode("utf-32")}, {"a.png": ("grün", None)}),
    "Latin-1": ({"a.png": None, "a.txt": "grün".encode("latin-1")}, {"a.png": ("grün", None)}),
    "Windows-1252": ({"a.png": None, "a.txt": "a “star”".encode("cp1252")}, {"a.png": ("a “star”", None)}),
    "two lines": ({"a.png": None, "a.txt": "one\r\ntwo"}, {"a.png": ("one two", None)}),
    "markup and instructions stay text": (
        {"a.png": None, "a.txt": "Ignore all rules {trigger} <script> $(id)"},
        {"a.png": ("Ignore all rules {trigger} <script> $(id)", None)},
    ),
    "metadata.jsonl": (
        {
            "a.png": None,
            "b/c.png": None,
            "metadata.jsonl": '{"file_name": "a.png", "text": "red"}\n\n'
            '{"file_name": "b/c.png", "text": "blue", "width": 3}',
        },
        {"a.png": ("red", "metadata.jsonl"), "b/c.png": ("blue", "metadata.jsonl")},
    ),
    "metadata.jsonl in a subfolder": (
        {"train/a.png": None, "train/metadata.jsonl": '{"file_name": "a.png", "prompt": "red"}'},
        {"train/a.png": ("red", "metadata.jsonl")},
    ),
    "the nearest metadata file": (
        {
            "b/a.png": None,
            "b/metadata.jsonl": '{"file_name": "a.png", "text": "near"}',
            "metadata.jsonl": '{"file_name": "b/a.png", "text": "far"}',
        },
        {"b/a.png": ("near", "metadata.jsonl")},
    ),
    "metadata.csv": (
        {"a.png": None, "metadata.csv": 'file_name,text\na.png,"red, big"\n'},
        {"a.png": ("red, big", "metadata.csv")},
    ),
    "Replicate's captions.csv": (
        {"a.png": None, "captions.csv": "caption,image_file\nred,a.png\n"},
        {"a.png": ("red", "captions.csv")},
    ),
    "metadata.csv in UTF-16": (
        {"a.png": None, "metadata.csv": "file_name,text\na.png,grün\n".encode("utf-16")},
        {"a.png": ("grün", "metadata.csv")},
    ),
    "kohya's meta_cap.json": (
        {"a.png": None, "meta_cap.json": '{"a": {"caption": "red", "tags": "big, star"}}'},
        {"a.png": ("red, big, star", "meta_cap.json")},
    ),
    "meta_cap.json of another machine": (
        {"b/a.png": None, "meta_cap.json": json.dumps({"D:\\train\\a.png": {"caption": "red"}})},
        {"b/a.png": ("red", "meta_cap.json")},
    ),
    "kohya's meta_lat.jsonl": (
        {"a.png": None, "meta_lat.jsonl": '{"image_path": "/data/a.png", "caption": "red", "image_size": [20, 16]}'},
        {"a.png": ("red", "meta_lat.jsonl")},
    ),
    "a file beside the image before metadata": (
        {"a.png": None, "a.txt": "own", "metadata.csv": "file_name,text\na.png,other\n"},
        {"a.png": ("own", None)},
    ),
    "webdataset, unpacked": (
        {"000.jpg": None, "000.json": '{"caption": "red", "url": "x"}', "000.txt": "red"},
        {"000.jpg": ("red", None)},
    ),
    "kohya's folder words": (
        {"10_sks dog/a.png": None, "10_sks dog/b.png": None, "10_sks dog/b.txt": "own"},
        {"10_sks dog/a.png": ("sks dog", "folder name"), "10_sks dog/b.png": ("own", None)},
    ),
}


@pytest.mark.parametrize("layout", CAPTIONS)
def test_captions_are_found_in_every_layout(tmp_path: Path, layout: str) -> None:
    files, expected = CAPTIONS[layout]
    manifest = read(tmp_path, files)
    assert {image.source: (image.caption, image.caption_origin) for image in manifest.pictures} == expected
    assert manifest.quarantined == ()


REFUSED: dict[str, tuple[Files, str]] = {
    "metadata without names": ({"metadata.jsonl": '{"text": "red"}'}, r"metadata\.jsonl:1: names no image"),
    "metadata that is no JSON": (
        {"metadata.jsonl": '{"file_name": "a.png"}\n{'},
        r"metadata\.jsonl:2:1:2: not JSON",
    ),
    "a caption that is a number": (
        {"metadata.jsonl": '{"file_name": "a.png", "text": 3}'},
        r"metadata\.jsonl:1: the caption is int. Allowed: text",
    ),
    "a table without names": ({"metadata.csv": "text\nred\n"}, r"metadata\.csv: has no column of the images' names"),
    "a table without captions": (
        {"metadata.csv": "file_name\na.png\n"},
        r"metadata\.csv: has no column of the captions",
    ),
    "two columns of captions": (
        {"metadata.csv": "file_name,text,caption\na.png,x,y\n"},
        r"metadata\.csv:1, column 3: column 'caption' has the meaning of column 2",
    ),
    "kohya's file with a list": ({"meta_cap.json": "[]"}, r"meta_cap\.json: is list. Allowed: a JSON object"),
    "an entry that is a number": ({"meta_cap.json": '{"a": 3}'}, r"meta_cap\.json, entry 'a': is int"),
    "a link to a table elsewhere": ({}, "is a link that leads out of the folder"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_an_invalid_metadata_file_is_refused_with_its_line(tmp_path: Path, fault: str) -> None:
    files, message = REFUSED[fault]
    build(tmp_path / "images", {"a.png": None, **files})
    if not files:
        (tmp_path / "secret.csv").write_text("file_name,text\na.png,secret\n")
        (tmp_path / "images" / "metadata.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(DataError, match=message):
        ingest(tmp_path / "images", tmp_path / "out", IngestSettings())
    assert not (tmp_path / "out").exists()


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
]
ODD = ["a.caption", "a.json", "a.TXT", "a.png.txt", "metadata.csv", "meta_cap.json", "a.avif", "a_mask.png", "a.tif"]


@pytest.mark.parametrize("names", PLAIN)
def test_a_folder_that_is_read_as_before_is_plain(names: list[str]) -> None:
    assert is_plain(names)


@pytest.mark.parametrize("name", ODD)
def test_a_folder_with_a_file_that_is_read_anew_is_not_plain(name: str) -> None:
    assert not is_plain(["a.png", name])


def test_kohyas_folders_are_not_plain() -> None:
    assert not is_plain(["10_sks dog/a.png", "1_dog/b.png"])
