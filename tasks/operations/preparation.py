"""Finds the models that preprocess uses: for masks, and to enlarge images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_engine.captioning.source import CaptionerModel, resolve_vision_model
from lora_engine.data.spec import PreprocessSettings
from tasks.step import locate_base


def find_preparation_models(settings: PreprocessSettings, folder: Path) -> dict[str, CaptionerModel]:
    """Returns setting -> its model, of `mask` and `upscale`; downloads it if necessary.

    Args:
        settings: The settings.
        folder: The folder that relative paths start from.

    Raises:
        BaseModelError: A model is missing, incomplete or unsafe.
    """
    return {role: resolve_vision_model(locate_base(name, folder)) for role, name in settings.models().items()}


def describe_models(settings: PreprocessSettings, folder: Path) -> dict[str, dict[str, str]]:
    """Returns the models for keys and lineage; see `StepKind.models`."""
    names = settings.models()
    described = {}
    for role, model in find_preparation_models(settings, folder).items():
        place = {"revision": model.revision} if model.revision else {"path": str(model.folder)}
        described[role] = {"name": names[role], "label": model.label, "fingerprint": model.fingerprint(), **place}
    return described


def with_folders(settings: PreprocessSettings, models: Mapping[str, CaptionerModel]) -> PreprocessSettings:
    """Returns settings in which the models are folders."""
    found = {
        role: getattr(settings, role).model_copy(update={"model": str(model.folder)}) for role, model in models.items()
    }
    return settings.model_copy(update=found)
