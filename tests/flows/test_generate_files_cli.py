"""`loraline generate`: formats, signatures, previews, stopping, variations, schedule types, and sizes beyond memory."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import c2pa
import numpy as np
import pytest
from PIL import Image

from lora_engine.data.evidence import read_evidence
from tests.flows.commands import loraline_here, say
from tests.flows.shared import Trained, copy_trained
from tests.support.certificates import write_signer

CONSENTED = """\
name: stars
base: tiny
steps:
  photos:   {uses: ingest, images: images/, consent: consent.csv}
  prepared: {uses: preprocess, dataset: photos, resolution: 32}
  captions: {uses: caption, dataset: prepared, captioner: template, trigger: sks, class_word: star}
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 1}
  release:  {uses: register, adapter: adapter, name: stars}
"""
TAG = "a zorb <lora:small@1:0.8>"


@pytest.fixture(scope="module")
def small(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return copy_trained(trained_home, tmp_path_factory.mktemp("generate") / "trained")


def generate(small: Trained, folder: Path, *more: object, prompt: str = TAG) -> list[Path]:
    """Draws and returns the files."""
    say("generate", prompt, "-o", folder, "--steps", 3, *more, home=small.home.path)
    return sorted(folder.iterdir())


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def test_lineage_goes_from_an_image_of_each_format_to_its_training_images(small: Trained, tmp_path: Path) -> None:
    for kind, suffix in (("png", "png"), ("webp", "webp"), ("jpeg", "jpg")):
        (file,) = generate(small, tmp_path / kind, "-n", 1, "--format", kind)
        assert file.name == f"0.{suffix}"
        nodes = json.loads(say("lineage", file, "--json", home=small.home.path))["nodes"]
        labels = " ".join(node["label"] for node in nodes)
        assert all(text in labels for text in ("(train)", "(ingest)", "0.png", "7.png")), labels
        assert "a1111-parameters" in read_evidence(file, file.parent)


@pytest.mark.nightly
def test_lineage_goes_from_an_image_to_the_consents_of_its_training_images(
    tmp_path: Path, home: Path, pipeline: Callable[..., Path]
) -> None:
    line = pipeline(CONSENTED, images=2)
    (line.parent / "consent.csv").write_text("file,consent\n0.png,C-17\n1.png,C-18\n")
    say("run", line, home=home)
    out = tmp_path / "out"
    say(*("generate", "a <lora:stars@1>", "-o", out, "-n", 1, "--steps", 1, "--format", "webp"), home=home)
    nodes = json.loads(say("lineage", out / "0.webp", "--json", home=home))["nodes"]
    assert {"C-17", "C-18"} <= {node["id"] for node in nodes}


def test_formats_have_the_same_pixels_but_for_their_compression(small: Trained, tmp_path: Path) -> None:
    (png,) = generate(small, tmp_path / "png", "-n", 1)
    (webp,) = generate(small, tmp_path / "webp", "-n", 1, "--format", "webp", "--quality", 100)
    (jpeg,) = generate(small, tmp_path / "jpeg", "-n", 1, "--format", "jpeg", "--quality", 100)
    assert np.array_equal(pixels_of(png), pixels_of(webp))
    assert 0 < np.abs(pixels_of(png) - pixels_of(jpeg)).max() < 8


def test_images_are_signed_and_lineage_still_reads_them(small: Trained, tmp_path: Path) -> None:
    signer = write_signer(tmp_path)
    (file,) = generate(small, tmp_path / "out", "-n", 1, "--sign-c2pa", signer.chain, signer.key)
    trust = {"verify": {"verify_trust": True}, "trust": {"user_anchors": signer.root.read_text()}}
    with (
        c2pa.Context(c2pa.Settings.from_dict(trust)) as context,
        c2pa.Reader("image/png", io.BytesIO(file.read_bytes()), context=context) as reader,
    ):
        assert reader.get_validation_state() == "Trusted"
        assert "small@1" in reader.json()
    assert "(train)" in say("lineage", file, home=small.home.path)
    (tmp_path / "other").mkdir()
    other = write_signer(tmp_path / "other")
    refused = loraline_here(
        *("generate", TAG, "-o", tmp_path / "no", "--sign-c2pa", signer.chain, other.key), home=small.home.path
    )
    assert refused.returncode == 1
    assert "C2PA cannot sign" in refused.stderr
    assert not (tmp_path / "no").exists()  # refused before the first step


def test_a_variation_keeps_the_seed_and_counts_up_its_own(small: Trained, tmp_path: Path) -> None:
    (plain,) = generate(small, tmp_path / "plain", "-n", 1, "--seed", 3)
    varied = generate(small, tmp_path / "varied", "-n", 2, "--seed", 3, "--variation", "8:0.2")
    assert [file.name for file in varied] == ["3-8.png", "3-9.png"]
    strong = generate(small, tmp_path / "strong", "-n", 1, "--seed", 3, "--variation", "8:0.9")
    other = generate(small, tmp_path / "other", "-n", 1, "--seed", 8)
    distance = {
        name: np.abs(pixels_of(file) - pixels_of(plain)).mean()
        for name, file in {"little": varied[0], "much": strong[0], "other": other[0]}.items()
    }
    assert 0 < distance["little"] < distance["much"]
    neutral = generate(small, tmp_path / "neutral", "-n", 2, "--seed", 3, "--variation", "8:0")
    assert [file.name for file in neutral] == ["3.png", "4.png"]
    assert np.array_equal(pixels_of(neutral[0]), pixels_of(plain))
    with Image.open(varied[1]) as image:
        image.load()
        assert (
            "Seed: 3, Size: 32x32, Model: tiny, Variation seed: 9, Variation seed strength: 0.2"
            in (image.info["parameters"])
        )
        assert json.loads(image.info["loraline"])["variation"] == [9, 0.2]


def test_noise_of_a_seed_size_makes_images_of_other_sizes_alike(small: Trained, tmp_path: Path) -> None:
    (plain,) = generate(small, tmp_path / "plain", "-n", 1)
    (same,) = generate(small, tmp_path / "same", "-n", 1, "--seed-size", "32")
    assert np.array_equal(pixels_of(plain), pixels_of(same))
    (wide,) = generate(small, tmp_path / "wide", "-n", 1, "--size", "48x32", "--seed-size", "32")
    (alone,) = generate(small, tmp_path / "alone", "-n", 1, "--size", "48x32")
    assert not np.array_equal(pixels_of(wide), pixels_of(alone))
    with Image.open(wide) as image:
        image.load()
        assert "Seed resize from: 32x32" in image.info["parameters"]


def test_batches_schedule_types_and_negative_prompts_act(small: Trained, tmp_path: Path) -> None:
    plain = generate(small, tmp_path / "plain", "-n", 3)
    single = generate(small, tmp_path / "single", "-n", 3, "--batch", 1)
    for one, other in zip(plain, single, strict=True):
        assert np.abs(pixels_of(one) - pixels_of(other)).max() <= 1
    karras = generate(small, tmp_path / "a", "-n", 1, "--sampler", "DPM++ 2M", "--schedule-type", "Karras")
    joined = generate(small, tmp_path / "b", "-n", 1, "--sampler", "DPM++ 2M Karras")
    assert karras[0].read_bytes() == joined[0].read_bytes() != plain[0].read_bytes()
    with Image.open(karras[0]) as image:
        image.load()
        assert "Sampler: DPM++ 2M, Schedule type: Karras" in image.info["parameters"]
    negative = generate(small, tmp_path / "c", "-n", 1, "--negative", "a red zorb")
    assert not np.array_equal(pixels_of(negative[0]), pixels_of(plain[0]))


def test_tiles_of_the_autoencoder_change_nothing_that_fits_into_one(small: Trained, tmp_path: Path) -> None:
    (plain,) = generate(small, tmp_path / "plain", "-n", 1)
    (tiled,) = generate(small, tmp_path / "tiled", "-n", 1, "--tile-vae")
    assert np.abs(pixels_of(plain) - pixels_of(tiled)).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "200000x200000"], "need at least"),
        (["--size", "200000x200000", "--tile-vae"], "need at least"),
        (["--schedule-type", "Karras"], "without a sampler"),
        (["--sampler", "DPM adaptive"], "use DPM++ 2M"),
        (["--variation", "8"], "variation '8'"),
        (["--offload", "0.5"], "offload is 0.5"),
        (["--guidance", "1e38"], "gives NaN or Inf"),
        (["--format", "jpeg", "--negative", "blue " * 20000], "in a JPEG"),
    ],
)
def test_what_cannot_be_drawn_or_written_is_refused_and_nothing_is_written(
    small: Trained, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    refused = loraline_here("generate", TAG, "-o", out, "-n", 1, "--steps", 3, *arguments, home=small.home.path)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert not out.exists()


def test_previews_are_images_while_a_run_is_drawn_and_ctrl_c_stops_at_the_next_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "from flows.cli import start; start()"
    command = [sys.executable, "-c", code, "generate", "a ring", "-o", str(out), "-n", "40", "--batch", "1"]
    process = subprocess.Popen(
        [*command, "--steps", "20", "--previews", "3"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (out / "0.png").exists() or not (out / "preview.png").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "finished images are in" in errors
    files = sorted(out.iterdir())
    finished = [file for file in files if file.name != "preview.png"]
    assert 1 <= len(finished) < 40
    assert [file.name for file in finished] == sorted(f"{number}.png" for number in range(len(finished)))
    for file in files:
        assert pixels_of(file).shape == (32, 32, 3)
    assert read_evidence(out / "preview.png", out) == ("digital-source-type-trained-algorithmic-media",)


def test_a_grid_has_images_of_the_format_and_a_sheet_that_says_it_is_generated(small: Trained, tmp_path: Path) -> None:
    files = generate(small, tmp_path / "out", "-x", "guidance=1,3", "--format", "webp", "--previews", 2)
    assert [file.name for file in files] == ["00-00.webp", "00-01.webp", "grid.png"]
    assert read_evidence(files[2], tmp_path / "out") == ("digital-source-type-trained-algorithmic-media",)


def test_the_preview_of_a_finished_run_is_removed(small: Trained, tmp_path: Path) -> None:
    files = generate(small, tmp_path / "out", "-n", 1, "--previews", 1)
    assert [file.name for file in files] == ["0.png"]
