"""Merging adapter files: reads them, merges what they mean, writes the result with a card that names its parents."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_engine.adapters import Adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.source import resolve_base
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.files import sha256_file
from lora_engine.formats import Card, read_adapter, write_adapter
from lora_engine.merging.concatenate import check_bases
from lora_engine.merging.deltas import needs_base_values
from lora_engine.merging.learned import denoising_losses, learn_weights
from lora_engine.merging.merge import merge_adapters
from lora_engine.merging.methods import METHODS, Elementwise
from lora_engine.merging.report import Report
from lora_engine.merging.spec import Learned, MergeOptions, Weight, parse_options


def merge_files(
    files: Sequence[Path],
    weights: Sequence[Weight],
    output: Path,
    *,
    method: str = "concatenate",
    options: MergeOptions | Mapping[str, Any] | None = None,
    seed: int = 0,
    base: str | None = None,
    dataset: Path | None = None,
    work: Path | None = None,
) -> Report:
    """Merges adapter files into one.

    Args:
        files: At least one adapter file, each readable without its base.
        weights: One weight a file: a number, or numbers by pattern over module names.
        output: The file to write, in the native format.
        method: Name of a merge method.
        options: What is set about the method, if anything; see `merging.spec`.
        seed: Of the methods that draw.
        base: A name for `resolve_base`; loaded only where an adapter or the method needs it.
        dataset: A captioned dataset, which `learned` needs.
        work: Where `learned` keeps its caches; None keeps none.

    Returns:
        What each module of the result keeps.

    Raises:
        AdapterError: A file is not whole, or the adapters are not for the same base, or not for the one given.
        SettingsError: No such method or option, not one weight a file, or a base or dataset is needed and not given.
    """
    chosen = options if isinstance(options, MergeOptions) else parse_options(method, options)
    adapters, cards = zip(*(read_adapter(file) for file in files), strict=True)
    check_bases(adapters, weights)
    model = _base_if_needed(adapters, chosen, base)
    used: Sequence[Weight] = weights
    if isinstance(chosen, Learned):
        used = _learn(adapters, weights, chosen, model, dataset, work, seed)
    merged, report = merge_adapters(adapters, used, chosen, seed=seed, base=model)
    card = merged_card(cards, files, weights, method, _recipe(chosen, seed, used, report))
    write_adapter(output, merged, card=card)
    return report


def merged_card(
    cards: Sequence[Card],
    files: Sequence[Path],
    weights: Sequence[Weight],
    method: str,
    recipe: Mapping[str, Any] | None = None,
) -> Card:
    """What is said of a merged adapter: who its parents are, and all that holds for every one of them.

    Args:
        cards: The parents'.
        files: The parents.
        weights: One a parent.
        method: Of the merge.
        recipe: What else belongs to the recipe.
    """
    titles = [card.title or file.stem for card, file in zip(cards, files, strict=True)]
    triggers = dict.fromkeys(card.trigger for card in cards if card.trigger)
    licenses = {card.license for card in cards}
    return Card(
        title=" + ".join(_shown(weight, title) for weight, title in zip(weights, titles, strict=True)),
        base=cards[0].base,
        base_fingerprint=cards[0].base_fingerprint,
        trigger=", ".join(triggers) or None,
        recipe={
            "method": method,
            "weights": list(weights),
            "parents": [f"{title} sha256:{sha256_file(file)}" for title, file in zip(titles, files, strict=True)],
            **(recipe or {}),
        },
        data=sorted({digest for card in cards for digest in card.data}),
        license=licenses.pop() if len(licenses) == 1 else None,
        resolution=_shared(card.resolution for card in cards),
        prediction=_shared(card.prediction for card in cards),
    )


def _shared(values: Iterable[str | None]) -> str | None:
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _shown(weight: Weight, title: str) -> str:
    return f"{title} by blocks" if isinstance(weight, Mapping) else f"{weight:g} {title}"


def _recipe(options: MergeOptions, seed: int, used: Sequence[Weight], report: Report) -> dict[str, Any]:
    found: dict[str, Any] = {}
    settings = options.model_dump(mode="json", exclude={"method"}, exclude_defaults=True)
    if settings:
        found["options"] = settings
    method = METHODS[options.name]
    if isinstance(method, Elementwise) and method.draws:
        found["seed"] = seed
    if isinstance(options, Learned):
        found |= {"learned_weights": list(used), "seed": seed}
    if report.retained < 1.0:
        found["retained_energy"] = round(report.retained, 6)
    return found


def _base_if_needed(adapters: Sequence[Adapter], options: MergeOptions, base: str | None) -> BaseModel | None:
    learns = isinstance(options, Learned)
    if not learns and not any(needs_base_values(delta) for adapter in adapters for delta in adapter.modules.values()):
        return None
    if base is None:
        if learns:
            raise SettingsError("method 'learned' needs the base", remedy="give the base that the adapters are for")
        return None  # the merge says which module needs it
    source = resolve_base(base)
    for adapter in adapters:
        for noun, theirs, ours in (
            ("family", adapter.base, source.family),
            ("base model", adapter.fingerprint, source.fingerprint()),
        ):
            if theirs and theirs != ours:
                raise AdapterError(
                    f"an adapter is for {noun} {theirs!r}, and the base given is {ours!r}",
                    allowed="the base that the adapters were made for",
                    remedy="name that base",
                )
    # Weights alone are read of it unless it has to compute.
    return load_base(source) if learns else load_base(source, device="cpu")


def _learn(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    options: Learned,
    base: BaseModel | None,
    dataset: Path | None,
    work: Path | None,
    seed: int,
) -> list[Weight]:
    if base is None or dataset is None:
        raise SettingsError(
            "method 'learned' needs pictures with captions", remedy="give the dataset that the weights are learned on"
        )
    with tempfile.TemporaryDirectory() as spare:
        trains_text = any(name.startswith("text_encoder") for adapter in adapters for name in adapter.modules)
        losses = denoising_losses(
            base, dataset, work or Path(spare), seed=seed, timesteps=options.timesteps, trains_text=trains_text
        )
        return list(learn_weights(adapters, weights, base, losses, options))
