"""Loads vision models of transformers from a local folder or the Hugging Face hub: safetensors only, on the CPU."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_engine.building import BUILDING, align_weights, without_bars
from lora_engine.data.preparation_spec import HUB_ID
from lora_engine.documents import read_json_object
from lora_engine.errors import SettingsError

_log = logging.getLogger(__name__)
_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine.

    Attributes:
        path: Its folder.
        label: Name for records: hub id with the commit, or name of the folder.
    """

    path: Path
    label: str


def find_model(name: str) -> ModelFolder:
    """Returns the folder of a model; downloads one of the hub that is not in the local cache.

    Args:
        name: Hub id, optionally with `@revision`; anything else is the path of a folder.

    Raises:
        SettingsError: It is not there, or the hub cannot be reached.
    """
    match = HUB_ID.fullmatch(name)
    if match is None:
        path = Path(name).expanduser().resolve()
        if not (path / "config.json").is_file():
            raise SettingsError(
                "is not a model: it has no config.json",
                where=name,
                remedy="give a folder that save_pretrained of transformers wrote, or a hub id: owner/name",
            )
        return ModelFolder(path, path.name)
    folder = _snapshot(match["repository"], match["revision"])
    return ModelFolder(folder, f"{match['repository']}@{folder.name}")


def load_vision_model(cls: Any, folder: ModelFolder, model_types: tuple[str, ...] = ()) -> Any:
    """Returns a model in float32, frozen and in evaluation mode.

    Args:
        cls: Its class, or automatic class, in transformers.
        folder: See `find_model`.
        model_types: Allowed values of `model_type`; empty allows all.

    Raises:
        SettingsError: It is another model, a weight is missing, or it needs code that transformers does not have.
    """
    where = str(folder.path)
    kind = read_json_object(folder.path / "config.json", SettingsError).get("model_type")
    if model_types and kind not in model_types:
        raise SettingsError(f"is a model of type {kind!r}", where=where, allowed=", ".join(model_types))
    try:
        # Building a model draws from the global generator; its state is restored.
        with BUILDING, torch.random.fork_rng(devices=[]), without_bars():
            model, loading = cls.from_pretrained(
                folder.path, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise _unusable(folder, error) from None
    # transformers would continue with random weights and only log a warning.
    if missing := sorted(loading["missing_keys"]):
        raise SettingsError(f"{len(missing)} weights are missing, first {missing[0]}", where=where)
    align_weights(model)
    return model.eval().requires_grad_(False)


def load_image_processor(folder: ModelFolder) -> Any:
    """Returns the image processor of a model, without torchvision.

    Raises:
        SettingsError: There is none, or it needs torchvision.
    """
    from transformers import AutoImageProcessor

    try:
        with BUILDING:
            return AutoImageProcessor.from_pretrained(folder.path, local_files_only=True, backend="pil")
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _unusable(folder, error) from None


def load_tokenizer_of(folder: ModelFolder) -> Any:
    """Returns the tokenizer of a model.

    Raises:
        SettingsError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        with BUILDING:
            return AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _unusable(folder, error) from None


def _snapshot(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        cached = Path(snapshot_download(repository, revision=revision, local_files_only=True)).resolve()
        if (cached / "config.json").is_file() and any(cached.glob("*.safetensors")):
            return cached
    except OSError:
        pass  # not cached
    at = f"@{revision}" if revision else ""
    _log.info("downloading %s%s from the Hugging Face hub", repository, at)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_PATTERNS)).resolve()
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise SettingsError(
            f"the model {repository + at!r} is not in the local Hugging Face cache and cannot be downloaded "
            f"({_first_line(error)})",
            remedy=f"run `hf download {repository}{f' --revision {revision}' if revision else ''}` on a machine with a "
            "network and set HF_HOME to that cache; the path of a folder begins with ./ or /",
        ) from None


def _unusable(folder: ModelFolder, error: Exception) -> SettingsError:
    return SettingsError(f"the model cannot be loaded ({_first_line(error)})", where=str(folder.path))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
