"""Reads a YAML or JSON file into plain data and records line and column of each value.

Uses the scalars of YAML 1.2: `1e-4` is a number, `no` and `1:30` are text. A duplicate key is an error. Aliases and
merge keys (`<<`) repeat values, at most 10 000 in all, because a few of them can expand to gigabytes.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_engine.documents.json_source import MAX_DEPTH, MAX_DIGITS, decode, parse_json
from lora_engine.errors import WordedError

_MAX_BYTES = 1_000_000
_MAX_VALUES = 20_000
_MAX_REPEATED = 10_000
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?[eE][-+]?[0-9]+)$")

_BOOLEAN = re.compile(r"(true|false)$")
_NULL = re.compile(r"(null|~|)$")
_SCALARS = {"int": _INTEGER, "float": _FLOAT, "bool": _BOOLEAN, "null": _NULL}
SCALAR_RESOLVERS = (
    ("tag:yaml.org,2002:bool", _BOOLEAN, list("tf")),
    ("tag:yaml.org,2002:null", _NULL, ["n", "~", ""]),
    ("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
)
"""Tag, form and first characters of the scalars that are no text."""

Where = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """A settings file as data.

    Args:
        path: The file.
        data: Mappings, lists, text, numbers, booleans and None.
        lines: Location in the data -> (line, column), counted from 1.
    """

    path: Path
    data: dict[str, Any]
    lines: dict[Where, tuple[int, int]]

    def where(self, location: Where) -> str:
        """Returns `file:line:column` of a location, or of its nearest known parent."""
        while location and location not in self.lines:
            location = location[:-1]
        return ":".join(map(str, (self.path, *self.lines.get(location, (1, 1)))))


def read_document(
    path: Path, error: type[WordedError], *, allowed: str, optional: bool = False, as_list: bool = False
) -> Document:
    """Reads a YAML file, or a JSON file whose name ends in `.json`.

    Args:
        path: The file.
        error: The class of the errors.
        allowed: The mapping that the file must contain, for errors.
        optional: True reads a missing file and a file without a value as an empty mapping.
        as_list: True expects a list, which is the value of the key `rows` of the data.

    Raises:
        WordedError: An `error`: the file is missing, not text, not YAML, too large or too deep, or has a duplicate key,
            an unusable number or text, or no mapping, or its aliases expand to too many values. Names line and column.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as problem:
        if optional and isinstance(problem, FileNotFoundError):
            return Document(path, {}, {})
        raise error(
            f"cannot read the file: {problem.strerror}", where=str(path), remedy="give the path of a YAML or JSON file"
        ) from problem
    if len(content) > _MAX_BYTES:
        raise error("the file is too large", where=str(path), allowed=f"at most {_MAX_BYTES} bytes")
    text = decode(content, str(path), error, "save the file as UTF-8")
    builder = _Builder(str(path), error)
    is_json = path.suffix.lower() == ".json"
    # Tabs between JSON's values are blanks, but YAML refuses them; they cannot occur inside of JSON's strings.
    data = parse_json(text, str(path), error) if is_json else builder.parse(text)
    if is_json:
        with suppress(error):
            builder.parse(text.replace("\t", " "))
    if data is None and optional:
        data = {}
    if as_list and isinstance(data, list):
        return Document(path, {"rows": data}, {("rows", *location): line for location, line in builder.lines.items()})
    if as_list or not isinstance(data, dict):
        raise error(f"the file contains {_NOUNS[type(data)]}", where=str(path), allowed=allowed)
    return Document(path, data, builder.lines)


def parse_value(text: str, where: str, error: type[WordedError]) -> Any:
    """Parses a value as in a YAML file: `8` gives an integer.

    Raises:
        WordedError: An `error`, as of `read_document`; does not quote the value, which may be a secret.
    """
    if len(text) > _MAX_BYTES:
        raise error("the value is too long", where=where, allowed=f"at most {_MAX_BYTES} characters")
    try:
        return _Builder(where, error).parse(text)
    except error as problem:
        # Without what the problem quotes, and without a cause, which would quote it, too.
        quoted = problem.problem.partition("'")[0].strip()
        raise error(quoted, where=problem.where, allowed=problem.allowed, remedy=problem.remedy) from None


_NOUNS = {
    type(None): "no value",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and bounds, because it takes long and recurses for each level."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (the base class declares it)
    _depth = _values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Returns the next node, as the base class."""
        self._depth += 1
        self._values += 1
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self._depth > MAX_DEPTH + 1:
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} levels deep", problem_mark=mark)
        if self._values > _MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {_MAX_VALUES} values", problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


for _tag, _pattern, _first in SCALAR_RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)


class _Builder:
    """Builds the data of a YAML tree, and records the place of each value. An alias is its anchor's node once more."""

    def __init__(self, source: str, error: type[WordedError]) -> None:
        self.source, self.error = source, error
        self.lines: dict[Where, tuple[int, int]] = {}
        self._built: set[int] = set()
        self._repeated = 0

    def parse(self, text: str) -> Any:
        loader = None
        try:
            loader = _Loader(text)
            root = loader.get_single_node()
        except yaml.MarkedYAMLError as problem:
            place = self._place(problem.problem_mark) if problem.problem_mark else self.source
            raise self.error(problem.problem or "not YAML", where=place, remedy="correct the YAML") from problem
        except yaml.reader.ReaderError as problem:
            line = text.count("\n", 0, problem.position) + 1
            place = f"{self.source}:{line}:{problem.position - text.rfind(chr(10), 0, problem.position)}"
            raise self.error(f"not YAML: {problem.reason}", where=place, remedy="delete the character") from problem
        except (yaml.YAMLError, ValueError, OverflowError) as problem:  # `"\U00110000"` is no character
            place = self._place(loader.get_mark()) if loader is not None else self.source
            raise self.error("not YAML", where=place, remedy="correct the YAML") from problem
        return self.build(root, ()) if root is not None else None

    def _place(self, mark: yaml.Mark) -> str:
        return f"{self.source}:{mark.line + 1}:{mark.column + 1}"

    def build(self, node: yaml.Node, location: Where) -> Any:
        self.lines.setdefault(location, (node.start_mark.line + 1, node.start_mark.column + 1))
        where = self._place(node.start_mark)
        self._count(node, where)
        if len(location) > MAX_DEPTH:
            raise self.error(f"nested more than {MAX_DEPTH} levels deep", where=where)
        if isinstance(node, yaml.ScalarNode):
            return self._build_scalar(node, where)
        if node.tag.rpartition(":")[2] not in ("map", "seq"):
            raise self._unsupported(node, where)
        if isinstance(node, yaml.MappingNode):
            return self._build_mapping(node, location)
        return [self.build(item, (*location, index)) for index, item in enumerate(node.value)]

    def _count(self, node: yaml.Node, where: str) -> None:
        self._repeated += id(node) in self._built
        self._built.add(id(node))
        if self._repeated > _MAX_REPEATED:
            raise self.error(
                f"aliases repeat more than {_MAX_REPEATED} values",
                where=where,
                remedy="write the values out, or repeat fewer of them",
            )

    def _build_mapping(self, node: yaml.MappingNode, location: Where) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            where = self._place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.error("a key is not plain text", where=where, allowed="text before the colon")
            key = self._text(key_node, where)
            if key == "<<" and key_node.style is None:
                merged = self._build_merged(value_node, location, where) | merged
                continue
            if key in mapping:
                raise self.error(f"duplicate key {key!r}", where=where, remedy="delete one of the two")
            self.lines[(*location, key)] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            mapping[key] = self.build(value_node, (*location, key))
        return merged | mapping

    def _build_merged(self, node: yaml.Node, location: Where, where: str) -> dict[str, Any]:
        """Returns the entries that `<<` merges; of several mappings, an earlier one takes precedence."""
        mappings = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for mapping in mappings:
            if not isinstance(mapping, yaml.MappingNode):
                raise self.error("'<<' merges a value that is no mapping", where=where, allowed="an alias of a mapping")
            merged = self.build(mapping, location) | merged
        return merged

    def _build_scalar(self, node: yaml.ScalarNode, where: str) -> Any:
        kind, text = node.tag.rpartition(":")[2], self._text(node, where)
        if kind == "str":
            return text
        if kind not in _SCALARS or not _SCALARS[kind].match(text):
            raise self._unsupported(node, where)
        if kind == "int" and len(text) > MAX_DIGITS:
            raise self.error(f"an integer of {len(text)} digits", where=where, allowed=f"at most {MAX_DIGITS} digits")
        if kind == "float" and math.isinf(float(text)):
            raise self.error("a number is too large", where=where, allowed="numbers up to 1e308")
        if kind == "null":
            return None
        return text == "true" if kind == "bool" else int(text) if kind == "int" else float(text)

    def _text(self, node: yaml.ScalarNode, where: str) -> str:
        text = str(node.value)
        try:
            # JSON writes a character beyond U+FFFF as two escapes.
            return text.encode("utf-16", "surrogatepass").decode("utf-16") if not text.isascii() else text
        except UnicodeDecodeError:
            raise self.error("the text has a lone surrogate", where=where, remedy="correct the escape") from None

    def _unsupported(self, node: yaml.Node, where: str) -> WordedError:
        return self.error(
            f"unsupported tag {node.tag!r}",
            where=where,
            allowed="plain text, numbers, true, false, null, lists and mappings, without tags",
        )
