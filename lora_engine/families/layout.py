"""Reads the layout of a diffusers folder: the files of the base, all of which must exist.

Torch-free; reads no weights, only names, `model_index.json` and the indices of sharded weights. Excludes pickled
weights (`.bin`, `.ckpt`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.documents import read_json_object
from lora_engine.errors import BaseModelError
from lora_engine.families import Family, Pipeline, families, find_pipeline
from lora_engine.files import is_file_name

INDEX = "model_index.json"
_STEMS = dict.fromkeys(("unet", "transformer", "vae"), "diffusion_pytorch_model")
_VARIANTS = (None, "fp16")


@dataclass(frozen=True)
class Layout:
    """The files of one base.

    Attributes:
        family: The family of its adapters.
        pipeline: Its pipeline.
        index: The content of `model_index.json`.
        variants: Variant of the weight files (None or `fp16`) by component.
        files: All files of the base, relative to the folder, sorted.
    """

    family: Family
    pipeline: Pipeline
    index: dict[str, Any]
    variants: dict[str, str | None]
    files: tuple[str, ...]


def read_layout(folder: Path) -> Layout:
    """Reads the layout of a diffusers folder.

    Raises:
        BaseModelError: Not a diffusers folder, an unknown family, a missing part, or weights only as pickles.
    """
    family, pipeline, index = read_pipeline(folder)
    files: list[str] = [INDEX]
    variants: dict[str, str | None] = {}
    for component in pipeline.components:
        path = folder / component
        if component in pipeline.optional and _is_null(index.get(component)):
            continue
        if not path.is_dir():
            raise BaseModelError(
                f"the component {component!r} is missing",
                where=str(folder),
                allowed=f"a folder with {', '.join(pipeline.components)}",
                remedy="download or save the base again",
            )
        if component == "scheduler":
            names: Sequence[str] = [_required(path, "scheduler_config.json")]
        elif component.startswith("tokenizer"):
            names = _tokenizer_files(path)
        else:
            variants[component], names = find_component(path, component)
        files += [f"{component}/{name}" for name in names]
    return Layout(family, pipeline, index, variants, tuple(sorted(files)))


def find_component(folder: Path, component: str) -> tuple[str | None, tuple[str, ...]]:
    """Returns the variant of the weights of a component, and the names of its configuration and weights.

    Args:
        folder: The folder of the component.
        component: Its name in `model_index.json`.

    Raises:
        BaseModelError: A file is missing, or the weights are pickles.
    """
    variant, weights = find_weights(folder, _STEMS.get(component, "model"))
    return variant, (_required(folder, "config.json"), *weights)


def read_pipeline(folder: Path) -> tuple[Family, Pipeline, dict[str, Any]]:
    """Returns family, pipeline and index of a diffusers folder; reads `model_index.json` only.

    Raises:
        BaseModelError: Not a diffusers folder, or an unknown family.
    """
    index = _read_json(folder / INDEX)
    check_components(index, folder / INDEX)
    found = find_pipeline(str(index.get("_class_name")))
    if found is None:
        known = ", ".join(pipeline.name for family in families.values() for pipeline in family.pipelines)
        raise BaseModelError(f"unknown pipeline {index.get('_class_name')!r}", where=str(folder / INDEX), allowed=known)
    return *found, index


def check_components(index: Iterable[str], path: Path) -> None:
    """Raises an error if the name of a component, which is that of its subfolder, is a path.

    Args:
        index: The names in `model_index.json`.
        path: The file.

    Raises:
        BaseModelError: A name is not that of a folder.
    """
    invalid = [name for name in index if not is_file_name(name)]
    if invalid:
        raise BaseModelError(
            f"invalid component {invalid[0][:80]!r}",
            where=str(path),
            allowed="names of subfolders",
            remedy="do not use this model unless you know where it comes from",
        )


def download_patterns(variant: str | None) -> list[str]:
    """Returns patterns for the files of a hub repository that a base needs; safetensors only.

    Args:
        variant: Variant of the weights; None takes the files without a variant.
    """
    middle = f".{variant}" if variant else ""
    weights = [
        f"*/{stem}{ending}"
        for stem in ("diffusion_pytorch_model", "model")
        for ending in (
            f"{middle}.safetensors",
            f"{middle}-?????-of-?????.safetensors",
            f"-?????-of-?????{middle}.safetensors",
            f".safetensors.index{middle}.json",
        )
    ]
    parts = sorted({part for family in families.values() for entry in family.pipelines for part in entry.components})
    settings = [f"{part}/{name}" for part in parts for name in ("*config.json", "vocab.json", "merges.txt")]
    return [INDEX, *settings, "tokenizer*/*.json", "tokenizer*/*.model", "tokenizer*/*.jinja", *weights]


def text_encoder_of(tokenizer: str) -> str:
    """Returns the name of the text encoder whose tokens a tokenizer makes, such as `text_encoder_2`."""
    return tokenizer.replace("tokenizer", "text_encoder")


def _is_null(entry: Any) -> bool:
    return entry is None or (isinstance(entry, list) and not any(entry))


def find_weights(folder: Path, stem: str) -> tuple[str | None, list[str]]:
    """Returns the variant (None or `fp16`) and the files of the weights in a folder: safetensors, whole or in shards.

    Raises:
        BaseModelError: There are none, only pickles, or the shards are incomplete.
    """
    for variant in _VARIANTS:
        middle = f".{variant}" if variant else ""
        single = f"{stem}{middle}.safetensors"
        if (folder / single).is_file():
            return variant, [single]
        index = f"{stem}.safetensors.index{middle}.json"
        if (folder / index).is_file():
            return variant, [index, *_shards(folder, index)]
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in {".bin", ".ckpt", ".pt", ".pth"})
    if pickled:
        raise BaseModelError(
            f"the weights exist only as pickles ({', '.join(pickled[:3])}), which can run code when they are read",
            where=str(folder),
            allowed=f"{stem}.safetensors",
            remedy="use a revision with safetensors, or convert the weights once in a sandbox",
        )
    packed = sorted(path.name for path in folder.glob("*.gguf"))
    if packed:
        raise BaseModelError(
            f"the weights exist only as GGUF ({', '.join(packed[:3])}), whose blocks of quantized weights are not read",
            where=str(folder),
            allowed=f"{stem}.safetensors",
            remedy="use the bf16, fp16 or fp8 safetensors files of the same model",
        )
    raise BaseModelError(
        "there are no weights",
        where=str(folder),
        allowed=f"{stem}.safetensors",
        remedy="download or save the base again",
    )


def _shards(folder: Path, index: str) -> list[str]:
    weight_map = _read_json(folder / index).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    invalid = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if not names or invalid:
        raise BaseModelError(
            f"invalid shard names {', '.join(map(repr, invalid))}" if invalid else "names no shards of weights",
            where=str(folder / index),
            allowed="safetensors files in the same folder",
        )
    return [_required(folder, name) for name in names]


def _tokenizer_files(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in {".json", ".txt", ".model", ".jinja"})
    if not {"tokenizer.json", "spiece.model"} & set(names):
        _required(folder, "vocab.json")
        _required(folder, "merges.txt")
    return names


def _required(folder: Path, name: str) -> str:
    if not (folder / name).is_file():
        raise BaseModelError(
            f"the file {name!r} is missing", where=str(folder), remedy="download or save the base again"
        )
    return name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_json_object(path, BaseModelError)
    except FileNotFoundError:
        raise BaseModelError(
            f"there is no {path.name}",
            where=str(path.parent),
            allowed="a diffusers folder: model_index.json and a subfolder per component",
        ) from None
    return content
