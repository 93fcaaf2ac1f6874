"""Changes the captions of single images in the user's folder: in the file beside the image, with undo.

Each change is logged in the home with its user and the bytes before it. Nothing outside of the folder is written.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_engine.data.folder import Tree, list_tree, open_inside
from lora_engine.data.manifest import MAX_CAPTION
from lora_engine.data.text_files import clean_text, decode_text, printable
from lora_engine.errors import DataError
from lora_engine.files import atomic_write, canonical_json, sha256_bytes, sha256_file, write_within
from registry.home import Home
from registry.versions.guard import require_permission
from registry.versions.versions import Versions
from tasks.operations.caption_folder import find_caption_files

LOG = "caption-edits"
_MAX_BYTES = 64 * 1024
_KEPT = 500


@dataclass(frozen=True)
class CaptionEdit:
    """A change of a caption.

    Attributes:
        source: Name of the image in the folder.
        file: Name of the caption file in the folder.
        before: The caption before; None if there was no file.
        after: The caption after; None if an undo removed the file.
    """

    source: str
    file: str
    before: str | None
    after: str | None


def edit_caption(
    home: Home,
    folder: Path,
    source: str,
    text: str,
    *,
    expected: str | None = None,
    sha256: str | None = None,
    actor: str | None = None,
) -> CaptionEdit:
    """Writes the caption of an image into the text file beside it, which ingest prefers to all other captions.

    Args:
        home: The home, which logs the change.
        folder: The folder of the images.
        source: Name of the image in the folder, as a manifest has it.
        text: The caption, one line.
        expected: What the caption file must have now; empty for no file; None for anything.
        sha256: Digest that the image must have; None for any.
        actor: The user; None means this process's user.

    Raises:
        DataError: The caption or the image cannot be used, the file has other text than expected, or is a link.
        Refused: The user has no role that may train any adapter.
    """
    user = _require_trainer(home, actor)
    caption = _check_caption(text)
    path = _find_file(folder, source, sha256)
    with home.lock("caption-edits"):
        before = _read(path, folder)
        current = None if before is None else clean_text(decode_text(before, path.name))
        if expected is not None and (current or "") != clean_text(expected):
            raise DataError(
                f"the caption is now {(current or '')[:80]!r}",
                where=printable(source),
                allowed=f"{expected[:80]!r}, which was shown",
                remedy="load the dataset again",
            )
        after = f"{caption}\n".encode()
        with write_within(folder):
            atomic_write(path, after)
        name = path.relative_to(folder).as_posix()
        entries = [*_read_log(home, folder), _entry(source, name, before, after, user)]
        _write_log(home, folder, entries)
    return CaptionEdit(source, name, current, caption)


def undo_caption(home: Home, folder: Path, *, actor: str | None = None) -> CaptionEdit:
    """Restores the caption file of the last change in a folder, byte for byte; a second call undoes the one before.

    Raises:
        DataError: There is nothing to undo, or the file was changed since.
        Refused: The user has no role that may train any adapter.
    """
    _require_trainer(home, actor)
    with home.lock("caption-edits"):
        entries = _read_log(home, folder)
        if not entries:
            raise DataError("no change of a caption is known", where=str(folder))
        last = entries[-1]
        path = _find_file(folder, last["source"], None)
        current = _read(path, folder)
        if current is None or sha256_bytes(current) != last["after"] or path != folder / last["file"]:
            raise DataError(
                "the caption was changed by others since",
                where=printable(last["source"]),
                remedy="edit it again",
            )
        before = None if last["before"] is None else base64.b64decode(last["before"])
        with write_within(folder):
            if before is None:
                path.unlink()
            else:
                atomic_write(path, before)
        _write_log(home, folder, entries[:-1])
    texts = [None if content is None else clean_text(decode_text(content, path.name)) for content in (current, before)]
    return CaptionEdit(last["source"], last["file"], *texts)


def read_captions(folder: Path, sources: Iterable[str]) -> dict[str, str | DataError]:
    """Returns image -> the caption in the file beside it, empty without one, or why the file cannot be used."""
    names = set(map(printable, list_tree(Tree(folder)).images))
    known = [source for source in sources if source in names]
    captions: dict[str, str | DataError] = {}
    for source, path in find_caption_files(folder, known).items():
        try:
            content = _read(path, folder)
            captions[source] = "" if content is None else clean_text(decode_text(content, path.name))
        except DataError as error:
            captions[source] = error
    return captions


def _require_trainer(home: Home, actor: str | None) -> str:
    with closing(Versions(home)) as versions:
        return str(require_permission(versions, "register", actor=actor))


def _check_caption(text: str) -> str:
    """Returns a caption as it is written.

    Raises:
        DataError: It is empty, too long, or has control characters.
    """
    caption = clean_text(text)
    if not caption:
        raise DataError("the caption is empty", remedy="write a caption, or delete the text file yourself")
    if len(caption) > MAX_CAPTION:
        raise DataError(f"the caption has {len(caption):,} characters", allowed=f"at most {MAX_CAPTION:,}")
    if caption != " ".join(text.split()):
        raise DataError(
            f"the caption {printable(text)[:80]!r} has control characters, or letters that are not composed",
            allowed=f"{caption[:80]!r}",
        )
    return caption


def _find_file(folder: Path, source: str, sha256: str | None) -> Path:
    """Returns the caption file of an image that is in the folder."""
    names = {printable(name): name for name in list_tree(Tree(folder)).images}
    if source not in names:
        raise DataError(f"no image {printable(source)[:80]!r}", where=str(folder), remedy="name an image of the folder")
    image = folder / names[source]
    with open_inside(image, folder):  # refuses links out of the folder
        pass
    if sha256 is not None and sha256_file(image) != sha256:
        raise DataError("the image is another one than in the dataset", where=printable(source))
    return find_caption_files(folder, [source])[source]


def _read(path: Path, folder: Path) -> bytes | None:
    """Returns the content of a caption file; None if there is none."""
    if path.is_symlink():
        raise DataError("the caption file is a link", where=printable(path.name), remedy="replace it by a file")
    if not path.exists():
        return None
    with open_inside(path, folder) as file:
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise DataError("the caption file is too long", where=printable(path.name), allowed=f"{_MAX_BYTES:,} bytes")
    return content


def _entry(source: str, file: str, before: bytes | None, after: bytes, user: str) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "actor": user,
        "source": source,
        "file": file,
        "before": None if before is None else base64.b64encode(before).decode(),
        "after": sha256_bytes(after),
    }


def _log_path(home: Home, folder: Path) -> Path:
    return home.path / LOG / f"{sha256_bytes(str(folder.resolve()).encode())[:32]}.json"


def _read_log(home: Home, folder: Path) -> list[dict[str, Any]]:
    path = _log_path(home, folder)
    try:
        entries = json.loads(path.read_bytes())["edits"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError("the log of caption edits is damaged", where=str(path), remedy="remove it") from None
    return list(entries)


def _write_log(home: Home, folder: Path, entries: list[dict[str, Any]]) -> None:
    value = {"folder": str(folder.resolve()), "edits": entries[-_KEPT:]}
    atomic_write(_log_path(home, folder), canonical_json(value))
