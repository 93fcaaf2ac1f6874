"""Reads the revision of a base model on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

_REPOSITORY = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def read_revision(base: str, timeout: float) -> str | None:
    """Returns the commit that a base has on the hub now.

    Args:
        base: The base as a pipeline names it.
        timeout: Limit of the request in seconds.

    Returns:
        None if the base is no repository of the hub, or is pinned to a commit, which never changes.

    Raises:
        ConnectionError: The hub cannot be reached, refuses the repository, or `HF_HUB_OFFLINE` is set.
    """
    match = _REPOSITORY.fullmatch(base)
    if match is None or Path(base).exists() or _COMMIT.fullmatch(match["revision"] or ""):
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if is_offline_mode():
        raise ConnectionError(f"HF_HUB_OFFLINE is set, so {base} is not looked up")
    try:
        return HfApi().model_info(match["repository"], revision=match["revision"], timeout=timeout).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ConnectionError(f"the hub does not answer about {base}: {type(error).__name__}") from None
    except Exception as error:  # the client's own errors of the connection are no OSError
        if type(error).__module__.partition(".")[0] not in {"httpx", "requests", "huggingface_hub"}:
            raise
        raise ConnectionError(f"the hub cannot be reached: {type(error).__name__}") from None
