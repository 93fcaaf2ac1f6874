from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.yaml_source import parse_value, read_document
from tasks.errors import SpecError


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
    parsed = parse_value("key", text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_json_and_yaml_give_the_same_data(tmp_path: Path) -> None:
    data = {"name": "x", "steps": {"a": {"uses": "ingest", "images": "images/", "heldout": 0.25}}}
    path = tmp_path / "file.json"
    path.write_text(json.dumps(data))
    assert read_document(path).data == data


def test_every_value_knows_its_line(tmp_path: Path) -> None:
    document = read_document(write(tmp_path, "name: x\nsteps:\n  a:\n    uses: ingest\n"))
    assert document.where(("steps", "a", "uses")).endswith(":4")
    assert document.where(("steps", "a", "missing")).endswith(":3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "duplicate key 'a'"),
        ("a: &x [*x, *x]\n", "nested more than 50 levels"),
        ("a: &x [1]\nb: {<<: *x}\n", "'<<' merges a value that is no mapping"),
        ("a: !!python/object:os.system x\n", "tag"),
        ("a: [1\n", "expected"),
        ("- 1\n", "list"),
        ("", "NoneType"),
        ("? [a]\n: 1\n", "plain text"),
    ],
)
def test_a_document_that_is_no_plain_mapping_is_refused_with_its_path(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SpecError, match=message) as caught:
        read_document(path)
    assert str(path) in str(caught.value)


def test_depth_and_size_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="levels deep"):
        read_document(write(tmp_path, "a: " + "[" * 60 + "]" * 60))
    with pytest.raises(SpecError, match="bytes"):
        read_document(write(tmp_path, "a: " + "x" * 1_000_001))


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(SpecError, match="UTF-8"):
        read_document(path)


def test_aliases_and_merge_keys_repeat_values(tmp_path: Path) -> None:
    text = """\
steps:
  a: &first {uses: train, rank: 8, targets: &which [q, k]}
  b: {<<: *first, rank: 4}
  c: {rank: 2, <<: [{uses: merge}, *first]}
  d: {targets: *which}
"""
    steps = read_document(write(tmp_path, text)).data["steps"]
    assert steps["b"] == {"uses": "train", "rank": 4, "targets": ["q", "k"]}
    assert steps["c"] == {"uses": "merge", "rank": 2, "targets": ["q", "k"]}
    assert steps["d"] == {"targets": ["q", "k"]}
    assert read_document(write(tmp_path, '{"<<": {"a": 1}}')).data == {"<<": {"a": 1}}


def test_aliases_that_expand_to_gigabytes_are_refused_with_the_line(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(SpecError, match="aliases repeat more than 10000 values") as caught:
        read_document(write(tmp_path, "\n".join(levels)))
    assert "file.yaml:" in caught.value.where
