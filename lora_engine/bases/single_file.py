"""Loads single checkpoint files as bases: converts each once into a cache that is keyed by content.

`lora_engine.checkpoints` converts. The cache is `LORALINE_CACHE`, else `loraline` under `XDG_CACHE_HOME` (by default
`~/.cache`); its content can be deleted at any time.
"""

from __future__ import annotations

import os
from pathlib import Path

from lora_engine.errors import BaseModelError, EngineError
from lora_engine.files import canonical_json, expand_home, sha256_bytes, sha256_file

_SUFFIXES = (".safetensors", ".ckpt")
# Increased whenever the conversion of the same file changes.
_REVISION = 1


def cache_folder() -> Path:
    """Returns the cache folder, which may not exist yet."""
    configured = os.environ.get("LORALINE_CACHE")
    if configured:
        return expand_home(configured)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "loraline"


def check_file(file: Path) -> None:
    """Raises an error for a file that is no checkpoint by its name and first bytes; reads no more of it.

    Raises:
        BaseModelError: It has another suffix, or is GGUF.
    """
    from lora_engine.formats.safetensors_io import refuse_gguf

    with file.open("rb") as opened:
        refuse_gguf(file, opened.read(4), BaseModelError)
    if file.suffix.lower() not in _SUFFIXES:
        raise BaseModelError(
            f"{file.name!r} is not a checkpoint file name",
            where=str(file),
            allowed=f"a file that ends in {' or '.join(_SUFFIXES)}, or a diffusers folder",
        )


def folder_of_file(file: Path, digest: str, cache: Path | None = None) -> Path:
    """Returns the diffusers folder of a single file; converts the file if it is not cached.

    Settings and tokenizers come from a diffusers folder with the file's name (`model/` beside `model.safetensors`),
    whose weights are ignored. Otherwise the settings are the published ones, and the tokenizer comes from a folder
    `tokenizer` beside the file, or from the local Hugging Face cache.

    Args:
        file: An original `.safetensors` or `.ckpt` file of a complete base.
        digest: Its SHA-256; part of the cache key, with the settings and tokenizers beside the file.
        cache: The cache folder; None is `cache_folder()`.

    Raises:
        BaseModelError: The file is not such a checkpoint or is incomplete, or there is no tokenizer.
    """
    from filelock import FileLock

    settings, tokenizer = file.with_suffix(""), file.parent / "tokenizer"
    config = settings if (settings / "model_index.json").is_file() else None
    tokenizer_folder = tokenizer if config is None and tokenizer.is_dir() else None
    key = {"file": digest, "revision": _REVISION, "beside": _digests(config or tokenizer_folder)}
    folder = (cache or cache_folder()) / "bases" / sha256_bytes(canonical_json(key))
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A concurrent run with the same file waits for the conversion.
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            _convert(file, folder, config, tokenizer_folder)
    return folder


def _digests(folder: Path | None) -> dict[str, str]:
    """Returns the digests of the settings and vocabularies in a folder and its subfolders."""
    if folder is None:
        return {}
    files = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.suffix in (".json", ".txt")]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(files)}


def _convert(file: Path, folder: Path, config: Path | None, tokenizer: Path | None) -> None:
    from lora_engine.checkpoints import convert_checkpoint

    try:
        _refuse_transformer(file)
        convert_checkpoint(file, folder, to="diffusers", config=config, tokenizer=tokenizer)
    except BaseModelError:
        raise
    except EngineError as error:
        # The caller handles errors of bases only.
        raise BaseModelError(
            error.problem, where=error.where or str(file), allowed=error.allowed, remedy=error.remedy
        ) from error


def _refuse_transformer(file: Path) -> None:
    from lora_engine.checkpoints import is_original_transformer

    if is_original_transformer(file):
        raise BaseModelError(
            "the file holds a transformer in its original names, without text encoders and autoencoder",
            where=str(file),
            allowed="a complete base",
            remedy="convert it into a diffusers folder: loraline convert FILE --to diffusers -o BASE/transformer",
        )
