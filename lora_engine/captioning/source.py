"""Resolves the name of a model that captions images to a folder and a fingerprint. Torch-free; loads no weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_engine.bases.hub import fetch_files
from lora_engine.bases.source import digest_files, split_hub_id
from lora_engine.captioning.vlm_families import VLM_FAMILIES
from lora_engine.data.text_files import printable
from lora_engine.documents import read_json_object
from lora_engine.errors import BaseModelError
from lora_engine.families.layout import find_weights
from lora_engine.files import FilePath, expand_home, is_present_folder

_TEXTS = ("*.json", "*.jinja", "*.txt", "*.model")
_WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
_ADAPTER = "adapter_config.json"
TAGGER_FILES = ("model.onnx", "selected_tags.csv")
"""The files of a tagger."""


@dataclass(frozen=True)
class CaptionerModel:
    """A complete model on this machine.

    Attributes:
        name: The name that the user gave, without the revision.
        folder: Its folder.
        revision: The commit of a model from the hub; None for a local folder.
        files: Names of the files that it is loaded from, sorted.
    """

    name: str
    folder: Path
    revision: str | None
    files: tuple[str, ...]

    @property
    def label(self) -> str:
        """The name for captions and records: without paths, the same on every machine."""
        return f"{self.name}@{self.revision[:12]}" if self.revision else printable(self.folder.name)

    @property
    def pinned(self) -> str:
        """The name that finds these files again on this machine: with the revision, or as a full path."""
        return f"{self.name}@{self.revision}" if self.revision else str(self.folder)

    def fingerprint(self) -> str:
        """Returns the SHA-256 over the names and digests of its files: weights and configuration."""
        return digest_files(self.folder, self.files)


def resolve_vlm(name: FilePath) -> CaptionerModel:
    """Finds a vision-language model; downloads it if necessary.

    Args:
        name: A folder that `save_pretrained` of transformers wrote, or a hub id, optionally with `@revision`.

    Raises:
        BaseModelError: There is no such model, it brings code of its own, or its weights are missing or pickles.
    """
    return _resolve(name, [*_TEXTS, *_WEIGHTS], list_vlm_files, "captioner")


def resolve_vision_model(name: FilePath) -> CaptionerModel:
    """Finds a model of transformers that marks or enlarges images; see `resolve_vlm` for names and errors."""
    return _resolve(name, [*_TEXTS, *_WEIGHTS], list_vlm_files, "model")


def resolve_judge(name: FilePath) -> CaptionerModel:
    """Finds a vision-language model that answers questions about images; see `resolve_vlm` for names.

    Raises:
        BaseModelError: See `resolve_vlm`, or the model follows no instruction.
    """
    source = _resolve(name, [*_TEXTS, *_WEIGHTS], list_vlm_files, "judge")
    found = read_json_object(source.folder / "config.json", BaseModelError).get("model_type")
    family = VLM_FAMILIES.get(str(found))
    if family is None or not family.follows_instructions:
        raise BaseModelError(
            f"{source.label!r} cannot judge: a model of the type {found!r} answers no questions",
            where=str(source.folder),
            allowed=", ".join(kind for kind, entry in VLM_FAMILIES.items() if entry.follows_instructions),
            remedy="choose a chat model of these types",
        )
    return source


def resolve_tagger(name: FilePath) -> CaptionerModel:
    """Finds a tagger; downloads it if necessary.

    Args:
        name: A folder with `model.onnx` and `selected_tags.csv`, or a hub id, optionally with `@revision`.

    Raises:
        BaseModelError: There is no such model, or a file is missing.
    """
    return _resolve(name, list(TAGGER_FILES), list_tagger_files, "tagger")


def list_vlm_files(folder: Path) -> tuple[str, ...]:
    """Returns the names of the files that a vision-language model is loaded from.

    Raises:
        BaseModelError: The folder has no configuration, an adapter, code of its own, or no safetensors.
    """
    if not (folder / "config.json").is_file():
        raise BaseModelError(
            "there is no config.json",
            where=str(folder),
            allowed="a folder that `save_pretrained` of transformers wrote",
            remedy="download or save the model again",
        )
    if (folder / _ADAPTER).is_file():
        raise BaseModelError(
            f"the folder has an {_ADAPTER}, which names another model to load",
            where=str(folder),
            allowed="whole models",
            remedy="merge the adapter into its model with PEFT, and save that",
        )
    texts = sorted({path.name for pattern in _TEXTS for path in folder.glob(pattern) if path.is_file()})
    code = sorted(path.name for path in folder.glob("*.py"))
    for name in texts:
        if name.endswith("config.json") and "auto_map" in read_json_object(folder / name, BaseModelError):
            code.append(f"auto_map in {name}")
    if code:
        raise BaseModelError(
            f"the model brings code of its own ({', '.join(code[:3])}), which is not run",
            where=str(folder),
            allowed="models whose classes transformers has",
            remedy="use a converted repository, such as florence-community/Florence-2-base for Florence-2",
        )
    _, weights = find_weights(folder, "model")
    return tuple(sorted({*texts, *weights}))


def list_tagger_files(folder: Path) -> tuple[str, ...]:
    """Returns the names of the files of a tagger.

    Raises:
        BaseModelError: One is missing.
    """
    missing = [name for name in TAGGER_FILES if not (folder / name).is_file()]
    if missing:
        raise BaseModelError(
            f"the tagger has no {' and no '.join(missing)}",
            where=str(folder),
            allowed=f"a folder with {' and '.join(TAGGER_FILES)}",
            remedy="download it again, such as SmilingWolf/wd-vit-tagger-v3",
        )
    return TAGGER_FILES


def _resolve(
    name: FilePath, patterns: list[str], files: Callable[[Path], tuple[str, ...]], noun: str
) -> CaptionerModel:
    path = expand_home(name)
    if is_present_folder(path):
        folder = path.resolve()
        return CaptionerModel(str(name), folder, None, files(folder))
    hub_id = split_hub_id(name)
    if hub_id is None:
        raise BaseModelError(
            f"unknown {noun} {str(name)!r}: neither a folder nor a hub id",
            allowed="a folder, or a hub id (`owner/name` or `owner/name@revision`)",
            remedy="check the path",
        )
    folder, commit = fetch_files(*hub_id, patterns, files, noun)
    return CaptionerModel(hub_id[0], folder, commit, files(folder))
