"""The nouns of the documents of a version: what is known of it. How it is gathered and laid out lives elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from lora_engine.files import canonical_json, sha256_bytes
from registry.entities import AdapterVersion, ArtifactRef, Execution, Run

_ABSOLUTE = re.compile(r"(?:/|~|\\\\|[A-Za-z]:[\\/]|file:)")


@dataclass(frozen=True)
class Dataset:
    """A dataset that an adapter was trained on, without names of files or people.

    Args:
        artifact: Its manifest.
        role: What it served as: `dataset`, `class_dataset`.
        train: Number of pictures that were trained on.
        heldout: Number of pictures that were kept from training.
        captioned: Number of pictures with a caption.
        quarantined: Number of files that were left out.
        sizes: `width x height` of the pictures, the most frequent first.
        consents: Id of each consent -> number of pictures that it covers.
        pictures: Digests of the original files, sorted.
    """

    artifact: ArtifactRef
    role: str
    train: int
    heldout: int
    captioned: int
    quarantined: int
    sizes: tuple[str, ...]
    consents: Mapping[str, int]
    pictures: tuple[str, ...]

    @property
    def count(self) -> int:
        """All pictures."""
        return self.train + self.heldout


@dataclass(frozen=True)
class Parent:
    """An adapter that went into this one.

    Args:
        name: `name@version` where the registry knows it, else what it was called.
        sha256: Digest of its file, where that is known.
    """

    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class Sample:
    """Images of one prompt and seed, as PNG files: before and after.

    The real ones of the report stay in the report: a card is made to be passed on, and they are of people.
    """

    prompt: str
    kind: str
    seed: int
    base: bytes
    adapter: bytes


@dataclass(frozen=True)
class LicenseTerms:
    """Under which terms a version may be used.

    Args:
        licenses: The licences that apply, all at once: SPDX identifiers, or names; empty where nothing is known.
        origin: Where that is known from.
        permissions: What is allowed.
        obligations: What is asked in return.
        restrictions: What is not allowed.
        unknown: What has no known licence; anything here allows nothing.
        sources: What each part is from: (where, what is stated there).
    """

    licenses: tuple[str, ...]
    origin: str
    permissions: tuple[str, ...] = ()
    obligations: tuple[str, ...] = ()
    restrictions: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str | None:
        """The licences in one text; None where some are not known."""
        return None if self.unknown or not self.licenses else " AND ".join(self.licenses)


@dataclass(frozen=True)
class Facts:
    """All that the documents of a version are made from.

    Args:
        version: The version.
        terms: Its licence.
        report: Content of `report.json`; empty where nothing was evaluated.
        maker: The step that made the adapter; None for a file that came from elsewhere.
        run: The run of that step.
        steps: All steps on the way, each as it last ran, in the order of their beginning.
        datasets: What it was trained on, as far back as lineage goes.
        parents: The adapters that went into it.
        samples: Images of the report.
        builder: Version of this program.
    """

    version: AdapterVersion
    terms: LicenseTerms
    report: Mapping[str, Any] = field(default_factory=dict)
    maker: Execution | None = None
    run: Run | None = None
    steps: Sequence[Execution] = ()
    datasets: Sequence[Dataset] = ()
    parents: Sequence[Parent] = ()
    samples: Sequence[Sample] = ()
    builder: str = "unknown"

    @property
    def title(self) -> str:
        """The name for people."""
        return str(self.version.card.get("title") or self.version.name)

    @property
    def base(self) -> str:
        """The base as its user named it; of a path, the last part."""
        return str(without_paths(str(self.version.card.get("base") or "")))

    @property
    def base_fingerprint(self) -> str | None:
        """Digest of the base's weights and configuration."""
        return self.version.card.get("base_fingerprint")

    @property
    def family(self) -> str:
        """The base's family (sd, sdxl, sd3, flux), or an empty string."""
        return str((self.report.get("base") or {}).get("family") or "")

    @property
    def triggers(self) -> tuple[str, ...]:
        """The words that call what was learned."""
        return tuple(word.strip() for word in str(self.version.card.get("trigger") or "").split(",") if word.strip())

    @property
    def recipe(self) -> Mapping[str, Any]:
        """How it was made, without paths of the machine that made it."""
        found: dict[str, Any] = without_paths(dict(self.version.card.get("recipe") or {}))
        return found

    @property
    def kind(self) -> str:
        """The kind of adapter, or an empty string."""
        kind = self.recipe.get("kind")
        return str(kind.get("name", "")) if isinstance(kind, Mapping) else str(kind or "")


def packages_digest(execution: Execution) -> str | None:
    """What names the set of packages that a step ran with."""
    installed = execution.environment.get("distributions") or execution.environment.get("packages")
    return sha256_bytes(canonical_json(installed)) if installed else None


def without_paths(value: Any) -> Any:
    """The value, in which of every text that is a path only the last part is left: names of people lie in paths."""
    if isinstance(value, Mapping):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(entry) for entry in value]
    if isinstance(value, str) and _is_path(value):
        plain = value.removeprefix("file:")
        return PureWindowsPath(plain).name if "\\" in plain else PurePosixPath(plain).name
    return value


def _is_path(text: str) -> bool:
    # A prompt may begin with a slash, but then it does not go on like a path.
    climbs = ".." in PurePosixPath(text).parts
    return "\n" not in text and (climbs or (_ABSOLUTE.match(text) is not None and len(text) < 4096))
