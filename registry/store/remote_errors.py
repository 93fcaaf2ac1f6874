"""Converts the errors of fsspec file systems and their clients to `StoreError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from registry.errors import StoreError

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


def unsupported_protocol(error: ImportError | ValueError, protocol: str, url: str) -> StoreError:
    """Returns the error for a protocol that cannot be opened: its package is missing, or fsspec does not know it."""
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(protocol)
        return StoreError(
            f"the package that opens {protocol}:// is not installed ({error})",
            where=url,
            remedy=f'`pip install "loraline[{extra}]"`' if extra else "install the package that the message names",
        )
    return StoreError(
        f"the store cannot be opened ({error})",
        where=url,
        allowed="a folder, or a URL that fsspec knows, such as s3://bucket/folder",
        remedy="correct `store` in loraline.yaml, or LORALINE_STORE_URL",
    )


def _store_error(error: Exception, url: str) -> StoreError:
    name, text = type(error).__name__, str(error) or type(error).__name__
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
    return StoreError(problem, where=url, remedy=remedy)


def _client_errors() -> tuple[type[Exception], ...]:
    """Returns the error types of installed clients that are no OSError."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return ()
    types: tuple[type[Exception], ...] = (BotoCoreError, ClientError)
    return types
