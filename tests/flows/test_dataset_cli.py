"""The verb `dataset`, and a run on kohya's folders."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file

from lora_engine.bases.tiny import folder
from lora_engine.data.images import encode_png, open_image
from lora_engine.data.manifest import Manifest
from lora_engine.data.pixels import to_pixels
from lora_engine.embedding.embedder import load_embedder
from lora_engine.inference.content_credentials import Credentials
from lora_engine.inference.image_files import ImageOptions, encode_image
from registry.entities import ArtifactRef
from registry.home import Home
from registry.store.artifacts import open_store
from tests.flows.commands import loraline_here, say
from tests.flows.shared import draw_noise
from tests.lora_engine.data.corpus.build import build, png, tar, zipped
from tests.lora_engine.inference.drawings import make_drawing, make_image
from tests.support.certificates import write_signer

KOHYA = """\
name: dog
base: tiny
seed: 7
steps:
  photos:   {uses: ingest, images: images/}
  prepared: {uses: preprocess, dataset: photos, resolution: 32}
  captions: {uses: caption, dataset: prepared, trigger: sks, class_word: dog}
"""


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for seed, name in enumerate(("10_sks dog/a.png", "10_sks dog/b.png", "1_dog/c.png", "1_dog/d.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_noise(folder / name, seed)
    (folder / "10_sks dog" / "a.caption").write_text("sks dog on grass")
    return folder


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    folder = tmp_path / "odd <b>"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (200, 220, 3), dtype=np.uint8)
    detailed = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(0.5))
    detailed.save(folder / "good.png")
    detailed.resize((110, 100)).save(folder / "half.png")
    Image.fromarray(noise[:10, :11]).resize((220, 200), Image.Resampling.BICUBIC).save(folder / "blurred.png")
    Image.new("RGB", (200, 200), (3, 3, 3)).save(folder / "black.png")
    (folder / "broken.png").write_bytes(encode_png(detailed)[:90])
    (folder / "good.txt").write_text("<script>alert(1)</script>")
    return folder


def test_the_dataset_of_a_folder_is_shown_before_any_training(kohya: Path, tmp_path: Path) -> None:
    shown = say("dataset", kohya, home=tmp_path / "home")
    assert shown.splitlines()[0] == (
        "dataset  2 images, captions: 1 .caption, 1 folder name; 2 class images; "
        "kohya folders: 10 x 'sks dog' (2 images), 1 x 'dog' as class images (2 images)"
    )
    assert "advice   2 images are few" in shown
    assert not (tmp_path / "home").exists()


def test_flaws_twins_and_unusable_files_are_named(odd: Path, tmp_path: Path) -> None:
    facts = json.loads(say("dataset", odd, "--resolution", 128, "--json", home=tmp_path / "home"))
    assert facts["flaws"] == {
        "black.png": ["nearly of one color", "very dark"],
        "blurred.png": ["blurred"],
        "half.png": ["smaller than 128 pixels"],
    }
    assert facts["alike"] == [["good.png", "half.png"]]
    assert [item["source"] for item in facts["quarantined"]] == ["broken.png"]
    assert [image["caption"] for image in facts["images"] if image["source"] == "good.png"] == [
        "<script>alert(1)</script>"
    ]
    assert facts["advice"][:3] == [
        "4 images are few: a concept needs about 10 to 30 different ones",
        "3 of 4 images have no caption: the template of the caption step is used",
        "1 images show nearly the same as another: they count more than the others",
    ]
    assert facts["advice"][3:] == [
        "keep good.png, which has a caption, and remove half.png",
        "1 images: nearly of one color, first black.png; remove them",
        "1 images: very dark, first black.png; brighten or remove them",
        "1 images: blurred, first blurred.png; replace them by sharp ones, or remove them",
        "1 images: smaller than 128 pixels, first half.png; "
        "replace them by larger ones, or train at a lower resolution",
    ]
    assert facts["duplicates"] == [
        {"keep": "good.png", "others": ["half.png"], "captions": ["<script>alert(1)</script>"]}
    ]


def test_the_contact_sheet_shows_every_image_and_runs_nothing(odd: Path, tmp_path: Path) -> None:
    page = tmp_path / "sheet.html"
    assert str(page) in say("dataset", odd, "-o", page, home=tmp_path / "home")
    text = page.read_text()
    assert text.count("<img ") == 4
    assert "<script" not in text
    assert "odd &lt;b&gt;" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert re.findall(r'(?:src|href)="(?!data:image/)', text) == []
    assert "broken.png" in text.split("Not used")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "comfy"], "layout: Input should be 'auto', 'plain', 'kohya', 'huggingface', 'onetrainer',"),
        (["--layout", "onetrainer"], "layout is onetrainer, but the folder has no files that may describe it"),
        (["--layout", "kohya"], "not every image is in a folder such as '10_sks dog'"),
        (["--heldout", "2"], "heldout: Input should be less than or equal to 0.9, not 2.0"),
    ],
)
def test_a_wrong_setting_is_refused(odd: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    page = tmp_path / "sheet.html"
    run = loraline_here("dataset", odd, "-o", page, *arguments, home=tmp_path / "home")
    assert run.returncode == 1
    assert message in run.stderr
    assert not page.exists()


CONCEPTS = [{"name": "sks dog", "path": "dog", "balancing": 4}, {"path": "cat", "enabled": False}]


@pytest.mark.parametrize("name", ["set.zip", "set.tar", "set"])
def test_archives_and_dataset_files_are_shown(tmp_path: Path, name: str) -> None:
    files = {
        "dog/a.png": png(1),
        "dog/a.txt": b"one\ntwo",
        "cat/b.png": png(2),
        "concepts.json": json.dumps(CONCEPTS).encode(),
    }
    images = tmp_path / name
    if name == "set":
        build(images, files)
    else:
        images.write_bytes(zipped(files) if name.endswith("zip") else tar(files))
    layout = "OneTrainer concepts: 4 x 'sks dog' (1 image); 1 captions have alternatives, and their first line is used"
    archive = f"; archives: 1 {name[4:]} (1 image)" if name != "set" else ""
    shown = say("dataset", images, home=tmp_path / "home").splitlines()
    assert shown[0] == f"dataset  1 images, captions: 1 .txt; 1 skipped; {layout}{archive}"
    assert "skipped  1 images: the concept 'cat' is disabled" in shown
    facts = json.loads(say("dataset", images, "--layout", "onetrainer", "--json", home=tmp_path / "home"))
    assert [image["repeats"] for image in facts["images"]] == [4]
    assert facts["skipped"] == {"the concept 'cat' is disabled": 1}


@pytest.mark.usefixtures("prefect_server")
def test_a_run_reads_an_archive_and_keeps_its_result(tmp_path: Path) -> None:
    (tmp_path / "images.tar").write_bytes(tar({"a.png": png(1, 40, 40), "b.png": png(2, 40, 40), "a.txt": b"red"}))
    spec = tmp_path / "dog.yaml"
    spec.write_text(KOHYA.replace("images/", "images.tar"))
    first = json.loads(say("run", spec, "--json", home=tmp_path / "home"))["outcomes"]
    again = json.loads(say("run", spec, "--json", home=tmp_path / "home"))["outcomes"]
    assert [outcome["ref"] for outcome in first.values()] == [outcome["ref"] for outcome in again.values()]
    assert {outcome["cached"] for outcome in again.values()} == {True}
    (tmp_path / "images.tar").write_bytes(tar({"a.png": png(3, 40, 40)}))
    changed = json.loads(say("run", spec, "--json", home=tmp_path / "home"))["outcomes"]
    assert changed["photos"]["ref"] != first["photos"]["ref"]
    spec.write_text(KOHYA.replace("images/", "gone.tar"))
    refused = loraline_here("run", spec, home=tmp_path / "home")
    assert "photos.images is 'gone.tar', which does not exist. Allowed: a folder or archive" in refused.stderr


def test_of_duplicates_the_one_with_a_caption_wins_and_differing_captions_are_named(odd: Path, tmp_path: Path) -> None:
    (odd / "good.txt").unlink()
    (odd / "half.txt").write_text("a half")
    facts = json.loads(say("dataset", odd, "--json", home=tmp_path / "home"))
    assert "keep half.png, which has a caption, and remove good.png" in facts["advice"]
    (odd / "good.txt").write_text("a whole")
    page = tmp_path / "sheet.html"
    facts = json.loads(say("dataset", odd, "-o", page, "--json", home=tmp_path / "home"))
    differing = "keep good.png, which has a caption, and remove half.png; their captions differ: 'a whole' and 'a half'"
    assert differing in facts["advice"]
    assert html.escape(differing, quote=True).replace("&#x27;", "&#39;") in page.read_text()


def write_head(path: Path, *shapes: tuple[int, int]) -> Path:
    weights = {}
    generator = torch.Generator().manual_seed(0)
    for number, (inner, outer) in enumerate(shapes):
        weights[f"layers.{2 * number}.weight"] = torch.randn(outer, inner, generator=generator)
        weights[f"layers.{2 * number}.bias"] = torch.randn(outer, generator=generator)
    path.parent.mkdir(exist_ok=True)
    torch.save(weights, path) if path.suffix == ".pth" else save_file(weights, path)
    return path


@pytest.mark.parametrize("name", ["head.safetensors", "head.pth"])
def test_images_are_rated_by_a_head_on_a_clip(odd: Path, tmp_path: Path, name: str) -> None:
    clip = folder() / "clip"
    width = load_embedder().embed_texts([""]).shape[1]
    head = write_head(tmp_path / "head" / name, (width, 16), (16, 1))
    page = tmp_path / "sheet.html"
    arguments = ("dataset", odd, "--clip", clip, "--aesthetic", head.parent, "-o", page)
    ratings = json.loads(say(*arguments, "--json", home=tmp_path / "home"))["ratings"]
    assert set(ratings) == {"good.png", "half.png", "blurred.png", "black.png"}
    assert len({*ratings.values()}) == 4
    assert f"rating {ratings['good.png']:.1f}" in page.read_text()
    tensors = torch.load(head, weights_only=True) if name.endswith("pth") else load_file(head)
    vector = load_embedder().embed_images(to_pixels(open_image(odd / "good.png"))[None])
    hidden = vector @ tensors["layers.0.weight"].T + tensors["layers.0.bias"]
    expected = float((hidden @ tensors["layers.2.weight"].T + tensors["layers.2.bias"])[0, 0])
    assert ratings["good.png"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(7, 1)], "the head has 7 to 1"),
        ([(256, 4)], "linear layers from"),
        ([], "the head has no layer"),
    ],
)
def test_a_head_of_another_clip_is_refused(
    odd: Path, tmp_path: Path, shapes: list[tuple[int, int]], message: str
) -> None:
    head = write_head(tmp_path / "head.safetensors", *shapes)
    run = loraline_here("dataset", odd, "--clip", folder() / "clip", "--aesthetic", head, home=tmp_path / "home")
    assert run.returncode == 1
    assert message in run.stderr
    alone = loraline_here("dataset", odd, "--aesthetic", head, home=tmp_path / "home")
    assert "give its folder as --clip" in alone.stderr


def test_class_images_that_preserve_nothing_are_shown(kohya: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(kohya / "1_dog" / "e.png")
    facts = json.loads(say("dataset", kohya, "--clip", folder() / "clip", "--json", home=tmp_path / "home"))
    odd = [line for line in facts["advice"] if "class images" in line]
    assert odd[0].startswith("1 of 3 class images are nearly of one color or very dark, first 1_dog/e.png")


@pytest.mark.usefixtures("prefect_server")
def test_a_run_keeps_trigger_and_template_from_class_images(kohya: Path, tmp_path: Path) -> None:
    spec = kohya.parent / "dog.yaml"
    spec.write_text(KOHYA)
    outcomes = json.loads(say("run", spec, "--json", home=tmp_path / "home"))["outcomes"]
    store = open_store(Home.open(tmp_path / "home"))
    captions = ArtifactRef(**outcomes["captions"]["ref"])
    manifest = Manifest.model_validate_json(store.read(captions, "manifest.json"))
    assert {image.source: image.caption for image in manifest.pictures} == {
        "10_sks dog/a.png": "sks dog on grass",
        "10_sks dog/b.png": "sks dog",
        "1_dog/c.png": "dog",
        "1_dog/d.png": "dog",
    }
    (kohya / "10_sks dog" / "b.txt").write_bytes(bytes(range(256)))
    shown = loraline_here("run", spec, home=tmp_path / "home").stdout
    assert shown.count("b.txt") == 1, "an unusable caption is shown once"
    (kohya / "10_sks dog" / "b.txt").unlink()
    assert "photos: 2 images, captions: 1 .caption, 1 folder name; 2 class images" in say(
        "run", spec, home=tmp_path / "home"
    )


def test_notes_and_signatures_are_shown_once(tmp_path: Path) -> None:
    images, signer = tmp_path / "images", write_signer(tmp_path)
    build(images, {"a.txt": "one\ntwo", "lost.txt": "x", "broken.png": b"no"})
    options = ImageOptions(credentials=Credentials.read(signer.chain, signer.key))
    (images / "a.png").write_bytes(encode_image(make_image(), make_drawing("a", []), 7, options))
    run = loraline_here("dataset", images, "--c2pa-roots", signer.root, home=tmp_path / "home")
    assert run.stdout.count("broken.png") == 1
    assert "note      1 captions belong to no image, first lost.txt" in run.stdout
    assert "note      1 caption files have several lines" in run.stdout
    assert re.search(r"origin +a\.png: generated \(.*signature valid\)", run.stdout)
    assert "broken.png" not in run.stderr
    page = tmp_path / "sheet.html"
    facts = json.loads(
        say("dataset", images, "--several-captions", "draw", "-o", page, "--json", home=tmp_path / "home")
    )
    assert facts["images"][0]["alternatives"] == ["two"]
    assert facts["notes"] == ["1 captions belong to no image, first lost.txt"]
    assert "signature untrusted" in facts["generation"]["a.png"]
    assert "one | two" in page.read_text()
    refused = loraline_here("dataset", images, "--c2pa-roots", signer.key, home=tmp_path / "home")
    assert "has no certificates" in refused.stderr
