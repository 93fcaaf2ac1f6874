"""Reads `consent.csv`: rights and consent per image, one row per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_engine.data.images import open_inside
from lora_engine.data.rights import OptOut, Rights
from lora_engine.data.text_files import clean_text
from lora_engine.documents import TableRow, read_table
from lora_engine.errors import DataError

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
_SPELLINGS = {"licence": "license"}
_TRUTH = {"yes": True, "no": False}


@dataclass(frozen=True)
class Statement:
    """One row of the table.

    Attributes:
        consent: Id of the consent for the image; None if the row names none.
        rights: The other columns; None if they are empty.
    """

    consent: str | None = None
    rights: Rights | None = None


def read_consent(path: Path) -> dict[str, Statement]:
    """Returns the statement per file, from the column `file` and any others of `COLUMNS`.

    Other columns are ignored, unless they look like a misspelled one. A row may end early; the rest of it is empty.

    Args:
        path: The table, in UTF-8. `person`, `revocable` and `ai_generated` are `yes` or `no`; `expires` is a day such
            as 2027-12-31; `opt_out` is `tool/day/result` with the result `clear` or `opted-out`.

    Raises:
        DataError: The table is missing or invalid; names file, line and column.
    """
    where = str(path)
    if not path.is_file():
        raise DataError("there is no such consent file", where=where, remedy="write a CSV with columns file,consent")
    with open_inside(path, path.parent) as file:
        content = file.read(_MAX_TABLE + 1)
    if len(content) > _MAX_TABLE:
        raise DataError("is too large", where=where, allowed=f"{_MAX_TABLE:,} bytes")
    statements: dict[str, Statement] = {}
    for row in read_table(content, where, COLUMNS, DataError, spellings=_SPELLINGS):
        # File names are only stripped; other values are shown to users and become one clean line.
        name = row.cells.get("file", "").strip()
        cells = {column: clean_text(text) for column, text in row.cells.items() if column != "file"}
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


def _statement(row: TableRow, cells: dict[str, str]) -> Statement:
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
