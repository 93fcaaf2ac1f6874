"""Folders as other programs lay them out."""

from __future__ import annotations

import json
from typing import Any

from tests.lora_engine.data.conftest import make_image
from tests.lora_engine.data.corpus.build import Case, Files, Skipped, Unused, Used, arrow, encode, parquet, png, shard


def concepts(*entries: dict[str, Any]) -> Files:
    return {"concepts.json": json.dumps(entries)}


def backends(*entries: dict[str, Any]) -> Files:
    return {"multidatabackend.json": json.dumps(entries)}


def _recompressed(seed: int) -> bytes:
    return encode(make_image(40, 40, seed), "JPEG", quality=90)


_ROWS = [{"bytes": png(1), "path": "x/cat.jpg"}, {"bytes": None, "path": None}, {"bytes": b"no", "path": "b.png"}]
LAYOUTS: dict[str, Case] = {
    # kohya
    "kohya folders and class images": Case(
        {"10_sks dog/a.png": None, "1_dog/a.png": None},
        {
            "10_sks dog/a.png": Used("sks dog", "folder name", repeats=10),
            "1_dog/a.png": Used("dog", "folder name", "class"),
        },
        layout="kohya folders: 10 x 'sks dog' (1 image), 1 x 'dog' as class images (1 image)",
    ),
    "kohya folders below reg": Case(
        {"img/2_x/a.png": None, "reg/1_y/a.png": None},
        {"img/2_x/a.png": Used("x", "folder name", repeats=2), "reg/1_y/a.png": Used("y", "folder name", "class")},
        layout="kohya folders: 2 x 'x' (1 image), 1 x 'y' as class images (1 image)",
    ),
    "kohya folders without meaning": Case({"10_x/a.png": None}, {"10_x/a.png": Used()}, settings={"layout": "plain"}),
    "a folder without a number": Case({"10_x/a.png": None, "x/a.png": None}, {"10_x/a.png": Used(), "x/a.png": Used()}),
    # Hugging Face
    "splits of an imagefolder": Case(
        {
            "train/a.png": None,
            "train/metadata.jsonl": '{"file_name": "a.png", "text": "red"}',
            "test/b.png": None,
            "validation/c.png": None,
        },
        {
            "train/a.png": Used("red", "metadata.jsonl"),
            "test/b.png": Used(split="heldout"),
            "validation/c.png": Used(split="heldout"),
        },
        layout="Hugging Face splits: 1 test, 1 train, 1 validation",
    ),
    "a held-out image that is one of those for training": Case(
        {"train/a.png": png(1, 40, 40), "train/b.png": png(2, 40, 40), "test/c.jpg": _recompressed(1)},
        {"train/a.png": Used(), "train/b.png": Used(), "test/c.jpg": Used(split="heldout")},
        layout="Hugging Face splits: 1 test, 2 train",
        logged="1 held-out images of the folder show nearly the same as others, first test/c.jpg and train/a.png",
    ),
    "a train folder alone": Case({"train/a.png": None}, {"train/a.png": Used()}),
    "a test folder beside other images": Case(
        {"a.png": None, "test/b.png": None}, {"a.png": Used(), "test/b.png": Used()}
    ),
    "splits without meaning": Case(
        {"train/a.png": None, "test/b.png": None},
        {"train/a.png": Used(), "test/b.png": Used()},
        settings={"layout": "plain"},
    ),
    "Parquet shards with splits": Case(
        {
            "README.md": "---",
            "data/train-00000-of-00002.parquet": shard(2, 0, text=["red", "blue"]),
            "data/train-00001-of-00002.parquet": shard(1, 5, text=["green"]),
            "data/test-00000-of-00001.parquet": shard(1, 9, text=["black"]),
        },
        {
            "data/train-00000-of-00002.parquet/0000000.png": Used("red", ".parquet"),
            "data/train-00000-of-00002.parquet/0000001.png": Used("blue", ".parquet"),
            "data/train-00001-of-00002.parquet/0000000.png": Used("green", ".parquet"),
            "data/test-00000-of-00001.parquet/0000000.png": Used("black", ".parquet", "heldout"),
        },
        layout="Hugging Face splits: 1 test, 3 train; archives: 3 parquet (4 images)",
    ),
    "one Parquet file": Case(
        {"x.parquet": shard(1, text=["red"])},
        {"0000000.png": Used("red", ".parquet")},
        layout="archives: 1 parquet (1 image)",
        is_file=True,
    ),
    "a Parquet file with odd rows": Case(
        {"x.parquet": parquet({"image": _ROWS, "caption": ["red", "x", None]})},
        {
            "x.parquet/0000000.jpg": Used("red", ".parquet"),
            "x.parquet/row 1": Unused("has no image"),
            "x.parquet/0000002.png": Unused("is not a readable image"),
        },
        layout="archives: 1 parquet (1 image)",
    ),
    "a table of save_to_disk": Case(
        {"state.json": "{}", "data-00000-of-00001.arrow": arrow({"image": _ROWS[:1], "text": ["red"]})},
        {"data-00000-of-00001.arrow/0000000.jpg": Used("red", ".arrow")},
        layout="archives: 1 arrow (1 image)",
    ),
    "a table that names images": Case(
        {"a.png": None, "names.parquet": parquet({"image_path": ["a.png"], "caption": ["red"]})},
        {"a.png": Used("red", ".parquet")},
    ),
    # OneTrainer
    "concepts": Case(
        {
            "dog/a.png": None,
            "dog/a.txt": "one\ntwo",
            "dog/deep/b.png": None,
            "val/c.png": None,
            "reg/d.png": None,
            "off/e.png": None,
            "f.png": None,
            **concepts(
                {"name": "sks dog", "path": "dog", "balancing": 3},
                {"path": "val", "type": "VALIDATION"},
                {"path": "/data/set/reg", "type": "PRIOR_PREDICTION"},
                {"path": "off", "enabled": False},
            ),
        },
        {
            "dog/a.png": Used("one", repeats=3),
            "dog/deep/b.png": Skipped("is in no folder of concepts.json"),
            "val/c.png": Used(split="heldout"),
            "reg/d.png": Used(split="class"),
            "off/e.png": Skipped("the concept 'off' is disabled"),
            "f.png": Skipped("is in no folder of concepts.json"),
        },
        layout="OneTrainer concepts: 3 x 'sks dog' (1 image), 1 x 'val' held out (1 image), 1 x 'reg' as class images "
        "(1 image); 1 captions have alternatives, and their first line is used",
    ),
    "concepts whose lines are drawn": Case(
        {
            "dog/a.png": None,
            "dog/a.txt": "one\ntwo",
            "cat/b.png": None,
            "cat.txt": "red\nblue\n",
            **concepts(
                {"name": "d", "path": "dog"},
                {"name": "c", "path": "cat", "text": {"prompt_source": "concept", "prompt_path": "cat.txt"}},
            ),
        },
        {
            "dog/a.png": Used("one", others=("two",)),
            "cat/b.png": Used("red", "dataset file", others=("blue",)),
        },
        layout="OneTrainer concepts: 1 x 'd' (1 image), 1 x 'c' (1 image)",
        settings={"several_captions": "draw"},
    ),
    "concepts with subfolders": Case(
        {"x/a.png": None, "x/y/b.png": None, **concepts({"path": "x", "include_subdirectories": True})},
        {"x/a.png": Used(), "x/y/b.png": Used()},
        layout="OneTrainer concepts: 1 x 'x' (2 images)",
    ),
    "a nearer concept": Case(
        {
            "x/a.png": None,
            "x/y/b.png": None,
            **concepts({"path": "x", "include_subdirectories": True}, {"path": "x/y", "balancing": 2}),
        },
        {"x/a.png": Used(), "x/y/b.png": Used(repeats=2)},
        layout="OneTrainer concepts: 1 x 'x' (1 image), 2 x 'y' (1 image)",
    ),
    "a concept of Windows": Case(
        {"dog/a.png": None, **concepts({"path": "D:\\sets\\dog"})},
        {"dog/a.png": Used()},
        layout="OneTrainer concepts: 1 x 'dog' (1 image)",
    ),
    "concepts with names of files": Case(
        {"x/red_big star.png": None, **concepts({"path": "x", "text": {"prompt_source": "filename"}})},
        {"x/red_big star.png": Used("red big star", "file name")},
        layout="OneTrainer concepts: 1 x 'x' (1 image)",
    ),
    "concepts with a file of prompts": Case(
        {
            "x/a.png": None,
            "p.txt": "\nred\nblue",
            **concepts({"path": "x", "text": {"prompt_source": "concept", "prompt_path": "p.txt"}}),
        },
        {"x/a.png": Used("red", "dataset file")},
        layout="OneTrainer concepts: 1 x 'x' (1 image)",
    ),
    "concepts with samples": Case(
        {"x/a.png": None, "x/b.png": None, **concepts({"path": "x", "balancing": 6, "balancing_strategy": "SAMPLES"})},
        {"x/a.png": Used(repeats=3), "x/b.png": Used(repeats=3)},
        layout="OneTrainer concepts: 6 of 'x' (2 images)",
    ),
    "concepts with half repeats": Case(
        {"x/a.png": None, **concepts({"path": "x", "balancing": 2.5, "loss_weight": 0.5})},
        {"x/a.png": Used(repeats=2)},
        layout="OneTrainer concepts: 2 x 'x' (1 image); 'x' has 2.5 repeats, and 2 are used; "
        "the loss weight of 'x' is not used",
        logged="the loss weight of 'x' is not used",
    ),
    "a disabled concept that is gone": Case(
        {"x/a.png": None, **concepts({"path": "x"}, {"path": "/gone", "enabled": False})},
        {"x/a.png": Used()},
        layout="OneTrainer concepts: 1 x 'x' (1 image)",
    ),
    "concepts with masks": Case(
        {"x/a.png": None, "x/a-masklabel.png": None, **concepts({"path": "x"})},
        {"x/a.png": Used(has_mask=True)},
        layout="OneTrainer concepts: 1 x 'x' (1 image)",
    ),
    "concepts without meaning": Case(
        {"x/a.png": None, "b.png": None, **concepts({"path": "/gone"})},
        {"x/a.png": Used(), "b.png": Used()},
        settings={"layout": "plain"},
    ),
    # ai-toolkit
    "ai-toolkit datasets": Case(
        {
            "dog/a.png": None,
            "dog/a.txt": "[trigger] on\ngrass",
            "dog/b.png": None,
            "masks_of_dog/a.png": None,
            "reg/c.png": None,
            "ai-toolkit.yaml": "job: extension\nconfig:\n  process:\n  - trigger_word: sks\n    datasets:\n"
            "    - {folder_path: /train/dog, num_repeats: 4, default_caption: 'a [trigger] dog', caption_ext: txt, "
            "mask_path: masks_of_dog}\n    - {folder_path: reg, is_reg: true}\n",
        },
        {
            "dog/a.png": Used("sks on grass", repeats=4, has_mask=True),
            "dog/b.png": Used("a sks dog", "dataset file", repeats=4),
            "reg/c.png": Used(split="class"),
        },
        layout="ai-toolkit datasets: 4 x 'dog' (2 images), 1 x 'reg' as class images (1 image)",
    ),
    "ai-toolkit under another name": Case(
        {"x/a.png": None, "job.yaml": "datasets: [{dataset_path: x, caption_ext: tags}]"},
        {"x/a.png": Used()},
        layout="ai-toolkit datasets: 1 x 'x' (1 image); captions in '.tags' files of 'x' are not read",
        settings={"layout": "ai-toolkit"},
    ),
    "a trigger that makes a caption too long": Case(
        {
            "x/a.png": None,
            "x/a.txt": "[trigger]" * 200,
            "ai-toolkit.yaml": "datasets: [{folder_path: x, trigger_word: sixteenletters--}]",
        },
        {"x/a.png": Used("sixteenletters--" * 125)},
        {"x/a.png, its caption": "is cut after 2,000 characters"},
        layout="ai-toolkit datasets: 1 x 'x' (1 image)",
    ),
    # SimpleTuner
    "SimpleTuner backends": Case(
        {
            "dog/a.png": None,
            "dog/a.txt": "one\ntwo",
            "names/red_star.png": None,
            "prompt/b.png": None,
            "eval/c.png": None,
            "reg/d.png": None,
            "off/e.png": None,
            "masks_of_dog/a.png": None,
            **backends(
                {"id": "dog", "instance_data_dir": "dog", "repeats": 2, "conditioning_data": "m"},
                {"id": "n", "instance_data_dir": "names", "caption_strategy": "filename"},
                {
                    "id": "p",
                    "instance_data_dir": "prompt",
                    "caption_strategy": "instanceprompt",
                    "instance_prompt": "sks",
                },
                {"id": "e", "instance_data_dir": "eval", "dataset_type": "eval"},
                {"id": "r", "instance_data_dir": "reg", "is_regularisation_data": True},
                {"id": "o", "instance_data_dir": "off", "disabled": True},
                {
                    "id": "m",
                    "instance_data_dir": "masks_of_dog",
                    "dataset_type": "conditioning",
                    "conditioning_type": "mask",
                },
                {"id": "t", "dataset_type": "text_embeds", "cache_dir": "cache"},
            ),
        },
        {
            "dog/a.png": Used("one", repeats=3, has_mask=True),
            "names/red_star.png": Used("red star", "file name"),
            "prompt/b.png": Used("sks", "dataset file"),
            "eval/c.png": Used(split="heldout"),
            "reg/d.png": Used(split="class"),
            "off/e.png": Skipped("the backend 'o' is disabled"),
        },
        layout="SimpleTuner backends: 3 x 'dog' (1 image), 1 x 'n' (1 image), 1 x 'p' (1 image), 1 x 'e' held out "
        "(1 image), 1 x 'r' as class images (1 image); 1 captions have alternatives, and their first line is used",
    ),
    "SimpleTuner conditioning images": Case(
        {
            "x/a.png": None,
            "edges/a.png": None,
            **backends(
                {"id": "x", "instance_data_dir": "x", "probability": 0.5},
                {"id": "c", "instance_data_dir": "edges", "dataset_type": "conditioning"},
            ),
        },
        {"x/a.png": Used(), "edges/a.png": Skipped("the backend 'c' has conditioning")},
        layout="SimpleTuner backends: 1 x 'x' (1 image); the probability of 'x' is not used",
    ),
    # Repeats
    "stated repeats before those of a file": Case(
        {"x/a.png": None, **concepts({"path": "x", "balancing": 3})},
        {"x/a.png": Used(repeats=7)},
        layout="OneTrainer concepts: 3 x 'x' (1 image)",
        settings={"repeats": {"x/*": 7}},
    ),
}
