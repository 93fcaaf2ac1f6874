"""Tests what each verb does with a missing, a read-only and a full home.

The verbs come from the parser of the command line, so a new verb is tested by being added. A new kind of argument needs
a value in `_values`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import typer

from flows.cli import app
from flows.cli.verbs import Access
from registry.home import Home
from registry.maintenance.backup import backup
from registry.store.copy_database import copy_tables
from registry.versions.versions import Versions
from tests.flows.commands import loraline_here as loraline
from tests.flows.shared import Trained, copy_trained, draw_noise

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
        "NAME@REF|PATH": "none@1",
        "SUBJECT": "consent-1",
        "COMPARISON": "0123456789",
        "FILE|NAME@REF": "none@1",
        "A[:w] B[:w] ...": "none@1",
        "A[:w] ...": "none@1",
        "PROMPT": "a ring <lora:none@1:1>",
        "name": "none",
        "reason": "test",
        "trigger": "zorb",
        "class_word": "ring",
        "ALIAS": "production",
        "USER": "ci-nightly",
        "FORMAT": "peft",
        "BASE": "tiny",
        "base": "tiny",
        "TUNED": str(folder / "tuned"),
        "SPEC": str(folder / "line.yaml"),
        "IMAGES": str(folder / "images"),
        "FILE": str(folder / "file"),
        "PROMPTS": str(folder / "prompts.txt"),
        "FILE.pub": str(folder / "file.pub"),
        "FILE.html": str(folder / "page.html"),
        "FOLDER|FILE.tar": str(folder / "backups"),
        "FOLDER": str(folder / "documents"),
        "DIR": str(folder / "new"),
        "OUT": str(folder / "out"),
        "URL": f"sqlite:///{folder / 'copy.db'}",
    }


MORE = {
    "keys new": ("--trust", "--without-passphrase"),
    "generate": ("-n", "1", "--steps", "1"),
    "resize": ("--rank", "1"),
    "caption": ("--captioner", "none", "--dry-run"),
}
"""Verb -> options with which it opens the home, or is quicker."""
SLOW = {"generate", "reproduce"}


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
    (tmp_path / "prompts.txt").write_text("a ring")
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


# `train` ends as `run`, `sweep` refuses a file without a sweep before it opens the home, `up`, `serve` do not end.
@pytest.mark.parametrize(
    "verb", sorted({*verbs(Access.WRITE, Access.DELETE)} - {"train", "sweep", "up", "serve", "studio"})
)
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


@contextmanager
def _read_only(folder: Path) -> Iterator[None]:
    """Mounts a folder over itself, read-only."""
    _mount("--bind", folder, folder)
    try:
        _mount("-o", "remount,bind,ro", folder)
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _fill(folder: Path) -> None:
    with (folder / "filler").open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


@contextmanager
def _full(folder: Path) -> Iterator[None]:
    _fill(folder)
    try:
        yield
    finally:
        (folder / "filler").unlink()


@contextmanager
def _forbidden(folder: Path) -> Iterator[None]:
    """Takes the permission to write from the user; root becomes another user."""
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        for path in reversed(paths):
            path.chmod(0o755 if path.is_dir() else 0o644)


STATES: Mapping[str, Callable[[Path], AbstractContextManager[None]]] = {
    "read-only": _read_only,
    "full": _full,
    "forbidden": _forbidden,
}


def _mount(*arguments: object) -> None:
    if subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk: not root")


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """Yields a small disk of its own, which each user may read."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    _mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


@pytest.fixture(scope="module")
def small(trained_home: Path, disk: Path) -> Trained:
    """Returns a trained home on the small disk."""
    return copy_trained(trained_home, disk / "trained")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """Yields a folder in which each user may write; the folders of pytest are private."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.mark.usefixtures("prefect_server", "trained_here")
@pytest.mark.parametrize(
    ("verb", "state"),
    [(verb, state) for verb in verbs(Access.READ) for state in STATES if state == "read-only" or verb not in SLOW],
)
def test_a_verb_that_reads_answers_where_the_home_cannot_be_written(
    verb: str, state: str, small: Trained, disk: Path, public_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = _values(public_folder) | {"SPEC": str(small.spec)}
    known = {key: value.replace("none@1", "small@1") for key, value in values.items()}
    before = {path.name for path in small.home.path.iterdir()}
    if state == "full":
        monkeypatch.setattr(tempfile, "tempdir", str(disk))  # as with one disk for everything
    with STATES[state](disk):
        done = loraline(*arguments(verb, known), home=small.home.path)
    # No scheduled run waits for an approval, and no comparison for votes.
    warns = (verb, state) == ("doctor", "full") or verb in {"approve", "vote ballot"}
    assert done.returncode == warns, done.stdout + done.stderr
    assert {path.name for path in small.home.path.iterdir()} == before


def test_a_full_disk_does_not_stop_what_frees_space(trained_home: Path, disk: Path) -> None:
    trained = copy_trained(trained_home, disk / "other")
    home = trained.home.path
    with _full(disk):
        refused = loraline("run", trained.spec, "--force", "photos", home=home)
        assert "the disk is full" in refused.stderr
        assert "`loraline gc`" in refused.stderr
        for verb, ref in (("unalias", "small@staging"), ("delete", "small@1")):
            done = loraline(verb, ref, "--reason", "space", home=home)
            assert done.returncode == 0, done.stderr
        _fill(disk)
        before = sum(path.stat().st_size for path in (home / "store").rglob("*") if path.is_file())
        done = loraline("gc", "--grace", "0", "--keep-runs", "0", "--json", home=home)
        assert done.returncode == 0, done.stderr
        freed = json.loads(done.stdout)["size"]
        assert freed > 0
        assert before - freed == sum(path.stat().st_size for path in (home / "store").rglob("*") if path.is_file())
    assert Versions(Home.open(home)).show("small", 1).state == "DELETED"
    assert loraline("fsck", home=home).returncode == 0
