"""Reads and writes the header card: an adapter's description in the file's metadata, in every format.

Must not import torch. Codecs write what their format needs (ranks, hashes).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_engine.documents import parse_json
from lora_engine.errors import AdapterError
from lora_engine.files import canonical_json

CARD = "loraline.card"
GENERATED = "loraline.generated"
# Every writer recomputes these, so they are never carried over.
_OF_THE_FILE = ("format", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "lora_adapter_metadata")
_NUMBERED = re.compile(r"(unet|text_encoder)(:\d+:rank)?")
_OF_THE_NETWORK = (
    *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"),
    *("lora_alpha", "network_alpha", "alpha", "lora_rank", "network_dim", "rank"),
)
RECORDED = ("clip_skip", "prediction", "zero_terminal_snr")
"""Options of the base that a recipe has under their own names; it has the digest of the autoencoder as `vae`."""


class Card(BaseModel):
    """An adapter's description of itself.

    Attributes:
        title: Display name.
        base: Name of the base model, as the user typed it.
        base_fingerprint: Digest of the base's files.
        trigger: Trigger word of the concept.
        class_word: Class of the concept, such as `dog`.
        recipe: Settings that made it, as JSON values.
        data: SHA-256 of the training images.
        seed: Training seed.
        license: SPDX identifier, or text.
        resolution: `width`x`height` in pixels for which the base was made.
        prediction: Prediction type of the base: `eps`, `v_prediction` or `flow`.
        recommended: Weights that a prompt's tag has if it gives none, as the tag would have them after the name, such
            as `0.8` or `0@0,1@1:curve=cosine`.
        extra: All other header entries, carried over unchanged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    base: str = ""
    base_fingerprint: str | None = None
    trigger: str | None = None
    class_word: str | None = None
    recipe: dict[str, Any] = Field(default={}, repr=False)
    data: list[str] = Field(default=[], repr=False)
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    license: str | None = None
    resolution: str | None = None
    prediction: str | None = None
    recommended: Annotated[str, Field(min_length=1, max_length=2_000)] | None = None
    extra: dict[str, str] = Field(default={}, repr=False)


def card_header(card: Card) -> dict[str, str]:
    """Returns the header entry of the card as canonical JSON; `modelspec` builds the entries for other programs."""
    return {CARD: canonical_json(card.model_dump(exclude={"extra"}, exclude_defaults=True)).decode()}


def restate(card: Card, *, license_expression: str | None = None, recommended: str | None = None) -> Card:
    """Returns a card with another license or recommendation; None keeps it.

    Header entries of other programs with the same meaning are removed, because they would replace the card's when the
    file is written.
    """
    stated = {
        "license": ("modelspec.license", license_expression),
        "recommended": ("modelspec.usage_hint", recommended),
    }
    for name, (entry, value) in stated.items():
        if value is not None:
            extra = {key: text for key, text in card.extra.items() if key != entry}
            card = card.model_copy(update={name: value, "extra": extra})
    return card


def read_card(header: Mapping[str, str]) -> Card:
    """Returns the card of a header; for another program's header, from its `modelspec.*` and `ss_*` entries.

    Raises:
        AdapterError: The card in the header is broken.
    """
    try:
        generated = {str(name) for name in _parse(header.get(GENERATED, "[]"), GENERATED)}
        fields = _parse(header[CARD], CARD) if CARD in header else _external(header)
        skipped = generated.union(_OF_THE_FILE, _OF_THE_NETWORK)
        extra = {key: text for key, text in header.items() if key not in skipped and not _is_of_the_file(key, text)}
        return Card.model_validate({**fields, "extra": extra})
    except (TypeError, ValidationError) as error:
        problem = f"the header's card is broken: {error}"
        raise AdapterError(problem, where=f"metadata {CARD!r}", remedy="save or download the file again") from error


def _parse(text: str, key: str) -> Any:
    try:
        return parse_json(text, f"metadata {key!r}", AdapterError, remedy="save or download the file again")
    except AdapterError as error:
        raise AdapterError(
            f"the header's card is broken: {error.problem}", where=error.where, remedy=error.remedy
        ) from error


def _is_of_the_file(key: str, text: str) -> bool:
    is_numbered = _NUMBERED.fullmatch(key) is not None or text == "<embed>"  # cloneofsimo's
    return is_numbered or key.startswith("loraline.") or key.endswith("adapter_config.json")


def _external(header: Mapping[str, str]) -> dict[str, Any]:
    fields = {
        "title": header.get("modelspec.title") or header.get("ss_output_name"),
        "base": header.get("ss_sd_model_name"),
        "trigger": header.get("modelspec.trigger_phrase"),
        "license": header.get("modelspec.license"),
    }
    return {name: text for name, text in fields.items() if text and text != "None"}


def recipe_of(card: Card) -> Mapping[str, Any]:
    """Returns the recipe of the training or merge, also of an imported file; empty for one of another program."""
    recipe: Any = card.recipe
    while isinstance(recipe, Mapping) and "imported" in recipe:
        recipe = recipe.get("made")
    return recipe if isinstance(recipe, Mapping) else {}


def stated_options(card: Card) -> dict[str, Any]:
    """Returns what the training changed of its base, as a recipe or a header states it."""
    recipe = recipe_of(card)
    stated = {name: recipe.get(name) for name in (*RECORDED, "vae")} if recipe else header_options(card.extra)
    return {name: value for name, value in stated.items() if value}


def header_options(header: Mapping[str, str]) -> dict[str, Any]:
    """Returns the options that a header of sd-scripts or of the modelspec standard states; of other values, nothing.

    sd-scripts ignores `clip_skip` for SDXL, and has a rescaled schedule only with v-prediction.
    """
    version = header.get("ss_base_model_version") or header.get("modelspec.architecture") or ""
    is_first = version.startswith(("sd_v", "sd_1", "stable-diffusion-v")) or (not version and "ss_v2" in header)
    is_diffusion = is_first or version.startswith(("sdxl", "stable-diffusion-xl"))
    found: dict[str, Any] = {}
    skipped = header.get("ss_clip_skip", "")
    if is_first and re.fullmatch(r"[1-9][0-9]?", skipped):
        found["clip_skip"] = None if skipped == "1" else int(skipped)
    stated = header.get("modelspec.prediction_type", "")
    if is_diffusion and (stated in ("v", "v_prediction") or re.fullmatch(r"sd_v2\w*_v", version)):
        found["prediction"] = "v_prediction"
        if header.get("ss_zero_terminal_snr") == "True":
            found["zero_terminal_snr"] = True
    return found
