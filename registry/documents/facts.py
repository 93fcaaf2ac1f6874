"""Defines the facts that the documents of a version are made from. `gather` collects them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from lora_engine.files import canonical_json, sha256_bytes
from registry.entities import AdapterVersion, ArtifactRef, Execution, Run
from registry.policy.license_terms import LicenseTerms

_ABSOLUTE = re.compile(r"(?:/|~|\\\\|[A-Za-z]:[\\/]|file:)")


@dataclass(frozen=True)
class Dataset:
    """A training dataset, without names of files or people.

    Args:
        artifact: Its manifest.
        role: Input role: `dataset`, `class_dataset`.
        train: Number of training images.
        heldout: Number of held-out images.
        captioned: Number of images with a caption.
        quarantined: Number of files that were left out.
        sizes: `width x height` of the images, the most frequent first.
        consents: Consent id -> number of images that it covers.
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
        """Number of all images."""
        return self.train + self.heldout


@dataclass(frozen=True)
class Parent:
    """A parent adapter.

    Args:
        name: `name@version` if registered, else its title.
        sha256: Digest of its file; None means unknown.
    """

    name: str
    sha256: str | None = None


@dataclass(frozen=True)
class Sample:
    """PNG images of one prompt and seed, from the base and the adapter.

    The report's real images are not included: cards are shared, and the images may show people.
    """

    prompt: str
    kind: str
    seed: int
    base: bytes
    adapter: bytes


@dataclass(frozen=True)
class Facts:
    """The facts about a version that its documents are made from.

    Args:
        version: The version.
        terms: Its license terms.
        terms_origin: How the terms were determined.
        terms_sources: (where, statement) of each source of the terms.
        report: Content of `report.json`; empty means not evaluated.
        maker: The step that made the adapter; None for an imported file.
        run: The run of that step.
        steps: The last execution of every upstream step, by start time.
        datasets: All upstream training datasets.
        parents: The parent adapters.
        samples: Images of the report.
        builder: Version of this program.
    """

    version: AdapterVersion
    terms: LicenseTerms
    terms_origin: str
    terms_sources: Sequence[tuple[str, str]] = ()
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
        """The display name."""
        return str(self.version.card.get("title") or self.version.name)

    @property
    def license(self) -> str | None:
        """The licenses that apply together, as one SPDX expression; None means that some are unknown."""
        return None if self.terms.unknown else self.terms.expression or None

    @property
    def base(self) -> str:
        """The base as the user named it; only the last part of a path."""
        return str(without_paths(str(self.version.card.get("base") or "")))

    @property
    def base_fingerprint(self) -> str | None:
        """Digest of the base's weights and configuration."""
        return self.version.card.get("base_fingerprint")

    @property
    def family(self) -> str:
        """The base's family, or an empty string."""
        return str((self.report.get("base") or {}).get("family") or "")

    @property
    def triggers(self) -> tuple[str, ...]:
        """The trigger words."""
        return tuple(word.strip() for word in str(self.version.card.get("trigger") or "").split(",") if word.strip())

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe, without paths of the machine that made the version."""
        recipe: dict[str, Any] = without_paths(dict(self.version.card.get("recipe") or {}))
        return recipe

    @property
    def kind(self) -> str:
        """The kind of adapter, or an empty string."""
        kind = self.recipe.get("kind")
        return str(kind.get("name", "")) if isinstance(kind, Mapping) else str(kind or "")


def packages_digest(execution: Execution) -> str | None:
    """Returns the digest of the installed packages of a step; None if they are not recorded."""
    installed = execution.environment.get("distributions") or execution.environment.get("packages")
    return sha256_bytes(canonical_json(installed)) if installed else None


def without_paths(value: Any) -> Any:
    """Returns the value with every path reduced to its last part, because paths contain user names."""
    if isinstance(value, Mapping):
        return {key: without_paths(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(entry) for entry in value]
    if isinstance(value, str) and _is_path(value):
        plain = value.removeprefix("file:")
        return PureWindowsPath(plain).name if "\\" in plain else PurePosixPath(plain).name
    return value


def _is_path(text: str) -> bool:
    # A prompt may start with a slash, but a long or multi-line text is not a path.
    has_parent = ".." in PurePosixPath(text).parts
    return "\n" not in text and (has_parent or (_ABSOLUTE.match(text) is not None and len(text) < 4096))
