"""Modules of every size of every family, synthesized from the families' tables."""

from __future__ import annotations

from collections.abc import Iterator

from lora_engine.families import Family, families
from lora_engine.families.family import Size
from lora_engine.families.proof import _values

TABLES = [name for name, family in families.items() if family.names is not None]
SIZES = [(name, size.title) for name in TABLES for size in families[name].sizes]


def size_of(family: str, title: str) -> Size:
    return next(size for size in families[family].sizes if size.title == title)


def rows_and_columns(shape: str, size: Size) -> tuple[int, int]:
    rows, columns = (_values(terms, size)[0] for terms in shape.split())
    return rows, columns


def modules_of(family: Family, size: Size, *, original: bool = False) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields path and shape of the modules with a known shape, in diffusers' or the original names."""
    names = family.names
    assert names is not None
    for blocks in names.blocks:
        for number in range({**size.blocks, **size.small}.get(blocks.canonical, 0)):
            for written, parts in blocks.modules.items():
                if not all(part in blocks.shapes for part in parts):
                    continue
                shapes = [rows_and_columns(blocks.shapes[part], size) for part in parts]
                if original:
                    yield f"{blocks.original}.{number}.{written}", (sum(rows for rows, _ in shapes), shapes[0][1])
                else:
                    yield from zip((f"{blocks.canonical}.{number}.{part}" for part in parts), shapes, strict=True)
    for written, path in names.outside.items():
        if path in names.shapes:
            yield (written if original else path), rows_and_columns(names.shapes[path], size)


def narrow(size: Size) -> Size:
    """Returns a size with the same proportions and one to four blocks of each type."""
    unit = min(size.units.values()) // 4
    return Size(
        size.title,
        {name: min(count, 2) for name, count in size.blocks.items()},
        {name: value // unit for name, value in size.units.items()},
        {name: min(count, 1) for name, count in size.small.items()},
    )
