"""Mutators of formats with checksums or an inner structure: PNG, tar, zip and SQLite."""

from __future__ import annotations

import io
import sqlite3
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from random import Random
from typing import Any

from tests.fuzz.mutate_bytes import PIECES, mutate_bytes

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CELLS: tuple[Any, ...] = (
    *(None, b"\xff\x00", b"", "", "x", -7, 0, 1, 5, 2**63 - 1, -(2**63), 0.5, 1e308, "5", "2026-13-45T00:00:00"),
    *('{"a": [1,', "[]", "{}", "null", "a" * 5000, "../../victim", "\x1b[2J", "0" * 64, "\u202ezorb", "COMPLETED"),
)


def mutate_png(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Returns a PNG with changed chunks, most of them with the right checksum."""
    chunks = list(_chunks(content))
    if not chunks or random.random() < 0.2:
        return mutate_bytes(content, others, random)
    for _ in range(random.choice((1, 1, 2))):
        place = random.randrange(len(chunks))
        kind, data = chunks[place]
        match random.randrange(6):
            case 0:
                chunks[place] = (kind, mutate_bytes(data, others, random))
            case 1:
                del chunks[place]
            case 2:
                chunks.insert(random.randrange(len(chunks) + 1), (kind, data))
            case 3:
                chunks.insert(
                    place, (random.choice((b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"gAMA")), _text(random))
                )
            case 4 if len(data) == 13:
                sizes = [random.choice((0, 1, 7, 8000, 1 << 16, (1 << 31) - 1)) for _ in range(2)]
                chunks[place] = (kind, struct.pack(">II", *sizes) + data[8:])
            case _:
                chunks[place] = (random.choice((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL")), data)
        if not chunks:
            break
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(_SIGNATURE)
    while place + 12 <= len(content):
        length = struct.unpack_from(">I", content, place)[0]
        yield content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        place += 12 + length


def _text(random: Random) -> bytes:
    text = random.choice(PIECES).encode("utf-8", "replace")
    bomb = zlib.compress(b"\0" * (1 << 20), 9) if random.random() < 0.1 else zlib.compress(text)
    key = random.choice((b"parameters", b"prompt", b"Software", b"Exif", b"XML:com.adobe.xmp"))
    return key + random.choice((b"\0", b"\0\0", b"\0\1\0\0\0", b"")) + random.choice((text, bomb))


def mutate_tar(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Returns an archive with a changed member, or with changed bytes and right checksums of the headers."""
    if random.random() < 0.3:
        return _with_checksums(mutate_bytes(content, others, random))
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = [(member, archive.extractfile(member)) for member in archive]
            pairs = [(member, stream.read() if stream else b"") for member, stream in members]
    except (tarfile.TarError, ValueError, OSError, KeyError):
        return mutate_bytes(content, others, random)
    if pairs:
        _change_member(pairs, random)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=random.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as archive:
        for member, data in pairs:
            try:
                archive.addfile(member, io.BytesIO(data))
            except (ValueError, OSError, UnicodeError):
                continue
    return out.getvalue()


def _change_member(pairs: list[tuple[tarfile.TarInfo, bytes]], random: Random) -> None:
    place = random.randrange(len(pairs))
    member, data = pairs[place]
    match random.randrange(5):
        case 0:
            name = random.choice((*PIECES, "/etc/x", "../x", "a/../../x", "snapshots", "blobs/x")).replace("\0", "?")
            member.name = name.encode("utf-8", "replace").decode()
        case 1:
            kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE)
            member.type, member.linkname = random.choice(kinds), random.choice(("/etc/passwd", "..", member.name))
        case 2:
            pairs.insert(random.randrange(len(pairs) + 1), (member, data))
        case 3:
            del pairs[place]
        case _:
            changed = mutate_bytes(data, (), random)
            member.size = len(changed)
            pairs[place] = (member, changed)


def mutate_zip(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Changes a member of a zip archive, which keeps valid checksums, or all bytes if it is no archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, ValueError, zlib.error):
        return mutate_bytes(content, others, random)
    if not members:
        return mutate_bytes(content, others, random)
    # The pickle itself is most of what a reader interprets.
    name = random.choice([*members, *([entry for entry in members if entry.endswith(".pkl")] * 4)])
    members[name] = mutate_bytes(members[name], [], random)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for entry, data in members.items():
            archive.writestr(zipfile.ZipInfo(entry), data)
    return buffer.getvalue()


def _with_checksums(content: bytes) -> bytes:
    data = bytearray(content)
    for place in range(0, len(data) - 511, 512):
        if data[place + 257 : place + 262] == b"ustar":
            data[place + 148 : place + 156] = b" " * 8
            data[place + 148 : place + 156] = b"%06o\0 " % sum(data[place : place + 512])
    return bytes(data)


def mutate_database(content: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Returns a SQLite file with a changed cell, a changed schema or, more rarely, changed bytes."""
    if random.random() < 0.15:
        return mutate_bytes(content, others, random)
    try:
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
            connection.deserialize(content)
            connection.execute("PRAGMA journal_mode = MEMORY")
            connection.execute("PRAGMA ignore_check_constraints = ON")
            for _ in range(random.choice((1, 1, 2))):
                _change_database(connection, random)
            return connection.serialize()
    except (sqlite3.Error, OverflowError, UnicodeError):
        return mutate_bytes(content, others, random)


def _change_database(connection: sqlite3.Connection, random: Random) -> None:
    rows = connection.execute(
        "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"
    ).fetchall()
    tables = [name for kind, name, _ in rows if kind == "table" and not name.startswith("sqlite_")]
    if random.random() < 0.1:
        change = random.choice(
            (
                f'ALTER TABLE "{random.choice(tables)}" ADD COLUMN more TEXT',
                f'DROP TABLE "{random.choice(tables)}"',
                f'CREATE VIEW "{random.choice(("names2", "../x"))}" AS SELECT 1',
                f"PRAGMA user_version = {random.choice((0, 1, 99))}",
                f"PRAGMA application_id = {random.choice((0, 1, 99))}",
            )
        )
        connection.execute(change)
        return
    filled = [name for name in tables if connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]]
    if not filled:
        return
    triggers = [(name, sql) for kind, name, sql in rows if kind == "trigger"]
    for name, _ in triggers:
        connection.execute(f'DROP TRIGGER "{name}"')
    table = random.choice(filled)
    columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
    column, value = random.choice(columns), random.choice(CELLS)
    number = random.choice([row[0] for row in connection.execute(f'SELECT rowid FROM "{table}" LIMIT 50')])
    try:
        connection.execute(f'UPDATE "{table}" SET "{column}" = ? WHERE rowid = ?', (value, number))
        if random.random() < 0.1:
            connection.execute(f'DELETE FROM "{table}" WHERE rowid = ?', (number,))
    except sqlite3.IntegrityError:
        connection.execute(f'DELETE FROM "{table}" WHERE rowid = ?', (number,))
    finally:
        for _, sql in triggers:
            connection.execute(sql)
