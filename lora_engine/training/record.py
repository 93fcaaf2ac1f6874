"""What is kept of a training beside the adapter: its card, and its curves. Nothing here computes anything."""

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
    """What the adapter's header says."""
    return Card(
        title=" ".join(word for word in (manifest.trigger, manifest.class_word) if word),
        base=base.name,
        base_fingerprint=base.fingerprint,
        trigger=manifest.trigger,
        class_word=manifest.class_word,
        # Sample pictures leave the adapter as it is, and so its bytes.
        recipe=settings.model_dump(mode="json", exclude={"samples"}),
        data=sorted({picture.sha256 for picture in manifest.of_split("train")}),
        seed=settings.seed,
        resolution="{1}x{0}".format(*base.default_size),
        prediction=base.noise.parameterisation,
    )


def curves_of(history: History, trained_on: Sequence[str]) -> dict[str, Any]:
    """The content of `training.json`."""
    return {
        "loss": thin(history.loss),
        "lr": thin(history.rate),
        "validation_loss": [list(entry) for entry in history.validation],
        "trained_on": list(trained_on),
    }


def thin(values: Sequence[float]) -> list[list[float]]:
    """(step, value): every step up to 500 of them; then evenly spread ones, with the first and the last."""
    count = len(values)
    if count <= _POINTS:
        steps = list(range(count))
    else:
        steps = sorted({round(place * (count - 1) / (_POINTS - 1)) for place in range(_POINTS)})
    return [[step + 1, values[step]] for step in steps]
