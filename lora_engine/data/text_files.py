"""Reads the text files that people keep beside images, in the encodings in which they occur."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path

from lora_engine.data.folder import open_inside
from lora_engine.errors import DataError

# They change the reading direction, so a caption could display other text than it contains.
_DIRECTION = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path, root: Path, max_bytes: int) -> str:
    """Returns the text of a file; see `decode_text`.

    Args:
        path: The file.
        root: Links that lead out of this folder are refused.
        max_bytes: Largest size of the file.

    Raises:
        DataError: It is too large, not text, no regular file, or a link out of the root.
    """
    with open_inside(path, root) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DataError("is too long", where=printable(path.name), allowed=f"{max_bytes:,} bytes")
    return decode_text(content, path.name)


def decode_text(content: bytes, name: str) -> str:
    """Returns the text of bytes in UTF-8, UTF-16, UTF-32, Windows-1252 or Latin-1.

    A byte order mark decides; otherwise UTF-16 is known by its zero bytes, and what is not UTF-8 is taken for the
    8-bit encodings of older editors, unless it has control characters.

    Raises:
        DataError: It is not text.
    """
    encodings = [encoding for mark, encoding in _MARKS if content.startswith(mark)][:1]
    if not encodings:
        encodings = [_wide_encoding(content) or "utf-8", "cp1252", "latin-1"]
    for encoding in encodings:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if encoding not in {"cp1252", "latin-1"} or not any(map(_is_control, text)):
            return text
    raise DataError("is not text", where=printable(name), allowed="UTF-8, UTF-16 or Latin-1", remedy="save it as UTF-8")


def clean_text(text: str) -> str:
    """Returns the text as one line: white space collapsed, control and direction characters removed, NFC."""
    spaced = (" " if character.isspace() else character for character in text)
    visible = (c for c in spaced if unicodedata.category(c) not in {"Cc", "Cs"} and c not in _DIRECTION)
    # A removed character may have kept a letter and its accent apart.
    return " ".join(unicodedata.normalize("NFC", "".join(visible)).split())


def printable(name: str) -> str:
    """Returns the name with control and direction characters escaped, safe for terminals and pages."""
    safe = (
        character
        if character.isprintable() and character not in _DIRECTION
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in name
    )
    return "".join(safe)


def _wide_encoding(content: bytes) -> str | None:
    """Returns the UTF-16 encoding of text without a byte order mark, where most characters are ASCII."""
    if len(content) < 4 or len(content) % 2:
        return None
    high, low = content[1::2].count(0), content[0::2].count(0)
    if low == 0 and high * 2 > len(content) // 2:
        return "utf-16-le"
    return "utf-16-be" if high == 0 and low * 2 > len(content) // 2 else None


def _is_control(character: str) -> bool:
    return unicodedata.category(character) == "Cc" and character not in "\t\n\r\f\v"
