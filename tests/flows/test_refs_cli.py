"""Tests that each verb refuses each text that names no version. The verbs come from the parser of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from registry.refs import can_exist, split_ref, version_number
from tests.flows.commands import loraline_here as loraline
from tests.flows.shared import Trained, copy_trained
from tests.flows.test_access_cli import VERBS, arguments, values

__all__ = ["values"]

NO_VERSIONS = {
    "huge": f"small@{'9' * 5000}",
    "of 65 bits": "small@36893488147419103232",
    "undecodable": "small@\udcff",
    "undecodable name": "\udcff@1",
    "wide digit": "small@\uff11",
    "zero": "small@0",
    "empty": "small@",
    "nothing": "@",
    "twice": "small@1@1",
    "newline": "small@1\n",
}
PLACES = ("NAME@REF", "NAME@ALIAS", "REF|FILE", "REF|DIGEST|FILE", "A[:w] B[:w] ...", "A[:w] ...")
REFUSALS = ("no version", "no adapter", "invalid alias", "nothing has the name", "does not exist")


@pytest.fixture(scope="module")
def small(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return copy_trained(trained_home, tmp_path_factory.mktemp("refs") / "trained")


TAKERS = [verb for verb in VERBS if any(parameter.metavar in PLACES for parameter in VERBS[verb].params)]


@pytest.mark.parametrize("verb", TAKERS)
def test_a_text_that_names_no_version_is_refused(verb: str, values: Mapping[str, str], small: Trained) -> None:
    before = small.version().aliases
    for text in NO_VERSIONS.values():
        own = dict.fromkeys(PLACES, text) | {"OUT": values["OUT"]}
        done = loraline(*arguments(verb, {**values, **own}), home=small.home.path)
        assert done.returncode == 1, (text, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert any(refusal in done.stderr for refusal in REFUSALS), (text[:40], done.stderr)
        assert len(done.stderr) < 1000, done.stderr
    assert small.version().aliases == before


def test_some_verbs_take_versions() -> None:
    assert {"show", "promote", "lineage", "merge", "diff", "unalias"} <= set(TAKERS)


# The newline at the end of a tag is stripped.
@pytest.mark.parametrize("text", [text for name, text in NO_VERSIONS.items() if name != "newline"])
def test_tags_in_prompts_and_expectations_are_parsed_as_references(text: str, small: Trained, tmp_path: Path) -> None:
    prompt = loraline("generate", f"a <lora:{text}:1>", "-o", tmp_path / "out", home=small.home.path)
    expect = ("promote", "small@1", "--to", "staging", "--reason", "test", "--expect", text)
    for done in (prompt, loraline(*expect, home=small.home.path)):
        assert done.returncode == 1, done.stdout
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "\udcff"),
        ("log", "\udcff"),
        ("log", "small", "--alias", "\udcff"),
        ("revoke", "\udcff", "--reason", "x"),
        ("rollback", "\udcff"),
        ("rollback", "small", "--to", "9" * 30),
        ("rollback", "small", "--to-event", "9" * 30),
    ],
)
def test_other_names_may_be_any_text(arguments: tuple[str, ...], small: Trained) -> None:
    done = loraline(*arguments, home=small.home.path)
    assert done.returncode in (0, 1, 2)
    assert "Traceback" not in done.stderr


def test_the_parser_reads_names_numbers_and_aliases() -> None:
    assert split_ref("a@b") == ("a", "b")
    assert split_ref("a") == ("a", "latest")
    assert [version_number(ref) for ref in ("1", "12", 3, "0", "01", "x", 10**5000)] == [
        1,
        12,
        3,
        None,
        None,
        None,
        None,
    ]
    assert can_exist("a.b", "production")
    impossible = ("huge", "undecodable", "undecodable name", "wide digit", "empty", "nothing", "newline")
    assert not any(can_exist(*split_ref(NO_VERSIONS[name])) for name in impossible)
