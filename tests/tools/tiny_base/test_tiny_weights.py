"""The shipped weights: they load like any base, are small, and match the model card."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from lora_engine.files import sha256_file
from tools.tiny_base.assembly import MAX_BYTES, folder_size
from tools.tiny_base.card import FIGURES, read_figures, render_figures
from tools.tiny_base.images import render, to_pixels
from tools.tiny_base.judge import load_judge
from tools.tiny_base.measure import count_right, generate, measure_clip
from tools.tiny_base.world import ATTRIBUTES, CONCEPT, scenes

DIGESTS = {
    "clip/heads.safetensors": "c95199f79e9b4f68e42030e6048d0e6cc05cb380c41aa2724092252b78016e71",
    "clip/model.safetensors": "8d1cf6828b20f9ba79359baccdcb9263716b9696c2c6cb333d4d20ff55d9821f",
    "judge.safetensors": "76fed1d013f30b59212c43803472da08afa754d3e6e366efcc11deca221f0112",
    "text_encoder/model.safetensors": "2d4522944ef1801b808d5954d4c042b5abfe4bd3c2a4e66bfe23c593fd4a01a3",
    "unet/diffusion_pytorch_model.safetensors": "b97f09568d86a708fb0103f27a96b1310037ceb698e5e3b532e187671ade533b",
    "vae/diffusion_pytorch_model.safetensors": "0e1c94d5c9254306ed0c5b8c1f4dbe7ec857ea70759b16f2b602f2067f43bf29",
}
"""Update these with the measured figures after a new build of the base."""


def test_the_weights_load_through_diffusers_and_are_small(weights: Path) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(weights, local_files_only=True)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert {parameter.dtype for parameter in pipeline.text_encoder.parameters()} == {torch.float32}
    assert folder_size(weights) <= MAX_BYTES == 16_000_000


def test_the_weights_are_those_that_were_measured(weights: Path) -> None:
    digests = {str(file.relative_to(weights)): sha256_file(file) for file in weights.rglob("*.safetensors")}
    assert digests == DIGESTS


def test_the_weights_contain_no_pickle_and_no_local_path(weights: Path) -> None:
    assert {path.suffix for path in weights.rglob("*") if path.is_file()} == {".json", ".md", ".safetensors", ".txt"}
    for path in weights.rglob("*.json"):
        assert b"_name_or_path" not in path.read_bytes(), path


def test_the_judge_is_accurate_on_drawings(weights: Path) -> None:
    judge = load_judge(weights)
    dataset = scenes(31, 270, "any") + scenes(32, 30, "concept")
    accuracy = count_right(judge.read(to_pixels(render(dataset))), dataset)
    assert set(accuracy) == {*ATTRIBUTES, "all"}
    assert min(accuracy.values()) >= 0.99
    concept = scenes(33, 100, "concept")
    assert {row["shape"] for row in judge.read(to_pixels(render(concept)))} == {CONCEPT}


def test_clip_distinguishes_colors_and_shapes(weights: Path) -> None:
    accuracy = measure_clip(weights, 64)
    assert min(accuracy["colour"], accuracy["shape"]) >= 0.95


def test_the_card_shows_the_measured_figures(weights: Path) -> None:
    figures = read_figures(weights)
    assert json.loads((weights / FIGURES).read_bytes()) == figures
    assert render_figures(figures) in (weights / "README.md").read_text()


def test_the_measured_figures_are_good_enough(weights: Path) -> None:
    figures = read_figures(weights)
    follows = dict(figures["follows"]["right"])
    assert figures["follows"]["n"] == 512
    assert follows.pop("all") >= 0.95
    assert min(follows.values()) >= 0.98
    assert min(figures["judge"]["right"].values()) >= 0.99
    assert min(figures["clip"]["right"]["colour"], figures["clip"]["right"]["shape"]) >= 0.97


def test_the_base_follows_held_out_captions(weights: Path) -> None:
    requested = scenes(556, 16, "heldout")
    accuracy = count_right(load_judge(weights).read(generate(weights, requested)), requested)
    assert accuracy["all"] >= 0.9
