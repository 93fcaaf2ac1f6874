"""Parses JSON strictly: no duplicate key, no endless number, no lone surrogate, bounded depth."""

from __future__ import annotations

import json
import math
import re
from itertools import islice
from pathlib import Path
from typing import Any

from lora_engine.errors import WordedError

MAX_DEPTH = 50
MAX_DIGITS = 100
"""Digits of an integer; a longer one has no use and takes quadratic time."""
# Parts after which the search for the place of a fault ends; it takes about a microsecond per part.
_MAX_PARTS = 1_000_000
# A string without an end is one part, too: else each of its quotes would be searched for its end.
_PART = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}:,]|[^\s"\[\]{}:,]+', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_INTEGER = re.compile(r"-?[0-9]+")


def parse_json(
    content: bytes | str,
    where: str,
    error: type[WordedError],
    *,
    remedy: str = "",
    depth: int | None = MAX_DEPTH,
    max_bytes: int | None = None,
) -> Any:
    """Returns the data of a JSON text. `Infinity` and `NaN` are accepted, because diffusers writes them.

    Args:
        content: The text, or its UTF-8 bytes.
        where: File or other place, for errors.
        error: The class of the errors.
        remedy: The fix, for errors.
        depth: Maximum depth of nesting; None means that the caller checks the structure.
        max_bytes: Maximum length of the content.

    Raises:
        WordedError: An `error`: the text is no JSON, has a duplicate key, an integer of over 100 digits, a number that
            is too large, or a lone surrogate, or is nested too deep. Names line and column.
    """
    if max_bytes is not None and len(content) > max_bytes:
        raise error(f"has {len(content)} bytes", where=where, allowed=f"at most {max_bytes} bytes", remedy=remedy)
    text = content if isinstance(content, str) else decode(content, where, error, remedy)
    fault = _first_fault(text, depth) if _SURROGATE.search(text) else None
    if fault is None:
        try:
            data = json.loads(text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_float)
        except json.JSONDecodeError as problem:
            fault = f"not JSON: {problem.msg}", problem.pos
        except _Invalid as problem:
            fault = _first_fault(text, depth) or (str(problem), None)
        except RecursionError:
            fault = _first_fault(text, MAX_DEPTH) or ("nested too deep", None)
        else:
            if depth is None or not _is_deeper(data, depth):
                return data
            fault = _first_fault(text, depth) or (f"nested more than {depth} levels deep", None)
    raise error(fault[0], where=_place(where, text, fault[1]), remedy=remedy)


def read_json_object(path: Path, error: type[WordedError], *, remedy: str = "", max_bytes: int = 16 << 20) -> Any:
    """Returns the JSON object in a file.

    Raises:
        FileNotFoundError: There is no such file.
        WordedError: An `error`, as of `parse_json`, or the file cannot be read or holds no object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"cannot be read ({problem.strerror})", where=str(path), remedy=remedy) from problem
    data = parse_json(content, str(path), error, remedy=remedy, max_bytes=max_bytes)
    if not isinstance(data, dict):
        raise error("is not a JSON object", where=str(path), allowed="a JSON object", remedy=remedy)
    return data


def decode(content: bytes, where: str, error: type[WordedError], remedy: str = "") -> str:
    """Returns the text of UTF-8 bytes, without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        column = problem.start - content.rfind(b"\n", 0, problem.start)
        raise error(
            f"byte {problem.start} is not UTF-8", where=f"{where}:{line}:{column}", remedy=remedy or "save it as UTF-8"
        ) from problem


def place_of_key(text: str, where: str, key: str) -> str:
    """Returns `where:line:column` of a key of the outermost object of a valid JSON text; `where` if it has no such."""
    depth, last = 0, ("", 0)
    for match in islice(_PART.finditer(text), _MAX_PARTS):
        part = match[0]
        depth += (part in "[{") - (part in "]}")
        if part == ":" and depth == 1 and json.loads(last[0]) == key:
            return _place(where, text, last[1])
        last = part, match.start()
    return where


class _Invalid(Exception):
    """JSON that Python accepts and Loraline does not; `_first_fault` finds its place."""


def _is_deeper(data: Any, depth: int) -> bool:
    level = [data] if isinstance(data, dict | list) else []
    for _ in range(depth):
        values = (entry for part in level for entry in (part.values() if isinstance(part, dict) else part))
        level = [entry for entry in values if isinstance(entry, dict | list)]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise _Invalid("a key occurs twice")
    return entries


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _Invalid(_long(text))
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    if math.isinf(number) and "nfinity" not in text:
        raise _Invalid(f"the number {_short(text)} is too large")
    return number


def _first_fault(text: str, depth: int | None) -> tuple[str, int | None] | None:
    """Returns the first fault of a text and its offset, or None; broken syntax is left to the parser."""
    nested: list[set[str] | None] = []
    last, start = "", 0
    for count, match in enumerate(_PART.finditer(text)):
        part = match[0]
        if count >= _MAX_PARTS:
            return None
        if part in "[{":
            nested.append(set() if part == "{" else None)
            if depth is not None and len(nested) > depth:
                return f"nested more than {depth} levels deep", match.start()
        elif part in "]}":
            del nested[-1:]
        elif part == ":" and nested and nested[-1] is not None:
            if last in nested[-1]:
                return f"duplicate key {_short(last)!r}", start
            nested[-1].add(last)
        elif part not in ":,":
            problem, last = _check_scalar(part)
            if problem:
                return problem, match.start()
            start = match.start()
    return None


def _check_scalar(part: str) -> tuple[str, str]:
    """Returns the problem of a string or a number, and its value as text."""
    if part.startswith('"'):
        try:
            value = str(json.loads(part, strict=False))
            value.encode()
        except UnicodeEncodeError:
            return "the text has a lone surrogate", ""
        except ValueError:
            return "", part
        return "", value
    try:
        (_integer if _INTEGER.fullmatch(part) else _float)(part)
    except _Invalid as problem:
        return str(problem), part
    except ValueError:
        return "", part
    return "", part


def _long(text: str) -> str:
    return f"an integer of {len(text.lstrip('-'))} digits"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def _place(where: str, text: str, offset: int | None) -> str:
    if offset is None:
        return where
    return f"{where}:{text.count(chr(10), 0, offset) + 1}:{offset - text.rfind(chr(10), 0, offset)}"
