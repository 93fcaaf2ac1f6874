"""diffusers reads our original single files and gets the same weights, and we read them as it does."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from lora_engine.checkpoints import convert_checkpoint
from tests.support.untrained import write_untrained_base

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
CLASSES = {"sd15": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


class Twins(NamedTuple):
    """One base in three forms, and the weights that diffusers loads from the first."""

    folder: Path
    single: Path
    back: Path
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Twins]:
    """For each architecture: a diffusers folder, our single file of it, and our folder of that file."""
    root = tmp_path_factory.mktemp("parity")
    twins_by_name = {}
    for name, cls in CLASSES.items():
        folder = write_untrained_base(root / name, name)
        single = convert_checkpoint(folder, root / f"{name}.safetensors", to="ldm")[0]
        convert_checkpoint(single, root / f"{name}-back", to="diffusers", config=folder)
        twins_by_name[name] = Twins(folder, single, root / f"{name}-back", weights(load(folder, cls)))
    return twins_by_name


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value
        for part in NETWORKS
        if (module := getattr(pipeline, part, None)) is not None
        for name, value in module.state_dict().items()
    }


def load(folder: Path, cls: Any) -> Any:
    return cls.from_pretrained(str(folder), local_files_only=True)


def load_single(path: Path, folder: Path, cls: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls.from_single_file(str(path), config=str(folder), local_files_only=True)


def assert_same(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == reference.keys()
    assert len(ours) > 10
    assert [key for key in ours if not torch.equal(ours[key], reference[key])] == []


@pytest.mark.parametrize("name", CLASSES)
def test_diffusers_reads_our_single_file(name: str, twins: dict[str, Twins]) -> None:
    one = twins[name]
    assert_same(one.weights, weights(load_single(one.single, one.folder, CLASSES[name])))


@pytest.mark.parametrize("name", CLASSES)
def test_we_read_a_single_file_as_diffusers_does(name: str, twins: dict[str, Twins]) -> None:
    one = twins[name]
    stored = load_file(one.single)
    for part, convert in {"unet": convert_ldm_unet_checkpoint, "vae": convert_ldm_vae_checkpoint}.items():
        config = json.loads((one.folder / part / "config.json").read_text())
        ours = load_file(one.back / part / "diffusion_pytorch_model.safetensors")
        assert_same(ours, convert(stored, config))


@pytest.mark.parametrize("name", CLASSES)
def test_the_libraries_load_our_folder_without_warnings(
    name: str, twins: dict[str, Twins], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ours = weights(load(twins[name].back, CLASSES[name]))
    assert [record.getMessage() for record in caplog.records] == []
    assert_same(ours, twins[name].weights)


def test_a_wrong_name_is_detected(twins: dict[str, Twins], tmp_path: Path) -> None:
    """Negative control: with q and k of one attention exchanged, diffusers gets other weights."""
    one = twins["sd15"]
    stored = load_file(one.single)
    to_q = next(name for name in stored if name.endswith("attn1.to_q.weight"))
    to_k = to_q.replace("to_q", "to_k")
    save_file(stored | {to_q: stored[to_k].clone(), to_k: stored[to_q].clone()}, tmp_path / "x.safetensors")
    read = weights(load_single(tmp_path / "x.safetensors", one.folder, StableDiffusionPipeline))
    assert sum(not torch.equal(one.weights[key], read[key]) for key in one.weights) == 2
