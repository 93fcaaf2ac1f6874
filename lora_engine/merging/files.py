"""Merging adapter files: reads them, merges what they mean, writes the result with a card that names its parents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_engine.files import sha256_file
from lora_engine.formats import Card, read_adapter, write_adapter
from lora_engine.merging.methods import METHODS


def merge_files(files: Sequence[Path], weights: Sequence[float], output: Path, *, method: str = "concatenate") -> None:
    """Merges adapter files into one.

    Args:
        files: At least one adapter file, each readable without its base.
        weights: One weight a file.
        output: The file to write, in the native format.
        method: Name of a merge method.

    Raises:
        AdapterError: A file is not whole, or the adapters are not for the same base.
        SettingsError: No such method, or not one weight a file.
    """
    merge = METHODS[method]
    adapters, cards = zip(*(read_adapter(file) for file in files), strict=True)
    merged = merge(adapters, weights)
    write_adapter(output, merged, card=merged_card(cards, files, weights, method))


def merged_card(cards: Sequence[Card], files: Sequence[Path], weights: Sequence[float], method: str) -> Card:
    """What is said of a merged adapter: who its parents are, and all that holds for every one of them."""
    titles = [card.title or file.stem for card, file in zip(cards, files, strict=True)]
    triggers = dict.fromkeys(card.trigger for card in cards if card.trigger)
    licenses = {card.license for card in cards}
    return Card(
        title=" + ".join(f"{weight:g} {title}" for weight, title in zip(weights, titles, strict=True)),
        base=cards[0].base,
        base_fingerprint=cards[0].base_fingerprint,
        trigger=", ".join(triggers) or None,
        recipe={
            "method": method,
            "weights": list(weights),
            "parents": [f"{title} sha256:{sha256_file(file)}" for title, file in zip(titles, files, strict=True)],
        },
        data=sorted({digest for card in cards for digest in card.data}),
        license=licenses.pop() if len(licenses) == 1 else None,
    )
