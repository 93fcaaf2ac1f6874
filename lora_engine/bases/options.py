"""Defines `BaseOptions`: what a training changes of its base beside the adapter. Torch-free.

A file's recipe has the options of its training, so that everything that uses the adapter computes with the same base.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_engine.bases.vae import VaeSource
from lora_engine.errors import SettingsError
from lora_engine.formats.card import RECORDED, Card, header_options, recipe_of
from lora_engine.settings import PredictionTarget

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseOptions:
    """Changes of a base.

    Attributes:
        clip_skip: Layer of the CLIP text encoders that the network reads, counted from the last one, which is 1; None
            is the base's own.
        prediction: What the network predicts; None is what the base's scheduler says.
        zero_terminal_snr: True rescales the noise schedule so that the last timestep has no signal.
        vae: Another autoencoder; None is the base's own.
    """

    clip_skip: int | None = None
    prediction: PredictionTarget | None = None
    zero_terminal_snr: bool = False
    vae: VaeSource | None = None

    def key(self) -> dict[str, Any]:
        """Returns the options that are set, as JSON values; the autoencoder by its digest."""
        values = {name: getattr(self, name) for name in RECORDED}
        values["vae"] = self.vae and self.vae.fingerprint()
        return {name: value for name, value in values.items() if value}

    def recipe(self) -> dict[str, Any]:
        """Returns what a recipe has beside the settings: name and digest of the autoencoder."""
        return {} if self.vae is None else {"vae": {"name": self.vae.label, "sha256": self.vae.fingerprint()}}


UNCHANGED_BASE = BaseOptions()


def options_of_cards(
    cards: Sequence[Card], *, clip_skip: int | None = None, vae: VaeSource | None = None
) -> BaseOptions:
    """Returns the options that adapters were trained with.

    Headers of other programs are hints: they count where no recipe states an option and they agree.

    Args:
        cards: The cards of the adapters.
        clip_skip: Replaces that of the cards.
        vae: The autoencoder to use: cards have only its digest.

    Raises:
        SettingsError: The adapters were trained with different options, or with another autoencoder than `vae`.
    """
    found = {name: _shared(name, cards) for name in RECORDED if name != "clip_skip" or clip_skip is None}
    trained = _shared("vae", cards)
    digest = trained.get("sha256") if isinstance(trained, Mapping) else None
    if digest != (vae and vae.fingerprint()) and any(recipe_of(card) for card in cards):
        name = (
            f"the autoencoder {trained.get('name')!r} ({str(digest)[:16]})" if digest else "the base's own autoencoder"
        )
        raise SettingsError(
            f"the adapter was trained with {name}, not with {vae.label if vae else 'that of the base'!r}",
            where="vae",
            remedy="set vae to the one of the training" if digest else "leave vae out",
        )
    return BaseOptions(**({"clip_skip": clip_skip} | {name: value for name, value in found.items() if value}), vae=vae)


def shared_options(cards: Sequence[Card]) -> dict[str, Any]:
    """Returns the entries of a recipe with the options that all adapters were trained with.

    Raises:
        SettingsError: They differ.
    """
    found = {name: _shared(name, cards) for name in (*RECORDED, "vae")}
    return {name: value for name, value in found.items() if value}


def differing_options(card: Card, options: BaseOptions) -> list[str]:
    """Returns `name: value, not other` of each option in which an adapter's training differs from others."""
    other = {**options.key(), **options.recipe()}
    # A header of another program that is silent about an option does not say that it was not set.
    stated = {**dict.fromkeys((*RECORDED, "vae")), **recipe_of(card)} if recipe_of(card) else header_options(card.extra)
    own = {name: stated[name] for name in (*RECORDED, "vae") if name in stated}
    return [
        f"{name} {_shown(value)!r}, not {_shown(other.get(name))!r}"
        for name, value in own.items()
        if (value or None) != other.get(name)
    ]


def _shown(value: Any) -> Any:
    return value["name"] if isinstance(value, Mapping) and "name" in value else value


def _shared(name: str, cards: Sequence[Card]) -> Any:
    """Returns an option of all cards; without recipes, the one that the headers agree on."""
    recipes = [recipe for card in cards if (recipe := recipe_of(card))]
    values = [recipe.get(name) for recipe in recipes]
    if any(value != values[0] for value in values):
        raise SettingsError(
            f"the adapters were trained with different values of {name} ({_listed(values)})",
            where=name,
            remedy="combine adapters that were trained alike" + (", or set clip_skip" if name == "clip_skip" else ""),
        )
    stated = [header_options(card.extra) for card in cards if not recipe_of(card)]
    hints = [header[name] for header in stated if name in header]
    if any(hint != (values or hints)[0] for hint in hints):
        _log.warning("the adapters were trained with different values of %s (%s); %s is used", name,
                     _listed([*values, *hints]), repr(_shown(values[0])) if values else "that of the base")  # fmt: skip
        return values[0] if values else None
    return (values or hints or [None])[0]


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(repr(_shown(value)) for value in values)
