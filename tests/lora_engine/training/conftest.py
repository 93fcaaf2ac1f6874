from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lora_engine.bases.base import BaseModel
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import ImageEntry, Manifest
from lora_engine.data.pixels import write_png
from lora_engine.data.preprocess import preprocess
from lora_engine.data.spec import IngestSettings, PreprocessSettings
from lora_engine.training.spec import TrainSettings
from tests.lora_engine.training.runs import Runs, load_once
from tests.support.untrained import write_untrained_base

# Bases this small are slower on several cores.
torch.set_num_threads(1)
SHAPES = ("small-sd", "small-sd-v", "small-sdxl", "small-sd-inpainting")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {shape: write_untrained_base(folder / shape, shape) for shape in SHAPES}


def write_dataset(folder: Path, sizes: list[int], heldout: int = 0, **about: Any) -> Path:
    images = []
    for number, size in enumerate([*sizes, *[sizes[0]] * heldout]):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        tiles = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(number)) * 2 - 1
        name = f"pictures/{digest[:16]}.png"
        write_png(folder / name, tiles.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2))
        split = "train" if number < len(sizes) else "heldout"
        caption = about.get("caption", f"a sks star {number % 2}")
        images.append(
            ImageEntry(
                sha256=digest, file=name, width=size, height=size, caption=caption, source=f"{number}.png", split=split
            )
        )
    Manifest(pictures=tuple(images), trigger="sks", class_word=about.get("class_word", "star")).save(folder)
    return folder


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    def make(sizes: list[int] | None = None, heldout: int = 0, **about: Any) -> Path:
        return write_dataset(tmp_path / "dataset", sizes or [16] * 5, heldout, **about)

    return make


@pytest.fixture
def dataset(make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(heldout=1)


@pytest.fixture
def masked(dataset: Path) -> Path:
    """The default dataset with a mask over the left half of each image."""
    manifest = Manifest.load(dataset)
    images = []
    for image in manifest.pictures:
        mask = torch.full((3, image.height, image.width), -1.0)
        mask[:, :, : image.width // 2] = 1.0
        name = f"masks/{Path(image.file).name}"
        write_png(dataset / name, mask)
        images.append(image.model_copy(update={"mask": name}))
    manifest.model_copy(update={"pictures": tuple(images)}).save(dataset)
    return dataset


@pytest.fixture(scope="session")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three shapes, with masks, repeats and captions in tags, as the steps make them."""
    folder = tmp_path_factory.mktemp("varied")
    images = folder / "images"
    for number, (width, height) in enumerate([(32, 32), (64, 32), (64, 30), (30, 70), (33, 31)]):
        path = images / ("3_often" if number == 1 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiles = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(number))
        values = (tiles * 255).to(torch.uint8).numpy()
        Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST).save(path)
        path.with_suffix(".txt").write_text(f"{{a|b}}, (c:1.2), sks, on white, number {number}")
        if number % 2:
            Image.new("L", (width, height), 200).save(path.with_name(f"{number}.mask.png"))
    ingest(images, folder / "one", IngestSettings(heldout=0.2, repeats="folders"))
    wanted = {"resolution": 32, "crop": "bucket", "buckets": {"step": 8, "keep": "salient"}, "original_sizes": True}
    preprocess(folder / "one", folder / "dataset", PreprocessSettings.model_validate(wanted))
    return folder / "dataset"


@pytest.fixture
def settings() -> Callable[..., TrainSettings]:
    def make(**change: Any) -> TrainSettings:
        plain: dict[str, Any] = {"method": "finetune", "rank": 2, "steps": 4, "batch": 2, "seed": 7}
        if change.get("method") == "dreambooth":
            plain["prior"] = {"count": 3, "steps": 2}
        return TrainSettings.model_validate({**plain, **change})

    return make


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[..., BaseModel]]:
    """What all runs of a worker share: encoded images and texts, and loaded bases."""
    return tmp_path_factory.mktemp("encoded"), load_once()


@pytest.fixture
def runs(
    bases: dict[str, Path],
    dataset: Path,
    tmp_path: Path,
    settings: Callable[..., TrainSettings],
    shared: tuple[Path, Callable[..., BaseModel]],
) -> Runs:
    """Runs on the default dataset; see `Runs`."""
    return Runs(bases, dataset, tmp_path, *shared, settings)
