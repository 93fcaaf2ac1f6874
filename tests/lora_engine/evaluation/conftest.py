from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.adapters import Adapter
from lora_engine.adapters.creation import create_adapter
from lora_engine.bases.base import load_base
from lora_engine.data.manifest import ImageEntry, Manifest, Quarantined
from lora_engine.data.pixels import write_png
from lora_engine.formats import write_adapter
from tests.support.untrained import spelling_tokenizer, write_untrained_base

# More threads are slower for shapes this small.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_base(tmp_path_factory.mktemp("evaluated") / "small", "small-sd")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("embedders") / "random-clip")


def write_clip(folder: Path, seed: int = 0) -> Path:
    from transformers import CLIPConfig, CLIPModel

    tokenizer = spelling_tokenizer(16)
    last = len(tokenizer) - 1
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**common, "vocab_size": last + 1, "max_position_embeddings": 16, "bos_token_id": last - 1}
    text |= {"eos_token_id": last, "pad_token_id": last}
    vision = {**common, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return folder


def write_dataset(
    folder: Path, train: int = 3, heldout: int = 2, size: int = 16, *, first: int = 0, **options: Any
) -> Path:
    """Writes a dataset of noise; equal numbers from `first` on are equal images."""
    images = []
    for number in range(train + heldout):
        digest = hashlib.sha256(f"{folder.name} {number}".encode()).hexdigest()
        name = f"pictures/{digest[:16]}.png"
        write_png(
            folder / name, torch.rand(3, size, size, generator=torch.Generator().manual_seed(first + number)) * 2 - 1
        )
        text = options.get("caption", "a {number} zorb").format(number=number)
        image = ImageEntry(sha256=digest, file=name, width=size, height=size, caption=text, source=f"{number}.png")
        images.append(image.model_copy(update={"split": "train" if number < train else "heldout"}))
    quarantined = (Quarantined(source="cut.png", reason="is broken"),)
    Manifest(pictures=tuple(images), quarantined=quarantined, trigger="zorb", class_word="star").save(folder)
    return folder


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    return lambda name="dataset", **options: write_dataset(tmp_path / name, **options)


def change_adapter(adapter: Adapter, value: Callable[[torch.Tensor], torch.Tensor]) -> Adapter:
    modules = {}
    for name, delta in adapter.modules.items():
        factors = {key: value(factor) if factor.dim() > 1 else factor for key, factor in delta.factors().items()}
        modules[name] = delta.with_factors(factors)
    return Adapter(modules, adapter.base, adapter.fingerprint)


@pytest.fixture(name="change_adapter")
def _change_adapter() -> Callable[..., Adapter]:
    return change_adapter


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    fresh = create_adapter(load_base(str(base), device="cpu"), "attention", generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    strong = change_adapter(fresh, lambda factor: torch.randn(factor.shape, generator=noise))
    for name, adapter in (("zero", fresh), ("strong", strong)):
        write_adapter(folder / name / "adapter.safetensors", adapter)
    return {name: folder / name for name in ("zero", "strong")}
