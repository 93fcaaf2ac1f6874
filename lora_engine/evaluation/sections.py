"""Prepares the sections of the report that show details, and folds settings with default values away. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_engine.evaluation.chart import draw_bands, draw_spectra
from lora_engine.evaluation.details import Details, Neighbors
from lora_engine.training.spec import TrainSettings

EmbedFile = Callable[[str], dict[str, Any]]
"""Returns an image of the report by its file name; see `embed_image`."""

_COLORS = 3
"""Number of line styles of the page."""


def detail_sections(details: Details, embed: EmbedFile) -> dict[str, Any]:
    """Returns the values of the templates' sections; those that are empty are not shown.

    Args:
        details: See there.
        embed: Embeds an image file of the report.
    """
    return {
        "neighbors": [_neighbors(entry, embed) for entry in details.neighbors],
        "sweep": _sweep(details, embed),
        "bands": _bands(details),
        "spectra": draw_spectra([module.spectrum for module in details.modules.values()]),
        "modules": sorted(
            ({"name": name, **module.model_dump()} for name, module in details.modules.items()),
            key=lambda module: not module["notes"],
        ),
        "noted": sum(bool(module.notes) for module in details.modules.values()),
        "notes": list(details.notes),
    }


def default_recipe() -> dict[str, Any]:
    """Returns the settings of a training with their defaults; those without a default are missing."""
    return TrainSettings.model_construct().model_dump(mode="json")


def fold_defaults(recipe: Sequence[tuple[str, str]], defaults: Mapping[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Returns a recipe as `set` and `default`: the settings whose value differs from the default, and the others."""
    folded: dict[str, list[tuple[str, str]]] = {"set": [], "default": []}
    for name, value in recipe:
        folded["default" if defaults.get(name) == value else "set"].append((name, value))
    return folded


def _neighbors(entry: Neighbors, embed: EmbedFile) -> dict[str, Any]:
    images = [
        ("with adapter", embed(entry.image), None),
        ("nearest training image", embed(entry.training), entry.training_similarity),
    ]
    if entry.heldout is not None:
        images.append(("nearest held-out image", embed(entry.heldout), entry.heldout_similarity))
    return {"prompt": entry.prompt, "is_copy": entry.is_copy, "images": images}


def _sweep(details: Details, embed: EmbedFile) -> dict[str, Any] | None:
    if details.sweep is None:
        return None
    sweep = details.sweep
    return {
        "zero_is_base": sweep.zero_is_base,
        "strips": [
            {
                "prompt": prompt,
                "images": [(entry.strength, embed(entry.images[index])) for entry in sweep.strengths],
            }
            for index, prompt in enumerate(sweep.prompts)
        ],
        "rows": [entry for entry in sweep.strengths if entry.agreement is not None or entry.likeness is not None],
    }


def _bands(details: Details) -> dict[str, Any] | None:
    if not details.bands:
        return None
    roles = [role for role in details.bands[0].losses if all(role in band.losses for band in details.bands)][:_COLORS]
    chart = draw_bands([((band.low + band.high) / 2, [band.losses[role] for role in roles]) for band in details.bands])
    return {"chart": chart, "roles": roles, "rows": details.bands}
