"""Describes registered adapters for a user who chooses one: a card per adapter, its sample image, its metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from registry import changes, queries
from registry.context import RegistryContext
from registry.entities import AdapterVersion
from registry.errors import StoreError
from registry.home import Home
from registry.refs import split_ref
from registry.store.artifacts import Store
from tasks.operations.adapter_samples import find_sample, has_sample, read_report, scale_sample
from tasks.operations.promote import differ_in_embedder

PRODUCTION = "production"
_WEIGHT = re.compile(r"\b(?:weight|strength)s?\W{0,4}([0-9](?:\.[0-9]{1,3})?)\b", re.IGNORECASE)


@dataclass(frozen=True)
class CardVersion:
    """A version of an adapter that can be used.

    Attributes:
        number: Its number.
        aliases: Its aliases.
        gates: Result of its gates; see `AdapterVersion.gate_status`.
        created: Day of its registration, `YYYY-MM-DD`.
        base: The base model.
        triggers: The trigger words.
        license: The license; empty if none is stated.
        has_sample: True if its evaluation or its training has an image.
    """

    number: int
    aliases: tuple[str, ...]
    gates: str
    created: str
    base: str
    triggers: tuple[str, ...]
    license: str
    has_sample: bool


@dataclass(frozen=True)
class AdapterCard:
    """An adapter as a user chooses it; values are those of the version that `references[0]` names.

    Attributes:
        name: Its registered name.
        title: Its display name.
        base: The base model.
        family: The base's family; empty if it is unknown.
        kind: Kind of adapter; empty if it is unknown.
        triggers: The trigger words.
        license: The license; empty if none is stated.
        weight: The weight that its author recommends in `modelspec.usage_hint`; None without one.
        shown: Number of the version that the values are of.
        versions: The usable versions, newest first.
    """

    name: str
    title: str
    base: str
    family: str
    kind: str
    triggers: tuple[str, ...]
    license: str
    weight: float | None
    shown: int
    versions: tuple[CardVersion, ...]

    @property
    def gates(self) -> str:
        """Result of the gates of the shown version."""
        return next(version.gates for version in self.versions if version.number == self.shown)

    @property
    def references(self) -> tuple[str, ...]:
        """The references by which a prompt can name it: aliases, then numbers."""
        aliases = sorted({alias for version in self.versions for alias in version.aliases})
        preferred = [alias for alias in aliases if alias == PRODUCTION] + [a for a in aliases if a != PRODUCTION]
        return tuple(f"{self.name}@{end}" for end in (*preferred, *(version.number for version in self.versions)))


def list_adapter_cards(home: Home, name: str | None = None) -> tuple[AdapterCard, ...]:
    """Returns one card per adapter with a usable version, by name; reads no bytes of adapters.

    Args:
        home: The home with the versions.
        name: The adapter; None takes all.
    """
    by_name: dict[str, list[AdapterVersion]] = {}
    with closing(RegistryContext(home)) as context:
        for version in _read_usable(context, name):
            by_name.setdefault(version.name, []).append(version)
        return tuple(_describe(context.store, entries) for _, entries in sorted(by_name.items()))


def choose_cards(cards: Sequence[AdapterCard], text: str = "", base: str = "") -> tuple[AdapterCard, ...]:
    """Returns the cards that have every word of a text, and whose base or family is `base`.

    Args:
        cards: The cards.
        text: Words of names, titles, trigger words, kinds or licenses, in any case.
        base: A base or family; empty takes all.
    """
    words = text.casefold().split()

    def fits(card: AdapterCard) -> bool:
        fields = " ".join([card.name, card.title, *card.triggers, card.kind, card.license, card.base]).casefold()
        return base in {"", card.base, card.family} and all(word in fields for word in words)

    return tuple(card for card in cards if fits(card))


def read_card_sample(home: Home, reference: str) -> bytes | None:
    """Returns a sample image of a version as WebP of at most `SIDE` pixels; None if it has none or it is damaged.

    It is the first image of the evaluation with the trigger word, or the last one of the training.

    Args:
        home: The home with the versions.
        reference: `name@version` or `name@alias`.

    Raises:
        UnknownName: The adapter does not exist.
        UnknownVersion: The version or alias does not exist.
        GoneVersion: It was withdrawn or deleted.
    """
    content = read_sample_png(home, reference)
    return None if content is None else scale_sample(content)


def read_sample_png(home: Home, reference: str) -> bytes | None:
    """Returns the whole sample image of a version as the PNG that is stored; see `read_card_sample`."""
    with closing(RegistryContext(home)) as context:
        version = _find_usable(context, reference)
        try:
            sample = find_sample(context.store, version)
            return None if sample is None else context.store.read(*sample)
        except StoreError:
            return None


def read_usable(home: Home, name: str) -> tuple[AdapterVersion, ...]:
    """Returns the versions of an adapter that are neither withdrawn nor deleted, newest first."""
    with closing(RegistryContext(home)) as context:
        return tuple(reversed(_read_usable(context, name)))


def tabulate_metrics(home: Home, references: Sequence[str]) -> list[list[str]]:
    """Returns a row per metric that at least one version has: its name, then its value for each version.

    Values that were measured with other embedders than the first version's are marked with `*`.

    Args:
        home: The home with the versions.
        references: `name@version` or `name@alias` of each column.

    Raises:
        RegistryError: A version does not exist, or was withdrawn or deleted.
    """
    with closing(RegistryContext(home)) as context:
        columns = [_find_usable(context, reference).metrics for reference in references]
    names = dict.fromkeys(name for column in columns for name, metric in column.items() if "adapter" in metric)
    return [[name, *(_shown(columns[0], column, name) for column in columns)] for name in names]


def _read_usable(context: RegistryContext, name: str | None) -> list[AdapterVersion]:
    """Reads the database only; comparing with MLflow would import it, which takes seconds."""
    with context.lineage.database.read() as session:
        return [version for version in queries.read_versions(session, name) if version.state == "ACTIVE"]


def _find_usable(context: RegistryContext, reference: str) -> AdapterVersion:
    with context.lineage.database.read() as session:
        version = queries.read_version(session, *split_ref(reference))
        changes.require_active(session, version.name, version.version)
    return version


def _shown(first: Mapping[str, Any], column: Mapping[str, Any], name: str) -> str:
    value = column.get(name, {}).get("adapter")
    if value is None:
        return ""
    return f"{value:.4g}{'*' if differ_in_embedder(first, column, name) else ''}"


def _describe(store: Store, versions: Sequence[AdapterVersion]) -> AdapterCard:
    aliased = sorted((version for version in versions if version.aliases), key=lambda version: version.aliases)
    production = [version for version in aliased if PRODUCTION in version.aliases]
    shown = [*production, *aliased, versions[-1]][0]
    card = shown.card
    base = _base(shown)
    kind = (card.get("recipe") or {}).get("kind")
    hint = str((card.get("extra") or {}).get("modelspec.usage_hint") or "")
    weight = _WEIGHT.search(hint)
    return AdapterCard(
        shown.name,
        str(card.get("title") or shown.name),
        base,
        _family(store, shown, base),
        str(kind.get("name", "") if isinstance(kind, Mapping) else kind or ""),
        _triggers(shown),
        str(card.get("license") or ""),
        float(weight[1]) if weight else None,
        shown.version,
        tuple(
            CardVersion(
                entry.version,
                entry.aliases,
                entry.gate_status,
                f"{entry.created_at:%Y-%m-%d}",
                _base(entry),
                _triggers(entry),
                str(entry.card.get("license") or ""),
                has_sample(store, entry),
            )
            for entry in reversed(versions)
        ),
    )


def _base(version: AdapterVersion) -> str:
    """Returns the base without a folder of this machine."""
    return str(version.card.get("base") or "").replace("\\", "/").rstrip("/").rpartition("/")[2]


def _triggers(version: AdapterVersion) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, str(version.card.get("trigger") or "").split(","))))


def _family(store: Store, version: AdapterVersion, base: str) -> str:
    from lora_engine.families import published

    if base in published:
        return published[base].family
    report = read_report(store, version)
    return str((report.get("base") or {}).get("family") or "")
