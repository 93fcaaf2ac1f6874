"""Resolves the name of an embedder to a folder, a type and a fingerprint. Torch-free; loads no weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.bases.source import TINY, BaseSource, split_hub_id
from lora_engine.documents import read_json_object
from lora_engine.errors import BaseModelError, NotDownloadedError, SettingsError
from lora_engine.families import families
from lora_engine.files import canonical_json, expand_home, is_present_folder, sha256_bytes, sha256_file

NO_EMBEDDER = "none"
"""The name that leaves out the metrics of an embedder."""
_PATTERNS = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json", "*token*", "*.txt"]
_ALLOWED = "a folder that save_pretrained wrote, or a hub id (`owner/name` or `owner/name@revision`)"


@dataclass(frozen=True)
class EmbedderType:
    """A model type of transformers that embeds images.

    Attributes:
        model: Name of the model class.
        processor: Name of the image processor class for Pillow.
        reads_text: True if it embeds texts too.
    """

    model: str
    processor: str
    reads_text: bool


EMBEDDER_TYPES: Mapping[str, EmbedderType] = {
    "clip": EmbedderType("CLIPModel", "CLIPImageProcessorPil", True),
    "siglip": EmbedderType("SiglipModel", "SiglipImageProcessorPil", True),
    "siglip2": EmbedderType("Siglip2Model", "Siglip2ImageProcessorPil", True),
    "dinov2": EmbedderType("Dinov2Model", "BitImageProcessorPil", False),
    "dinov2_with_registers": EmbedderType("Dinov2WithRegistersModel", "BitImageProcessorPil", False),
}
"""`model_type` in `config.json` -> its classes."""


@dataclass(frozen=True)
class EmbedderSource:
    """An embedder on this machine.

    Attributes:
        name: Name that `resolve_embedder` finds it by on this machine.
        label: Name for reports, without paths.
        folder: The folder with its weights and configuration.
        model_type: A name among `EMBEDDER_TYPES`.
    """

    name: str
    label: str
    folder: Path
    model_type: str

    @property
    def reads_text(self) -> bool:
        """Returns True if it embeds texts too."""
        return EMBEDDER_TYPES[self.model_type].reads_text

    def fingerprint(self) -> str:
        """Returns the SHA-256 over the names and digests of its files: weights, configuration, vocabulary."""
        files = [path for path in self.folder.iterdir() if path.suffix in {".safetensors", ".json", ".txt"}]
        state = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files))
        return _fingerprint(state)


def resolve_embedder(name: str) -> EmbedderSource:
    """Finds an embedder; downloads it if necessary.

    Args:
        name: `tiny` for the one of the embedded base, a folder, or a hub id, optionally with `@revision`.

    Raises:
        SettingsError: There is no such embedder, it has no weights, or it is of another type.
    """
    if name == TINY:
        from lora_engine.bases.tiny import folder as tiny_folder

        return _source(TINY, f"{TINY}/clip", tiny_folder() / "clip")
    path = expand_home(name)
    if is_present_folder(path):
        return _source(str(path.resolve()), path.resolve().name, path.resolve())
    hub_id = split_hub_id(name)
    if hub_id is None:
        raise SettingsError(f"unknown embedder {name!r}: neither a folder nor a hub id", allowed=_ALLOWED)
    from lora_engine.bases.hub import fetch_files

    try:
        folder, commit = fetch_files(*hub_id, _PATTERNS, _require_configuration, "embedder")
    except NotDownloadedError:
        raise
    except BaseModelError as error:
        raise SettingsError(error.problem, allowed=_ALLOWED, remedy=error.remedy) from error
    pinned = f"{hub_id[0]}@{commit}"
    return _source(pinned, pinned, folder)


def _require_configuration(folder: Path) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise BaseModelError(f"has no {name}", where=str(folder))


@dataclass(frozen=True)
class ChosenEmbedders:
    """The embedders of an evaluation.

    Attributes:
        text: The embedder of images and texts; None if there is none.
        image: The embedder of images only; None if there is none.
        missing: Why there is none, by setting: `embedder`, `image_embedder`; those that were not asked for are absent.
    """

    text: EmbedderSource | None
    image: EmbedderSource | None
    missing: Mapping[str, str]


def choose_embedders(embedder: str | None, image_embedder: str | None, base: BaseSource) -> ChosenEmbedders:
    """Finds the embedders for a base: the named ones, or the defaults of its family.

    The embedded one judges images of the embedded base only: it has seen nothing but its drawings.

    Args:
        embedder: See `EvaluateSettings`.
        image_embedder: See `EvaluateSettings`.
        base: The base.

    Raises:
        SettingsError: A named embedder cannot be used. A default one that is not at hand is in `missing` instead.
    """
    is_tiny = base.name == TINY
    family = families[base.family]
    text_default = TINY if is_tiny else family.embedder
    image_default = "" if is_tiny else family.image_embedder
    found: dict[str, EmbedderSource | None] = {}
    missing: dict[str, str] = {}
    for setting, name, default in (
        ("embedder", embedder, text_default),
        ("image_embedder", image_embedder, image_default),
    ):
        found[setting] = None
        if name == TINY and not is_tiny:
            raise SettingsError(
                f"{setting} is 'tiny', which has seen nothing but the drawings of the embedded base",
                allowed=_ALLOWED,
                remedy=f"leave it out for the default of the family, {default}",
            )
        if name == NO_EMBEDDER or not (name or default):
            continue
        try:
            found[setting] = _of_kind(setting, resolve_embedder(name or default))
        except SettingsError as error:
            if name:
                raise
            missing[setting] = f"the default {default} is not at hand: {error.problem}"
    return ChosenEmbedders(found["embedder"], found["image_embedder"], missing)


def _of_kind(setting: str, source: EmbedderSource) -> EmbedderSource:
    if setting == "embedder" and not source.reads_text:
        raise SettingsError(
            f"embedder {source.label!r} is a {source.model_type}, which embeds no texts",
            allowed=", ".join(name for name, kind in EMBEDDER_TYPES.items() if kind.reads_text),
            remedy="name it as image_embedder",
        )
    return source


def _source(name: str, label: str, folder: Path) -> EmbedderSource:
    config = read_configuration(folder / "config.json")
    found = config.get("model_type") if config else None
    if not isinstance(found, str) or found not in EMBEDDER_TYPES:
        raise SettingsError(
            f"{label!r} is not an embedder: "
            + ("it has no config.json" if config is None else f"its config.json is of the type {found!r}"),
            where=str(folder),
            allowed=f"a model of type {', '.join(EMBEDDER_TYPES)}",
            remedy="give a folder that save_pretrained of such a model wrote, with its tokenizer",
        )
    if not any(folder.glob("*.safetensors")):
        raise SettingsError(
            f"the embedder {label!r} has no weights: no .safetensors file",
            where=str(folder),
            remedy="download or save it again; for a hub id, name a @revision that has model.safetensors",
        )
    return EmbedderSource(name, label, folder, found)


def read_configuration(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file of an embedder; None if it is missing."""
    try:
        content: dict[str, Any] = read_json_object(path, SettingsError)
    except FileNotFoundError:
        return None
    return content


@functools.lru_cache(maxsize=64)
def _fingerprint(state: tuple[tuple[Path, int, int], ...]) -> str:
    # Hashes gigabytes once per process, unless a file changes.
    return sha256_bytes(canonical_json([[path.name, sha256_file(path)] for path, _, _ in state]))
