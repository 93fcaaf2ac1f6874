"""Defines the tables of module names of diffusion transformers and of text encoders. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

TRANSFORMER = "transformer"
"""The component of every diffusion transformer."""


@dataclass(frozen=True)
class Blocks:
    """One type of repeated block.

    Attributes:
        original: Name of the list of blocks in the original code.
        canonical: Its name in diffusers.
        modules: Original name inside a block to the names in diffusers; several if the layer is fused. If programs
            spell a name in several ways, the first is written.
        shapes: Diffusers' name inside a block to the `rows columns` of its weight, in the units of a `Size`: `4w w`,
            or `6w|2w w` if blocks differ. Missing names have any shape.
    """

    original: str
    canonical: str
    modules: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """The diffusers modules that a module of a file corresponds to.

    Attributes:
        parts: Paths in diffusers, in the order of the rows.
        original: Original path, with dots; empty if the file uses diffusers' path.
    """

    parts: tuple[str, ...]
    original: str = ""


@dataclass(frozen=True)
class NameTable:
    """The original and diffusers' names of one component.

    Attributes:
        blocks: Names of its repeated blocks.
        outside: Original name to diffusers' name, for modules outside blocks.
        shapes: Shapes of the modules outside blocks, as in `Blocks`.
        tensors: Original name to diffusers' name, for tensors of the network itself, which belong to no layer.
    """

    blocks: tuple[Blocks, ...]
    outside: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    def find(self, path: str, separator: str = ".") -> Target | None:
        """Returns the target of a module by its original path, written with the separator; None if unknown."""
        return self._find(path, self._tables(separator)[0])

    def find_canonical(self, path: str, separator: str = ".") -> str | None:
        """Returns the path in diffusers of a path that is written with the separator; None if unknown."""
        target = self._find(path, self._tables(separator)[1])
        return target.parts[0] if target else None

    def original_of(self, path: str) -> Target | None:
        """Returns the target of the original module that contains a diffusers path, with all parts; None if unknown."""
        if path in self._outside_back:
            return Target((path,), self._outside_back[path])
        for block, back in self._blocks_back:
            match = re.fullmatch(rf"{re.escape(block.canonical)}\.(\d{{1,4}})\.(.+)", path)
            if match and match[2] in back:
                return _target(block, back[match[2]], block.modules[back[match[2]]], int(match[1]))
        return None

    def rows_of(self, parts: Sequence[str], columns: int) -> list[int]:
        """Returns the rows of each part of a fused layer.

        Args:
            parts: Paths in diffusers.
            columns: Columns of the layer, which its parts share; 1 gives the proportions.
        """
        name, _, inner = parts[0].partition(".")
        block = next(block for block in self.blocks if block.canonical == name)
        shapes = [block.shapes[part.removeprefix(f"{name}.{inner.partition('.')[0]}.")].split() for part in parts]
        return [_factor(rows) * columns // _factor(width) for rows, width in shapes]

    def _find(self, path: str, table: _Table) -> Target | None:
        if path in table.outside:
            name, canonical = table.outside[path]
            return Target((canonical,), name)
        for pattern, block, modules in table.blocks:
            match = pattern.fullmatch(path)
            if match and match[2] in modules:
                return _target(block, *modules[match[2]], int(match[1]))
        return None

    @cached_property
    def _by_separator(self) -> dict[str, tuple[_Table, _Table]]:
        return {}

    def _tables(self, separator: str) -> tuple[_Table, _Table]:
        if separator not in self._by_separator:
            own = [
                Blocks(b.canonical, b.canonical, {p: (p,) for ps in b.modules.values() for p in ps})
                for b in self.blocks
            ]
            self._by_separator[separator] = (
                _table(separator, self.outside, self.blocks),
                _table(separator, {path: path for path in self.outside.values()}, own),
            )
        return self._by_separator[separator]

    @cached_property
    def _outside_back(self) -> dict[str, str]:
        return {path: original for original, path in reversed([*self.outside.items()])}

    @cached_property
    def _blocks_back(self) -> list[tuple[Blocks, dict[str, str]]]:
        # Of several spellings, the first is written.
        return [
            (block, {part: name for name, parts in reversed([*block.modules.items()]) for part in parts})
            for block in self.blocks
        ]


@dataclass(frozen=True)
class _Table:
    """A `NameTable` indexed by names with one separator; the values keep the dotted names."""

    outside: Mapping[str, tuple[str, str]]
    blocks: list[tuple[re.Pattern[str], Blocks, Mapping[str, tuple[str, tuple[str, ...]]]]]


def _table(separator: str, outside: Mapping[str, str], blocks: Iterable[Blocks]) -> _Table:
    def written(path: str) -> str:
        return path.replace(".", separator)

    sep = re.escape(separator)
    return _Table(
        {written(name): (name, path) for name, path in outside.items()},
        [
            (
                re.compile(rf"{re.escape(written(block.original))}{sep}(\d{{1,4}}){sep}(.+)"),
                block,
                {written(name): (name, parts) for name, parts in with_single_parts(block.modules)},
            )
            for block in blocks
        ],
    )


def with_single_parts(modules: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the names of a block, and for fused layers those of the parts, as OneTrainer writes them (`qkv.0`)."""
    for name, parts in modules.items():
        yield name, parts
        if len(parts) > 1:
            yield from ((f"{name}.{number}", (part,)) for number, part in enumerate(parts))


def same_names(*names: str) -> dict[str, tuple[str, ...]]:
    """Returns the table of modules whose original names are diffusers'."""
    return {name: (name,) for name in names}


def same_blocks(shapes: Mapping[str, str], path: str = "transformer_blocks") -> Blocks:
    """Returns the blocks of a list that has diffusers' names in the original too; `shapes`: see `Blocks`."""
    return Blocks(path, path, same_names(*shapes), shapes)


def _target(block: Blocks, name: str, parts: Sequence[str], number: int) -> Target:
    paths = tuple(f"{block.canonical}.{number}.{part}" for part in parts)
    return Target(paths, f"{block.original}.{number}.{name}")


def _factor(term: str) -> int:
    return int(re.match(r"\d*", term)[0] or 1)  # type: ignore[index]  # matches always
