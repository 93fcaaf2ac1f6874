"""Removes passwords, tokens and keys from texts before they are printed, logged, raised or stored."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
_NAMES = r"(?:password|passwd|passphrase|pwd|secret|token|key|credentials?|auth|auth_string|signature|sig)"
_NAMED_USERS = frozenset({"postgresql", "postgres", "mysql", "mariadb", "mssql", "oracle", "ssh", "sftp", "ftp", "smb"})
"""Schemes whose user is a name; elsewhere it may be a token."""
# Each pattern takes linear time: what it repeats has a bound, or cannot start within itself.
_USERINFO = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]{0,30})://(?P<user>[^\s:/?#@'\"]*)(?P<password>:[^\s'\"]*)?@", re.IGNORECASE
)
_WORD = re.compile(r"[^\s'\"]+")
_PORT = re.compile(r":\d{0,5}[/?#]")
_QUERY = re.compile(rf"(?P<name>[?&;][\w.%-]*?{_NAMES}=)(?P<value>[^\s&;#'\"]*[^\s&;#'\",.)])", re.IGNORECASE)
_PARAMETER = re.compile(rf"(?P<name>[?&;][^?=&;]*?{_NAMES}=)(?P<value>[^&;#]+)", re.IGNORECASE)
_ASSIGNMENT = re.compile(
    r"(?P<name>(?<![\w-])[\w-]*(?:password|passwd|passphrase|secret|api[_-]?key|access[_-]?key|auth[_-]?token|"
    r"hf[_-]?token)['\"]?\s*[=:]\s*['\"]?)(?P<value>[^\s'\",;&]+)",
    re.IGNORECASE,
)
_SECRET_KEY = re.compile(
    r"(?:.*[_-])?(?:password|passwd|passphrase|secret|api[_-]?key|access[_-]?key|auth[_-]?token|hf[_-]?token)",
    re.IGNORECASE,
)
"""Names of settings whose value is a secret, whatever its form."""
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|"
    r"sk-[A-Za-z0-9_-]{20,}|xox[a-z]-[\w-]{10,}|pn[ub]_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|"
    r"eyJ[\w-]{10,1000}\.[\w-]{10,20000}\.[\w-]*)"
)
# The shell's PWD is the current folder.
_VARIABLES = re.compile(rf"(?!PWD$)(?:^|.*_){_NAMES}$", re.IGNORECASE)
_SHORTEST = 8
"""Characters from which the value of a variable is searched in texts; a shorter one may be a common word."""


def redact(text: str, *urls: str) -> str:
    """Returns a text in which `***` replaces every password, token and key.

    Finds them in URLs (before the host and in the query), in `name=value`, by the forms of well-known tokens, and by
    the values of environment variables such as `HF_TOKEN`.

    Args:
        text: Any text, such as a URL or an error message.
        urls: URLs that the text is about; their secrets are replaced wherever and however the text quotes them.
    """
    for url in urls:
        text = text.replace(url, redact_url(url))
        for secret in sorted(secrets_of(url), key=len, reverse=True):
            text = _replace_word(text, secret)
    for secret in _environment_secrets():
        text = _replace_word(text, secret)
    return _redact_forms(text)


def redact_url(url: str) -> str:
    """Returns a URL in which `***` replaces every secret; valid or not, also with unescaped `@`, `/` or spaces."""
    prefix, user, colon, _, host = _split(url)
    if user or colon:
        scheme = prefix.removesuffix("://")
        url = f"{prefix}{_hide_user(scheme, user, colon)}@{host}"
    return _TOKENS.sub(HIDDEN, _PARAMETER.sub(rf"\g<name>{HIDDEN}", url))


def redact_values(value: Any) -> Any:
    """Returns a JSON value without the secrets in its texts; mappings become dicts, tuples lists.

    Unlike `redact`, finds them by their form and by names such as `hf_token`: the value of a variable may also be a
    word of a pipeline file.
    """
    if isinstance(value, str):
        return _redact_forms(value)
    if isinstance(value, Mapping):
        return {
            str(key): HIDDEN if entry and _SECRET_KEY.fullmatch(str(key)) else redact_values(entry)
            for key, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redact_values(entry) for entry in value]
    return value


def redact_error(error: BaseException) -> None:
    """Replaces the secrets in the texts of an error and of its causes, in place, before others store or print them."""
    errors = [error]
    while errors:
        current = errors.pop()
        own = dict(vars(current))
        if isinstance(current, OSError):
            own |= {"strerror": current.strerror, "filename": current.filename}
        current.args = tuple(map(_redact_part, current.args))
        for name, value in own.items():
            setattr(current, name, _redact_part(value))
        errors += [*filter(None, {current.__cause__, current.__context__})]


def is_secret_key(name: str) -> bool:
    """Returns True if the value of a setting with this name is a secret, which `redact_values` hides."""
    return _SECRET_KEY.fullmatch(name) is not None


def is_secret_variable(name: str) -> bool:
    """Returns True if an environment variable with this name holds a secret."""
    return _is_secret(name)


def has_secret(text: str) -> bool:
    """Returns True if a text has a part with the form of a secret, which `redact_values` hides."""
    return _redact_forms(text) != text


class SecretFreeErrors:
    """A `with` block whose errors leave it without secrets."""

    def __enter__(self) -> None:
        """Does nothing."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Replaces the secrets in the error."""
        if error is not None:
            redact_error(error)


def secrets_of(url: str) -> set[str]:
    """Returns the secrets in a URL, as they are written and decoded."""
    prefix, user, _, password, _ = _split(url)
    secrets = {password, *(match["value"] for match in _PARAMETER.finditer(url))}
    if not _is_public(prefix.removesuffix("://")):
        secrets.add(user)
    return {form for secret in secrets for form in (secret, unquote(secret)) if form}


def _redact_part(value: Any) -> Any:
    """Returns a text, or a tuple with texts, without secrets; other values as they are."""
    if isinstance(value, tuple):
        return tuple(map(_redact_part, value))
    return redact(value) if isinstance(value, str) else value


def _split(url: str) -> tuple[str, str, str, str, str]:
    """Returns scheme with `://`, user, `:`, password and the rest; user and password are empty if there is no `@`."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    userinfo, at, host = rest.rpartition("@")
    user, colon, password = userinfo.partition(":")
    # An `@` in a path or a query ends no userinfo.
    is_path = bool(re.search(r"[/?#\\]", user)) or not (colon or separator)
    return (
        (scheme + separator, "", "", "", rest)
        if not at or is_path
        else (scheme + separator, user, colon, password, host)
    )


def _redact_forms(text: str) -> str:
    if "://" in text:
        text = _WORD.sub(_redact_word, text)
    text = _QUERY.sub(rf"\g<name>{HIDDEN}", text)
    text = _ASSIGNMENT.sub(rf"\g<name>{HIDDEN}", text)
    return _TOKENS.sub(HIDDEN, text)


def _redact_word(match: re.Match[str]) -> str:
    """Returns a word without the passwords before its last `@`; what follows has none, and is not searched for one."""
    head, at, tail = match[0].rpartition("@")
    return _USERINFO.sub(_hide_userinfo, f"{head}@") + tail if at and "://" in head else match[0]


def _hide_userinfo(match: re.Match[str]) -> str:
    password = match["password"] or ""
    if _PORT.match(password):  # `http://host:8080/x@y`
        return match[0]
    return f"{match['scheme']}://{_hide_user(match['scheme'], match['user'], password[:1])}@"


def _hide_user(scheme: str, user: str, colon: str) -> str:
    if not _is_public(scheme):
        return HIDDEN
    return f"{user}{colon}{HIDDEN}" if colon else user


def _is_public(scheme: str) -> bool:
    """Returns True if the user in a URL of the scheme is a name, not a token."""
    return not _NAMED_USERS.isdisjoint(scheme.lower().split("+"))


def _replace_word(text: str, secret: str) -> str:
    if secret not in text:
        return text
    return re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", HIDDEN, text)


def _environment_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _is_secret(name):
            yield value


@lru_cache(maxsize=1024)
def _is_secret(variable: str) -> bool:
    """Returns True if a variable of this name holds a secret; cached, because every cell of a table is redacted."""
    return _VARIABLES.match(variable) is not None
