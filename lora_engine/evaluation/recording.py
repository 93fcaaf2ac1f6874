"""Writes the images of an evaluation and describes what it was made of, for `report.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_engine.data.pixels import write_png
from lora_engine.evaluation.evidence import BASE, CANDIDATE, Evidence, ImageSet, RequestSet
from lora_engine.evaluation.plan import EvaluationPlan

# Kind in `report.json` -> set of requests, largest number of samples.
_SAMPLES: dict[str, tuple[RequestSet, int]] = {
    "paired": ("reference", 8),
    "asked": ("with_trigger", 8),
    "unasked": ("without_trigger", 4),
    "class": ("of_class", 4),
    "unrelated": ("unrelated", 4),
}


def describe_plan(plan: EvaluationPlan) -> dict[str, Any]:
    """Returns the parts of the report that the plan decides."""
    return {
        "measured_on": plan.measured_on,
        "sizes": [list(size) for size in plan.sizes],
        "left_out": [asdict(item) for item in plan.left_out],
        "chosen": plan.chosen.model_dump(mode="json", by_alias=True) if plan.chosen else None,
        "trigger": plan.trigger,
        "class_word": plan.class_word,
    }


def write_samples(evidence: Evidence, out: Path) -> list[dict[str, Any]]:
    """Writes a few images of each kind by every model to `pictures/`; returns their entries in the report."""
    shown: set[str] = set()
    samples: list[dict[str, Any]] = []
    for kind, (name, limit) in _SAMPLES.items():
        for images in [item for item in evidence.sets.get(name, ()) if item.request.prompt not in shown][:limit]:
            shown.add(images.request.prompt)
            samples.append(_write_sample(kind, len(samples), images, out))
    return samples


def write_images(evidence: Evidence, out: Path, limit: int) -> dict[str, Any]:
    """Writes the generated images to `images/`, each once, up to a limit.

    Returns:
        Their number, the number that was written, and one entry per image: its prompt, seed and size, and the file of
        each model.
    """
    entries: list[dict[str, Any]] = []
    total = written = 0
    for prompt, seed, size, images in _distinct(evidence):
        total += len(images)
        files: dict[str, str] = {}
        for position, (role, image) in enumerate(images.items()):
            if written < limit:
                files[role] = f"images/{len(entries):05d}-{position}.png"
                write_png(out / files[role], _to_pixels(image))
                written += 1
        entries.append({"prompt": prompt, "seed": seed, "size": list(size), "files": files})
    return {"count": total, "kept": written, "entries": entries}


def _distinct(evidence: Evidence) -> Iterator[tuple[str, int, tuple[int, int], Mapping[str, Tensor]]]:
    seen: set[tuple[str, int, tuple[int, int]]] = set()
    for images in (item for sets in evidence.sets.values() for item in sets):
        request = images.request
        for position, seed in enumerate(request.seeds):
            key = (request.prompt, seed, request.size)
            if key not in seen:
                seen.add(key)
                yield *key, {role: drawn[position] for role, drawn in images.images.items()}


def _write_sample(kind: str, index: int, images: ImageSet, out: Path) -> dict[str, Any]:
    pixels: dict[str, Tensor | None] = {
        "base": _to_pixels(images.images[BASE][0]),
        "adapter": _to_pixels(images.images[CANDIDATE][0]),
        "reference": images.reference,
    }
    sample: dict[str, Any] = {"kind": kind, "prompt": images.request.prompt, "seed": images.request.seeds[0]}
    for role, values in pixels.items():
        sample[role] = f"pictures/{index:02d}-{role}.png" if values is not None else None
        if values is not None:
            write_png(out / sample[role], values)
    others = [role for role in images.images if role not in (BASE, CANDIDATE)]
    if others:
        sample["others"] = {
            role: f"pictures/{index:02d}-other{number}.png" for number, role in enumerate(others, start=1)
        }
        for role, file in sample["others"].items():
            write_png(out / file, _to_pixels(images.images[role][0]))
    return sample


def _to_pixels(image: Tensor) -> Tensor:
    return image.float() / 127.5 - 1.0
