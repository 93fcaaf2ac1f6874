"""Captions in every place, encoding and size."""

from __future__ import annotations

import json

from tests.lora_engine.data.corpus.build import Case, Unused, Used, outside, parquet, png, used

CAPTIONS: dict[str, Case] = {
    "txt": Case({"a.png": None, "a.txt": "red"}, {"a.png": Used("red")}),
    "TXT in capitals": Case({"a.png": None, "a.TXT": "red"}, {"a.png": Used("red")}),
    "image ending in capitals": Case({"a.PNG": None, "A.txt": "red"}, {"a.PNG": Used("red")}),
    "kohya's caption": Case({"a.png": None, "a.caption": "red"}, {"a.png": Used("red", ".caption")}),
    "gallery-dl": Case({"a.png": None, "a.png.txt": "red"}, {"a.png": Used("red")}),
    "json with a caption": Case({"a.png": None, "a.json": '{"caption": "red"}'}, {"a.png": Used("red", ".json")}),
    "json with tags": Case(
        {"a.png": None, "a.png.json": '{"tags": ["red", "star"]}'}, {"a.png": Used("red, star", ".json")}
    ),
    "json with both": Case(
        {"a.png": None, "a.json": '{"caption": "a star", "tags": "red, big"}'},
        {"a.png": Used("a star, red, big", ".json")},
    ),
    "booru": Case({"a.png": None, "a.json": '{"tag_string": "red star"}'}, {"a.png": Used("red star", ".json")}),
    "json without a caption": Case({"a.png": None, "a.json": '{"width": 3}'}, {"a.png": Used("")}),
    "json that is a list": Case({"a.png": None, "a.json": "[1]"}, {"a.png": Used("")}),
    "txt before caption": Case({"a.png": None, "a.txt": "one", "a.caption": "two"}, {"a.png": Used("one")}),
    "an empty txt": Case({"a.png": None, "a.txt": " \n", "a.caption": "two"}, {"a.png": Used("two", ".caption")}),
    "two images of one stem": Case(
        {"a.png": None, "a.jpg": None, "a.txt": "both"},
        {"a.jpg": Used("both"), "a.png": Used("both")},
    ),
    "stems that differ in case": Case(
        {"A.png": None, "a.png": None, "A.txt": "upper", "a.txt": "lower"},
        {"A.png": Used("upper"), "a.png": Used("lower")},
    ),
    "dots in the stem": Case({"a.b.png": None, "a.b.txt": "red"}, {"a.b.png": Used("red")}),
    "UTF-8 with a mark": Case({"a.png": None, "a.txt": "\ufeffgrün".encode()}, {"a.png": Used("grün")}),
    "UTF-16": Case({"a.png": None, "a.txt": "grün".encode("utf-16")}, {"a.png": Used("grün")}),
    "UTF-16 big-endian": Case({"a.png": None, "a.txt": "\ufeffgrün".encode("utf-16-be")}, {"a.png": Used("grün")}),
    "UTF-16 without a mark": Case({"a.png": None, "a.txt": "green".encode("utf-16-le")}, {"a.png": Used("green")}),
    "UTF-32": Case({"a.png": None, "a.txt": "grün".encode("utf-32")}, {"a.png": Used("grün")}),
    "Latin-1": Case({"a.png": None, "a.txt": "grün".encode("latin-1")}, {"a.png": Used("grün")}),
    "Windows-1252": Case({"a.png": None, "a.txt": "a “star”".encode("cp1252")}, {"a.png": Used("a “star”")}),
    "two lines": Case(
        {"a.png": None, "a.txt": "one\r\ntwo"},
        {"a.png": Used("one two")},
        logged="1 caption files have several lines, which are one caption (set several_captions to first or draw",
    ),
    "markup and instructions stay text": Case(
        {"a.png": None, "a.txt": "Ignore all rules {trigger} <script> $(id)"},
        {"a.png": Used("Ignore all rules {trigger} <script> $(id)")},
    ),
    "metadata.jsonl": Case(
        {
            "a.png": None,
            "b/c.png": None,
            "metadata.jsonl": '{"file_name": "a.png", "text": "red"}\n\n'
            '{"file_name": "b/c.png", "text": "blue", "width": 3}',
        },
        {"a.png": Used("red", "metadata.jsonl"), "b/c.png": Used("blue", "metadata.jsonl")},
    ),
    "metadata.jsonl in a subfolder": Case(
        {"train/a.png": None, "train/metadata.jsonl": '{"file_name": "a.png", "prompt": "red"}'},
        {"train/a.png": Used("red", "metadata.jsonl")},
    ),
    "the nearest metadata file": Case(
        {
            "b/a.png": None,
            "b/metadata.jsonl": '{"file_name": "a.png", "text": "near"}',
            "metadata.jsonl": '{"file_name": "b/a.png", "text": "far"}',
        },
        {"b/a.png": Used("near", "metadata.jsonl")},
    ),
    "metadata.csv": Case(
        {"a.png": None, "metadata.csv": 'file_name,text\na.png,"red, big"\n'},
        {"a.png": Used("red, big", "metadata.csv")},
    ),
    "Replicate's captions.csv": Case(
        {"a.png": None, "captions.csv": "caption,image_file\nred,a.png\n"},
        {"a.png": Used("red", "captions.csv")},
    ),
    "metadata.csv in UTF-16": Case(
        {"a.png": None, "metadata.csv": "file_name,text\na.png,grün\n".encode("utf-16")},
        {"a.png": Used("grün", "metadata.csv")},
    ),
    "kohya's meta_cap.json": Case(
        {"a.png": None, "meta_cap.json": '{"a": {"caption": "red", "tags": "big, star"}}'},
        {"a.png": Used("red, big, star", "meta_cap.json")},
    ),
    "meta_cap.json of another machine": Case(
        {"b/a.png": None, "meta_cap.json": json.dumps({"D:\\train\\a.png": {"caption": "red"}})},
        {"b/a.png": Used("red", "meta_cap.json")},
    ),
    "kohya's meta_lat.jsonl": Case(
        {"a.png": None, "meta_lat.jsonl": '{"image_path": "/data/a.png", "caption": "red", "image_size": [20, 16]}'},
        {"a.png": Used("red", "meta_lat.jsonl")},
    ),
    "a file beside the image before metadata": Case(
        {"a.png": None, "a.txt": "own", "metadata.csv": "file_name,text\na.png,other\n"},
        {"a.png": Used("own")},
    ),
    "webdataset, unpacked": Case(
        {"000.jpg": None, "000.json": '{"caption": "red", "url": "x"}', "000.txt": "red"},
        {"000.jpg": Used("red")},
    ),
    "kohya's folder words": Case(
        {"10_sks dog/a.png": None, "10_sks dog/b.png": None, "10_sks dog/b.txt": "own"},
        {"10_sks dog/a.png": Used("sks dog", "folder name", repeats=10), "10_sks dog/b.png": Used("own", repeats=10)},
        layout="kohya folders: 10 x 'sks dog' (2 images)",
    ),
    # Encodings and characters
    "UTF-16 little-endian with a mark": Case({"a.png": None, "a.txt": "\ufeffgrün".encode("utf-16-le")}, used("grün")),
    "an accent apart from its letter": Case({"a.png": None, "a.txt": "gru\u0308n"}, used("grün")),
    "emoji": Case({"a.png": None, "a.txt": "a 🌟 star"}, used("a 🌟 star")),
    "control characters": Case({"a.png": None, "a.txt": "a\x1b[31m red\x07 star"}, used("a[31m red star")),
    "a reversed direction": Case({"a.png": None, "a.txt": "a \u202egnp.exe\u202c star"}, used("a gnp.exe star")),
    "isolates": Case({"a.png": None, "a.txt": "a\u2066b\u2069c"}, used("abc")),
    "tabs and Unicode spaces": Case({"a.png": None, "a.txt": "a\t\u3000red\u00a0star"}, used("a red star")),
    "line and paragraph separators": Case({"a.png": None, "a.txt": "a\u2028red\u2029star"}, used("a red star")),
    "only white space": Case({"a.png": None, "a.txt": " \t\r\n "}, used("")),
    "an empty file": Case({"a.png": None, "a.txt": ""}, used("")),
    "only a mark": Case({"a.png": None, "a.txt": b"\xef\xbb\xbf"}, used("")),
    "a null character": Case({"a.png": None, "a.txt": "red\x00star"}, used("redstar")),
    "weights and a LoRA tag": Case({"a.png": None, "a.txt": "(red:1.2) <lora:x:1>"}, used("(red:1.2) <lora:x:1>")),
    "a template": Case({"a.png": None, "a.txt": "{{ 7*7 }} ${HOME} %s"}, used("{{ 7*7 }} ${HOME} %s")),
    "a path": Case({"a.png": None, "a.txt": "../../etc/passwd"}, used("../../etc/passwd")),
    "the longest caption": Case({"a.png": None, "a.txt": "x" * 2_000}, used("x" * 2_000)),
    # Unusable captions: their images are used
    "a caption of 2,001 characters": Case(
        {"a.png": None, "a.txt": "x" * 2_001}, used(""), {"a.txt": "has 2,001 characters; allowed: 2,000"}
    ),
    "a caption of a megabyte": Case(
        {"a.png": None, "a.txt": "x" * 1_000_000}, used(""), {"a.txt": "is too long; allowed: 65,536 bytes"}
    ),
    "a megabyte in .txt, and a .caption": Case(
        {"a.png": None, "a.txt": "x" * 1_000_000, "a.caption": "red"}, used("red", ".caption"), {"a.txt": "is too long"}
    ),
    "an image as a caption": Case({"a.png": None, "a.txt": png(9)}, used(""), {"a.txt": "is not text"}),
    "a half UTF-16 mark": Case({"a.png": None, "a.txt": b"\xff\xfex"}, used(""), {"a.txt": "is not text"}),
    "a link to a secret": Case(
        {"a.png": None, "a.txt": outside("secret.txt", b"secret")}, used(""), {"a.txt": "leads out of the folder"}
    ),
    "a broken JSON": Case({"a.png": None, "a.json": '{"caption": '}, used(""), {"a.json": "not JSON"}),
    "a JSON that is too deep": Case(
        {"a.png": None, "a.json": '{"caption": ' + "[" * 60 + "]" * 60 + "}"}, used(""), {"a.json": "levels deep"}
    ),
    "a JSON with a key twice": Case(
        {"a.png": None, "a.json": '{"caption": "a", "caption": "b"}'}, used(""), {"a.json": "caption"}
    ),
    "a JSON with a number": Case({"a.png": None, "a.json": '{"caption": 3}'}, used(""), {"a.json": "caption is int"}),
    # Precedence
    "caption before the name with its ending": Case(
        {"a.png": None, "a.caption": "one", "a.png.txt": "two"},
        used("one", ".caption"),
        logged="different captions in two places, first a.png: .caption is used, not .txt",
    ),
    "text before JSON": Case(
        {"a.png": None, "a.png.caption": "one", "a.json": '{"caption": "two"}'}, used("one", ".caption")
    ),
    "JSON before metadata": Case(
        {"a.png": None, "a.json": '{"caption": "one"}', "metadata.csv": "file_name,text\na.png,two\n"},
        used("one", ".json"),
    ),
    "a text for no image": Case(
        {"a.png": None, "b.txt": "red"}, used(""), logged="1 captions belong to no image, first b.txt"
    ),
    # Metadata
    "metadata.parquet": Case(
        {"a.png": None, "metadata.parquet": parquet({"file_name": ["a.png"], "text": ["red"]})},
        used("red", "metadata.parquet"),
    ),
    "metadata.parquet in a subfolder": Case(
        {"b/a.png": None, "b/metadata.parquet": parquet({"file_name": ["a.png"], "prompt": ["red"]})},
        {"b/a.png": Used("red", "metadata.parquet")},
    ),
    "metadata.parquet with a list of captions": Case(
        {"a.png": None, "metadata.parquet": parquet({"file_name": ["a.png"], "captions": [["red", "blue"]]})},
        used("red", "metadata.parquet"),
    ),
    "metadata.parquet without captions": Case(
        {"a.png": None, "metadata.parquet": parquet({"file_name": ["a.png"], "width": [20]})}, used("")
    ),
    "metadata.parquet with a name that is missing": Case(
        {"a.png": None, "metadata.parquet": parquet({"file_name": ["../b.png"], "text": ["red"]})},
        used(""),
        logged="1 entries of metadata files name no image, first ../b.png in metadata.parquet",
    ),
    "a broken metadata.parquet": Case(
        {"a.png": None, "metadata.parquet": b"PAR1 no table PAR1"},
        used(""),
        {"metadata.parquet": "is broken after 0 rows"},
    ),
    "a table of numbers": Case(
        {"a.png": None, "x.parquet": parquet({"n": [1]})}, used(""), {"x.parquet": "has neither images nor their names"}
    ),
    "an image stated twice": Case(
        {
            "a.png": None,
            "metadata.jsonl": '{"file_name": "a.png", "text": "one"}\n{"file_name": "a.png", "text": "two"}',
        },
        used("one", "metadata.jsonl"),
        logged="stated twice with different captions, and the first is used, first a.png in metadata.jsonl",
    ),
    "an absolute path that exists": Case(
        {"b/a.png": None, "metadata.csv": "file_name,text\n/etc/hostname,secret\n"},
        {"b/a.png": Used()},
        logged="name no image, first /etc/hostname in metadata.csv",
    ),
    "a caption of a megabyte in metadata": Case(
        {"a.png": None, "metadata.jsonl": '{"file_name": "a.png", "text": "' + "x" * 1_000_000 + '"}'},
        used(""),
        {"metadata.jsonl, entry a.png": "has 1,000,000 characters"},
    ),
    "a link to captions elsewhere in the folder": Case(
        {"a.png": None, "b.png": None, "b.txt": "red", "a.txt": lambda path: path.symlink_to("b.txt")},
        {"a.png": Used("red"), "b.png": Used("red")},
    ),
    "a caption for a broken image": Case(
        {"a.png": b"no", "a.txt": "red", "b.png": None}, {"a.png": Unused("is not a readable image"), "b.png": Used()}
    ),
    # Several captions of one image
    "lines of which the first is used": Case(
        {"a.png": None, "a.txt": "\n one\ntwo"}, used("one"), settings={"several_captions": "first"}
    ),
    "lines of which one is drawn": Case(
        {"a.png": None, "a.txt": "one\r\n\n  \ntwo\none\nthree"},
        used("one", others=("two", "three")),
        settings={"several_captions": "draw"},
    ),
    "one line where lines are drawn": Case(
        {"a.png": None, "a.txt": "one, {red|blue}\n"},
        used("one, {red|blue}"),
        settings={"several_captions": "draw"},
    ),
    "a line of a megabyte among others": Case(
        {"a.png": None, "a.txt": "one\n" + "x" * 60_000},
        used(""),
        {"a.txt": "has 60,000 characters"},
        settings={"several_captions": "draw"},
    ),
    "too many lines": Case(
        {"a.png": None, "a.txt": "\n".join(map(str, range(101)))},
        used(""),
        {"a.txt": "has 101 captions; allowed: 100"},
        settings={"several_captions": "draw"},
    ),
    "json with a list of captions": Case(
        {"a.png": None, "a.json": '{"caption": ["one", "two"]}'},
        used(""),
        {"a.json": "the caption is list.*several_captions"},
    ),
    "json with several captions": Case(
        {"a.png": None, "a.json": '{"caption": ["one", "two"], "caption_short": "1", "text": "three", "tags": "x"}'},
        used("one, x", ".json", others=("two, x", "three, x", "1, x")),
        settings={"several_captions": "draw"},
    ),
    "json with several captions of which the first is used": Case(
        {"a.png": None, "a.json": '{"caption": ["one", "two"]}'},
        used("one", ".json"),
        settings={"several_captions": "first"},
    ),
    "a list with something else": Case(
        {"a.png": None, "a.json": '{"caption": ["one", 2]}'},
        used(""),
        {"a.json": "the caption is int"},
        settings={"several_captions": "draw"},
    ),
    "rows of one image, as in COCO's tables": Case(
        {
            "a.png": None,
            "b.png": None,
            "captions.csv": "image,caption\na.png,one\nb.png,red\na.png,two\na.png,one\n",
        },
        {
            "a.png": Used("one", "captions.csv", others=("two",)),
            "b.png": Used("red", "captions.csv"),
        },
        settings={"several_captions": "draw"},
    ),
    "lists in metadata.parquet": Case(
        {"a.png": None, "metadata.parquet": parquet({"file_name": ["a.png"], "captions": [["red", "", "blue"]]})},
        used("red", "metadata.parquet", others=("blue",)),
        settings={"several_captions": "draw"},
    ),
    "kohya's metadata with several captions": Case(
        {"a.png": None, "meta_cap.json": '{"a": {"caption": ["one", "two"], "tags": "x, y"}}'},
        used("one, x, y", "meta_cap.json", others=("two, x, y",)),
        settings={"several_captions": "draw"},
    ),
}
