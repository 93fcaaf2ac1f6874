"""Reads a pipeline file into plain data and records the line of each value.

Uses the scalars of YAML 1.2: `1e-4` is a number, `no` and `1:30` are text. A duplicate key is an error. Anchors and
aliases are refused, because a few of them can expand to gigabytes. The same code reads JSON.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tasks.errors import SpecError

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 50
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?[eE][-+]?[0-9]+)$")

Where = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A pipeline file as data.

    Args:
        path: The file.
        data: Mappings, lists, text, numbers, booleans and None.
        lines: Location in the data -> line, counted from 1.
    """

    path: Path
    data: dict[str, Any]
    lines: dict[Where, int]

    def where(self, location: Where) -> str:
        """Returns `file:line` of a location, or of its nearest known parent."""
        while location and location not in self.lines:
            location = location[:-1]
        return f"{self.path}:{self.lines.get(location, 1)}"


def read_document(path: Path) -> Document:
    """Reads a YAML or JSON file.

    Raises:
        SpecError: The file is missing, not text, not YAML, too large or too deep, or has a duplicate key or an alias.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SpecError(
            f"cannot read the pipeline file: {error.strerror}",
            where=str(path),
            remedy="give the path of a YAML or JSON file",
        ) from error
    if len(content) > _MAX_BYTES:
        raise SpecError(f"the file has {len(content)} bytes", where=str(path), allowed=f"at most {_MAX_BYTES} bytes")
    try:
        root = yaml.compose(content.decode(), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise SpecError(f"byte {error.start} is not UTF-8", where=str(path), remedy="save the file as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SpecError(
            error.problem or "not YAML", where=f"{path}:{line}", remedy="correct the YAML in this line"
        ) from error
    except yaml.YAMLError as error:
        raise SpecError("not YAML", where=str(path), remedy="correct the file") from error
    lines: dict[Where, int] = {}
    data = _build(root, (), path, lines) if root is not None else None
    if not isinstance(data, dict):
        raise SpecError(
            f"the file contains {type(data).__name__}",
            where=str(path),
            allowed="a mapping with name, base, seed and steps",
        )
    return Document(path, data, lines)


def parse_value(key: str, text: str) -> Any:
    """Parses the value of a key as in a pipeline file: `--set adapter.rank=8` gives the integer 8."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SpecError(f"the value of {key!r} is not YAML", where="--set", remedy="quote it") from error
    return _build(node, (), Path("--set"), {}) if node is not None else None


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and without aliases."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (the base class declares it)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor}: aliases are not allowed; repeat the value",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", re.compile(r"(true|false)$"), "tf"),
    ("tag:yaml.org,2002:null", re.compile(r"(null|~|)$"), "n~\0"),
    ("tag:yaml.org,2002:int", _INTEGER, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first) if _tag[-4:] != "null" else ["n", "~", ""])


def _build(node: yaml.Node, location: Where, path: Path, lines: dict[Where, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(location, line)
    where = f"{path}:{line}"
    if len(location) > _MAX_DEPTH:
        raise SpecError(f"nested more than {_MAX_DEPTH} levels deep", where=where)
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(node, location, path, lines)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*location, index), path, lines) for index, item in enumerate(node.value)]
    return _build_scalar(node, where)


def _build_mapping(node: yaml.MappingNode, location: Where, path: Path, lines: dict[Where, int]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise SpecError("a key is not plain text", where=where)
        key = str(key_node.value)
        if key in mapping:
            raise SpecError(f"duplicate key {key!r}", where=where, remedy="delete one of the two")
        lines[(*location, key)] = key_node.start_mark.line + 1
        mapping[key] = _build(value_node, (*location, key), path, lines)
    return mapping


def _build_scalar(node: yaml.Node, where: str) -> Any:
    kind, text = node.tag.rpartition(":")[2], str(node.value)
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text == "true"
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text)
    raise SpecError(
        f"unsupported tag {node.tag!r}",
        where=where,
        allowed="plain text, numbers, true, false, null, lists and mappings",
    )
