"""Finds the tokenizers that a folder needs and a single file lacks, in local files only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_engine.checkpoints.folder import read_json
from lora_engine.errors import BaseModelError
from lora_engine.families import Architecture, ComponentConfig
from lora_engine.families.sd.published import CLIP_L_REPOSITORY
from lora_engine.files import atomic_write

VOCABULARY = ("vocab.json", "merges.txt")
_PIECES = ("spiece.model",)
_CLIP = "CLIPTokenizer"
_WHOLE = "tokenizer.json"


def find_tokenizers(architecture: Architecture, requested: Path | None, config: Path | None) -> dict[str, Path]:
    """Returns, for each tokenizer of an architecture, a folder with its files.

    Args:
        architecture: The architecture whose tokenizers are needed.
        requested: A folder with `vocab.json` and `merges.txt` or with `tokenizer.json`, or a diffusers folder; None
            searches `config` and the Hugging Face cache.
        config: A diffusers folder to search; None searches only the cache.

    Raises:
        BaseModelError: A tokenizer was not found; names the accepted sources.
    """
    folders = {}
    for name, repository in architecture.tokenizers.items():
        class_name = architecture.components[name].class_name
        files = _PIECES if class_name.startswith("T5") else VOCABULARY
        folder = _find_folder(name, repository, requested, config, files, is_clip=class_name == _CLIP)
        if folder is None:
            source = CLIP_L_REPOSITORY if class_name == _CLIP else repository
            searched = f"{requested or config or 'no folder'}, and the local Hugging Face cache for {repository}"
            raise BaseModelError(
                f"a diffusers folder needs the {name}, which single files do not have, and it was not found",
                where=searched,
                allowed=f"a folder with {' and '.join(files)} (or {_WHOLE}), or a diffusers folder of any base of "
                f"this family; or a cache filled by `hf download {source} {' '.join(files)}`",
                remedy="pass --tokenizer, or --without-tokenizer for a folder without tokenizers",
            )
        folders[name] = folder
    return folders


def write_tokenizer(source: Path, target: Path, settings: ComponentConfig, text: ComponentConfig) -> list[Path]:
    """Copies a tokenizer's files; writes the published settings if it has none of its own.

    Args:
        source: Folder with its files.
        target: Output folder.
        settings: The published settings.
        text: The text encoder that reads its tokens.

    Raises:
        BaseModelError: Its vocabulary is larger than the text encoder's.
    """
    _check_vocabulary(source, text)
    names = [*VOCABULARY, *_PIECES, _WHOLE, "tokenizer_config.json", "special_tokens_map.json"]
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


def _find_folder(
    name: str, repository: str, requested: Path | None, config: Path | None, files: Sequence[str], *, is_clip: bool
) -> Path | None:
    if requested is not None:
        # Only the requested folder: another tokenizer must not replace it silently.
        candidates = [requested / name, *([requested, requested / "tokenizer"] if is_clip else [])]
    else:
        candidates = [config / name] if config is not None else []
        candidates += _cached(repository, files)
        # The CLIPs have one vocabulary.
        candidates += _cached(CLIP_L_REPOSITORY, files) if is_clip else []
    return next((folder for folder in candidates if _is_tokenizer(folder, files)), None)


def _is_tokenizer(folder: Path, files: Sequence[str]) -> bool:
    return (folder / _WHOLE).is_file() or all((folder / name).is_file() for name in files)


def _cached(repository: str, names: Sequence[str]) -> list[Path]:
    from huggingface_hub import try_to_load_from_cache

    # Returns a path, a marker for a file that the repository lacks, or None.
    files = [try_to_load_from_cache(repository, name) for name in names]
    if all(isinstance(path, str) for path in files):
        return [Path(str(files[0])).parent]
    return []


def _check_vocabulary(source: Path, text: ComponentConfig) -> None:
    if not (source / VOCABULARY[0]).is_file():
        return
    vocabulary: Mapping[str, object] = read_json(source / VOCABULARY[0])
    size = int(text.config.get("vocab_size", 49408))
    highest = max((number for number in vocabulary.values() if isinstance(number, int)), default=-1)
    if highest >= size:
        raise BaseModelError(
            f"the tokenizer has the token ID {highest}, and the text encoder has {size} tokens",
            where=str(source),
            allowed=f"token IDs below {size}",
            remedy="use the tokenizer of this base",
        )
