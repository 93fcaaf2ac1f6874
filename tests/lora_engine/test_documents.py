from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_engine.documents import Document, parse_json, parse_value, read_document, read_table
from lora_engine.errors import DataError, SettingsError


def read(path: Path) -> Document:
    return read_document(path, SettingsError, allowed="a mapping")


def write(folder: Path, text: str) -> Path:
    path = folder / "file.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5e-3", 1.5e-3),
        ("8", 8),
        ("-3", -3),
        ("0.5", 0.5),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        (".nan", ".nan"),
        ("true", True),
        ("null", None),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    parsed = parse_value(text, "--set", SettingsError)
    assert parsed == value
    assert type(parsed) is type(value)


def test_json_and_yaml_give_the_same_data(tmp_path: Path) -> None:
    data = {"name": "x", "steps": {"a": {"uses": "ingest", "images": "images/", "heldout": 0.25}}}
    path = tmp_path / "file.json"
    path.write_text(json.dumps(data))
    assert read(path).data == data


def test_every_value_knows_its_line(tmp_path: Path) -> None:
    document = read(write(tmp_path, "name: x\nsteps:\n  a:\n    uses: ingest\n"))
    assert document.where(("steps", "a", "uses")).endswith("file.yaml:4:5")
    assert document.where(("steps", "a", "missing")).endswith("file.yaml:3:3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "duplicate key 'a'"),
        ("a: &x [*x, *x]\n", "nested more than 50 levels"),
        ("a: &x [1]\nb: {<<: *x}\n", "'<<' merges a value that is no mapping"),
        ("a: !!python/object:os.system x\n", "tag"),
        ("a: [1\n", "expected"),
        ("- 1\n", "contains a list"),
        ("", "no value"),
        ("a: !!set {x}\n", "tag"),
        ("a: !!int x\n", "tag"),
        ("a: !!bool maybe\n", "tag"),
        ('a: "\\ud800"\n', "lone surrogate"),
        ('"\\ud800": 1\n', "lone surrogate"),
        ("a: 1e999\n", "too large"),
        ("a: " + "1" * 5000, "5000 digits"),
        ("a: " + "[" * 5000, "levels deep"),
        ("a: \0\n", "special characters"),
        ('a: "\\U00110000"\n', "YAML"),
        ("? [a]\n: 1\n", "plain text"),
    ],
)
def test_a_document_that_is_no_plain_mapping_is_refused_with_its_path(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_depth_and_size_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="levels deep"):
        read(write(tmp_path, "a: " + "[" * 60 + "]" * 60))
    with pytest.raises(SettingsError, match="too large"):
        read(write(tmp_path, "a: " + "x" * 1_000_001))


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(SettingsError, match="UTF-8"):
        read(path)


def test_aliases_and_merge_keys_repeat_values(tmp_path: Path) -> None:
    text = """\
steps:
  a: &first {uses: train, rank: 8, targets: &which [q, k]}
  b: {<<: *first, rank: 4}
  c: {rank: 2, <<: [{uses: merge}, *first]}
  d: {targets: *which}
"""
    steps = read(write(tmp_path, text)).data["steps"]
    assert steps["b"] == {"uses": "train", "rank": 4, "targets": ["q", "k"]}
    assert steps["c"] == {"uses": "merge", "rank": 2, "targets": ["q", "k"]}
    assert steps["d"] == {"targets": ["q", "k"]}
    assert read(write(tmp_path, '{"<<": {"a": 1}}')).data == {"<<": {"a": 1}}


def test_aliases_that_expand_to_gigabytes_are_refused_with_the_line(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(SettingsError, match="aliases repeat more than 10000 values") as caught:
        read(write(tmp_path, "\n".join(levels)))
    assert "file.yaml:" in caught.value.where


def test_a_text_of_more_values_than_a_settings_file_has_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="more than 20000 values"):
        read(write(tmp_path, "a: [" + "1," * 20_001 + "]"))


@pytest.mark.parametrize("text", ["*hunter2", "!hunter2 x", "{hunter2: 1, hunter2: 2}", "'hunter2", "[hunter2"])
def test_an_error_of_a_single_value_does_not_quote_it(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_value(text, "--set key", SettingsError)
    assert "hunter2" not in str(caught.value)
    assert caught.value.where.startswith("--set key:1:")


def test_json_files_may_have_tabs_and_escaped_pairs_of_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text('{\n\t"a": "\\ud83d\\ude00",\n\t"b": 1}')
    document = read(path)
    assert document.data == {"a": "\U0001f600", "b": 1}
    assert document.where(("b",)).endswith("file.json:3:2")


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ('{"a": 1,\n "a": 2}', ":2:2", "duplicate key 'a'"),
        ('{"a": {"b": 1, "b": 2}}', ":1:16", "duplicate key 'b'"),
        ('{"a": "\\ud800"}', ":1:7", "lone surrogate"),
        ('{"a":\n[' + "1" * 5000 + "]}", ":2:2", "5000 digits"),
        ('{"a": 1e999}', ":1:7", "too large"),
        ('{"a": ' + "[" * 60 + "]" * 60 + "}", ":1:56", "50 levels deep"),
        ("[" * 100_000, ":1:51", "50 levels deep"),
        ('{"a": }', ":1:7", "not JSON"),
        ("", ":1:1", "not JSON"),
    ],
)
def test_json_that_is_refused_has_line_and_column(text: str, place: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem) as caught:
        parse_json(text.encode(), "x.json", SettingsError)
    assert caught.value.where == f"x.json{place}"


def test_equal_keys_of_different_objects_and_the_numbers_of_diffusers_are_accepted() -> None:
    text = '[{"a": {"a": 1}}, {"a": -Infinity, "b": {"a": "\\ud83d\\ude00"}}]'
    assert parse_json(text, "x", SettingsError) == json.loads(text)


@pytest.mark.parametrize(
    ("content", "place", "problem"),
    [
        (b"file,License,licence\na,b,c\n", "x.csv:1, column 3", "meaning of column 2"),
        (b"file,file\na,b\n", "x.csv:1, column 2", "meaning of column 1"),
        (b'file,license\n"a\nb",c\na,b,c\n', "x.csv:4, column 3", "3 cells"),
        (b"file,licens\n", "x.csv:1, column 2", "did you mean 'license'"),
        (b'file\n"a\n', "x.csv:2", "not CSV"),
        (b"file\n" + b"a" * 200_000, "x.csv:2", "not CSV"),
        (b"file\na\n\xff\n", "x.csv:3:1", "not UTF-8"),
    ],
)
def test_a_table_that_is_refused_has_line_and_column(content: bytes, place: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        read_table(content, "x.csv", ("file", "license"), DataError, spellings={"licence": "license"})
    assert caught.value.where == place


def test_rows_know_their_lines_and_ignore_other_columns() -> None:
    rows = read_table(b"\xef\xbb\xbffile,note,license\r\na,x,mit\r\n\r\nb\r\n", "x.csv", ("file", "license"), DataError)
    assert [row.cells for row in rows] == [{"file": "a", "license": "mit"}, {"file": "b"}]
    assert rows[1].where == "x.csv:4"
    assert rows[0].place("license") == "x.csv:2, column 3 (license)"
