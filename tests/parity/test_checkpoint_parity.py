"""diffusers reads our original single files by its own code and gets the very weights; and we read them as it does."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file

from lora_engine.bases.untrained import write_untrained_base
from lora_engine.checkpoints import convert_checkpoint

pytestmark = pytest.mark.slow

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
CLASSES = {"sd15": StableDiffusionPipeline, "sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """For each architecture a diffusers folder and our original single file of it."""
    root = tmp_path_factory.mktemp("parity")
    found = {}
    for name in CLASSES:
        folder = write_untrained_base(root / name, name)
        found[name] = (folder, convert_checkpoint(folder, root / f"{name}.safetensors", to="ldm")[0])
    return found


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value
        for part in NETWORKS
        if (module := getattr(pipeline, part, None)) is not None
        for name, value in module.state_dict().items()
    }


def load(folder: Path, cls: Any) -> Any:
    return cls.from_pretrained(str(folder), local_files_only=True)


@pytest.mark.parametrize("name", CLASSES)
def test_diffusers_reads_our_single_file(name: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    folder, single = pairs[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = CLASSES[name].from_single_file(str(single), config=str(folder), local_files_only=True)
    ours, theirs = weights(load(folder, CLASSES[name])), weights(read)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.parametrize("name", CLASSES)
def test_we_read_a_single_file_as_diffusers_does(
    name: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, single = pairs[name]
    convert_checkpoint(single, tmp_path / "out", to="diffusers", config=folder)
    stored = load_file(single)
    pipeline = load(folder, CLASSES[name])
    theirs = {
        "unet": convert_ldm_unet_checkpoint(stored, dict(pipeline.unet.config)),
        "vae": convert_ldm_vae_checkpoint(stored, dict(pipeline.vae.config)),
    }
    for part, expected in theirs.items():
        ours = load_file(tmp_path / "out" / part / "diffusion_pytorch_model.safetensors")
        assert ours.keys() == expected.keys()
        assert [key for key in ours if not torch.equal(ours[key], expected[key])] == []


@pytest.mark.parametrize("name", CLASSES)
def test_the_libraries_load_our_folder_without_a_word(
    name: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, single = pairs[name]
    convert_checkpoint(single, tmp_path / "out", to="diffusers", config=folder)
    with caplog.at_level(logging.WARNING):
        ours = weights(load(tmp_path / "out", CLASSES[name]))
    assert [record.getMessage() for record in caplog.records] == []
    expected = weights(load(folder, CLASSES[name]))
    assert ours.keys() == expected.keys()
    assert [key for key in ours if not torch.equal(ours[key], expected[key])] == []


def test_a_wrong_name_would_be_seen(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """The negative control: with q and k of one attention exchanged, diffusers gets other weights."""
    from safetensors.torch import save_file

    folder, single = pairs["sd15"]
    stored = load_file(single)
    to_q = next(name for name in stored if name.endswith("attn1.to_q.weight"))
    to_k = to_q.replace("to_q", "to_k")
    path = tmp_path / "x.safetensors"
    save_file(stored | {to_q: stored[to_k].clone(), to_k: stored[to_q].clone()}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = weights(StableDiffusionPipeline.from_single_file(str(path), config=str(folder), local_files_only=True))
    ours = weights(load(folder, StableDiffusionPipeline))
    assert sum(not torch.equal(ours[key], read[key]) for key in ours) == 2
