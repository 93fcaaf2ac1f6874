"""Bases from the Hugging Face hub: the local cache first, then a download. Torch-free; safetensors only."""

from __future__ import annotations

import logging
from pathlib import Path

from lora_engine.bases.layout import download_patterns, read_layout
from lora_engine.errors import BaseModelError

_log = logging.getLogger(__name__)


def fetch_from_hub(repository: str, revision: str | None) -> tuple[Path, str]:
    """The folder of a hub repository's snapshot and the commit that it is of.

    Args:
        repository: `owner/name`.
        revision: Branch, tag or commit; None is the default branch.

    Raises:
        BaseModelError: It is neither in the cache nor to be had, or what is there is not a usable base.
    """
    try:
        folder = _snapshot(repository, revision, local=True)
        read_layout(folder)
    except (OSError, BaseModelError):
        # Not in the cache, or only in part.
        folder = _download(repository, revision)
    return folder, folder.name


def _download(repository: str, revision: str | None) -> Path:
    _log.info("downloading %s%s from the Hugging Face hub", repository, f" at {revision}" if revision else "")
    problem: BaseModelError | None = None
    for variant in (None, "fp16"):
        folder = _snapshot_or_explain(repository, revision, variant)
        try:
            read_layout(folder)
        except BaseModelError as error:
            problem = problem or error
        else:
            return folder
    raise problem or BaseModelError(f"{repository!r} cannot be used")


def _snapshot_or_explain(repository: str, revision: str | None, variant: str | None) -> Path:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"{repository!r} at revision {revision!r}" if revision else repr(repository)
    try:
        return _snapshot(repository, revision, local=False, variant=variant)
    except GatedRepoError:
        raise BaseModelError(
            f"access to {name} has to be granted by its owner",
            remedy="accept its terms on huggingface.co and log in with `hf auth login`",
        ) from None
    except RevisionNotFoundError:
        raise BaseModelError(f"the hub has no {name}", remedy="give a branch, tag or commit that exists") from None
    except RepositoryNotFoundError:
        raise BaseModelError(
            f"the hub has no {name}, or it is private",
            remedy="check the spelling, or log in with `hf auth login`; a local folder is given by its path",
        ) from None
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        at = f" --revision {revision}" if revision else ""
        raise BaseModelError(
            f"the base {name} is not in the local Hugging Face cache, and the hub cannot be reached ({_first(error)})",
            allowed="`tiny`, a diffusers folder, or a hub id that is in the cache or can be downloaded",
            remedy=f"fill the cache where there is a network (`hf download {repository}{at}`, then HF_HOME says "
            "where it lies), give the path of a diffusers folder, or use `tiny`, which needs nothing",
        ) from None


def _snapshot(repository: str, revision: str | None, *, local: bool, variant: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    # In the local case the patterns would make the library compare with a listing that it does not have.
    patterns = None if local else download_patterns(variant)
    return Path(
        snapshot_download(repository, revision=revision, local_files_only=local, allow_patterns=patterns)
    ).resolve()


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
