"""Builds the documents written beside the adapter: its card and its training curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_engine.bases.base import BaseModel
from lora_engine.data.manifest import Manifest
from lora_engine.formats import Card
from lora_engine.training.loop import History
from lora_engine.training.spec import TrainSettings

_POINTS = 500


def card_of(settings: TrainSettings, base: BaseModel, manifest: Manifest) -> Card:
    """Returns the card for the adapter's header."""
    return Card(
        title=" ".join(word for word in (manifest.trigger, manifest.class_word) if word),
        base=base.name,
        base_fingerprint=base.fingerprint,
        trigger=manifest.trigger,
        class_word=manifest.class_word,
        # Samples do not change the adapter, so they must not change its bytes.
        recipe=settings.model_dump(mode="json", exclude={"samples"}),
        data=sorted({image.sha256 for image in manifest.of_split("train")}),
        seed=settings.seed,
        resolution="{1}x{0}".format(*base.default_size),
        prediction=base.noise.parameterization,
    )


def curves_of(history: History, trained_on: Sequence[str]) -> dict[str, Any]:
    """Returns the content of `training.json`."""
    return {
        "loss": downsample(history.loss),
        "lr": downsample(history.rate),
        "validation_loss": [list(entry) for entry in history.validation],
        "trained_on": list(trained_on),
    }


def downsample(values: Sequence[float]) -> list[list[float]]:
    """Returns (step, value): every step up to 500; beyond, 500 evenly spaced ones with the first and the last."""
    count = len(values)
    if count <= _POINTS:
        steps = list(range(count))
    else:
        steps = sorted({round(point * (count - 1) / (_POINTS - 1)) for point in range(_POINTS)})
    return [[step + 1, values[step]] for step in steps]
