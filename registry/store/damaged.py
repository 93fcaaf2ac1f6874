"""Defines the placeholder of a damaged cell of the registry's database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, cast

from registry.errors import DamagedRow

_SHOWN = 40


def _refuse(self: DamagedCell, *_arguments: object) -> NoReturn:
    column = f"the column {self.column!r}" if self.column else "a cell"
    raise DamagedRow(
        f"{column} is damaged: {self.problem}",
        where=f"row {self.row} of the table {self.table}" if self.table else "database",
        remedy="`loraline fsck` names it, and `--repair` restores what can be rebuilt; else restore a backup",
    )


@dataclass(frozen=True, eq=False)
class DamagedCell:
    """A damaged value. It can be shown, as `damaged`; any other use raises `DamagedRow`.

    Attributes:
        table: The table; empty if unknown.
        row: Its primary key, as text.
        column: The column; empty if unknown.
        problem: The fault, with the value.
        value: The value.
        key: Its primary key.
    """

    table: str
    row: str
    column: str
    problem: str
    value: Any
    key: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return "damaged"

    def __format__(self, form: str) -> str:
        return "damaged"

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = __call__ = __contains__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = _refuse
    __int__ = __float__ = __index__ = __or__ = __ror__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __truediv__ = __floordiv__ = _refuse


def show_cell(value: object) -> str:
    """Returns the representation of a value for messages, at most 40 characters of it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def broken(value: Any, problem: str) -> DamagedCell:
    """Returns the placeholder of a value that its type cannot read; the row is not known yet."""
    return DamagedCell("", "", "", f"{show_cell(value)} {problem}", value)


def as_tuple(values: Any) -> tuple[Any, ...]:
    """Returns the values of a column as a tuple; a damaged cell as it is."""
    return cast("tuple[Any, ...]", values) if isinstance(values, DamagedCell) else tuple(values)
