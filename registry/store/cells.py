"""Recognizes damaged cells of the registry's database: values that no release writes into that column.

A damaged cell is loaded as a `DamagedCell`, so a verb that does not use it works. `find_damaged_cells` names each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache
from typing import Any, get_args

from sqlalchemy import Boolean, Column, Integer, event, inspect, select, type_coerce
from sqlalchemy.orm import Session
from sqlalchemy.types import JSON, NullType

from registry.entities import (
    Action,
    ContentKind,
    EventType,
    ExecutionStatus,
    RevocationKind,
    RunStatus,
    SubjectKind,
    VersionState,
    is_digest,
)
from registry.refs import NAME_RULE, is_unicode
from registry.store.damaged import DamagedCell, show_cell
from registry.store.tables import ArtifactRow, Instant, Table

_DIGESTS = {"sha256", "artifact", "report", "record", "output", "identity", "previous", "digest"}
_LISTS = {"gates", "listed"}
_CHOICES: dict[tuple[str, str], tuple[str, ...]] = {
    ("versions", "state"): get_args(VersionState),
    ("runs", "status"): get_args(RunStatus),
    ("executions", "status"): get_args(ExecutionStatus),
    ("subjects", "kind"): get_args(SubjectKind),
    ("revocations", "kind"): get_args(RevocationKind),
    ("content_digests", "kind"): get_args(ContentKind),
    ("events", "action"): (*get_args(Action), *get_args(EventType)),
}


def find_damaged_cells(session: Session) -> Iterator[DamagedCell]:
    """Yields every damaged cell; reads all tables once. A value of the right form may still be a wrong one."""
    for table in Table.metadata.sorted_tables:
        columns = list(table.columns)
        for values in session.execute(select(*(type_coerce(column, NullType()) for column in columns))).all():
            for column, value in zip(columns, values, strict=True):
                problem = _find_problem(column, value) or _find_meaningless(column, value)
                if problem:
                    key = tuple(entry for c, entry in zip(columns, values, strict=True) if c.primary_key)
                    yield DamagedCell(table.name, _name_row(key), column.name, problem, value, key)


def _find_problem(column: Any, value: Any) -> str:
    """Returns the fault of a value as the driver returns it, or as the type of the column converts it."""
    value = value.value if isinstance(value, DamagedCell) else value
    if value is None:
        return "" if column.nullable else "it is NULL"
    if isinstance(column.type, JSON):
        return _find_broken_json(column, value)
    if isinstance(column.type, Boolean):
        return "" if value in (0, 1) and isinstance(value, int) else f"{show_cell(value)} is not true or false"
    if isinstance(column.type, Integer):
        return "" if type(value) is int else f"{show_cell(value)} is no integer"
    if isinstance(column.type, Instant):
        return "" if isinstance(value, datetime) or _is_time(value) else f"{show_cell(value)} is no time"
    return "" if isinstance(value, str) and is_unicode(value) else f"{show_cell(value)} is no text"


def _find_broken_json(column: Any, value: Any) -> str:
    kind = list if column.name in _LISTS else dict
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return f"{show_cell(value)} is no JSON"
    noun = "list" if kind is list else "object"
    return "" if isinstance(value, kind) else f"{show_cell(value)} is no JSON {noun}"


def _find_meaningless(column: Column[Any], value: Any) -> str:
    """Returns the fault of a value of the right type."""
    choices = _CHOICES.get((column.table.name, column.name))
    if choices and value not in choices:
        return f"{show_cell(value)} is not one of {', '.join(choices)}"
    if column is ArtifactRow.__table__.columns["kind"] and not re.fullmatch(NAME_RULE, value):
        return f"{show_cell(value)} is no kind of artifact"
    if column.name in _DIGESTS and value is not None and not is_digest(value):
        return f"{show_cell(value)} is no digest"
    if isinstance(column.type, Integer) and value is not None and value < 0:
        return f"{value} is negative"
    return ""


def _is_time(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (ValueError, TypeError):
        return False


def _name_row(key: Sequence[Any]) -> str:
    return ", ".join(show_cell(value) if isinstance(value, bytes) else str(value)[:80] for value in key)


@event.listens_for(Table, "load", propagate=True)
@event.listens_for(Table, "refresh", propagate=True)
def _mark(instance: Table, *_arguments: object) -> None:
    """Replaces the damaged values of a row, except in its primary key."""
    values = instance.__dict__
    for name, column in _loaded_columns(type(instance)):
        if name in values and (problem := _find_problem(column, values[name])):
            key = _name_row(inspect(instance).identity or ())
            values[name] = DamagedCell(instance.__tablename__, key, column.name, problem, values[name])


@cache
def _loaded_columns(table: type[Table]) -> tuple[tuple[str, Any], ...]:
    """Returns the columns that are not part of the primary key, by attribute."""
    attributes = ((attribute.key, attribute.columns[0]) for attribute in inspect(table).column_attrs)
    return tuple((name, column) for name, column in attributes if not column.primary_key)
