"""Lists what clients may name: the base of a server, and the adapters of its home."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from typing import Any

from lora_engine.bases.source import resolve_base
from lora_engine.errors import SettingsError
from registry.entities import AdapterVersion
from registry.home import Home
from registry.refs import can_exist, split_ref
from registry.versions.versions import Versions
from tasks.serving.adapters import DEFAULT_ALIAS

_LABEL = re.compile(r"(?P<name>.+)-v(?P<number>[1-9][0-9]{0,8})")
_TAG = re.compile(r"<(?P<kind>lora|lyco):(?P<name>[^<>:@/]+)(?P<rest>:[^<>]*)?>")


@dataclass(frozen=True)
class ServedBase:
    """The base of a server.

    Attributes:
        name: Its name, without a path of the machine.
        fingerprint: SHA-256 over its files.
    """

    name: str
    fingerprint: str

    @property
    def title(self) -> str:
        """The name with ten digits of the fingerprint, as A1111 titles models."""
        return f"{self.name} [{self.fingerprint[:10]}]"

    def is_named(self, text: str) -> bool:
        """Returns True for the title, the name or the digits."""
        return text in {self.title, self.name, self.fingerprint, self.fingerprint[:10]}


@dataclass(frozen=True)
class ListedAdapter:
    """An adapter that requests may name.

    Attributes:
        name: `name` if the version has the alias `production`, otherwise `name@alias`.
        reference: `name@version`.
        label: `NAME-vN`, which is what the infotext of an image has.
        card: License, trigger, base and other metadata.
        sha256: Digest of its file.
        created: Time of registration, in seconds since 1970.
    """

    name: str
    reference: str
    label: str
    card: Mapping[str, Any]
    sha256: str
    created: int


@cache
def describe_base(base: str) -> ServedBase:
    """Returns name and fingerprint of a base, computed once.

    Raises:
        BaseModelError: There is no such base.
    """
    source = resolve_base(base)
    return ServedBase(source.label, source.fingerprint())


def list_named_adapters(home: Home) -> list[ListedAdapter]:
    """Returns the active versions that have an alias, one entry per alias, by name."""
    with closing(Versions(home)) as versions:
        active = [version for version in versions.list() if version.state == "ACTIVE"]
    return [_listed(version, alias) for version in active for alias in version.aliases]


def resolve_labels(prompt: str, home: Home) -> str:
    """Returns a prompt with `<lora:NAME-vN:..>`, as images name registered versions, written as `<lora:NAME@N:..>`.

    A tag stays as it is if an adapter has that whole name, or if none is named NAME.
    """
    labels = [match for match in _TAG.finditer(prompt) if _LABEL.fullmatch(match["name"])]
    if not labels:
        return prompt
    with closing(Versions(home)) as versions:
        names = {version.name for version in versions.list()}

    def rewrite(match: re.Match[str]) -> str:
        label = _LABEL.fullmatch(match["name"])
        if label is None or match["name"] in names or label["name"] not in names:
            return match[0]
        return f"<{match['kind']}:{label['name']}@{label['number']}{match['rest'] or ''}>"

    return _TAG.sub(rewrite, prompt)


def adapter_tag(reference: str, weight: float) -> str:
    """Returns the tag that attaches an adapter.

    Raises:
        SettingsError: The reference cannot be one, so it could be other syntax of a prompt.
    """
    if not can_exist(*split_ref(reference)):
        raise SettingsError(f"invalid adapter {reference[:80]!r}", allowed="name@version, name@alias or name")
    return f"<lora:{reference}:{f'{weight:.6f}'.rstrip('0').rstrip('.')}>"


def _listed(version: AdapterVersion, alias: str) -> ListedAdapter:
    return ListedAdapter(
        version.name if alias == DEFAULT_ALIAS else f"{version.name}@{alias}",
        f"{version.name}@{version.version}",
        f"{version.name}-v{version.version}",
        version.card,
        version.sha256,
        int(version.created_at.timestamp()),
    )
