"""What the verbs on files ask of the engine: adapters by file or by registered name, pictures by prompt."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from flows.errors import SpecError
from lora_engine.errors import AdapterError
from registry.home import Home
from tasks.progress import StepEvent, publish

if TYPE_CHECKING:
    from lora_engine.adapters import Adapter
    from lora_engine.formats import Card


def open_adapter(file: Path, base: str | None) -> tuple[Adapter, Card]:
    """Reads and validates an adapter file.

    Args:
        file: The file, or a PEFT folder.
        base: A base whose module names and shapes it must fit; None trusts the names in the file.

    Raises:
        AdapterError: Not an adapter, not whole, or not for that base.
    """
    from lora_engine.formats import read_adapter

    if not file.exists():
        raise AdapterError("there is no such file", where=str(file), remedy="check the path")
    if base is None:
        return read_adapter(file)
    from lora_engine.adapters import module_shapes
    from lora_engine.bases.base import load_base

    return read_adapter(file, module_shapes(load_base(base)))


def parse_weighted(text: str) -> tuple[Path, float]:
    """`file` or `file:weight`; a colon that is part of the file's name counts as such if the file exists."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise SpecError(f"{text!r}", allowed="FILE or FILE:WEIGHT, such as a.safetensors:0.7") from None


def draw(
    prompt: str,
    folder: Path,
    home: Path,
    *,
    base: str,
    count: int,
    seed: int,
    steps: int,
    guidance: float,
    size: int | None,
) -> list[Path]:
    """Draws pictures and writes them as PNG files, named by their seeds.

    Args:
        prompt: May name adapters: `<lora:name@production:0.7>` or `<lora:path/to/file.safetensors:0.7>`.
        folder: Where the pictures go.
        home: The home whose registry knows the names.
        base: The base model.
        count: How many pictures.
        seed: Of the first; the others count up.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        size: Pixels of a side; None for the base's own.
    """
    from lora_engine.inference.draw import draw_pictures
    from lora_engine.inference.syntax import parse_prompt

    text, named = parse_prompt(prompt)
    with tempfile.TemporaryDirectory() as name:
        adapters = [(_fetch(ref, home, Path(name) / str(index)), weight) for index, (ref, weight) in enumerate(named)]
        return draw_pictures(
            text,
            folder,
            base=base,
            adapters=adapters,
            seeds=range(seed, seed + count),
            steps=steps,
            guidance=guidance,
            size=size,
            progress=lambda done, total, values: publish(StepEvent("generate", "progress", done, total, values)),
        )


def _fetch(ref: str, home: Path, folder: Path) -> Path:
    if "@" not in ref:
        return Path(ref)
    from flows.promote import find_version
    from registry.versions import Versions

    versions, path = Versions(Home.open(home, create=False)), folder / "adapter.safetensors"
    versions.checkout_adapter(find_version(versions, ref), path)
    return path
