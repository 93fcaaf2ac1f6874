"""Fetches bases from the Hugging Face hub, or from its local cache. Torch-free; safetensors only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from lora_engine.documents import read_json_object
from lora_engine.errors import BaseModelError, NotDownloadedError
from lora_engine.families.layout import INDEX, download_patterns, read_layout

_log = logging.getLogger(__name__)
_NETWORKS = ("unet", "transformer", "text_encoder", "vae")
_downloads: ContextVar[bool] = ContextVar("downloads", default=True)


@contextmanager
def downloads(*, allowed: bool) -> Iterator[None]:
    """Decides whether models that are not in the local cache are downloaded; otherwise `NotDownloadedError` is raised.

    Args:
        allowed: False sends nothing to the hub until the end of the `with` block.
    """
    token = _downloads.set(allowed and _downloads.get())
    try:
        yield
    finally:
        _downloads.reset(token)


def fetch_from_hub(repository: str, revision: str | None) -> tuple[Path, str]:
    """Returns the snapshot folder of a hub repository and its commit.

    Args:
        repository: `owner/name`.
        revision: Branch, tag or commit; None is the default branch.

    Raises:
        BaseModelError: It is neither cached nor downloadable, or is not a usable base.
    """
    try:
        folder = _snapshot(repository, revision, local=True)
        read_layout(folder)
    except OSError:
        folder = _download(repository, revision)
    except BaseModelError as error:  # perhaps only partly cached
        folder = _download(repository, revision, error)
    return folder, folder.name


def fetch_configuration(repository: str, revision: str | None) -> Path:
    """Returns a snapshot folder of a hub repository with its index and the configurations of its networks.

    Args:
        repository: `owner/name`.
        revision: Branch, tag or commit; None is the default branch.

    Raises:
        BaseModelError: It is neither cached nor downloadable.
    """
    try:
        folder = _snapshot(repository, revision, local=True)
        if _has_configurations(folder):
            return folder
    except OSError:
        pass  # not cached
    return _snapshot_or_explain(repository, revision, patterns=[INDEX, "*/config.json"])


def _has_configurations(folder: Path) -> bool:
    if not (folder / INDEX).is_file():
        return False
    index = read_json_object(folder / INDEX, BaseModelError)
    networks = [name for name, entry in index.items() if name.startswith(_NETWORKS) and isinstance(entry, list)]
    return all((folder / name / "config.json").is_file() for name in networks if index[name][:1] != [None])


def fetch_vae(repository: str, revision: str | None) -> Path:
    """Returns the snapshot folder of a hub repository with an autoencoder, at its top or in `vae`.

    Args:
        repository: `owner/name`.
        revision: Branch, tag or commit; None is the default branch.

    Raises:
        BaseModelError: It is neither cached nor downloadable.
    """
    try:
        return _snapshot(repository, revision, local=True)
    except OSError:
        _announce(repository, revision)
        names = ("config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
        patterns = [*names, *(f"vae/{name}" for name in names)]
        return _snapshot_or_explain(repository, revision, patterns)


def fetch_files(
    repository: str, revision: str | None, patterns: list[str], check: Callable[[Path], object], noun: str
) -> tuple[Path, str]:
    """Returns the snapshot folder of a hub repository with the files of a model that is no base, and its commit.

    Args:
        repository: `owner/name`.
        revision: Branch, tag or commit; None is the default branch.
        patterns: The files to download.
        check: Raises `BaseModelError` if the folder is incomplete.
        noun: The model, for errors.

    Raises:
        BaseModelError: It is neither cached nor downloadable, or `check` refuses it.
    """
    refusal: BaseModelError | None = None
    try:
        folder = _snapshot(repository, revision, local=True)
        check(folder)
    except OSError:
        pass  # not cached
    except BaseModelError as error:  # perhaps only partly cached
        refusal = error
    else:
        return folder, folder.name
    _announce(repository, revision, refusal)
    try:
        folder = _snapshot_or_explain(repository, revision, patterns, noun)
    except BaseModelError as error:
        raise refusal or error from None
    check(folder)
    return folder, folder.name


def _announce(repository: str, revision: str | None, refusal: BaseModelError | None = None) -> None:
    """Logs a download; raises if the command downloads nothing. `refusal` says why what is cached is not used."""
    if not _downloads.get():
        name = f"{repository}@{revision}" if revision else repository
        state = f"not complete on this machine ({refusal.problem})" if refusal else "not on this machine"
        raise NotDownloadedError(
            f"{name!r} is {state}, and a run downloads it first",
            remedy=f"run `hf download {repository}{f' --revision {revision}' if revision else ''}`",
        )
    _log.info("downloading %s%s from the Hugging Face hub", repository, f" at {revision}" if revision else "")


def _download(repository: str, revision: str | None, refusal: BaseModelError | None = None) -> Path:
    _announce(repository, revision, refusal)
    problem: BaseModelError | None = None
    for variant in (None, "fp16"):
        folder = _snapshot_or_explain(repository, revision, download_patterns(variant))
        try:
            read_layout(folder)
        except BaseModelError as error:
            problem = problem or error
        else:
            return folder
    raise problem or BaseModelError(f"{repository!r} cannot be used")


def _snapshot_or_explain(repository: str, revision: str | None, patterns: list[str], noun: str = "base") -> Path:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"{repository!r} at revision {revision!r}" if revision else repr(repository)
    try:
        return _snapshot(repository, revision, local=False, patterns=patterns)
    except GatedRepoError:
        raise BaseModelError(
            f"access to {name} requires the approval of its owner",
            remedy="accept its terms on huggingface.co and log in with `hf auth login`",
        ) from None
    except RevisionNotFoundError:
        raise BaseModelError(f"the hub has no {name}", remedy="name an existing branch, tag or commit") from None
    except RepositoryNotFoundError:
        raise BaseModelError(
            f"the hub has no {name}, or it is private",
            remedy="check the spelling or the path of a local folder, or log in with `hf auth login`",
        ) from None
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        at = f" --revision {revision}" if revision else ""
        local, instead = "a folder", "or pass the path of a folder"
        if noun == "base":
            local, instead = (
                "`tiny`, a diffusers folder",
                "pass the path of a diffusers folder, or use `tiny`, which needs no download",
            )
        raise BaseModelError(
            f"the {noun} {name} is not in the local Hugging Face cache, and the hub cannot be reached"
            f" ({_first(error)})",
            allowed=f"{local}, or a hub id that is in the cache or can be downloaded",
            remedy=f"run `hf download {repository}{at}` on a machine with a network and set HF_HOME to that cache, "
            f"{instead}",
        ) from None


def _snapshot(repository: str, revision: str | None, *, local: bool, patterns: list[str] | None = None) -> Path:
    from huggingface_hub import snapshot_download

    # With patterns the library would need a file listing, which the local cache does not have.
    return Path(
        snapshot_download(repository, revision=revision, local_files_only=local, allow_patterns=patterns)
    ).resolve()


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
