"""Mutators of bytes and of text that know nothing of a format."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from random import Random

MAX_SIZE = 1 << 20
"""Size in bytes of an input after which mutators do not lengthen it."""
NUMBERS = (
    *("0", "-0", "-1", "1", "2", "7", "255", "256", "65535", "65536", "2147483647", "2147483648", "4294967296"),
    *("9223372036854775807", "9223372036854775808", "18446744073709551616", "1e-300", "1e30", "1e308", "1e999"),
    *("-1e30", "NaN", "Infinity", "-Infinity", ".5", "1.", "010", "0x10", "1_000", "1:30", "9" * 40, "9" * 5000),
    *("0.1", "1e-7", "100000", "1000000000", "\uff11", "true", "null"),
)
PIECES = (
    *("\0", "\n", "\r", "\t", " ", "\x1b[2J", "\u202e", "\ufeff", "\ud800", "\U0001f600", "\u0301", "\u2028", "\xa0"),
    *("..", "../../victim", "/etc/passwd", "C:\\x", "~", "-", "--", "*", "?", "%s", "{0}", "{}", "$HOME", "`id`"),
    *("'", '"', "\\", ":", ": ", ",", ";", "@", "#", "|", "<", ">", "<lora:a:1>", "<lora:", "(", ")", "[", "]", "{"),
    *("}", "&a ", "*a", "<<: *a", "!!python/name:os.system ", "!!set {a}", "---\n", "? ", "| \n", "\\ud800"),
    *(
        "a" * 300,
        "(a" * 200,
        "[" * 300,
        "9" * 400,
        "x.y.z",
        "unet",
        "text_encoder",
        "alpha",
        "None",
        "yes",
        "2026-01-01",
    ),
)
_INTEGERS = (
    0,
    1,
    2,
    7,
    127,
    128,
    255,
    256,
    32767,
    65535,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def mutate_bytes(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Returns changed bytes; `others` are contents to take parts from."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        random.choice(_BYTES)(data, others, random)
    return bytes(data)


def mutate_text(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Returns changed text; bytes that are not UTF-8 are kept as they are."""
    text = content.decode("utf-8", "surrogateescape")
    for _ in range(random.choice((1, 1, 2, 3))):
        text = random.choice(_TEXTS)(text, [other.decode("utf-8", "replace") for other in others], random)
    # Surrogates that stand for a byte become that byte again, and others the bytes that no decoder accepts.
    return b"".join(
        bytes([ord(part) - 0xDC00]) if "\udc80" <= part <= "\udcff" else part.encode("utf-8", "surrogatepass")
        for part in text
    )


def _range(length: int, random: Random, most: int = 64) -> slice:
    start = random.randrange(length + 1)
    return slice(start, min(length, start + random.randint(1, most)))


def _flip(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    if data:
        data[random.randrange(len(data))] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))


def _delete(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    del data[_range(len(data), random)]


def _insert(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    place = random.randrange(len(data) + 1)
    data[place:place] = random.randbytes(random.randint(1, 16))


def _truncate(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    del data[random.randrange(len(data) + 1) :]


def _extend(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    data += random.choice((b"\0", b"\xff", b" ")) * random.choice((1, 8, 4096))


def _repeat(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    part = bytes(data[_range(len(data), random)])
    place = random.randrange(len(data) + 1)
    data[place:place] = part * min(random.choice((1, 2, 50, 2000)), MAX_SIZE // (len(data) + 1))


def _integer(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    form = random.choice(("B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(form)
    if len(data) >= size:
        place = random.randrange(len(data) - size + 1)
        struct.pack_into(form, data, place, random.choice(_INTEGERS) & ((1 << 8 * size) - 1))


def _splice(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    if others:
        other = random.choice(others)
        data[_range(len(data), random)] = other[_range(len(other), random, 4096)]


def _keep(text: str, others: Sequence[str], random: Random) -> str:
    place = random.randrange(len(text) + 1)
    return text[:place] + random.choice(PIECES) + text[place:]


def _change_number(text: str, others: Sequence[str], random: Random) -> str:
    found = list(_NUMBER.finditer(text))
    if not found:
        return text + random.choice(NUMBERS)
    match = random.choice(found)
    return text[: match.start()] + random.choice(NUMBERS) + text[match.end() :]


def _change_word(text: str, others: Sequence[str], random: Random) -> str:
    words = list(re.finditer(r"[^\s:,{}\[\]()<>@.]+", text))
    if not words:
        return text + random.choice(PIECES)
    match, other = random.choice(words), random.choice(words)
    new = random.choice((other[0], random.choice(PIECES), random.choice(NUMBERS), "", match[0] * 2, match[0].upper()))
    return text[: match.start()] + new + text[match.end() :]


def _repeat_part(text: str, others: Sequence[str], random: Random) -> str:
    part = text[_range(len(text), random)]
    place = random.randrange(len(text) + 1)
    times = min(random.choice((1, 2, 100, 5000)), MAX_SIZE // 8 // (len(part) + 1))
    return text[:place] + part * times + text[place:]


def _move_line(text: str, others: Sequence[str], random: Random) -> str:
    lines = text.splitlines(keepends=True) or [""]
    line = random.choice(lines)
    if random.random() < 0.5:
        lines.remove(line)
    if random.random() < 0.7:
        lines.insert(random.randrange(len(lines) + 1), random.choice((line, " " + line, line.strip())))
    return "".join(lines)


def _cut(text: str, others: Sequence[str], random: Random) -> str:
    part = _range(len(text), random)
    return text[: part.start] + text[part.stop :]


def _splice_text(text: str, others: Sequence[str], random: Random) -> str:
    other = random.choice(others) if others else text
    part = _range(len(text), random)
    return text[: part.start] + other[_range(len(other), random, 400)] + text[part.stop :]


_BYTES: tuple[Callable[[bytearray, Sequence[bytes], Random], None], ...] = (
    *(_flip, _set, _delete, _insert, _truncate, _extend, _repeat, _integer, _integer, _splice),
)
_TEXTS: tuple[Callable[[str, Sequence[str], Random], str], ...] = (
    *(_keep, _keep, _change_number, _change_word, _change_word, _repeat_part, _move_line, _cut, _splice_text),
)
