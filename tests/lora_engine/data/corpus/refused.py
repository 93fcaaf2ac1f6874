"""Folders and archives that are refused as a whole, with what is said."""

from __future__ import annotations

import json
import tarfile
from typing import Any

from tests.lora_engine.data.corpus.build import Case, Files, outside, png, special, tar


def refuse(files: Files, error: str, **settings: Any) -> Case:
    return Case({"a.png": None, **files}, error=error, settings=settings)


def concepts(*entries: dict[str, Any] | int) -> Files:
    return {"concepts.json": json.dumps(entries)}


REFUSED: dict[str, Case] = {
    "metadata without names": refuse({"metadata.jsonl": '{"text": "red"}'}, r"metadata\.jsonl:1: names no image"),
    "metadata that is no JSON": refuse(
        {"metadata.jsonl": '{"file_name": "a.png"}\n{'}, r"metadata\.jsonl:2:1:2: not JSON"
    ),
    "a caption that is a number": refuse(
        {"metadata.jsonl": '{"file_name": "a.png", "text": 3}'}, r"metadata\.jsonl:1: the caption is int. Allowed: text"
    ),
    "a table without names": refuse(
        {"metadata.csv": "text\nred\n"}, r"metadata\.csv: has no column of the images' names"
    ),
    "a table without captions": refuse(
        {"metadata.csv": "file_name\na.png\n"}, r"metadata\.csv: has no column of the captions"
    ),
    "two columns of captions": refuse(
        {"metadata.csv": "file_name,text,caption\na.png,x,y\n"},
        r"metadata\.csv:1, column 3: column 'caption' has the meaning of column 2",
    ),
    "kohya's file with a list": refuse({"meta_cap.json": "[]"}, r"meta_cap\.json: is list. Allowed: a JSON object"),
    "an entry that is a number": refuse({"meta_cap.json": '{"a": 3}'}, r"meta_cap\.json, entry 'a': is int"),
    "a link to a table elsewhere": refuse(
        {"metadata.csv": outside("secret.csv", b"file_name,text\na.png,secret\n")},
        "is a link that leads out of the folder",
    ),
    "an empty folder": Case({"readme.md": "nothing"}, error="the folder has no images"),
    "only broken images": Case({"a.png": b"no", "b.png": b""}, error="none of the 2 files can be used"),
    "a file that is no archive": Case({"a.png": None}, error="is a file, not a folder of images", is_file=True),
    "an archive that is none": Case(
        {"a.zip": b"no"}, error="none of the 1 files can be used .* a.zip: is broken", is_file=True
    ),
    "an empty archive": Case({"a.tar": tar({})}, error="the folder has no images", is_file=True),
    "an archive of links": Case(
        {"a.tar": tar({"a.png": special(tarfile.SYMTYPE, "/etc/passwd")})}, error="a.png: is a link", is_file=True
    ),
    "a number for a concept": refuse(concepts(3), "concepts, entry 1: is int"),
    "concepts that are no list": refuse({"concepts.json": "{}"}, "concepts: is dict. Allowed: a list"),
    "concepts that are no JSON": refuse({"concepts.json": "["}, r"concepts\.json:1:2: not JSON"),
    "a concept that leads out": refuse(
        concepts({"path": "../images"}), r"the path '\.\./images' leads out of the folder"
    ),
    "a concept that leads far out": refuse(concepts({"path": "x/../../.."}), "leads out of the folder"),
    "a concept elsewhere": refuse(concepts({"path": "/etc"}), "there is no folder '/etc' with files"),
    "a concept of another drive": refuse(concepts({"path": "D:\\\\dogs"}), "there is no folder 'D:"),
    "an unknown type of concept": refuse(
        concepts({"path": ".", "type": "OTHER"}), "type is 'OTHER'. Allowed: STANDARD"
    ),
    "concepts of one folder": refuse(concepts({"path": "."}, {"path": "./"}), "have the same folder '.'"),
    "endless repeats": refuse(concepts({"path": ".", "balancing": 1e300}), "balancing is 1e\\+300"),
    "no repeats": refuse(concepts({"path": ".", "balancing": 0}), "balancing is 0"),
    "a flag that is text": refuse(concepts({"path": ".", "enabled": "no"}), "enabled is str. Allowed: true or false"),
    "a prompt file that leads out": refuse(
        concepts({"path": ".", "text": {"prompt_source": "concept", "prompt_path": "../secret.txt"}}),
        "leads out of the folder",
    ),
    "a prompt file that is a link": refuse(
        {
            "p.txt": outside("secret.txt", b"secret"),
            **concepts({"path": ".", "text": {"prompt_source": "concept", "prompt_path": "p.txt"}}),
        },
        "is a link that leads out of the folder",
    ),
    "concepts behind a link": refuse(
        {"concepts.json": outside("c.json", b"[]")}, "is a link that leads out of the folder"
    ),
    "a backend in a cloud": refuse(
        {"multidatabackend.json": json.dumps([{"id": "s3", "type": "aws", "instance_data_dir": "."}])},
        "type is 'aws'. Allowed: local. Fix: download its images",
    ),
    "a backend without a folder": refuse(
        {"multidatabackend.json": json.dumps([{"id": "x", "instance_data_dir": "gone"}])}, "there is no folder 'gone'"
    ),
    "ai-toolkit with a tag": refuse(
        {"ai-toolkit.yaml": "datasets: !!python/object/apply:os.system ['id']"}, r"ai-toolkit\.yaml:1:11"
    ),
    "ai-toolkit with a list": refuse({"ai-toolkit.yaml": "[1]"}, "the file contains a list"),
    "a default caption of 100,000 characters": refuse(
        {"ai-toolkit.yaml": f"datasets: [{{folder_path: ., default_caption: {'x' * 100_000}}}]"},
        "default_caption: has 100,000 characters. Allowed: 2,000 characters",
    ),
    "a prompt of a megabyte": refuse(
        {
            "p.txt": "x" * 1_000_000,
            **concepts({"path": ".", "text": {"prompt_source": "concept", "prompt_path": "p.txt"}}),
        },
        r"p\.txt: has 1,000,000 characters",
    ),
    "ai-toolkit outside": refuse({"ai-toolkit.yaml": "datasets: [{folder_path: ../x}]"}, "leads out of the folder"),
    "a layout that the folder does not have": refuse(
        {}, "layout is simpletuner, but the folder has no files", layout="simpletuner"
    ),
    "no splits": refuse({}, "layout is huggingface, but not every image is in", layout="huggingface"),
    "no kohya folders": refuse({}, "layout is kohya, but not every image is in", layout="kohya"),
    "a pattern without an image": refuse({}, "the pattern 'x/\\*' of repeats matches no image", repeats={"x/*": 2}),
    "metadata in an archive that is invalid": Case(
        {"a.tar": tar({"a.png": png(), "metadata.csv": b"x\n1\n"})},
        error="has no column of the images' names",
        is_file=True,
    ),
}
