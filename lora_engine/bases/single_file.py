"""Single checkpoint files as bases: converted once into a cache, by their content, and read from there.

Converting itself lives in `lora_engine.checkpoints`. The cache is `LORALINE_CACHE`, else `loraline` under
`XDG_CACHE_HOME` (by default `~/.cache`); what lies in it can be deleted at any time.
"""

from __future__ import annotations

import os
from pathlib import Path

from lora_engine.errors import BaseModelError, EngineError
from lora_engine.files import canonical_json, sha256_bytes, sha256_file

SUFFIXES = (".safetensors", ".ckpt")
# Raised whenever the same file would now be converted to something else.
_REVISION = 1


def cache_folder() -> Path:
    """Where what can be made again is kept between runs; it may not be there yet."""
    given = os.environ.get("LORALINE_CACHE")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "loraline"


def folder_of_file(file: Path, digest: str, cache: Path | None = None) -> Path:
    """The diffusers folder of a single file, converted unless that was done before.

    What such a file lacks is looked for beside it: a diffusers folder of the file's own name (`model/` beside
    `model.safetensors`), whose weights do not matter, gives settings and tokenizers; else a folder `tokenizer` gives
    the tokenizer, and the settings are the published ones. Without either, the tokenizer comes from the local Hugging
    Face cache.

    Args:
        file: An original `.safetensors` or `.ckpt` file of a whole base.
        digest: Its SHA-256; the folder is kept under this and what was found beside it.
        cache: None is `cache_folder()`.

    Raises:
        BaseModelError: It is no such file, something lacks in it, or there is no tokenizer.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise BaseModelError(
            f"{file.name!r} is no checkpoint by its name",
            where=str(file),
            allowed=f"a file that ends in {' or '.join(SUFFIXES)}, or a diffusers folder",
        )
    from filelock import FileLock

    settings, tokenizer = file.with_suffix(""), file.parent / "tokenizer"
    config = settings if (settings / "model_index.json").is_file() else None
    given = tokenizer if config is None and tokenizer.is_dir() else None
    key = {"file": digest, "revision": _REVISION, "beside": _digests(config or given)}
    place = (cache or cache_folder()) / "bases" / sha256_bytes(canonical_json(key))
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    # Two runs that want the same file: the second waits for the first.
    with FileLock(f"{place}.lock"):
        if not place.is_dir():
            _convert(file, place, config, given)
    return place


def _digests(folder: Path | None) -> dict[str, str]:
    """Digest of each small text file of a folder and of its sub-folders: settings and vocabularies."""
    if folder is None:
        return {}
    files = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if path.suffix in (".json", ".txt")]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(files)}


def _convert(file: Path, place: Path, config: Path | None, tokenizer: Path | None) -> None:
    from lora_engine.checkpoints import convert_checkpoint

    try:
        convert_checkpoint(file, place, to="diffusers", config=config, tokenizer=tokenizer)
    except BaseModelError:
        raise
    except EngineError as error:
        # What is wrong with the file is, for the caller, wrong with the base.
        raise BaseModelError(
            error.problem, where=error.where or str(file), allowed=error.allowed, remedy=error.remedy
        ) from error
