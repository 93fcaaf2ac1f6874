"""Training on every family: it runs, changes the adapter and is deterministic."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.pixels import write_png
from lora_engine.formats import read_adapter
from lora_engine.training.run import ADAPTER, train
from lora_engine.training.spec import TrainSettings

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    images = []
    for number in range(2):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        name = f"pictures/{digest[:16]}.png"
        tiles = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(number)) * 2 - 1
        write_png(folder / name, tiles.repeat_interleave(4, 1).repeat_interleave(4, 2))
        fields: dict[str, Any] = {"width": 16, "height": 16, "caption": "a sks star", "source": f"{number}.png"}
        images.append(ImageEntry(sha256=digest, file=name, split="train", **fields))
    Manifest(pictures=tuple(images), trigger="sks", class_word="star").save(folder)
    return folder


def trained(base: Path, dataset: Path, folder: Path, **change: Any) -> Path:
    settings = TrainSettings.model_validate(
        {"method": "finetune", "rank": 2, "steps": 3, "batch": 2, "seed": 7, "learning_rate": 1e-2, **change}
    )
    train(settings, str(base), dataset, folder / "out", folder / "work")
    return folder / "out" / ADAPTER


@pytest.mark.parametrize("shape", ["small-sd3", "small-flux"])
def test_training_on_a_flow_gives_the_same_bytes_twice(
    untrained: dict[str, Path], dataset: Path, tmp_path: Path, shape: str
) -> None:
    files = [trained(untrained[shape], dataset, tmp_path / name) for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    adapter, _ = read_adapter(files[0])
    assert adapter.base == shape.removeprefix("small-")
    assert any(delta.factors()["up"].abs().max() > 0 for delta in adapter.modules.values())


def test_an_adapter_is_trained_on_a_quantized_base(untrained: dict[str, Path], dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    files = {
        bits: trained(untrained["small-flux"], dataset, tmp_path / bits, running={"device": "cpu", "quantise": bits})
        for bits in ("none", "4bit")
    }
    plain, quantized = (read_adapter(file)[0] for file in files.values())
    assert plain.fingerprint == quantized.fingerprint
    assert plain.modules.keys() == quantized.modules.keys()
    assert files["none"].read_bytes() != files["4bit"].read_bytes()
