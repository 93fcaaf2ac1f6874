"""Merges adapter files: reads them, merges the adapters, and writes the result with a card that names its parents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_engine.adapters import Adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.options import options_of_cards, shared_options
from lora_engine.bases.source import resolve_base
from lora_engine.bases.vae import resolve_vae
from lora_engine.errors import AdapterError, SettingsError, UnknownBaseError
from lora_engine.files import FilePath, sha256_file
from lora_engine.formats import Card, read_adapter, write_adapter
from lora_engine.formats.verbatim import NAMES_KEPT, VerbatimAdapter, read_verbatim, write_verbatim
from lora_engine.merging.concatenate import check_bases
from lora_engine.merging.merge import merge_adapters
from lora_engine.merging.methods import METHODS, Elementwise, parse_options
from lora_engine.merging.report import Report
from lora_engine.merging.spec import MergeOptions, Weight


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
    vae: str | None = None,
) -> Report:
    """Merges adapter files into one.

    If the family of a file is unknown or not supported, the result has the module names, the format and the header of
    the files, which must agree on them.

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
        vae: For such a method, the autoencoder that the adapters were trained with, a name for `resolve_vae`; None is
            the base's own.

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
    try:
        adapters, cards = zip(*(read_adapter(file) for file in files), strict=True)
    except UnknownBaseError:
        if base is not None or learns(parsed):
            raise
        return _merge_verbatim(files, weights, output, parsed, seed)
    check_bases(adapters, weights)
    shared_options(cards)  # before the work
    model = load_base_if_read(adapters, parsed, base)
    if model is not None and learns(parsed):
        model.configure(options_of_cards(cards, vae=resolve_vae(vae) if vae else None))
    final_weights = _learn(adapters, weights, parsed, model, dataset, work, seed) if learns(parsed) else weights
    merged, report = merge_adapters(adapters, final_weights, parsed, seed=seed, base=model)
    recipe = merge_recipe(parsed, seed, final_weights, report)
    write_adapter(output, merged, card=_card_of_files(files, cards, weights, method, recipe))
    return report


def _merge_verbatim(
    files: Sequence[Path], weights: Sequence[Weight], output: Path, options: MergeOptions, seed: int
) -> Report:
    """Merges files whose family is unknown or not supported, module by module under their own names."""
    originals = [read_verbatim(file) for file in files]
    _check_same_names(files, originals)
    merged, report = merge_adapters([original.adapter for original in originals], weights, options, seed=seed)
    cards = [original.card for original in originals]
    card = _card_of_files(files, cards, weights, options.name, merge_recipe(options, seed, weights, report))
    headers = [original.metadata for original in originals]
    shared = {key: text for key, text in headers[0].items() if all(header.get(key) == text for header in headers)}
    write_verbatim(output, replace(originals[0], metadata=shared), merged, card)
    return replace(report, assumed=f"the adapters are for one base; {NAMES_KEPT}, where they agree")


def _check_same_names(files: Sequence[Path], originals: Sequence[VerbatimAdapter]) -> None:
    """Raises if the files cannot be of one base, or name modules differently."""
    first = originals[0]
    for file, other in zip(files, originals, strict=True):
        has_other_family = other.families and first.families and not set(other.families) & set(first.families)
        has_other_names = (other.codec.name, other.key_layout) != (first.codec.name, first.key_layout)
        if has_other_family or has_other_names:
            raise AdapterError(
                "the adapters are for different families of base models"
                if has_other_family
                else "the adapters name modules differently, and for their base family names cannot be converted",
                where=f"{files[0]} and {file}",
                allowed="adapters for one base, in one format",
                remedy="choose adapters of one program, or name the base if it is supported (--base)",
            )


def _card_of_files(
    files: Sequence[Path], cards: Sequence[Card], weights: Sequence[Weight], method: str, recipe: Mapping[str, Any]
) -> Card:
    """Returns the card of an adapter that was merged from files; its recipe names them with their digests."""
    titles = [card.title or file.stem for card, file in zip(cards, files, strict=True)]
    parents = [f"{title} sha256:{_digest_of(file)}" for title, file in zip(titles, files, strict=True)]
    return merged_card(cards, titles, weights, method, {"parents": parents, **recipe})


def _digest_of(path: Path) -> str:
    """Returns the digest of a file, or of the first file of weights in a PEFT folder."""
    weights = sorted(file for file in path.rglob("*") if file.suffix in (".safetensors", ".bin"))
    return sha256_file(weights[0] if path.is_dir() and weights else path)


def merged_card(
    cards: Sequence[Card],
    titles: Sequence[str],
    weights: Sequence[Weight],
    method: str,
    recipe: Mapping[str, Any],
) -> Card:
    """Returns the card of a merged adapter: how it was merged, and the facts that all parents share.

    Raises:
        SettingsError: The parents were trained with different options of the base.

    Args:
        cards: Cards of the parents.
        titles: Titles of the parents.
        weights: One weight per parent.
        method: Name of the merge method.
        recipe: Further entries of the recipe.
    """
    triggers = dict.fromkeys(card.trigger for card in cards if card.trigger)
    return Card(
        title=" + ".join(_shown(weight, title) for weight, title in zip(weights, titles, strict=True)),
        base=cards[0].base,
        base_fingerprint=cards[0].base_fingerprint,
        trigger=", ".join(triggers) or None,
        recipe={"method": method, "weights": list(weights), **shared_options(cards), **recipe},
        data=sorted({digest for card in cards for digest in card.data}),
        license=_all_licenses({card.license for card in cards}),
        resolution=_shared(card.resolution for card in cards),
        prediction=_shared(card.prediction for card in cards),
    )


def _all_licenses(licenses: Set[str | None]) -> str | None:
    """Returns the licenses as one SPDX expression; None if a parent states none."""
    stated = sorted(license_id for license_id in licenses if license_id)
    if len(stated) < max(len(licenses), 1):
        return None
    # OR binds less than AND.
    parts = [f"({text})" if len(stated) > 1 and " OR " in text.upper() else text for text in stated]
    return " AND ".join(parts)


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
