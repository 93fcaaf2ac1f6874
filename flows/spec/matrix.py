"""Expands the section `matrix` of a pipeline file into cells: the values of one pipeline each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from flows.refusals import nearest
from flows.spec.document import PipelineDocument, refuse_secrets
from flows.spec.parameters import Parameter, check_parameter_name
from flows.spec.references import MAX_PIPELINES, References, typed_value
from lora_engine.documents import Where, read_document, read_table
from lora_engine.files import is_present_file
from tasks.errors import SpecError

_MAX_TABLE = 1_000_000
_FORMS = "a mapping of lists, a list of mappings, or {file: adapters.csv}"
MatrixCell = Mapping[str, Any]


def find_axes(document: PipelineDocument) -> set[str]:
    """Returns the names that the matrix gives values to, without reading other files."""
    matrix = document.data.get("matrix")
    rows: list[Any] = matrix if isinstance(matrix, list) else []
    axes: set[str] = set()
    if isinstance(matrix, Mapping):
        axes |= {name for name in matrix if name not in ("include", "exclude") and name != "file"}
        include = matrix.get("include")
        rows = include if isinstance(include, list) else []
    return axes | {name for row in rows if isinstance(row, Mapping) for name in row}


class MatrixReader:
    """Reads the matrix of a file.

    Args:
        document: The file.
        declared: The declared parameters; an axis with such a name has its type and bounds.
        references: The references that values may have.
    """

    def __init__(self, document: PipelineDocument, declared: Mapping[str, Parameter], references: References) -> None:
        self._document, self._declared, self._references = document, declared, references

    def cells(self) -> list[MatrixCell]:
        """Returns the cells in the order of the file, the last axis changing first.

        Raises:
            SpecError: The matrix has another form, no values, more than `MAX_PIPELINES` cells, or a bad value.
        """
        raw, root = self._document.data["matrix"], ("matrix",)
        if isinstance(raw, list):
            self._count(len(raw), 0)
            return self._rows(raw, root)
        if not isinstance(raw, Mapping) or not raw:
            raise SpecError(
                "the matrix is empty" if raw in ({}, None) else f"the matrix is {_kind(raw)}",
                where=self._document.where(root),
                allowed=_FORMS,
            )
        include = self._list("include", raw)
        exclude = self._list("exclude", raw)
        rows = self._file(raw["file"]) if isinstance(raw.get("file"), str) else None
        axes = {
            name: values
            for name, values in raw.items()
            if name not in ("include", "exclude") and not (name == "file" and rows is not None)
        }
        for name, values in axes.items():
            self._check_axis(name, values)
        self._count(math.prod([len(rows or [{}]), *map(len, axes.values())]), len(include))
        options = [[{name: self._value(name, value, ("matrix", name, index))} for index, value in enumerate(values)]
                   for name, values in axes.items()]  # fmt: skip
        combined: list[MatrixCell] = []
        if axes or rows:
            for row, *chosen in product(rows or [{}], *options):
                combined.append({key: value for part in (row, *chosen) for key, value in part.items()})
        names = {name for cell in combined for name in cell}
        excluded = [self._row(entry, ("matrix", "exclude", index)) for index, entry in enumerate(exclude)]
        for index, entry in enumerate(excluded):
            for name in sorted(entry.keys() - names):
                where = self._document.where(("matrix", "exclude", index))
                raise SpecError(f"exclude names {name!r}", where=where, **nearest(name, names))
        cells: list[MatrixCell] = [
            cell for cell in combined if not any(entry.items() <= cell.items() for entry in excluded)
        ]
        cells = _include(cells, [self._row(entry, ("matrix", "include", i)) for i, entry in enumerate(include)])
        if not cells:
            raise SpecError("the matrix excludes every cell", where=self._document.where(("matrix", "exclude")))
        return cells

    def _list(self, key: str, raw: Mapping[str, Any]) -> Sequence[Any]:
        value = raw.get(key, [])
        if not isinstance(value, list) or len(value) > MAX_PIPELINES:
            raise SpecError(
                f"matrix.{key} is {_kind(value)}",
                where=self._document.where(("matrix", key)),
                allowed=f"a list of at most {MAX_PIPELINES} mappings",
            )
        return value

    def _count(self, cells: int, more: int) -> None:
        if cells + more > MAX_PIPELINES:
            raise SpecError(
                f"the matrix has {cells + more} cells",
                where=self._document.where(("matrix",)),
                allowed=f"at most {MAX_PIPELINES}",
                remedy="write several pipeline files that extend one",
            )

    def _check_axis(self, name: str, values: Any) -> None:
        where = self._document.where(("matrix", name))
        check_parameter_name(name, "axis", where)
        if not isinstance(values, list):
            raise SpecError(f"axis {name!r} is {_kind(values)}", where=where, allowed="a list of values")
        if not values:
            raise SpecError(f"axis {name!r} has no values", where=where, remedy="add a value, or remove the axis")

    def _rows(self, rows: Sequence[Any], location: Where) -> list[MatrixCell]:
        if not rows:
            raise SpecError("the matrix is empty", where=self._document.where(location), allowed=_FORMS)
        return [self._row(row, (*location, index)) for index, row in enumerate(rows)]

    def _row(self, row: Any, location: Where) -> MatrixCell:
        where = self._document.where(location)
        if not isinstance(row, Mapping) or not row:
            raise SpecError(f"a cell of the matrix is {_kind(row)}", where=where, allowed="a mapping of values")
        for name in row:
            check_parameter_name(name, "axis", self._document.where((*location, name)))
        return {name: self._value(name, value, (*location, name)) for name, value in row.items()}

    def _value(self, name: str, value: Any, location: Where) -> Any:
        return self._checked(name, value, lambda: self._document.where(location), parsed=False)

    def _checked(self, name: str, value: Any, where: Any, *, parsed: bool) -> Any:
        if isinstance(value, str) and "$" in value:
            resolved = self._references.resolve(value, where)
            if resolved.secret is not None:
                raise SpecError(
                    f"axis {name!r} has a secret", where=where(), remedy="write the reference where the value is used"
                )
            value = resolved.value
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str | int | float | bool) for item in items):
            raise SpecError(
                f"a value of axis {name!r} is {_kind(value)}", where=where(), allowed="text, a number, true or false"
            )
        if name in self._declared:
            declared = self._declared[name]
            return declared.parse(name, value, where()) if parsed else declared.check(name, value, where())
        return typed_value(value, where()) if parsed and isinstance(value, str) else value

    def _file(self, written: str) -> list[MatrixCell]:
        location: Where = ("matrix", "file")
        where = self._document.where(location)
        name = self._references.resolve(written, lambda: where).value
        if not isinstance(name, str) or not name or "\0" in name or "://" in name:
            raise SpecError(f"matrix.file is {name!r}", where=where, allowed="the path of a CSV, YAML or JSON file")
        path = self._document.file_of(location).parent / name
        if not is_present_file(path):
            raise SpecError(f"matrix.file is {written!r}, which is no file", where=where, allowed="a CSV or YAML file")
        rows = list(self._table(path) if path.suffix.lower() == ".csv" else self._listed(path))
        if not rows:
            raise SpecError("the file has no rows", where=str(path), remedy="add a row for each pipeline")
        return rows

    def _table(self, path: Path) -> Iterator[MatrixCell]:
        with path.open("rb") as file:
            content = file.read(_MAX_TABLE + 1)
        if len(content) > _MAX_TABLE:
            raise SpecError("the file is too large", where=str(path), allowed=f"at most {_MAX_TABLE} bytes")
        rows = read_table(content, str(path), None, SpecError)
        self._count(len(rows), 0)
        for row in rows:
            cells = {name: text.strip() for name, text in row.cells.items() if text.strip()}
            for name in cells:
                check_parameter_name(name, "column", row.place(name))
            place = row.where
            refuse_secrets(PipelineDocument(path, dict(cells), {}), place)
            yield {name: self._checked(name, text, lambda p=place: p, parsed=True) for name, text in cells.items()}

    def _listed(self, path: Path) -> list[MatrixCell]:
        document = read_document(path, SpecError, allowed="a list of mappings", as_list=True)
        refuse_secrets(document)
        self._count(len(document.data["rows"]), 0)
        if not document.data["rows"]:
            return []
        own = PipelineDocument(document.path, document.data, document.lines)
        return MatrixReader(own, self._declared, self._references)._rows(document.data["rows"], ("rows",))


def _include(cells: Sequence[MatrixCell], entries: Sequence[MatrixCell]) -> list[MatrixCell]:
    """Adds entries as GitHub Actions does: to each cell whose own values it keeps, else as a new cell."""
    expanded = [dict(cell) for cell in cells]
    own = [set(cell) for cell in cells]
    added: list[MatrixCell] = []
    for entry in entries:
        matching = [
            index
            for index, cell in enumerate(cells)
            if all(cell[key] == value for key, value in entry.items() if key in own[index])
        ]
        for index in matching:
            expanded[index] |= entry
        if not matching:
            added.append(entry)
    return [*expanded, *added]


def describe_cell(cell: MatrixCell) -> str:
    """Returns the values of a cell as text."""
    return ", ".join(f"{name}={value}" for name, value in cell.items())[:200]


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return repr(value[:60])
    names = {dict: "a mapping", list: "a list", type(None): "empty"}
    return names.get(type(value), repr(value))
