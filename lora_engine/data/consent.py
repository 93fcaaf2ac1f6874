"""Reads `consent.csv` or `consent.yaml`: rights and consent per image, one row or entry per image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_engine.data.folder import open_inside
from lora_engine.data.rights import OptOut, Rights
from lora_engine.data.text_files import clean_text
from lora_engine.documents import read_document, read_table
from lora_engine.errors import DataError, did_you_mean

COLUMNS = (
    "file",
    "consent",
    "owner",
    "license",
    "rights",
    "person",
    "scope",
    "expires",
    "revocable",
    "source",
    "opt_out",
    "ai_generated",
)
_MAX_TABLE = 64 * 1024 * 1024
_MAX_CELL = 200
_DOCUMENTS = {".yaml", ".yml", ".json"}
_SPELLINGS = {
    "image": "file",
    "consent_id": "consent",
    "licence": "license",
    "basis": "rights",
    "person_depicted": "person",
    "expiry": "expires",
    "opt-out": "opt_out",
}
"""Second name of a column -> its name."""
_TRUTH = {"yes": True, "no": False, "true": True, "false": False}


@dataclass(frozen=True)
class Statement:
    """One row of the table.

    Attributes:
        consent: Id of the consent for the image; None if the row names none.
        rights: The other columns; None if they are empty.
    """

    consent: str | None = None
    rights: Rights | None = None


@dataclass(frozen=True)
class _Row:
    """A row: the file, its cells by column, and the place of the row and of its columns."""

    file: str
    cells: Mapping[str, str]
    where: str
    place: Callable[[str], str]


def read_consent(path: Path) -> dict[str, Statement]:
    """Returns the statement per file, from the column `file` and any others of `COLUMNS`, or their second names.

    Other columns are ignored, unless they look like a misspelled one. A row may end early; the rest of it is empty.

    Args:
        path: A CSV table in UTF-8, or a YAML or JSON file that maps each file name to its columns. `person`,
            `revocable` and `ai_generated` are `yes` or `no`; `expires` is a day such as 2027-12-31; `opt_out` is
            `tool/day/result` with the result `clear` or `opted-out`.

    Raises:
        DataError: The file is missing or invalid; names file, line and column.
    """
    where = str(path)
    if not path.is_file():
        raise DataError("there is no such consent file", where=where, remedy="write a CSV with columns file,consent")
    rows = _rows_of_document(path) if path.suffix.lower() in _DOCUMENTS else _rows_of_table(path)
    statements: dict[str, Statement] = {}
    for row in rows:
        # File names are only stripped; other values are shown to users and become one clean line.
        name = row.file.strip()
        cells = {column: clean_text(text) for column, text in row.cells.items()}
        if not name or not any(cells.values()):
            raise DataError(
                "the row needs a file and a consent id, or a value in another column",
                where=row.where,
                allowed=f"the columns {','.join(COLUMNS)}",
            )
        if name in statements:
            raise DataError(f"the row repeats the file {name!r}", where=row.place("file"))
        statements[name] = _statement(row, {column: text for column, text in cells.items() if text})
    return statements


def _rows_of_table(path: Path) -> Iterator[_Row]:
    with open_inside(path, path.parent) as file:
        content = file.read(_MAX_TABLE + 1)
    if len(content) > _MAX_TABLE:
        raise DataError("is too large", where=str(path), allowed=f"{_MAX_TABLE:,} bytes")
    for row in read_table(content, str(path), COLUMNS, DataError, spellings=_SPELLINGS):
        cells = {column: text for column, text in row.cells.items() if column != "file"}
        yield _Row(row.cells.get("file", ""), cells, row.where, row.place)


def _rows_of_document(path: Path) -> Iterator[_Row]:
    document = read_document(path, DataError, allowed="a mapping of file names to columns")
    for file, stated in document.data.items():
        where = document.where((file,))
        if not isinstance(stated, dict):
            problem = f"{file!r} has {str(stated)[:40]!r}"
            raise DataError(problem, where=where, allowed=f"the columns {', '.join(COLUMNS[1:])}")
        places = {"file": where}
        cells: dict[str, str] = {}
        for key, value in stated.items():
            column = _SPELLINGS.get(key.lower(), key.lower())
            places[column] = place = document.where((file, key))
            if column not in COLUMNS[1:]:
                raise DataError(
                    f"unknown column {key!r}",
                    where=place,
                    allowed=", ".join(COLUMNS[1:]),
                    remedy=did_you_mean(column, COLUMNS[1:]),
                )
            if column in cells:
                raise DataError(f"{key!r} has the meaning of another column", where=place, remedy="delete one of them")
            cells[column] = _as_text(value, place)
        yield _Row(file, cells, where, partial(_place, places))


def _place(places: Mapping[str, str], column: str) -> str:
    return places.get(column, places["file"])


def _as_text(value: object, where: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, str | int | float):
        return "" if value is None else str(value)
    raise DataError(f"the value is {str(value)[:40]!r}", where=where, allowed="text, true or false")


def _statement(row: _Row, cells: dict[str, str]) -> Statement:
    consent = cells.get("consent")
    values = {}
    for column, text in cells.items():
        if len(text) > _MAX_CELL:
            problem = f"{column} has {len(text)} characters"
            raise DataError(problem, where=row.place(column), allowed=f"at most {_MAX_CELL}")
        try:
            values[column] = _READ.get(column, str)(text)
        except DataError as error:
            raise error.at(row.place(column)) from None
    values.pop("consent", None)
    try:
        return Statement(consent, Rights.model_validate(values) if values else None)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        column = ".".join(map(str, first["loc"]))
        problem = f"{column} {cells.get(column, '')!r} cannot be used ({first['msg']})"
        raise DataError(problem, where=row.place(column)) from None


def _yes_or_no(text: str) -> bool:
    if text.lower() not in _TRUTH:
        raise DataError(f"{text!r} is neither yes nor no", allowed="yes, no, or nothing")
    return _TRUTH[text.lower()]


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise DataError(f"{text!r} is not a day", allowed="days such as 2027-12-31") from None


def _opt_out(text: str) -> OptOut:
    tool, _, rest = text.partition("/")
    day, _, result = rest.partition("/")
    try:
        return OptOut.model_validate({"tool": tool.strip(), "checked": _day(day.strip()), "result": result.strip()})
    except (ValidationError, DataError):
        raise DataError(
            f"opt_out {text!r} cannot be used",
            allowed="tool/day/result, such as ai.txt/2026-05-01/clear or .../opted-out",
        ) from None


_READ: Mapping[str, Callable[[str], Any]] = {
    "person": _yes_or_no,
    "revocable": _yes_or_no,
    "ai_generated": _yes_or_no,
    "expires": _day,
    "opt_out": _opt_out,
    "rights": str.lower,
    "scope": str.lower,
}
