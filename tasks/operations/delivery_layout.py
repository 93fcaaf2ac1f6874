"""Makes the files of a version as ComfyUI, A1111 or the Hugging Face hub expect them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_engine.files import atomic_write
from registry.entities import AdapterVersion
from registry.policy.rights import inherited_license
from registry.versions.versions import Versions
from tasks.operations.adapter_files import convert_adapter
from tasks.operations.delivery_file import DeliveryLayout

if TYPE_CHECKING:
    from registry.documents.facts import Facts

LAYOUT_REVISION = 1
"""Raise it whenever the same version gives other files; targets are then written again."""
_FORMATS: Mapping[DeliveryLayout, str] = {"comfyui": "comfyui", "a1111": "kohya", "huggingface": "diffusers"}
_WEIGHTS = "pytorch_lora_weights.safetensors"
_FRONT = "---\n"
_SD1 = {"sd15", "stable-diffusion-v1-4", "stable-diffusion-v1-5"}


def build_layout(
    versions: Versions, version: AdapterVersion, layout: DeliveryLayout, path: str, folder: Path
) -> list[str]:
    """Writes the files of a version into a folder, with their paths in the target.

    Args:
        versions: The registry.
        version: The version; its bytes are verified.
        layout: The program that reads the files.
        path: Path of the adapter file in the target; for `huggingface` that of its folder.
        folder: An empty folder.

    Returns:
        The paths of the files, the adapter file first.

    Raises:
        AdapterError: The format cannot hold the adapter.
        RegistryError: The bytes are damaged.
    """
    from registry.documents.gather import gather_facts

    adapter = folder / ".registered.safetensors"
    main = path if layout != "huggingface" else f"{path}/{_WEIGHTS}"
    output = folder / main
    output.parent.mkdir(parents=True, exist_ok=True)
    versions.checkout_adapter(version, adapter)
    convert_adapter(
        adapter,
        output,
        _FORMATS[layout],
        base=None,
        dtype=None,
        approximation=None,
        license_expression=inherited_license(versions, version.artifact),
    )
    adapter.unlink()
    facts = gather_facts(versions, version)
    if layout == "huggingface":
        _write_repository(folder / path, facts)
    else:
        _write_beside(output, facts, layout)
    others = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return [main, *sorted(name for name in others if name != main)]


def _write_beside(output: Path, facts: Facts, layout: DeliveryLayout) -> None:
    """Writes the preview that the UI shows, and for A1111 the metadata of its card."""
    if facts.samples:
        suffix = ".preview.png" if layout == "a1111" else ".png"
        atomic_write(output.with_suffix(suffix), facts.samples[0].adapter)
    if layout == "a1111":
        text = json.dumps(_user_metadata(facts), indent=2, ensure_ascii=False)
        atomic_write(output.with_suffix(".json"), text.encode())


def _user_metadata(facts: Facts) -> dict[str, Any]:
    """Returns what A1111 stores when a user edits the card of a LoRA (extensions-builtin/Lora)."""
    base = facts.base.rpartition("/")[2].partition("@")[0]
    generation = {"sd": "SD1" if base in _SD1 else None, "sdxl": "SDXL"}
    metadata = {
        "description": f"{facts.title} ({facts.version.ref})",
        "activation text": ", ".join(facts.triggers),
        "preferred weight": _preferred_weight(facts),
        "notes": f"sha256 {facts.version.sha256}; license: {facts.license or 'not stated'}",
    }
    known = generation.get(facts.family)
    return metadata | ({"sd version": known} if known else {})


def _preferred_weight(facts: Facts) -> float:
    """Returns the denoiser's recommended weight, of a schedule the largest; 1, which was evaluated, without one."""
    from lora_engine.inference.prompts.tags import parse_arguments

    recommended = facts.version.card.get("recommended")
    if not recommended:
        return 1.0
    points = parse_arguments(facts.version.name, str(recommended)).denoiser.points
    return max((weight for _, weight in points), key=abs)


def _write_repository(folder: Path, facts: Facts) -> None:
    """Writes the model card with its front matter, and the sample images that it shows."""
    from registry.documents.card import render_markdown

    widget = []
    for index, sample in enumerate(facts.samples):
        name = f"images/{index}.png"
        atomic_write(folder / name, sample.adapter)
        widget.append({"text": sample.prompt, "output": {"url": name}})
    card = render_markdown(facts)
    if widget:
        _, matter, rest = card.split(_FRONT, 2)
        front = yaml.safe_load(matter) | {"widget": widget}
        card = f"{_FRONT}{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}{_FRONT}{rest}"
    atomic_write(folder / "README.md", card.encode())
