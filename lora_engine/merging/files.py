"""Merges adapter files: reads them, merges the adapters, and writes the result with a card that names its parents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_engine.adapters import Adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.source import resolve_base
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.files import FilePath, sha256_file
from lora_engine.formats import Card, read_adapter, write_adapter
from lora_engine.merging.concatenate import check_bases
from lora_engine.merging.merge import merge_adapters
from lora_engine.merging.methods import METHODS, Elementwise
from lora_engine.merging.report import Report
from lora_engine.merging.spec import MergeOptions, Weight, parse_options


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
        weights: One weight per file: a number, or numbers by pattern over module names.
        output: The file to write, in the native format.
        method: Name of a merge method.
        options: Options of the method; None means the defaults. See `merging.methods`.
        seed: Random seed of the methods that draw.
        base: A name for `resolve_base`; loaded only if an adapter or the method needs it.
        dataset: A captioned dataset, required by methods that learn the weights.
        work: Cache folder of such a method; None means a temporary one.

    Returns:
        Kind, rank and retained energy of each module of the result.

    Raises:
        AdapterError: A file is incomplete, or the adapters are for different bases, or not for `base`.
        SettingsError: The method or an option is unknown, the number of weights is wrong, or the base or dataset is
            missing.
    """
    parsed = options if isinstance(options, MergeOptions) else parse_options(method, options)
    if dataset is not None and not learns(parsed):
        learning = ", ".join(name for name, entry in METHODS.items() if entry.learn)
        raise SettingsError(f"method {parsed.name!r} takes no dataset", allowed=learning, remedy="leave it out")
    adapters, cards = zip(*(read_adapter(file) for file in files), strict=True)
    check_bases(adapters, weights)
    model = load_base_if_read(adapters, parsed, base)
    final_weights = _learn(adapters, weights, parsed, model, dataset, work, seed) if learns(parsed) else weights
    merged, report = merge_adapters(adapters, final_weights, parsed, seed=seed, base=model)
    titles = [card.title or file.stem for card, file in zip(cards, files, strict=True)]
    parents = [f"{title} sha256:{sha256_file(file)}" for title, file in zip(titles, files, strict=True)]
    recipe = {"parents": parents, **merge_recipe(parsed, seed, final_weights, report)}
    card = merged_card(cards, titles, weights, method, recipe)
    write_adapter(output, merged, card=card)
    return report


def merged_card(
    cards: Sequence[Card],
    titles: Sequence[str],
    weights: Sequence[Weight],
    method: str,
    recipe: Mapping[str, Any],
) -> Card:
    """Returns the card of a merged adapter: how it was merged, and the facts that all parents share.

    Args:
        cards: Cards of the parents.
        titles: Titles of the parents.
        weights: One weight per parent.
        method: Name of the merge method.
        recipe: Further entries of the recipe.
    """
    triggers = dict.fromkeys(card.trigger for card in cards if card.trigger)
    licenses = {card.license for card in cards}
    return Card(
        title=" + ".join(_shown(weight, title) for weight, title in zip(weights, titles, strict=True)),
        base=cards[0].base,
        base_fingerprint=cards[0].base_fingerprint,
        trigger=", ".join(triggers) or None,
        recipe={"method": method, "weights": list(weights), **recipe},
        data=sorted({digest for card in cards for digest in card.data}),
        license=licenses.pop() if len(licenses) == 1 else None,
        resolution=_shared(card.resolution for card in cards),
        prediction=_shared(card.prediction for card in cards),
    )


def _shared(values: Iterable[str | None]) -> str | None:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _shown(weight: Weight, title: str) -> str:
    return f"{title} by blocks" if isinstance(weight, Mapping) else f"{weight:g} {title}"


def merge_recipe(options: MergeOptions, seed: int, weights: Sequence[Weight], report: Report) -> dict[str, Any]:
    """Returns the entries of a recipe that repeat a merge: options that are not defaults, the seed, learned weights."""
    recipe: dict[str, Any] = {}
    settings = options.model_dump(mode="json", exclude={"method"}, exclude_defaults=True)
    if settings:
        recipe["options"] = settings
    method = METHODS[options.name]
    if isinstance(method, Elementwise) and method.draws:
        recipe["seed"] = seed
    if learns(options):
        recipe |= {"learned_weights": list(weights), "seed": seed}
    if report.retained < 1.0:
        recipe["retained_energy"] = round(report.retained, 6)
    return recipe


def load_base_if_read(adapters: Sequence[Adapter], options: MergeOptions, base: FilePath | None) -> BaseModel | None:
    """Loads the base if a delta or the method reads its weights, else returns None.

    Raises:
        AdapterError: The adapters are for another base.
        SettingsError: The method needs the base, and there is none.
    """
    learned = learns(options)
    if not learned and not any(delta.reads_base for adapter in adapters for delta in adapter.modules.values()):
        return None
    if base is None:
        if learned:
            remedy = "pass the base that the adapters are for"
            raise SettingsError(f"method {options.name!r} needs the base", remedy=remedy)
        return None  # the merge raises an error that names the module
    source = resolve_base(base)
    for adapter in adapters:
        for noun, expected, actual in (
            ("family", adapter.base, source.family),
            ("base model", adapter.fingerprint, source.fingerprint()),
        ):
            if expected and expected != actual:
                raise AdapterError(
                    f"an adapter is for {noun} {expected!r}, and the base is {actual!r}",
                    allowed="the base that the adapters were trained for",
                    remedy="name that base",
                )
    # To read the weights, no accelerator is needed.
    return load_base(source) if learned else load_base(source, device="cpu")


def learns(options: MergeOptions) -> bool:
    """Returns True if the method learns the weights, from a base and captioned images."""
    return METHODS[options.name].learn is not None


def _learn(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    options: MergeOptions,
    base: BaseModel | None,
    dataset: Path | None,
    work: Path | None,
    seed: int,
) -> Sequence[Weight]:
    learn = METHODS[options.name].learn
    if base is None or dataset is None or learn is None:
        raise SettingsError(
            f"method {options.name!r} needs images with captions", remedy="pass the dataset to learn the weights on"
        )
    return learn(adapters, weights, base, dataset, work, options, seed)
