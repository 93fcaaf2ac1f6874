"""Converts the errors of fsspec file systems and their clients to `StoreError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from registry.errors import StoreError
from registry.store.redaction import redact, redact_url

_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"})
_EXTRAS = {"s3": "s3", "s3a": "s3"}


@contextmanager
def with_context(url: str) -> Iterator[None]:
    """Converts the errors of a file system and its client to `StoreError`.

    Args:
        url: The store.
    """
    try:
        yield
    except (OSError, NotImplementedError) as error:
        raise _store_error(error, url) from error
    except _client_errors() as error:
        raise _store_error(error, url) from error


def unsupported_protocol(error: ImportError | None, protocol: str, url: str) -> StoreError:
    """Returns the error for a protocol whose package is missing, or that fsspec does not know (None)."""
    if error is None:
        return StoreError(
            f"the store cannot be opened (Protocol not known: {protocol})",
            where=redact_url(url),
            allowed="a folder, or a URL that fsspec knows, such as s3://bucket/folder",
            remedy="correct `store` in loraline.yaml, or LORALINE_STORE_URL",
        )
    extra = _EXTRAS.get(protocol)
    return StoreError(
        f"the package that opens {protocol}:// is not installed ({error})",
        where=redact_url(url),
        remedy=f'`pip install "loraline[{extra}]"`' if extra else "install the package that the message names",
    )


def malformed_url(url: str) -> StoreError:
    """Returns the error for a URL that has no valid form."""
    return StoreError(
        f"the store cannot be opened: {redact_url(url)!r} is malformed",
        where="LORALINE_STORE_URL or `store` in loraline.yaml",
        allowed="a folder, or a URL that fsspec knows, such as s3://bucket/folder",
        remedy="correct the URL; write `@`, `/` and `:` of a password as %40, %2F and %3A",
    )


def _store_error(error: Exception, url: str) -> StoreError:
    name = type(error).__name__
    text = redact(str(error), url) or name
    if name in _NO_CREDENTIALS:
        problem, remedy = "no credentials were found", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    elif isinstance(error, FileNotFoundError):
        problem = f"there is no such bucket or folder ({text})"
        remedy = "create it, or correct `store` in loraline.yaml"
    elif isinstance(error, PermissionError):
        problem, remedy = f"the store denies access ({text})", "check the credentials and their permissions"
    else:
        problem = f"the store failed ({name}: {text})"
        remedy = "check address, network and service"
    return StoreError(problem, where=redact_url(url), remedy=remedy)


def _client_errors() -> tuple[type[Exception], ...]:
    """Returns the error types of installed clients that are no OSError."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return ()
    types: tuple[type[Exception], ...] = (BotoCoreError, ClientError)
    return types
