"""The header card: what an adapter says of itself, carried in the file's metadata through every format.

Torch-free. What a format needs to be read (ranks, hashes) is the codec's affair, not the card's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_engine.errors import AdapterError
from lora_engine.files import canonical_json

CARD = "loraline.card"
GENERATED = "loraline.generated"
# Written anew by whoever writes a file, so never carried over.
_OF_THE_FILE = ("format", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "lora_adapter_metadata")
_NUMBERED = re.compile(r"(unet|text_encoder)(:\d+:rank)?")
_OF_THE_NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")


class Card(BaseModel):
    """What an adapter says of itself.

    Attributes:
        title: Name for people.
        base: Name of the base model, as its user named it.
        base_fingerprint: Digest of the base's files.
        trigger: The word that calls the concept.
        class_word: What the concept is an instance of.
        recipe: How it was made; JSON values.
        data: SHA-256 of the pictures that it was made from.
        seed: Seed of its making.
        license: SPDX identifier, or text.
        resolution: `width`x`height` in pixels that the base was made for.
        prediction: What the base predicts: `eps`, `v_prediction` or `flow`.
        extra: Everything else that the header held, carried over as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    base: str = ""
    base_fingerprint: str | None = None
    trigger: str | None = None
    class_word: str | None = None
    recipe: dict[str, Any] = {}
    data: list[str] = []
    seed: int | None = None
    license: str | None = None
    resolution: str | None = None
    prediction: str | None = None
    extra: dict[str, str] = {}


def card_header(card: Card) -> dict[str, str]:
    """The card itself as canonical JSON; the `modelspec.*` that other programs show are in `modelspec`."""
    return {CARD: canonical_json(card.model_dump(exclude={"extra"}, exclude_defaults=True)).decode()}


def read_card(header: Mapping[str, str]) -> Card:
    """The card of a header; of a foreign one, as much as its `modelspec.*` and `ss_*` tell, and all of it in `extra`.

    Raises:
        AdapterError: The header has a card that is broken.
    """
    try:
        generated = {str(name) for name in json.loads(header.get(GENERATED, "[]"))}
        ours = json.loads(header[CARD]) if CARD in header else _foreign(header)
        skipped = generated.union(_OF_THE_FILE, _OF_THE_NETWORK)
        extra = {key: text for key, text in header.items() if key not in skipped and not _is_of_the_file(key, text)}
        return Card.model_validate({**ours, "extra": extra})
    except (ValueError, TypeError, RecursionError, ValidationError) as error:
        problem = f"the header's card is broken: {error}"
        raise AdapterError(problem, where=f"metadata {CARD!r}", remedy="save or download the file again") from error


def _is_of_the_file(key: str, text: str) -> bool:
    is_numbered = _NUMBERED.fullmatch(key) is not None or text == "<embed>"  # cloneofsimo's
    return is_numbered or key.startswith("loraline.") or key.endswith("adapter_config.json")


def _foreign(header: Mapping[str, str]) -> dict[str, Any]:
    fields = {
        "title": header.get("modelspec.title") or header.get("ss_output_name"),
        "base": header.get("ss_sd_model_name"),
        "trigger": header.get("modelspec.trigger_phrase"),
        "license": header.get("modelspec.license"),
    }
    return {name: text for name, text in fields.items() if text and text != "None"}
