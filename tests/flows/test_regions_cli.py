"""`loraline generate` with regions, adapter guidance, grids of three axes, and weights that cards recommend."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from lora_engine.files import sha256_file
from tests.flows.commands import loraline_here, say
from tests.flows.shared import Trained, copy_trained


@pytest.fixture(scope="module")
def small(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return copy_trained(trained_home, tmp_path_factory.mktemp("regions") / "trained")


def generate(
    small: Trained, folder: Path, prompt: str, *more: object, steps: int = 3
) -> tuple[np.ndarray, dict[str, object], str]:
    said = say("generate", prompt, "-o", folder, "-n", 1, "--steps", steps, *more, home=small.home.path)
    with Image.open(folder / "0.png") as drawn:
        drawn.load()
        facts = json.loads(drawn.text["loraline"])  # type: ignore[attr-defined]
        return np.asarray(drawn.convert("RGB"), dtype=int), facts, said


def test_regions_reach_the_image_and_its_description(small: Trained, tmp_path: Path) -> None:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(tmp_path / "right.png")
    regions = ("--region", "0,0,0.5,1=a zorb <lora:small@1:0.8>", "--region", f"{tmp_path / 'right.png'}=a cube")
    drawn, facts, _ = generate(small, tmp_path / "regions", "a wall", *regions)
    assert facts["regions"] == [
        {"prompt": "a zorb", "box": [0.0, 0.0, 0.5, 1.0], "adapters": [0]},
        {"prompt": "a cube", "mask_sha256": sha256_file(tmp_path / "right.png")},
    ]
    assert [adapter["reference"] for adapter in facts["adapters"]] == ["small@1"]  # type: ignore[attr-defined]
    lineage = say("lineage", tmp_path / "regions" / "0.png", "--json", home=small.home.path)
    assert small.version(1).artifact.sha256 in lineage, "of an adapter that only a region names"
    soft, facts, _ = generate(small, tmp_path / "soft", "a wall", *regions, "--feather", 3)
    assert facts["feather"] == 3
    plain, _, _ = generate(small, tmp_path / "plain", "a zorb <lora:small@1:0.8>")
    whole, _, _ = generate(small, tmp_path / "whole", "x", "--region", "0,0,1,1=a zorb <lora:small@1:0.8>")
    assert np.array_equal(whole, plain)
    assert not np.array_equal(drawn, plain)
    assert not np.array_equal(drawn, soft)


def test_several_masks_of_an_image_have_prompts_of_their_own(small: Trained, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (200, 40, 40)).save(tmp_path / "photo.png")
    for name, left in (("a", 0), ("b", 20)):
        mask = Image.new("L", (32, 32))
        mask.paste(255, (left, 0, left + 8, 32))
        mask.save(tmp_path / f"{name}.png")
    source = ("--image", tmp_path / "photo.png", "--only-regions")
    one, two = f"{tmp_path / 'a.png'}=a zorb <lora:small@1>", f"{tmp_path / 'b.png'}=a cube"
    drawn, _, _ = generate(small, tmp_path / "out", "a wall", *source, "--region", one, "--region", two)
    with Image.open(tmp_path / "out" / "0.png") as image:
        assert "compositeWithTrainedAlgorithmicMedia" in str(image.getxmp())
    original = np.asarray(Image.open(tmp_path / "photo.png"), dtype=int)
    for first, last, is_drawn in ((0, 8, True), (8, 20, False), (20, 28, True), (28, 32, False)):
        assert np.array_equal(drawn[:, first:last], original[:, first:last]) != is_drawn


def test_adapter_guidance_of_the_verb_is_that_of_each_tag(small: Trained, tmp_path: Path) -> None:
    tag = "a zorb <lora:small@1:0.8>"
    plain, facts, _ = generate(small, tmp_path / "plain", tag)
    assert "guidance" not in facts["adapters"][0]  # type: ignore[index]
    by_option, facts, _ = generate(small, tmp_path / "option", tag, "--adapter-guidance", 2)
    assert facts["adapters"][0]["guidance"] == 2  # type: ignore[index]
    by_tag, _, _ = generate(small, tmp_path / "tag", "a zorb <lora:small@1:0.8:ag=2>")
    assert np.array_equal(by_option, by_tag)
    assert not np.array_equal(by_option, plain)
    none, _, _ = generate(small, tmp_path / "none", tag, "--adapter-guidance", 0)
    assert np.array_equal(none, generate(small, tmp_path / "base", "a zorb")[0])


def test_a_grid_of_three_axes_has_a_sheet_per_value_and_stacks_adapters(small: Trained, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    axes = ("-x", "adapter=none,small@1", "-y", "weight=0.4,1", "-z", "seed=4,5", "--steps", 2)
    region = ("--region", "0,0,0.5,1=a cube")
    listed = say("generate", "a zorb <lora:small@1:0.3>", "-o", out, *axes, *region, home=small.home.path)
    assert {Path(line).name for line in listed.splitlines() if line.endswith(".png")} == {
        "grid-00.png",
        "grid-01.png",
        *(f"{sheet:02d}-{row:02d}-{column:02d}.png" for sheet in (0, 1) for row in (0, 1) for column in (0, 1)),
    }
    prompt = "a zorb <lora:small@1:0.3> <lora:small@1:0.4>"
    generate(small, tmp_path / "alone", prompt, "--seed", 0, *region, steps=2)
    say(
        *("generate", prompt, "-o", tmp_path / "alone", "-n", 1, "--seed", 5, "--steps", 2, *region),
        home=small.home.path,
    )
    assert (tmp_path / "alone" / "5.png").read_bytes() == (out / "01-00-01.png").read_bytes()


def test_a_name_alone_has_the_weights_that_its_card_recommends(small: Trained, tmp_path: Path) -> None:
    weights = "0.9@0,0.2@1:curve=cosine"
    for number, to in enumerate(("kohya", "peft")):
        exported = tmp_path / to
        say("convert", "small@1", "--to", to, "-o", exported, "--recommend", weights, home=small.home.path)
        file = exported if to == "peft" else next(exported.glob("*.safetensors"))
        drawn, facts, said = generate(small, tmp_path / f"drawn-{number}", f"a zorb <lora:{file}>")
        assert f"{file}: denoiser 0.9@0,0.2@1, text_encoder 0.9@0,0.2@1, curve cosine, as its card recommends" in said
        assert facts["adapters"][0]["curve"] == "cosine"  # type: ignore[index]
        expected, _, said = generate(small, tmp_path / f"stated-{number}", f"a zorb <lora:{file}:{weights}>")
        assert "recommends" not in said
        assert np.array_equal(drawn, expected)
        plain, _, _ = generate(small, tmp_path / f"one-{number}", f"a zorb <lora:{file}:1>")
        assert not np.array_equal(drawn, plain)


def test_a_recommended_weight_comes_back_with_an_import_and_is_exported_for_others(
    small: Trained, tmp_path: Path
) -> None:
    say("convert", "small@1", "--to", "kohya", "-o", tmp_path / "a", "--recommend", "0.7", home=small.home.path)
    (file,) = (tmp_path / "a").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["modelspec.usage_hint"] == "Trigger: zorb. Weight: 0.7"
    say("import", file, "--name", "back", "--base", "tiny", "--license", "CC0-1.0", home=small.home.path)
    _, facts, said = generate(small, tmp_path / "out", "a zorb <lora:back@1>")
    assert "back@1: denoiser 0.7, text_encoder 0.7, as its card recommends" in said
    assert facts["adapters"][0]["denoiser"] == "0.7"  # type: ignore[index]
    more = ("--license", "CC0-1.0", "--recommend", "0.4")
    say("import", file, "--name", "other", "--base", "tiny", *more, home=small.home.path)
    assert "denoiser 0.4" in generate(small, tmp_path / "more", "a zorb <lora:other@1>")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--region", "a zorb"], "region 'a zorb'"),
        (["--region", "0,0,1,1=a <lora:smal@1>"], "'small'"),
        (["--region", "missing.png=a zorb"], "missing.png"),
        (["--feather", "3"], "no regions"),
        (["--region", "0,0,1,1=a", "--feather", "999"], "feather is 999"),
        (["--only-regions"], "no regions"),
        (["--region", "0,0,1,1=a", "--only-regions"], "name the image to start from"),
        (["-z", "seed=1,2", "-x", "steps=1,2"], "-y for -z"),
        (["-x", "weight=0,1"], "an axis 'adapter'"),
        (["-x", "adapter=smal@1"], "'small'"),
    ],
)
def test_what_cannot_be_composed_is_refused_and_nothing_is_drawn(
    arguments: list[str], message: str, small: Trained, tmp_path: Path
) -> None:
    done = loraline_here(
        "generate", "a zorb", "-o", tmp_path / "out", "-n", "1", "--steps", "1", *arguments, home=small.home.path
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["convert", "import"])
def test_weights_that_no_tag_could_have_are_not_recommended(verb: str, small: Trained, tmp_path: Path) -> None:
    say("convert", "small@1", "--to", "kohya", "-o", tmp_path / "a", home=small.home.path)
    (file,) = (tmp_path / "a").glob("*.safetensors")
    own = {
        "convert": (file, "--to", "peft", "-o", tmp_path / "out"),
        "import": (file, "--name", "no", "--base", "tiny", "--license", "CC0-1.0"),
    }
    done = loraline_here(verb, *own[verb], "--recommend", "heavy", home=small.home.path)
    assert done.returncode == 1
    assert "'heavy' of the weight 'heavy' is not a number" in done.stderr
