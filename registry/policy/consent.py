"""Consent: what the datasets of a version state about their pictures, and what that lacks. Pure; never judges a law."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from registry.entities import ArtifactRef

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class ConsentFindings:
    """What was found in the datasets of a version.

    Args:
        pictures: How many pictures there are.
        broken: What is stated and does not hold: expired, opted out, unreadable.
        missing: What is not stated and would have to be, for a complete record.
        generated: How many carry signs of having been generated, or are said to be; where none do, there is no
            evidence, which is no statement that people made them.
    """

    pictures: int = 0
    broken: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    generated: int = 0


def find_consent(datasets: Mapping[ArtifactRef, tuple[Entry, ...] | None], today: date) -> ConsentFindings:
    """What holds and what lacks in the statements about the pictures of some datasets.

    Args:
        datasets: The pictures of each, as `registry.policy.terms.read_datasets` gives them.
        today: The day that `expires` is compared with; on that very day a picture may still be used.
    """
    entries = {entry["sha256"]: entry for each in datasets.values() for entry in each or ()}
    pictures = [entries[digest] for digest in sorted(entries)]
    unreadable = tuple(
        f"dataset {ref.sha256[:12]} cannot be read, so nobody's consent is known"
        for ref, each in datasets.items()
        if each is None
    )
    broken = (*unreadable, *_counted(pictures, lambda entry: _broken(entry, today)))
    missing = tuple(_counted(pictures, _missing))
    if not datasets:
        missing = ("no dataset is recorded, so nobody's consent is known",)
    generated = sum(bool(_rights(each).get("evidence") or _rights(each).get("ai_generated")) for each in pictures)
    return ConsentFindings(len(pictures), broken, missing, generated)


def _broken(entry: Entry, today: date) -> Iterator[str]:
    rights = _rights(entry)
    expires = rights.get("expires")
    if expires is not None and date.fromisoformat(expires) < today:
        yield f"may be used until {expires} only"
    if (rights.get("opt_out") or {}).get("result") == "opted-out":
        yield "of an owner who opted out"


def _missing(entry: Entry) -> Iterator[str]:
    rights = _rights(entry)
    basis, person, consent = rights.get("rights"), rights.get("person"), entry.get("consent")
    if basis is None:
        yield "without a basis (column `rights`)"
    if person is None:
        yield "that do not say whether they show a person (column `person`)"
    if not consent and (person or basis == "consent"):
        yield "of people or used by consent, without the consent's id (column `consent`)"
    if basis == "licence" and not rights.get("license"):
        yield "used by a licence that is not named (column `license`)"
    if basis == "tdm" and not rights.get("opt_out"):
        yield "mined without a check for opt-outs (column `opt_out`)"


def _counted(pictures: Iterable[Entry], find: Any) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for entry in pictures:
        for reason in find(entry):
            found.setdefault(reason, []).append(entry.get("source") or entry["sha256"][:12])
    for reason, names in found.items():
        listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        yield f"{len(names)} picture{'s' if len(names) > 1 else ''} {reason}: {listed}"


def _rights(entry: Entry) -> Entry:
    return entry.get("rights") or {}
