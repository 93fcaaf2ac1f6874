"""Captions the images of the user's folder in text files beside them; nothing else is written there."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_engine.data.captioners import CAPTIONERS
from lora_engine.data.folder import Tree, list_tree
from lora_engine.data.spec import CaptionSettings, IngestSettings
from lora_engine.data.text_files import printable
from lora_engine.errors import SettingsError
from lora_engine.files import atomic_write, write_within
from lora_engine.progress import Progress, no_progress
from registry.home import Home
from tasks.operations.captions import (
    caption_cache,
    caption_labels,
    check_settings,
    find_caption_models,
    find_caption_problems,
)

_ENDING = ".txt"


def caption_folder(
    images: Path,
    settings: Mapping[str, Any],
    home: Home,
    *,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Writes a caption beside each image, as `name.txt`, atomically.

    With `existing: keep`, images that have a caption anywhere (see `docs/datasets.md`) are not looked at, and no file
    that holds something is replaced.

    Args:
        images: The folder.
        settings: Of `CaptionSettings`.
        home: Keeps single captions, so that an interrupted run resumes.
        dry_run: True writes no file beside the images.
        progress: Called after each image.

    Returns:
        `dataset` (a line), `captions` (image -> caption, origin and whether it was written to which file), `written`,
        `kept` (images whose captions stay), `left` (files that hold something else), `findings` and `models`.

    Raises:
        DataError: The folder cannot be read or has no usable image.
        SettingsError: A setting is invalid.
        BaseModelError: A model cannot be found, loaded or run.
    """
    from lora_engine.data.caption import caption, has_own_caption
    from lora_engine.data.ingest import ingest

    parsed = check_settings(CaptionSettings, settings)
    if not CAPTIONERS[parsed.captioner_name].describe:
        raise SettingsError(
            f"the captioner {parsed.captioner_name!r} does not look at images", remedy="give --captioner or --tagger"
        )
    models = find_caption_models(parsed, Path())
    with tempfile.TemporaryDirectory(prefix="loraline-") as work:
        dataset, out = Path(work) / "images", Path(work) / "captions"
        before = {image.source: image for image in ingest(images, dataset, IngestSettings()).pictures}
        manifest = caption(
            dataset, out, parsed, progress, cache=caption_cache(home), labels=caption_labels(parsed, models)
        )
        concept = [image for image in manifest.pictures if image.split != "class"]
        keeps = parsed.existing == "keep"
        changed = [image for image in concept if not (keeps and has_own_caption(before[image.source]))]
        texts = {image.source: image.caption for image in changed}
        files = {image.source: out / image.file for image in changed}
        findings = find_caption_problems(texts, files, parsed)[0] if changed else []
    targets = find_caption_files(images, [image.source for image in changed if image.caption])
    left = [source for source, path in targets.items() if keeps and _holds_text(path)]
    written = {} if dry_run else {source: path for source, path in targets.items() if source not in left}
    with write_within(images):
        for source, path in written.items():
            atomic_write(path, f"{texts[source]}\n".encode())
    return {
        "dataset": manifest.describe(),
        "captions": {image.source: {"caption": image.caption, "origin": image.caption_origin} for image in changed},
        "written": {source: path.relative_to(images).as_posix() for source, path in written.items()},
        "kept": [image.source for image in concept if image not in changed],
        "left": left,
        "quarantined": [item.model_dump() for item in manifest.quarantined],
        "findings": [str(finding) for finding in findings],
        "models": models,
    }


def find_caption_files(root: Path, sources: Iterable[str]) -> dict[str, Path]:
    """Returns image -> its caption file: `name.txt`, or `name.png.txt` where images share a name.

    Args:
        root: The folder of the images.
        sources: Names of images in the folder, as a manifest has them.
    """
    paths = {printable(name): root / name for name in list_tree(Tree(root)).images}
    stems = Counter(path.with_suffix("") for path in paths.values())
    return {
        source: path.with_suffix(_ENDING) if stems[path.with_suffix("")] == 1 else path.with_name(path.name + _ENDING)
        for source in sources
        for path in [paths[source]]
    }


def _holds_text(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and (not path.is_file() or path.stat().st_size > 0))
