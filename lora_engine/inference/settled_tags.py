"""Settles the tags of a prompt and its regions: the weights that cards recommend, and one entry per adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_engine.errors import SettingsError
from lora_engine.formats.card import Card
from lora_engine.inference.prompts.prompt import ParsedPrompt
from lora_engine.inference.prompts.tags import AdapterTag, parse_arguments
from lora_engine.inference.regions import Region, Regions


@dataclass(frozen=True)
class SettledTags:
    """A prompt and its regions whose tags have their weights.

    Attributes:
        prompt: The prompt.
        regions: The regions.
        tags: All tags, each once: of the prompt, then of the regions.
        used: Number of each tag in `all_tags`.
    """

    prompt: ParsedPrompt
    regions: Regions
    tags: tuple[AdapterTag, ...]
    used: tuple[int, ...]

    def region_facts(self) -> list[dict[str, Any]]:
        """Returns the facts of each region, with the numbers in `tags` of the adapters that act in it alone."""
        return [
            region.facts([number for number, tag in enumerate(self.tags) if self._is_own(tag, region)])
            for region in self.regions.items
        ]

    def _is_own(self, tag: AdapterTag, region: Region) -> bool:
        return tag in region.prompt.adapters and tag not in self.prompt.adapters


def all_tags(prompt: ParsedPrompt, regions: Regions) -> list[AdapterTag]:
    """Returns the tags of a prompt and then those of its regions, each once."""
    tags: list[AdapterTag] = []
    for tag in (*prompt.adapters, *(tag for region in regions.items for tag in region.prompt.adapters)):
        tags += [] if tag in tags else [tag]
    return tags


def settle_tags(
    prompt: ParsedPrompt, regions: Regions, cards: Sequence[Card], *, adapter_guidance: float = 1.0
) -> SettledTags:
    """Returns the tags with their weights.

    Args:
        prompt: The prompt.
        regions: The regions.
        cards: Cards of the adapters, in the order of `all_tags`. A tag with a name alone takes the weights that its
            card recommends.
        adapter_guidance: Scale of the tags that have none.

    Raises:
        SettingsError: A card recommends weights that cannot be read.
    """
    tags = all_tags(prompt, regions)
    settled = [_settle(tag, card, adapter_guidance) for tag, card in zip(tags, cards, strict=True)]

    def changed(text: ParsedPrompt) -> ParsedPrompt:
        return replace(text, adapters=tuple(settled[tags.index(tag)] for tag in text.adapters))

    items = tuple(replace(region, prompt=changed(region.prompt)) for region in regions.items)
    # Two tags can be equal only now: one by its card, the other by the text.
    used = [index for index, tag in enumerate(settled) if settled.index(tag) == index]
    return SettledTags(
        changed(prompt), replace(regions, items=items), tuple(settled[index] for index in used), tuple(used)
    )


def _settle(tag: AdapterTag, card: Card, adapter_guidance: float) -> AdapterTag:
    if tag.is_bare and card.recommended is not None:
        try:
            tag = parse_arguments(tag.name, card.recommended)
        except SettingsError as error:
            raise SettingsError(
                f"the card of {tag.name!r} recommends {card.recommended[:80]!r}: {error.problem}",
                allowed=error.allowed,
                remedy="write the weight in the tag",
            ) from None
    guidance = adapter_guidance if tag.guidance is None and adapter_guidance != 1.0 else tag.guidance
    return replace(tag, guidance=guidance, is_bare=False)
