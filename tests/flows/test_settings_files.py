"""Tests that every file of settings, JSON and CSV is refused in words, with file, line and column.

A new kind of file is tested by an entry in `KINDS`.
"""

from __future__ import annotations

import ast
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_engine.data.consent import read_consent
from lora_engine.errors import AdapterError, BaseModelError, DataError
from lora_engine.families.layout import read_layout
from lora_engine.formats.card import read_card
from lora_engine.formats.safetensors_io import read_header
from registry.errors import PolicyError, VoteError
from registry.policy.licenses import read_licenses
from registry.policy.policy_file import read_policies
from tasks.operations.adapter_files import parse_settings
from tasks.operations.ballots import read_answers
from tests.flows.commands import loraline_here

ROOT = Path(__file__).resolve().parents[2]
LONG = "1" * 5000

YAML: Mapping[str, bytes] = {
    "long integer": f"KEY: {LONG}\n".encode(),
    "large number": b"KEY: 1e999\n",
    "tag": b"KEY: !!python/object/apply:os.getcwd []\n",
    "set": b"KEY: !!set {a}\n",
    "wrong tag": b"KEY: !!int x\n",
    "deep": b"KEY: " + b"[" * 3000,
    "deep block": b"KEY:\n" + b"- " * 3000 + b"x\n",
    "surrogate": b'KEY: "\\ud800"\n',
    "bytes": b"KEY: \xff\n",
    "control": b"KEY: \x07\n",
    "no character": b'KEY: "\\U00110000"\n',
    "duplicate": b"KEY: a\nKEY: b\n",
    "recursion": b"KEY: &x [*x]\n",
    "aliases": b"KEY: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"k%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1) if n else b"*a"] * 10)) for n in range(5)),
    "date": b"KEY: 2026-01-01\n",
    "syntax": b"KEY: [\n",
    "list": b"- KEY\n",
    "text": b"KEY\n",
}
JSON: Mapping[str, bytes] = {
    "long integer": b'{"KEY": ' + LONG.encode() + b"}",
    "large number": b'{"KEY": 1e999}',
    "deep": b'{"KEY": ' + b"[" * 60 + b"]" * 60 + b"}",
    "deeper": b"[" * 5000,
    "surrogate": b'{"KEY": "\\ud800"}',
    "bytes": b'{"KEY": "\xff"}',
    "duplicate": b'{"KEY": "a", "KEY": "b"}',
    "syntax": b'{"KEY": ',
    "list": b'["KEY"]',
    "number": b"5",
    "empty": b"",
    "wrong type": b'{"KEY": []}',
}
TOML: Mapping[str, bytes] = {
    "long integer": f"KEY = {LONG}\n".encode(),
    "large number": b"KEY = 1e999\n",
    "not a number": b"KEY = [1, nan]\n",
    "deep": b"KEY = " + b"[" * 3000,
    "deep value": b"KEY = " + b"[" * 60 + b"]" * 60,
    "deep key": b"KEY" + b".a" * 200_000 + b" = 1\n",
    "quoted key": b"KEY = 1\n" + b'"a".' * 100_000 + b"b = 1\n",
    "surrogate": b'KEY = "\\ud800"\n',
    "bytes": b"KEY = \xff\n",
    "control": b'KEY = "\x07"\n',
    "duplicate": b"KEY = 1\nKEY = 2\n",
    "date": b"KEY = 2026-01-01\n",
    "time": b"KEY = [10:00:00]\n",
    "syntax": b"KEY = [\n",
    "many": b"KEY = [" + b"1, " * 30_000 + b"]\n",
}
CSV: Mapping[str, bytes] = {
    "bytes": b"file,consent\n\xff,1\n",
    "surplus": b"file,consent\n0.png,1,2\n",
    "one meaning": b"file,consent,license,Licence\n0.png,1,mit,cc0\n",
    "twice": b"file,consent,consent\n0.png,1,2\n",
    "quote": b'file,consent\n"0.png,1\n',
    "long cell": b"file,consent\n0.png," + b"x" * 200_000 + b"\n",
    "date": b"file,consent,expires\n0.png,1,2026-13-01\n",
    "row": b"file,consent\n0.png,1\n0.png,1\n",
}
BALLOT: Mapping[str, bytes] = {
    "bytes": b"pair,vote\n\xff,left\n",
    "surplus": b"pair,vote\n1,left,2\n",
    "twice": b"pair,vote,vote\n1,left,left\n",
    "misspelled": b"pair,votes\n1,left\n",
    "quote": b'pair,vote\n"1,left\n',
    "long cell": b"pair,vote\n1," + b"x" * 200_000 + b"\n",
    "row": b"pair,vote\n1,left\n1,left\n",
    "number": b"pair,vote\n" + LONG.encode() + b",left\n",
}


def refusal(folder: Path, *arguments: object) -> str:
    """Returns what a verb says that refuses its input."""
    done = loraline_here(*arguments, home=folder / "home")
    assert done.returncode in (1, 2), done.stdout
    return done.stderr


def _read_pipeline(folder: Path) -> str:
    return refusal(folder, "plan", next(folder.glob("line.*")))


def _read_toml(folder: Path) -> str:
    return refusal(folder, "init", folder / "out", "--from", folder / "config.toml")


def _read_settings(folder: Path) -> str:
    return refusal(folder, "list")


def _read_policy(folder: Path) -> str:
    with pytest.raises(PolicyError) as caught:
        read_policies(folder / "home")
    return str(caught.value)


def _read_licenses(folder: Path) -> str:
    with pytest.raises(PolicyError) as caught:
        read_licenses(folder / "home")
    return str(caught.value)


def _header_of(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _read_peft(folder: Path) -> str:
    names = (f"base_model.model.down_blocks.0.attentions.0.to_q.lora_{part}.weight" for part in "AB")
    entries = {
        name: {"dtype": "F32", "shape": [1, 1], "data_offsets": [n * 4, n * 4 + 4]} for n, name in enumerate(names)
    }
    (folder / "adapter_model.safetensors").write_bytes(_header_of(json.dumps(entries).encode()) + bytes(8))
    return refusal(folder, "validate", folder)


def _read_header(folder: Path) -> str:
    file = folder / "a.safetensors"
    file.write_bytes(_header_of(file.read_bytes()))
    return refusal(folder, "validate", file)


def _read_card(folder: Path) -> str:
    file = folder / "a.safetensors"
    metadata = {"loraline.card": (folder / "card.json").read_text(encoding="utf-8")}
    file.write_bytes(_header_of(json.dumps({"__metadata__": metadata}).encode()))
    with pytest.raises(AdapterError) as caught:
        read_card(read_header(file)[1])
    return str(caught.value)


def _read_index(folder: Path) -> str:
    with pytest.raises(BaseModelError) as caught:
        read_layout(folder)
    return str(caught.value)


def _read_consent(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_consent(folder / "consent.csv")
    return str(caught.value)


def _read_ballot(folder: Path) -> str:
    with pytest.raises(VoteError) as caught:
        read_answers(folder / "ballot.csv", 6)
    return str(caught.value)


@dataclass(frozen=True)
class Kind:
    """A kind of file: its path, a key that it may have, and a function that reads it and returns the refusal."""

    file: str
    key: str
    faults: Mapping[str, bytes]
    read: Callable[[Path], str]


KINDS: Mapping[str, Kind] = {
    "pipeline": Kind("line.yaml", "name", YAML, _read_pipeline),
    "pipeline in JSON": Kind("line.json", "name", JSON, _read_pipeline),
    "settings of sd-scripts": Kind("config.toml", "seed", TOML, _read_toml),
    "settings": Kind(
        "home/loraline.yaml", "store", {name: text for name, text in YAML.items() if name != "date"}, _read_settings
    ),
    "policy": Kind("home/policy.yaml", "policy", YAML, _read_policy),
    "licenses": Kind("home/licenses.yaml", "version", YAML, _read_licenses),
    "adapter_config": Kind("adapter_config.json", "peft_type", JSON, _read_peft),
    "header": Kind("a.safetensors", "x", {name: text for name, text in JSON.items() if name != "empty"}, _read_header),
    "card": Kind("card.json", "title", {name: text for name, text in JSON.items() if name != "bytes"}, _read_card),
    "index": Kind("model_index.json", "_class_name", JSON, _read_index),
    "consent": Kind("consent.csv", "", CSV, _read_consent),
    "ballot": Kind("ballot.csv", "", BALLOT, _read_ballot),
}
WITHOUT_PLACE = {"text", "list", "number"}
"""Faults of the whole file."""


@pytest.mark.parametrize(("kind", "fault"), [(kind, fault) for kind, entry in KINDS.items() for fault in entry.faults])
def test_a_fault_in_a_file_is_named_with_line_and_column(kind: str, fault: str, tmp_path: Path) -> None:
    entry = KINDS[kind]
    path = tmp_path / entry.file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(entry.faults[fault].replace(b"KEY", entry.key.encode()))
    message = entry.read(tmp_path)
    assert "Traceback" not in message
    assert len(message) < 1000, message
    name = "loraline.card" if kind == "card" else path.name
    assert name in message
    if fault not in WITHOUT_PLACE and (kind, fault) not in {("index", "wrong type"), ("card", "wrong type")}:
        assert re.search(rf"{re.escape(name)}[^ ]*(: header)?(:\d+:\d+|:\d+, column \d+( .\w+.)?|:\d+):", message), (
            message
        )


@pytest.mark.parametrize("text", [LONG, "1e999", "!!set {a}", "[" * 3000, '"\\ud800"', "&x [*x]", "[", '"\\U00110000"'])
@pytest.mark.parametrize("arguments", [("plan", "line.yaml"), ("merge", "a", "b", "-o", "out")])
def test_a_value_on_the_command_line_is_refused_without_quoting_it(
    arguments: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    (tmp_path / "line.yaml").write_text("name: a\nsteps: {adapter: {uses: merge, adapters: [x@1, y@1]}}\n")
    paths = [str(tmp_path / part) if part == "line.yaml" else part for part in arguments]
    message = refusal(tmp_path, *paths, "--set", f"adapter.rank={text}")
    assert "--set adapter.rank:1:" in message
    assert "Traceback" not in message
    assert text not in message.replace("'!!set'", "")


def test_a_merge_without_a_loop_reads_plain_values(tmp_path: Path) -> None:
    assert parse_settings(["density=0.3", "sign=total", "on=no"]) == {"density": 0.3, "sign": "total", "on": "no"}


OWN = {
    "lora_engine/training/spawn.py": "events of our own child process, on its standard output",
    "lora_engine/training/__main__.py": "the job that our own process wrote",
    "lora_engine/training/checkpoint.py": "facts of a checkpoint, after its digest was verified",
    "lora_engine/training/checkpoint_files.py": "facts of the home's own checkpoints, for plans",
    "lora_engine/training/states.py": "the result of a run in the home's cache",
    "lora_engine/evaluation/report.py": "files of an artifact, after their digests were verified",
    "tasks/run_entry.py": "the entry of a run, which this home's processes write",
    "tasks/operations/export_adapter.py": "files of an artifact, after their digests were verified",
    "tasks/operations/verify_files.py": "a document whose digest a valid signature covers",
    "lora_engine/checkpoints/names.py": "a key of a cache in memory",
    "lora_engine/data/decoder_child.py": "requests of our own process",
    "lora_engine/data/decoder_process.py": "answers of our own child process",
    "lora_engine/formats/pickle_child.py": "an argument of our own child process",
    "lora_engine/formats/pickles.py": "the answer of our own child process",
    "tasks/serving/records.py": "cells of the database that the home's server wrote",
    "tasks/environment.py": "metadata of an installed package",
    "tasks/operations/report.py": "files of an artifact, after their digests were verified",
    "tasks/steps/register.py": "files of an artifact, after their digests were verified",
    "tasks/steps/saved.py": "files of an artifact, after their digests were verified",
    "registry/policy/terms.py": "files of an artifact, after their digests were verified",
    "tasks/steps/convert.py": "the summary of an earlier result, after its digest was verified",
    "registry/store/trees.py": "the list of files of an artifact, after its digest was verified",
    "registry/versions/mlflow_sync.py": "a cell of the database that the registry wrote",
    "registry/versions/mlflow_writer.py": "files of an artifact, after their digests were verified",
    "registry/documents/signing.py": "a signature, whose form is checked field by field",
    "registry/store/migrations/revision_4.py": "a cell of the database that the registry wrote",
    "registry/store/cells.py": "a cell of the database that the registry wrote",
    "registry/store/database.py": "a cell of the database that the registry wrote",
    "registry/documents/gather.py": "files of an artifact, after their digests were verified",
    "flows/registered.py": "summaries of steps of this run",
    "flows/summary.py": "summaries of steps of this run",
    "flows/spec/validate.py": "data that the one parser has read, written again for pydantic's strict mode",
    "tasks/relay.py": "events that the workers of this run write",
    "tasks/operations/release.py": "a check that the home's own process began",
    "tasks/operations/delivery_layout.py": "the front matter of a card, after its digest was verified",
    "flows/deliver.py": "a number that the home's own process wrote",
    "flows/events.py": "how far the home's own process sent events",
    "flows/sensors.py": "what the home's own process saw last",
    "flows/up.py": "what the home's own process started",
    "flows/supervision.py": "answers of the Prefect server that our own process started",
    "flows/deployments.py": "data that the one parser has read, copied",
    "tasks/operations/votes.py": "files of an artifact, after their digests were verified",
    "tasks/operations/caption_edits.py": "what the home's own process wrote",
    "tasks/execution.py": "files of an artifact, after their digests were verified",
}
"""Files with another parser -> what they read, which no user writes."""
_METHODS = {"model_validate_json", "validate_json"}
"""Pydantic's own parser of JSON."""
_PARSERS = {"loads", "load", "safe_load", "compose", "DictReader", "reader", "JSONDecoder"}


def _parsers(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        is_of_module = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if is_of_module and node.value.id in {"json", "yaml", "csv", "tomllib"} and node.attr in _PARSERS:
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Attribute) and node.attr in _METHODS:
            yield node.attr


def test_all_other_text_is_parsed_by_one_package() -> None:
    files = [
        file for package in ("lora_engine", "tasks", "registry", "flows") for file in (ROOT / package).rglob("*.py")
    ]
    found = {str(file.relative_to(ROOT)) for file in files if any(_parsers(file))}
    own = {name for name in found if not name.startswith("lora_engine/documents/")}
    assert own == OWN.keys()
    assert found - own
