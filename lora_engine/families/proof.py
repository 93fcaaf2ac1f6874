"""Proves the family of an adapter by the names, block numbers, widths and row ratios of its modules. Torch-free.

Names alone never prove a family: FLUX.1, FLUX.2, Chroma, HunyuanVideo and Qwen-Image share the names of attention.
Every known module excludes the families that lack it, and the sizes in which its block or its shape does not exist. A
file that changes every block of a size excludes sizes with more blocks. One family left is the proof; several are
ambiguous; none is a contradiction.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lora_engine.families.family import Family, Size, families
from lora_engine.families.names import Blocks, with_single_parts

Shape = tuple[int, int]
"""Rows and columns of a weight; 0 is unknown."""
_ANY_SIZE = Size("", {})
_MARK = "*"
"""In place of a list of blocks: the module is known by a mark."""
_IN_BLOCK = re.compile(r"(.+?)_(\d{1,4})_(.+)")
_TERM = re.compile(r"(\d*)([a-z]?)")


@dataclass(frozen=True)
class Recognition:
    """What the modules of a file prove.

    Attributes:
        families: Names of the families that have all modules; several if the file is ambiguous, none if no module is
            known or the file is contradictory.
        problem: The contradiction; empty if there is none.
        where: The module that contradicts.
        allowed: What the families have instead.
    """

    families: tuple[str, ...] = ()
    problem: str = ""
    where: str = ""
    allowed: str = ""

    @property
    def proven(self) -> str:
        """The name of the only possible family; empty if there are several or none."""
        return self.families[0] if len(self.families) == 1 else ""


@dataclass(frozen=True)
class _Entry:
    """A module of a family: the list of blocks that it is in (empty outside blocks, or `_MARK`), and its shape."""

    family: str
    blocks: str
    shape: str


_EntryTable = Mapping[tuple[str, str], tuple[_Entry, ...]]


def recognize_family(modules: Mapping[str, Shape | None], *, by_size: bool = True) -> Recognition:
    """Returns the families that have all known modules of a file.

    Args:
        modules: Flattened path inside the network, without the prefix of a program, to the shape of the weight; None
            if unknown. Names that no family has prove nothing.
        by_size: True excludes families without a published size of these blocks and shapes; False is for bases of any
            size.
    """
    found = _known(modules)
    if not found:
        return Recognition()
    remaining, contradiction = _by_names(found)
    if contradiction is not None:
        return contradiction
    if not by_size:
        return Recognition(remaining)
    problems = [
        (name, size, _contradictions(found, modules, families[name], size))
        for name in remaining
        for size in families[name].sizes or (_ANY_SIZE,)
    ]
    fitting = [(name, size) for name, size, listed in problems if not listed]
    if not fitting:
        return min((listed for _, _, listed in problems), key=len)[0]
    complete = [(name, size) for name, size in fitting if _is_complete(found, name, size)]
    return Recognition(tuple(dict.fromkeys(name for name, _ in complete or fitting)))


def has_known_modules(names: Iterable[str]) -> bool:
    """Returns True if any flattened path is a module of a known transformer."""
    return bool(_known(names))


def titles(names: Iterable[str]) -> str:
    """Returns the titles of families for a message: `FLUX.1 or Chroma`."""
    listed = list(dict.fromkeys(families[name].title for name in names))
    return " or ".join(filter(None, [", ".join(listed[:-1]), listed[-1]]))


def _by_names(found: Mapping[str, tuple[_Entry, ...]]) -> tuple[tuple[str, ...], Recognition | None]:
    """Returns the families that have all modules, or the contradiction."""
    # Modules in blocks come first. The tables of families that are only recognized lack modules outside blocks.
    ordered = sorted(found, key=lambda name: not found[name][0].blocks)
    first, remaining = ordered[0], tuple(dict.fromkeys(entry.family for entry in found[ordered[0]]))
    is_in_block = bool(found[first][0].blocks)
    for name in ordered:
        known = {entry.family for entry in found[name]}
        is_outside = is_in_block and not found[name][0].blocks
        common = tuple(
            family for family in remaining if family in known or (is_outside and not families[family].is_supported)
        )
        if not common:
            allowed = f"{first!r} is of {titles(remaining)}, {name!r} of {titles(sorted(known))}"
            problem = f"no base family has the modules {first!r} and {name!r}"
            return (), Recognition(problem=problem, where=name, allowed=allowed)
        remaining = common
    return remaining, None


def _is_complete(found: Mapping[str, tuple[_Entry, ...]], family: str, size: Size) -> bool:
    """Returns True if the file changes a module in every block of a size."""
    numbers: dict[str, set[int]] = {blocks: set() for blocks in size.blocks}
    for name, entries in found.items():
        for entry in entries:
            if entry.family == family and entry.blocks in numbers:
                numbers[entry.blocks].add(_number(name))
    return bool(numbers) and all(len(numbers[blocks]) == count for blocks, count in size.blocks.items())


def _contradictions(
    found: Mapping[str, tuple[_Entry, ...]], modules: Mapping[str, Shape | None], family: Family, size: Size
) -> list[Recognition]:
    return [
        problem
        for name, entries in found.items()
        if (problem := _contradiction(name, modules[name], [e for e in entries if e.family == family.name], size))
    ]


def _contradiction(name: str, shape: Shape | None, entries: list[_Entry], size: Size) -> Recognition | None:
    """Returns why a size cannot have a module; None if it can."""
    problem = allowed = ""
    for entry in entries:
        count, number = size.blocks.get(entry.blocks) or size.small.get(entry.blocks, 0), _number(name)
        if entry.blocks not in ("", _MARK) and number >= count:
            problem, allowed = f"is in block {number}", f"{count or 'no'} such blocks"
        elif shape is not None and entry.shape and not _has_shape(shape, entry.shape, size):
            problem, allowed = f"has {_described(*shape)}", _expected(entry.shape, size)
        else:
            return None
    if not problem:
        return None
    return Recognition(problem=f"the module {problem}", where=name, allowed=f"in {size.title} {allowed}")


def _number(name: str) -> int:
    match = _IN_BLOCK.fullmatch(name)
    return int(match[2]) if match else 0


def _has_shape(shape: Shape, expected: str, size: Size) -> bool:
    pairs = zip(shape, expected.split(), strict=True)
    return all(not actual or actual in _values(terms, size) for actual, terms in pairs)


def _expected(expected: str, size: Size) -> str:
    rows, columns = (" or ".join(map(str, _values(terms, size))) for terms in expected.split())
    return f"{rows} rows and {columns} columns"


def _described(rows: int, columns: int) -> str:
    return " and ".join(filter(None, [f"{rows} rows" if rows else "", f"{columns} columns" if columns else ""]))


def _values(terms: str, size: Size) -> list[int]:
    """Returns the numbers that terms such as `w+w+4w` or `6w|2w` mean in a size."""
    return [sum(_value(term, size) for term in option.split("+")) for option in terms.split("|")]


def _value(term: str, size: Size) -> int:
    number, unit = _TERM.fullmatch(term).groups()  # type: ignore[union-attr]  # every table is tested
    return int(number or 1) * (size.units[unit] if unit else 1)


def _known(names: Iterable[str]) -> dict[str, tuple[_Entry, ...]]:
    """Returns the modules that any family has."""
    table, marks, any_mark = _index(tuple(families))
    known = {}
    for name in names:
        match = _IN_BLOCK.fullmatch(name)
        entries = table.get(("", name)) or (table.get((match[1], match[3])) if match else None)
        if entries is None and any_mark.match(name):
            entries = tuple(_Entry(family, _MARK, "") for family, mark in marks.items() if mark.match(name))
        if entries:
            known[name] = entries
    return known


@functools.cache
def _index(names: tuple[str, ...]) -> tuple[_EntryTable, Mapping[str, re.Pattern[str]], re.Pattern[str]]:
    """Returns the modules by list of blocks and name, the marks by family, and one pattern for all marks."""
    table: dict[tuple[str, str], dict[_Entry, None]] = {}
    for family in (families[name] for name in names):
        for key, entry in _rows(family):
            table.setdefault(key, {})[entry] = None
    marks = {name: re.compile(families[name].marks) for name in names if families[name].marks}
    any_mark = re.compile("|".join(mark.pattern for mark in marks.values()))
    return {key: tuple(entries) for key, entries in table.items()}, marks, any_mark


def _rows(family: Family) -> Iterator[tuple[tuple[str, str], _Entry]]:
    for names in filter(None, (family.names, *family.other_names.values())):
        for original, path in names.outside.items():
            for written in (original, path):
                yield ("", _flat(written)), _Entry(family.name, "", names.shapes.get(path, ""))
        for blocks in names.blocks:
            for original, parts in with_single_parts(blocks.modules):
                yield (_flat(blocks.original), _flat(original)), _block_entry(family, blocks, parts)
            for part in (part for parts in blocks.modules.values() for part in parts):
                yield (_flat(blocks.canonical), _flat(part)), _block_entry(family, blocks, (part,))


def _block_entry(family: Family, blocks: Blocks, parts: tuple[str, ...]) -> _Entry:
    shapes = [blocks.shapes.get(part, "").split() for part in parts]
    joint = f"{'+'.join(rows for rows, _ in shapes)} {shapes[0][1]}" if all(shapes) else ""
    return _Entry(family.name, blocks.canonical, joint)


def _flat(name: str) -> str:
    return name.replace(".", "_")
