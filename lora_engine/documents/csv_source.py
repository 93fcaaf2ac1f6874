"""Reads CSV tables with named columns."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_engine.documents.json_source import decode
from lora_engine.errors import WordedError


@dataclass(frozen=True)
class TableRow:
    """A row of a table.

    Attributes:
        where: `file:line`.
        cells: Column -> text; a cell that the row lacks is empty.
        columns: Column -> its number, counted from 1.
    """

    where: str
    cells: Mapping[str, str]
    columns: Mapping[str, int]

    def place(self, column: str) -> str:
        """Returns `file:line, column N (name)` of a cell."""
        return f"{self.where}, column {self.columns[column]} ({column})" if column in self.columns else self.where


def read_table(
    content: bytes,
    where: str,
    columns: Sequence[str] | None,
    error: type[WordedError],
    *,
    spellings: Mapping[str, str] | None = None,
) -> list[TableRow]:
    """Returns the rows of a UTF-8 table, by the names in its first line; blank lines are skipped.

    Other columns are ignored, unless their names look like misspelled ones.

    Args:
        content: The bytes of the table.
        where: The file, for errors.
        columns: The columns to read; None means all of them.
        error: The class of the errors.
        spellings: Other spellings of columns -> the column.

    Raises:
        WordedError: An `error`: the text is no CSV, two columns have one meaning, a row has more cells than the table
            has columns, or a column is misspelled. Names line and column.
    """
    reader = csv.reader(io.StringIO(decode(content, where, error), newline=""), strict=True)
    rows = []
    names: list[str] | None = None
    try:
        for cells in reader:
            place = f"{where}:{reader.line_num}"
            if columns is None:
                columns = [cell.strip().lower() for cell in cells]
            if names is None:
                names = _read_names(cells, place, columns, spellings or {}, error)
            elif cells:
                rows.append(_read_row(cells, place, names, columns, error))
    except csv.Error as problem:
        raise error(f"is not CSV ({problem})", where=f"{where}:{reader.line_num}", remedy="correct the line") from None
    return rows


def _read_names(
    cells: Sequence[str], where: str, columns: Sequence[str], spellings: Mapping[str, str], error: type[WordedError]
) -> list[str]:
    names: list[str] = []
    for number, cell in enumerate(cells, start=1):
        name = cell.strip().lower()
        name = spellings.get(name, name)
        place = f"{where}, column {number}"
        near = difflib.get_close_matches(name, columns, n=1, cutoff=0.8) if len(name) < 80 else []
        if name not in columns and near:
            # Ignoring a misspelled column would ignore the values in it.
            remedy = f"did you mean {near[0]!r}?"
            raise error(f"unknown column {cell!r}", where=place, allowed=", ".join(columns), remedy=remedy)
        if name in columns and name in names:
            problem = f"column {cell!r} has the meaning of column {names.index(name) + 1}"
            raise error(problem, where=place, remedy="delete one of the two")
        names.append(name)
    return names


def _read_row(
    cells: Sequence[str], where: str, names: Sequence[str], columns: Sequence[str], error: type[WordedError]
) -> TableRow:
    if len(cells) > len(names):
        raise error(
            f"the row has {len(cells)} cells, the table {len(names)} columns",
            where=f"{where}, column {len(names) + 1}",
            remedy='put text with commas into double quotes: "a, b"',
        )
    read = {name: cell for name, cell in zip(names, cells, strict=False) if name in columns}
    return TableRow(where, read, {name: number for number, name in enumerate(names, start=1)})
