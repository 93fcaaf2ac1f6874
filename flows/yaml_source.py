"""Reads a pipeline file into plain data and records the line of each value.

Uses the scalars of YAML 1.2: `1e-4` is a number, `no` and `1:30` are text. A duplicate key is an error. Aliases and
merge keys (`<<`) repeat values, at most 10 000 in all, because a few of them can expand to gigabytes. The same code
reads JSON.
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
_MAX_REPEATED = 10_000
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
        SpecError: The file is missing, not text, not YAML, too large or too deep, or has a duplicate key, or its
            aliases expand to too many values.
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
    builder = _Builder(path)
    data = builder.build(root, ()) if root is not None else None
    if not isinstance(data, dict):
        raise SpecError(
            f"the file contains {type(data).__name__}",
            where=str(path),
            allowed="a mapping with name, base, seed and steps",
        )
    return Document(path, data, builder.lines)


def parse_value(key: str, text: str) -> Any:
    """Parses the value of a key as in a pipeline file: `--set adapter.rank=8` gives the integer 8."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SpecError(f"the value of {key!r} is not YAML", where="--set", remedy="quote it") from error
    return _Builder(Path("--set")).build(node, ()) if node is not None else None


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (the base class declares it)


for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", re.compile(r"(true|false)$"), "tf"),
    ("tag:yaml.org,2002:null", re.compile(r"(null|~|)$"), "n~\0"),
    ("tag:yaml.org,2002:int", _INTEGER, "-+0123456789"),
    ("tag:yaml.org,2002:float", _FLOAT, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(_tag, _pattern, list(_first) if _tag[-4:] != "null" else ["n", "~", ""])


class _Builder:
    """Builds the data of a YAML tree, and records the line of each value. An alias is its anchor's node once more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Where, int] = {}
        self._built: set[int] = set()
        self._repeated = 0

    def build(self, node: yaml.Node, location: Where) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(location, line)
        where = f"{self.path}:{line}"
        self._count(node, where)
        if len(location) > _MAX_DEPTH:
            raise SpecError(f"nested more than {_MAX_DEPTH} levels deep", where=where)
        if isinstance(node, yaml.MappingNode):
            return self._build_mapping(node, location)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*location, index)) for index, item in enumerate(node.value)]
        return _build_scalar(node, where)

    def _count(self, node: yaml.Node, where: str) -> None:
        self._repeated += id(node) in self._built
        self._built.add(id(node))
        if self._repeated > _MAX_REPEATED:
            raise SpecError(
                f"aliases repeat more than {_MAX_REPEATED} values",
                where=where,
                remedy="write the values out, or repeat fewer of them",
            )

    def _build_mapping(self, node: yaml.MappingNode, location: Where) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = f"{self.path}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise SpecError("a key is not plain text", where=where)
            key = str(key_node.value)
            if key == "<<" and key_node.style is None:
                merged = self._build_merged(value_node, location, where) | merged
                continue
            if key in mapping:
                raise SpecError(f"duplicate key {key!r}", where=where, remedy="delete one of the two")
            self.lines[(*location, key)] = key_node.start_mark.line + 1
            mapping[key] = self.build(value_node, (*location, key))
        return merged | mapping

    def _build_merged(self, node: yaml.Node, location: Where, where: str) -> dict[str, Any]:
        """Returns the entries that `<<` merges; of several mappings, an earlier one takes precedence."""
        mappings = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for mapping in mappings:
            if not isinstance(mapping, yaml.MappingNode):
                raise SpecError("'<<' merges a value that is no mapping", where=where, allowed="an alias of a mapping")
            merged = self.build(mapping, location) | merged
        return merged


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
