"""Loads vision models of transformers from folders: safetensors only, no code of theirs, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lora_engine.building import BUILDING, align_weights, without_bars
from lora_engine.documents import read_json_object
from lora_engine.errors import SettingsError

_LOADING = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError)


def load_vision_model(cls: Any, folder: str, model_type: str = "") -> Any:
    """Returns a model in float32, frozen and in evaluation mode.

    Args:
        cls: Its class, or automatic class, in transformers.
        folder: A folder that `save_pretrained` wrote.
        model_type: The only allowed `model_type`; empty allows all.

    Raises:
        SettingsError: It is another model, a weight is missing, or transformers has no code for it.
    """
    try:
        kind = read_json_object(Path(folder) / "config.json", SettingsError).get("model_type")
    except FileNotFoundError:
        raise SettingsError(
            "is not a model: it has no config.json",
            where=folder,
            remedy="give a folder that save_pretrained of transformers wrote",
        ) from None
    if model_type and kind != model_type:
        raise SettingsError(f"is a model of type {kind!r}", where=folder, allowed=model_type)
    try:
        # Building a model draws from the global generator; its state is restored.
        with BUILDING, torch.random.fork_rng(devices=[]), without_bars():
            model, loading = cls.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except _LOADING as error:
        raise _unusable(folder, error) from None
    # transformers would continue with random weights and only log a warning.
    missing = sorted({*loading["missing_keys"], *(str(key[0]) for key in loading["mismatched_keys"])})
    if missing:
        raise SettingsError(f"{len(missing)} weights are missing or of another shape, first {missing[0]}", where=folder)
    align_weights(model)
    return model.eval().requires_grad_(False)


def load_part(cls: Any, folder: str, **options: Any) -> Any:
    """Returns the tokenizer or image processor of a model; `cls` is its class in transformers.

    Raises:
        SettingsError: There is none, or it needs a library that is missing.
    """
    try:
        with BUILDING:
            return cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except _LOADING as error:
        raise _unusable(folder, error) from None


def _unusable(folder: str, error: Exception) -> SettingsError:
    lines = str(error).strip().splitlines()
    return SettingsError(
        f"the model cannot be loaded ({lines[0][:300] if lines else type(error).__name__})", where=folder
    )
