"""Defines `BaseOptions`: what a training changes of its base beside the adapter. Torch-free.

A file's recipe has the options of its training, so that everything that uses the adapter computes with the same base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_engine.bases.vae import VaeSource
from lora_engine.errors import SettingsError

if TYPE_CHECKING:
    from lora_engine.formats.card import Card

PredictionTarget = Literal["epsilon", "v_prediction"]
RECORDED = ("clip_skip", "prediction", "zero_terminal_snr")
"""Options that a recipe has under their own names; it has the digest of the autoencoder as `vae`."""


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
    if digest != (vae and vae.fingerprint()) and cards:
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


def _shared(name: str, cards: Sequence[Card]) -> Any:
    values = [card.recipe.get(name) for card in cards]
    if any(value != values[0] for value in values):
        shown = ", ".join(repr(value["name"] if isinstance(value, Mapping) else value) for value in values)
        raise SettingsError(
            f"the adapters were trained with different values of {name} ({shown})",
            where=name,
            remedy="combine adapters that were trained alike" + (", or set clip_skip" if name == "clip_skip" else ""),
        )
    return values[0] if values else None
