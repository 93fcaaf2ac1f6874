"""Tests what each verb does with a missing, a read-only and a full home.

The verbs come from the parser of the command line, so a new verb is tested by being added. A new kind of argument needs
a value in `_values`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from flows.cli import app
from flows.cli.verbs import Access
from registry.home import Home
from registry.maintenance.backup import backup
from registry.store.copy_database import copy_tables
from tests.flows.commands import loraline_here as loraline
from tests.flows.shared import Trained, draw_noise

SPEC = """\
name: joined
base: tiny
seed: 7
steps:
  joined: {uses: merge, adapters: ["none@1", "none@2"]}
"""


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, (*path, name))
    if path and not hasattr(command, "commands"):
        yield " ".join(path), command


VERBS = dict(_commands(typer.main.get_command(app)))


def verbs(*access: Access) -> list[str]:
    return [name for name, command in VERBS.items() if command.context_settings.get("obj") in access]


def _values(folder: Path) -> Mapping[str, str]:
    """Returns a value for each kind of required argument and option, by its metavar or name."""
    return {
        "NAME@REF": "none@1",
        "NAME@ALIAS": "none@production",
        "REF|FILE": "none@1",
        "REF|DIGEST|FILE": "none@1",
        "IMAGE|DIGEST|CONSENT": "consent-1",
        "A[:w] B[:w] ...": "none@1",
        "A[:w] ...": "none@1",
        "PROMPT": "a ring <lora:none@1:1>",
        "name": "none",
        "reason": "test",
        "trigger": "zorb",
        "class_word": "ring",
        "ALIAS": "production",
        "FORMAT": "peft",
        "BASE": "tiny",
        "base": "tiny",
        "TUNED": str(folder / "tuned"),
        "SPEC": str(folder / "line.yaml"),
        "IMAGES": str(folder / "images"),
        "FILE": str(folder / "file"),
        "FILE.pub": str(folder / "file.pub"),
        "FILE.html": str(folder / "page.html"),
        "FOLDER|FILE.tar": str(folder / "backups"),
        "FOLDER": str(folder / "documents"),
        "DIR": str(folder / "new"),
        "OUT": str(folder / "out"),
        "URL": f"sqlite:///{folder / 'copy.db'}",
    }


MORE = {"keys new": ("--trust", "--without-passphrase")}
"""Verb -> options with which it opens the home."""


def arguments(verb: str, values: Mapping[str, str]) -> list[str]:
    """Returns a command with all required arguments and options."""
    line = verb.split()
    for parameter in VERBS[verb].params:
        if parameter.required:
            value = values[parameter.metavar or str(parameter.name)]
            line += [parameter.opts[0], value] if parameter.param_type_name == "option" else [value]
    return [*line, *MORE.get(verb, ())]


@pytest.fixture
def values(tmp_path: Path) -> Mapping[str, str]:
    (tmp_path / "line.yaml").write_text(SPEC)
    (tmp_path / "images").mkdir()
    draw_noise(tmp_path / "images" / "0.png", 0)
    return _values(tmp_path)


def test_each_verb_declares_its_access() -> None:
    assert [name for name in VERBS if name not in verbs(*Access)] == []


@pytest.mark.parametrize("verb", verbs(Access.READ))
def test_a_verb_that_reads_a_missing_home_says_so_and_does_not_create_it(
    verb: str, values: Mapping[str, str], home: Path
) -> None:
    done = loraline(*arguments(verb, values), home=home)
    assert str(home) in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not home.exists()
    if not any(parameter.required for parameter in VERBS[verb].params):
        assert done.returncode == 0, done.stderr
        assert json.loads(loraline(*verb.split(), "--json", home=home).stdout) is not None


@pytest.mark.parametrize("verb", verbs(Access.NONE))
def test_a_verb_on_files_does_not_create_a_home(verb: str, values: Mapping[str, str], home: Path) -> None:
    loraline(*arguments(verb, values), home=home)
    assert not home.exists()


@pytest.mark.parametrize("verb", sorted({*verbs(Access.WRITE, Access.DELETE)} - {"train"}))  # `train` ends as `run`
def test_a_verb_that_writes_creates_the_home(verb: str, values: Mapping[str, str], home: Path, tmp_path: Path) -> None:
    if verb == "restore-backup":
        backup(Home.open(tmp_path / "other"), tmp_path / "backups")
    done = loraline(*arguments(verb, values), home=home)
    assert "Traceback" not in done.stderr
    assert (home / "store").is_dir(), done.stderr


def test_after_the_first_command_a_listing_no_longer_says_that_the_home_is_missing(home: Path) -> None:
    loraline("gc", home=home)
    assert loraline("list", home=home).stderr == ""


def test_a_database_elsewhere_is_read_without_a_home(trained: Trained, home: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'lineage.db'}"
    copy_tables(trained.home.lineage_url, url)
    done = loraline("list", "--json", home=home, LORALINE_DATABASE_URL=url)
    assert [version["name"] for version in json.loads(done.stdout)] == ["small"], done.stderr
    assert done.stderr == ""
    assert not home.exists()
