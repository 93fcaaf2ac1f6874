"""Parses references to versions: `name@number`, `name@alias`, `name@latest` and `name`; checks names and aliases.

The only parser of them: any other text names no version, and reaches no query.
"""

from __future__ import annotations

import re

from registry.errors import VersionError

LATEST = "latest"
NAME_RULE = "[a-z0-9][a-z0-9._-]{0,62}"
_NAME = re.compile(NAME_RULE)
_ALIAS = re.compile(r"(?!latest$|v?[0-9]+$)[a-z0-9][a-z0-9_-]{0,62}")
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_QUERIED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(name: str) -> str:
    """Returns the name of an adapter unchanged.

    Raises:
        VersionError: It does not match `NAME_RULE`.
    """
    if not _NAME.fullmatch(name):
        raise VersionError(f"invalid adapter name {name[:64]!r}", allowed=f"names that match {NAME_RULE}")
    return name


def check_alias(alias: str) -> str:
    """Returns the alias unchanged. MLflow has the same rule; version numbers are not aliases.

    Raises:
        VersionError: It does not follow the rule.
    """
    if not _ALIAS.fullmatch(alias):
        raise VersionError(
            f"invalid alias {alias[:64]!r}",
            allowed="1 to 63 characters of a-z, 0-9, _ and -, but no version number and not 'latest'",
        )
    return alias


def split_ref(text: str) -> tuple[str, str]:
    """Returns the name and the number or alias of a reference, unchecked; `name` alone means its latest version."""
    name, at, ref = text.partition("@")
    return name, ref if at else LATEST


def version_number(ref: str | int) -> int | None:
    """Returns the number that a reference names, from 1 to 18 digits; None if it is no number."""
    text = str(ref) if isinstance(ref, str) or -(10**18) < ref < 10**18 else ""
    return int(text) if _NUMBER.fullmatch(text) else None


def can_exist(name: str, ref: str | int = LATEST) -> bool:
    """Returns False if no version can have that name and that number or alias."""
    is_ref = version_number(ref) is not None or (isinstance(ref, str) and _QUERIED.fullmatch(ref) is not None)
    return is_ref and _NAME.fullmatch(name) is not None


def is_unicode(text: str) -> bool:
    """Returns False for an argument of the command line whose bytes are not UTF-8; databases refuse such text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
