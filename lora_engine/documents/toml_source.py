"""Reads a TOML file into plain data, with the bounds of the other readers. Dates are refused."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_engine.documents.json_source import MAX_DEPTH, MAX_DIGITS, decode
from lora_engine.documents.yaml_source import Document, Where
from lora_engine.errors import WordedError

_MAX_BYTES = 1_000_000
_MAX_VALUES = 20_000
_PLACE = re.compile(r" ?\(at (?:line (\d+), column (\d+)|end of document)\)$")
# tomllib takes quadratic time for a key with many parts. Possessive, so that the search itself is linear.
_PART = r"""(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\."""
_LONG_KEY = re.compile(rf"(?<![\w.-])(?:{_PART}[ \t]*+){{{MAX_DEPTH}}}")
_LONG_NUMBER = re.compile(rf"[0-9_]{{{MAX_DIGITS + 1}}}")
_NESTED = re.compile(rf"(?:[\[{{][ \t]*+){{{MAX_DEPTH}}}")
_ASSIGNED = re.compile(r"^[ \t]*([\w-]+)[ \t]*=", re.MULTILINE)


def read_toml(path: Path, error: type[WordedError]) -> Document:
    """Reads a TOML file.

    `Document.lines` has the keys that are assigned once in the file.

    Raises:
        WordedError: An `error`: the file is missing, too large, too deep or not TOML, or has a date, a number that is
            not finite, or an integer of over 100 digits. Names line and column where TOML's parser does.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as problem:
        raise error(
            f"cannot read the file: {problem.strerror}", where=str(path), remedy="give the path of a TOML file"
        ) from problem
    if len(content) > _MAX_BYTES:
        raise error("the file is too large", where=str(path), allowed=f"at most {_MAX_BYTES} bytes")
    text = decode(content, str(path), error, "save the file as UTF-8").replace("\r\n", "\n")
    if (match := _LONG_KEY.search(text)) is not None:
        raise error(f"a key of more than {MAX_DEPTH} parts", where=_at(path, text, match.start()))
    try:
        data = tomllib.loads(text)
    except RecursionError:
        match = _NESTED.search(text)
        where = _at(path, text, match.start() if match else 0)
        raise error(f"nested more than {MAX_DEPTH} levels deep", where=where) from None
    except ValueError as problem:
        raise _explain(problem, path, text, error) from None
    places = _places(text)
    document = Document(path, data, {})
    for count, (location, value) in enumerate(_walk(data)):
        if (place := places.get(str(location[-1]))) is not None:
            document.lines[location] = place
        if count >= _MAX_VALUES or len(location) > MAX_DEPTH:
            rule = f"more than {_MAX_VALUES} values" if count >= _MAX_VALUES else f"nested more than {MAX_DEPTH} levels"
            raise error(rule, where=document.where(location))
        _check_value(value, document.where(location), error)
    return document


def _walk(data: dict[str, Any]) -> Iterator[tuple[Where, Any]]:
    pending: list[tuple[Where, Any]] = [((), data)]
    while pending:
        location, value = pending.pop()
        if location:
            yield location, value
        if isinstance(value, dict):
            pending += [((*location, key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [((*location, index), inner) for index, inner in enumerate(value)]


def _check_value(value: Any, where: str, error: type[WordedError]) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise error(f"the number {value} is not finite", where=where, allowed="numbers up to 1e308")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**MAX_DIGITS:
        raise error(f"an integer of over {MAX_DIGITS} digits", where=where, allowed=f"at most {MAX_DIGITS} digits")
    if not isinstance(value, str | bool | int | float | dict | list):
        raise error(f"a date or time ({value})", where=where, allowed="text, numbers, true, false, lists and tables")


def _places(text: str) -> dict[str, tuple[int, int]]:
    """Returns line and column of the keys that one line assigns."""
    places: dict[str, tuple[int, int]] = {}
    repeated: set[str] = set()
    line, end = 1, 0
    for match in _ASSIGNED.finditer(text):
        line, end = line + text.count("\n", end, match.start(1)), match.start(1)
        if match[1] in places:
            repeated.add(match[1])
        places[match[1]] = line, match.start(1) - text.rfind("\n", 0, match.start(1))
    return {key: place for key, place in places.items() if key not in repeated}


def _explain(problem: ValueError, path: Path, text: str, error: type[WordedError]) -> WordedError:
    if not isinstance(problem, tomllib.TOMLDecodeError):  # from `int`, of thousands of digits
        number = _LONG_NUMBER.search(text)
        return error(f"an integer of over {MAX_DIGITS} digits", where=_at(path, text, number.start() if number else 0))
    message = str(problem)
    match = _PLACE.search(message)
    line, column = (match[1], match[2]) if match and match[1] else (text.count("\n") + 1, 1)
    return error(f"not TOML: {_PLACE.sub('', message)}", where=f"{path}:{line}:{column}", remedy="correct the file")


def _at(path: Path, text: str, offset: int) -> str:
    return f"{path}:{text.count(chr(10), 0, offset) + 1}:{offset - text.rfind(chr(10), 0, offset)}"
