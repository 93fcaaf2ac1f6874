"""Finding the tokenizers that a folder needs and a single file never has: files only, nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lora_engine.bases.published import Architecture, ComponentConfig
from lora_engine.bases.published.sd15 import CLIP_L_REPOSITORY
from lora_engine.checkpoints.folder import read_json
from lora_engine.errors import BaseModelError
from lora_engine.files import atomic_write

VOCABULARY = ("vocab.json", "merges.txt")
_WHOLE = "tokenizer.json"


def find_tokenizers(architecture: Architecture, given: Path | None, config: Path | None) -> dict[str, Path]:
    """For each tokenizer of an architecture, the folder whose files it is to have.

    Args:
        architecture: Which tokenizers are needed.
        given: A folder with `vocab.json` and `merges.txt` or with `tokenizer.json`, or a diffusers folder.
        config: A diffusers folder that is looked into next.

    Raises:
        BaseModelError: One is nowhere; says what to give.
    """
    found = {}
    for name, repository in architecture.tokenizers.items():
        folder = _choose(name, repository, given, config)
        if folder is None:
            looked = f"{given or config or 'nothing given'}, and the local Hugging Face cache for {repository}"
            raise BaseModelError(
                f"a diffusers folder needs the {name}, which single files do not have, and it was not found",
                where=looked,
                allowed=f"a folder with {' and '.join(VOCABULARY)} (or {_WHOLE}), or a diffusers folder of any base of "
                f"this family; or a cache filled by `hf download {CLIP_L_REPOSITORY} {' '.join(VOCABULARY)}`",
                remedy="give one, or ask for a folder without tokenizers",
            )
        found[name] = folder
    return found


def write_tokenizer(source: Path, target: Path, settings: ComponentConfig, text: ComponentConfig) -> list[Path]:
    """Copies a tokenizer's files; settings of its own are kept, and the published ones stand in where it has none.

    Args:
        source: Where its files lie.
        target: The folder that it becomes.
        settings: The published settings.
        text: The text encoder that reads its tokens.

    Raises:
        BaseModelError: Its vocabulary is larger than the text encoder's.
    """
    _check_vocabulary(source, text)
    names = [*VOCABULARY, _WHOLE, "tokenizer_config.json", "special_tokens_map.json"]
    written = []
    for name in names:
        if (source / name).is_file():
            atomic_write(target / name, (source / name).read_bytes())
            written.append(target / name)
    if target / "tokenizer_config.json" not in written:
        content = {**settings.config, "tokenizer_class": settings.class_name}
        atomic_write(target / "tokenizer_config.json", (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        written.append(target / "tokenizer_config.json")
    return written


def _choose(name: str, repository: str, given: Path | None, config: Path | None) -> Path | None:
    if given is not None:
        # What was asked for is not replaced by something else that happens to be there.
        candidates = [given / name, given, given / "tokenizer"]
    else:
        candidates = [config / name] if config is not None else []
        candidates += [*_cached(repository), *_cached(CLIP_L_REPOSITORY)]
    return next((folder for folder in candidates if _is_tokenizer(folder)), None)


def _is_tokenizer(folder: Path) -> bool:
    return (folder / _WHOLE).is_file() or all((folder / name).is_file() for name in VOCABULARY)


def _cached(repository: str) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache

    # The cache says a path, that the repository is known to lack the file, or nothing.
    found = [try_to_load_from_cache(repository, name) for name in VOCABULARY]
    if all(isinstance(path, str) for path in found):
        return [Path(str(found[0])).parent]
    return []


def _check_vocabulary(source: Path, text: ComponentConfig) -> None:
    if not (source / VOCABULARY[0]).is_file():
        return
    vocabulary: Mapping[str, object] = read_json(source / VOCABULARY[0])
    known = int(text.config.get("vocab_size", 49408))
    highest = max((number for number in vocabulary.values() if isinstance(number, int)), default=-1)
    if highest >= known:
        raise BaseModelError(
            f"the tokenizer has a token of number {highest}, and the text encoder knows {known}",
            where=str(source),
            allowed=f"numbers below {known}",
            remedy="give the tokenizer of this base",
        )
