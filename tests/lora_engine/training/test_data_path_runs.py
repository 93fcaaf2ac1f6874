"""Whole runs with all that may change between a picture's file and a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.data.ingest import ingest
from lora_engine.data.preprocess import preprocess
from lora_engine.data.spec import IngestSettings, PreprocessSettings
from lora_engine.errors import InterruptedRun
from lora_engine.files import sha256_file
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings

Make = Callable[..., TrainSettings]

EVERYTHING: dict[str, Any] = {
    "wildcards": True,
    "replacements": {"on": ["on", "upon"]},
    "shuffle": True,
    "keep_tokens": 1,
    "tag_dropout": 0.2,
    "templates": ["a photo of {}", "{}"],
    "prefix": "the ",
    "weights": True,
    "chunks": 2,
    "flip": True,
    "colours": {"variants": 1, "hue": 0.1},
}


def digests(out: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(out.iterdir()) if path.is_file()}


class StopAtStep:
    """Says stop when so many steps are done."""

    def __init__(self, step: int) -> None:
        self.step, self.ready = step, False

    def __call__(self) -> bool:
        return self.ready

    def tell(self, done: int, total: int, values: Any) -> None:
        self.ready = "loss" in values and done >= self.step


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    """Pictures of three shapes, with masks, repeats and captions in tags, as the steps make them."""
    from PIL import Image

    images = tmp_path / "images"
    for number, (width, height) in enumerate([(32, 32), (64, 32), (64, 30), (30, 70), (33, 31)]):
        path = images / ("3_often" if number == 1 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tiles = torch.rand(4, 4, 3, generator=torch.Generator().manual_seed(number))
        values = (tiles * 255).to(torch.uint8).numpy()
        Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST).save(path)
        path.with_suffix(".txt").write_text(f"{{a|b}}, (c:1.2), sks, on white, number {number}")
        if number % 2:
            Image.new("L", (width, height), 200).save(path.with_name(f"{number}.mask.png"))
    ingest(images, tmp_path / "one", IngestSettings(heldout=0.2, repeats="folders"))
    wanted = {"resolution": 32, "crop": "bucket", "buckets": {"step": 8, "keep": "salient"}}
    preprocess(tmp_path / "one", tmp_path / "dataset", PreprocessSettings.model_validate(wanted))
    return tmp_path / "dataset"


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "targets"), [("small-sdxl", "attention"), ("small-sd", ["attention", "text"])])
def test_a_run_with_everything_changing_resumes_to_the_same_bytes(
    bases: dict[str, Path], varied: Path, tmp_path: Path, settings: Make, shape: str, targets: Any
) -> None:
    chosen = settings(
        captions=EVERYTHING, targets=targets, steps=5, accumulate=2, caption_dropout=0.3, validate_every=2
    )
    base = str(bases[shape])
    train(chosen, base, varied, tmp_path / "straight", tmp_path / "fresh")
    for step in (1, 3):
        stop = StopAtStep(step)
        with pytest.raises(InterruptedRun):
            train(chosen, base, varied, tmp_path / "resumed", tmp_path / "work", stop=stop, progress=stop.tell)
    # With what another run left in a shared folder, too.
    train(chosen, base, varied, tmp_path / "resumed", tmp_path / "work", cache=tmp_path / "fresh")
    assert digests(tmp_path / "resumed") == digests(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize(
    "captions",
    [
        {"shuffle": True},
        {"tag_dropout": 0.5},
        {"templates": "object"},
        {"prefix": "x "},
        {"wildcards": True},
        {"weights": True},
        {"chunks": 2},
        {"flip": True},
        {"colours": {"variants": 2}},
    ],
)
def test_every_setting_counts(
    bases: dict[str, Path], varied: Path, tmp_path: Path, settings: Make, captions: dict[str, Any]
) -> None:
    for name, change in (("plain", {}), ("changed", captions)):
        chosen = settings(captions=change, steps=3)
        train(chosen, str(bases["small-sd"]), varied, tmp_path / name, tmp_path / "work" / name, cache=tmp_path / "c")
    plain, changed = digests(tmp_path / "plain"), digests(tmp_path / "changed")
    assert plain["training.json"] != changed["training.json"]
