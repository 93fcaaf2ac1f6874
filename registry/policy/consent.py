"""Checks what the datasets of a version state about consent for their images. Pure; gives no legal advice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from registry.entities import ArtifactRef

Entry = Mapping[str, Any]
"""An image as a manifest lists it."""
ConsentPolicy = Literal["off", "warn", "strict"]
"""What broken and missing statements do: nothing, a warning that is recorded, or a refusal."""
_PROVENANCE = {"c2pa-manifest", "c2pa-valid", "c2pa-untrusted", "c2pa-invalid"}
"""What photographs can have, too; `PROVENANCE` of the engine."""
CONSENT_POLICIES: tuple[ConsentPolicy, ...] = ("off", "warn", "strict")


@dataclass(frozen=True)
class ConsentFindings:
    """Consent findings for the datasets of a version.

    Args:
        pictures: Number of images.
        broken: Statements that do not hold: expired, opted out, unreadable.
        missing: Statements that a complete record requires and that do not exist.
        generated: Number of images declared or detected as AI-generated; 0 does not prove that none is.
        is_stated: True if there is a statement about any image.
    """

    pictures: int = 0
    broken: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    generated: int = 0
    is_stated: bool = True

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the policy `warn` shows. A dataset without any statement claims nothing, so none of its are missing."""
        return (*self.broken, *(self.missing if self.is_stated else ()))


def find_consent(
    datasets: Mapping[ArtifactRef, tuple[Entry, ...] | None], today: date, undocumented: Sequence[str] = ()
) -> ConsentFindings:
    """Returns the broken and missing consent statements for the images of some datasets.

    Judges every statement: an image that several datasets contain has as many, and one of them is enough.

    Args:
        datasets: Images of each dataset, from `registry.policy.terms.read_datasets`.
        today: Date to compare `expires` with; an image may still be used on that date.
        undocumented: The upstream adapters without a dataset.
    """
    images = [entry for ref in sorted(datasets, key=lambda ref: ref.sha256) for entry in datasets[ref] or ()]
    digests = {entry["sha256"] for entry in images}
    unreadable = tuple(
        f"dataset {ref.sha256[:12]} cannot be read, so consent is unknown"
        for ref, listed in datasets.items()
        if listed is None
    )
    broken = (*unreadable, *_counted(images, lambda entry: find_broken(entry, today)))
    missing = tuple(_counted(images, _missing))
    if not datasets:
        missing = ("no dataset is recorded, so consent is unknown",)
    elif undocumented:
        missing += (f"no dataset is recorded for {', '.join(undocumented)}, so consent is unknown",)
    generated = {entry["sha256"] for entry in images if _is_generated(entry)}
    is_stated = any(map(has_statement, images))
    return ConsentFindings(len(digests), broken, missing, len(generated), is_stated)


def strictest(policies: Iterable[ConsentPolicy | None]) -> ConsentPolicy:
    """Returns the strictest of the policies that are set; `warn` if none is."""
    return CONSENT_POLICIES[max((CONSENT_POLICIES.index(policy) for policy in policies if policy), default=1)]


def rights_of(image: Entry) -> Entry:
    """Returns the rights that a manifest states for an image; empty for datasets older than that field."""
    return image.get("rights") or {}


def find_broken(entry: Entry, today: date) -> Iterator[str]:
    """Yields why an image may not be used any more: its consent expired, or its owner opted out."""
    rights = rights_of(entry)
    expires = rights.get("expires")
    if expires is not None and date.fromisoformat(expires) < today:
        yield f"with consent that expired on {expires}"
    if (rights.get("opt_out") or {}).get("result") == "opted-out":
        yield "of an owner who opted out"


def has_statement(entry: Entry) -> bool:
    """Returns True if anything is stated about an image, beside the evidence in its file."""
    if entry.get("consent"):
        return True
    return any(value is not None for name, value in rights_of(entry).items() if name != "evidence")


def _is_generated(entry: Entry) -> bool:
    return bool({*rights_of(entry).get("evidence", ())} - _PROVENANCE or rights_of(entry).get("ai_generated"))


def _missing(entry: Entry) -> Iterator[str]:
    rights = rights_of(entry)
    basis, person, consent = rights.get("rights"), rights.get("person"), entry.get("consent")
    if basis is None:
        yield "without a legal basis (column `rights`)"
    if person is None:
        yield "without a statement about depicted people (column `person`)"
    if not consent and (person or basis == "consent"):
        yield "of people or used by consent, without a consent id (column `consent`)"
    if basis == "licence" and not rights.get("license"):
        yield "used under an unnamed license (column `license`)"
    if basis == "tdm" and not rights.get("opt_out"):
        yield "mined without a check for opt-outs (column `opt_out`)"


def _counted(images: Iterable[Entry], find: Any) -> Iterator[str]:
    by_reason: dict[str, dict[str, str]] = {}
    for entry in images:
        for reason in find(entry):
            by_reason.setdefault(reason, {}).setdefault(entry["sha256"], entry.get("source") or entry["sha256"][:12])
    for reason, by_digest in by_reason.items():
        names = by_digest.values()
        listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        yield f"{len(names)} image{'s' if len(names) > 1 else ''} {reason}: {listed}"
