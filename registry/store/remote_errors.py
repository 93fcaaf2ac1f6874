"""What file systems behind a URL and their clients raise, in the registry's own words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from registry.errors import StoreError

_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"})
_EXTRAS = {"s3": "s3", "s3a": "s3"}


@contextmanager
def with_context(url: str) -> Iterator[None]:
    """Words what a file system and its client raise as `StoreError`.

    Args:
        url: The store.
    """
    try:
        yield
    except (OSError, NotImplementedError) as error:
        raise _word(error, url) from error
    except _client_errors() as error:
        raise _word(error, url) from error


def word_unknown(error: ImportError | ValueError, protocol: str, url: str) -> StoreError:
    """Why no file system of a protocol can be opened: its package is missing, or nobody knows it."""
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(protocol)
        return StoreError(
            f"a package is missing that opens {protocol}:// ({error})",
            where=url,
            remedy=f'`pip install "loraline[{extra}]"`' if extra else "install the package that it names",
        )
    return StoreError(
        f"no store can be opened here ({error})",
        where=url,
        allowed="a folder, or a URL that fsspec knows, such as s3://bucket/folder",
        remedy="correct `store` in loraline.yaml, or LORALINE_STORE_URL",
    )


def _word(error: Exception, url: str) -> StoreError:
    name, text = type(error).__name__, str(error) or type(error).__name__
    if name in _NO_CREDENTIALS:
        problem, remedy = "no credentials were found", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    elif isinstance(error, FileNotFoundError):
        problem = f"there is no such bucket or folder ({text})"
        remedy = "create it, or correct `store` in loraline.yaml"
    elif isinstance(error, PermissionError):
        problem, remedy = f"the store refuses ({text})", "check credentials, and what they may read and write"
    else:
        problem = f"the store does not answer as it should ({name}: {text})"
        remedy = "check address, network and service"
    return StoreError(problem, where=url, remedy=remedy)


def _client_errors() -> tuple[type[Exception], ...]:
    """What clients raise beside OSError, of those that are installed."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return ()
    known: tuple[type[Exception], ...] = (BotoCoreError, ClientError)
    return known
