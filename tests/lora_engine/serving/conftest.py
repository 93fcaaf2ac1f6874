"""A base, adapter files and jobs for the engines of serving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_engine.adapters import Adapter, create_adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.formats import Card, Embedding, write_adapter
from lora_engine.inference.draw import DrawSettings
from lora_engine.inference.generate import OnStep, ignore_step
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.serving.engine import DrawnImages, ImageJob

STEPS = 3
TARGETS = ("attention", "text_encoder*.q_proj", "unet.*.conv1")
"""Linear layers, convolutions, and layers of the text encoder."""


@pytest.fixture(scope="session")
def base(untrained_base: Callable[[str], Path]) -> BaseModel:
    return load_base(str(untrained_base("small-sd")), device="cpu")


@pytest.fixture
def write_file(base: BaseModel, tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter with random factors and returns its file."""

    def write(
        name: str,
        kind: str = "lora",
        rank: int = 2,
        targets: Sequence[str] = TARGETS,
        recipe: dict[str, Any] | None = None,
        embeddings: Sequence[Embedding] = (),
        spread: float = 0.3,
    ) -> Path:
        draw = torch.Generator().manual_seed(sum(map(ord, name)))
        adapter = create_adapter(base, list(targets), kind, rank=rank, generator=draw)
        modules = {
            module: delta.with_factors(
                {key: spread * torch.randn(value.shape, generator=draw) for key, value in delta.factors().items()}
            )
            for module, delta in adapter.modules.items()
        }
        moved = Adapter(modules, adapter.base, adapter.fingerprint)
        card = Card(recipe=recipe or {})
        (file,) = write_adapter(tmp_path / f"{name}.safetensors", moved, card=card, embeddings=embeddings)
        return file

    return write


def job_of(prompt: str, *files: Path, seeds: Sequence[int] = (1,), negative: str = "", **settings: Any) -> ImageJob:
    """Returns a job of 16 x 16 pixels; `on_step` and settings by name."""
    on_step: OnStep = settings.pop("on_step", ignore_step)
    return ImageJob(
        parse_prompt(prompt),
        parse_prompt(negative, is_negative=True),
        DrawSettings(tuple(seeds), **{"steps": STEPS, "size": (16, 16), **settings}),
        tuple((file, file.stem) for file in files),
        on_step,
    )


def pixels_of(result: object) -> Tensor:
    if isinstance(result, Exception):
        raise result
    assert isinstance(result, DrawnImages)
    return result.pixels


def count_predictions(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that gets the number of rows of each prediction of a base."""
    rows: list[int] = []
    predict = base.predict

    def counted(noisy: Tensor, *arguments: Any) -> Tensor:
        rows.append(len(noisy))
        return predict(noisy, *arguments)

    monkeypatch.setattr(base, "predict", counted)
    return rows
