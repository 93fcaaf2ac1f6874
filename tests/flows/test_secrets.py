"""No output, file or database of a home contains a password, token or key, wherever a user writes one."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from registry.home import Home
from registry.lineage.record import Lineage
from registry.settings import NAME
from tasks.environment import list_distributions
from tests.flows.commands import loraline_here
from tests.flows.conftest import PREPARE

Write = Callable[..., Path]

MARK = "hunter2"
"""A part of every secret in this file; each secret is longer, so a leaked fragment is found too."""
TOKEN = "hf_hunter2abcdefghijkl"
CLOSED = "127.0.0.1:9"
DOCTOR, BACKUP = ("doctor", "--json"), ("backup", "{}/saved")
VERBS = {
    "LORALINE_DATABASE_URL": (("list",), ("fsck",), DOCTOR, BACKUP),
    "LORALINE_MLFLOW_URL": (("fsck",), DOCTOR, BACKUP),
    "LORALINE_STORE_URL": (("show", "zorb"), ("fsck",), DOCTOR, BACKUP),
    "PREFECT_API_URL": (("doctor",),),
}

DATABASE_URLS = {
    f"postgresql+psycopg://ada:{MARK}@{CLOSED}/x?password={MARK}q&sslpassword={MARK}s": "ada:***@127.0.0.1",
    f"postgresql+psycopg://ada:{MARK}@{CLOSED}/x?unknown_option=1": "ada:***@127.0.0.1",
    f"postgresql://ada:{MARK}a/{MARK}b@host:port/x": "ada:***@host:port/x",
    f"postgresql://ada:{MARK}a@{MARK}b@host:65536x/x": "ada:***@host",
    f"postgresql+unknown://ada:{MARK}@host/x": "ada:***@host",
    f"ada:{MARK}@host/x": "***@host/x",
    f"https://{MARK}@host/x": "unsupported database 'https'",
    f"sqlite:///x.db?timeout=never&password={MARK}": "sqlite:///x.db?timeout=never&password=***",
}
STORE_URLS = {
    f"unknown://ada:{MARK}@host/x?token={MARK}q": "unknown://***@host/x?token=***",
    f"s3://ada:{MARK}@[host/x": "s3://***@[host/x",
    f"ftp://ada:{MARK}@{CLOSED}/x": "ftp://ada:***@127.0.0.1:9/x",
    f"ftp://ada:{MARK}a/{MARK}b@{CLOSED}/x": "ftp://ada:***@127.0.0.1:9/x",
}
PREFECT_URLS = {
    f"http://ada:{MARK}@{CLOSED}/api?token={MARK}q": "http://***@127.0.0.1:9/api?token=***",
    f"http://ada:{MARK}a/{MARK}b@{CLOSED}/api": "http://***@127.0.0.1:9/api",
    f"http://{MARK}@[host/api": "http://***@[host/api",
    f"postgresql://ada:{MARK}@host/api": "postgresql://ada:***@host/api",
}
VARIABLES = [
    *(("LORALINE_DATABASE_URL", url, shown) for url, shown in DATABASE_URLS.items()),
    *(("LORALINE_MLFLOW_URL", url, shown) for url, shown in DATABASE_URLS.items() if "psycopg" not in url),
    *(("LORALINE_STORE_URL", url, shown) for url, shown in STORE_URLS.items()),
    *(("PREFECT_API_URL", url, shown) for url, shown in PREFECT_URLS.items()),
]
SETTINGS = {
    f"databse: postgresql://ada:{MARK}@host/x\n": "did you mean 'database'?",
    f"password: {MARK}\n": "unknown setting 'password'",
    f"{TOKEN}: x\n": "unknown setting '***'",
    f"database: [{MARK}]\n": "database: the value is not text",
    f"database: *{MARK}\n": "the settings cannot be read: found undefined alias",
    f"store: x\ndatabase: '{MARK}\n": "found unexpected end of stream",
    f"{MARK}\n": "the file contains text",
}
OVERRIDES = {
    f"captions.hf_token:{MARK}": "'captions.hf_token' has no key or no value",
    f"captions.hf_tokn='{MARK}": "--set captions.hf_tokn:1:9: found unexpected end of stream",
    f"captions.hf_tokn={MARK}": "unknown key 'captions.hf_tokn'",
    f"seed={TOKEN}": "seed is a secret in plain text",
    f"prepared.resolution=https://ada:{MARK}@hub/model": "resolution is a secret in plain text",
}


@pytest.fixture
def opened(home: Path) -> Home:
    """Returns a home whose database exists."""
    opened = Home.open(home)
    Lineage(opened.lineage_url).close()
    return opened


def call(home: Home, *arguments: str, **variables: str) -> tuple[int, str]:
    """Runs a verb in this process; returns its exit code and all that it printed."""
    done = loraline_here(*arguments, home=home.path, **variables)
    return done.returncode, done.stdout + done.stderr


def leaks(folder: Path, *texts: str) -> list[str]:
    """Returns the texts, and the names of files below a folder, that contain a secret."""
    files = [str(path) for path in folder.rglob("*") if path.is_file() and MARK.encode() in path.read_bytes()]
    return [text for text in texts if MARK in text] + files


@pytest.mark.parametrize(("variable", "url", "shown"), VARIABLES)
def test_no_verb_shows_or_stores_a_secret_of_a_url(
    opened: Home, tmp_path: Path, variable: str, url: str, shown: str
) -> None:
    if "psycopg" in url:
        pytest.importorskip("psycopg")
    readers = [tuple(part.replace("{}", str(tmp_path)) for part in verb) for verb in VERBS[variable]]
    results = [call(opened, *verb, **{variable: url}) for verb in readers]
    assert leaks(tmp_path, *(text for _, text in results)) == []
    assert any(code for code, _ in results)
    assert any(shown in text for _, text in results), results


@pytest.mark.parametrize(("text", "shown"), SETTINGS.items())
def test_an_error_in_the_settings_quotes_no_value(opened: Home, text: str, shown: str) -> None:
    (opened.path / NAME).write_text(text)
    for verb in (("list",), ("fsck",), DOCTOR):
        code, output = call(opened, *verb)
        assert code
        assert MARK not in output
        assert shown in output


@pytest.mark.parametrize(("override", "shown"), OVERRIDES.items())
def test_an_error_in_an_override_quotes_no_secret(pipeline: Write, home: Path, override: str, shown: str) -> None:
    code, output = call(Home(home), "plan", str(pipeline()), "--set", override)
    assert code == 2
    assert leaks(home, output) == []
    assert shown in output


def test_a_target_database_is_named_without_its_secrets(opened: Home) -> None:
    for url, shown in DATABASE_URLS.items():
        code, output = call(opened, "copy-database", url)
        assert code
        assert leaks(opened.path, output) == []
        assert shown in output or "driver is not installed" in output


def test_a_run_records_no_secret_of_its_file_or_its_environment(
    pipeline: Write, opened: Home, prefect_server: str
) -> None:
    path = pipeline(PREPARE + "description: from the camera\n")
    refused = path.with_name("refused.yaml")
    refused.write_text(PREPARE + f"description: from https://ada:{MARK}@host/x?token={MARK}q, with {TOKEN}\n")
    secrets = {"HF_TOKEN": TOKEN, "AWS_SECRET_ACCESS_KEY": f"{MARK} key", "PREFECT_API_AUTH_STRING": f"ada:{MARK}"}
    outputs = [call(opened, verb, str(path), **secrets) for verb in ("run", "plan")]
    (path.parent / "images").rename(path.parent / "moved")
    outputs += [call(opened, "run", str(file), **secrets) for file in (path, refused)]
    assert [code for code, _ in outputs] == [0, 0, 2, 2]
    assert "description is a secret in plain text" in outputs[-1][1]
    assert leaks(opened.path, *(text for _, text in outputs)) == []
    lineage = Lineage(opened.lineage_url)
    (run,) = lineage.runs()
    lineage.close()
    assert run.spec["description"] == "from the camera"
    for kind in ("flow_runs", "task_runs"):
        request = Request(f"{prefect_server}/{kind}/filter", b"{}", {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            recorded = answer.read().decode()
        assert json.loads(recorded)
        assert MARK not in recorded


def test_prefect_stores_no_secret_of_a_failed_step(pipeline: Write, opened: Home, prefect_server: str) -> None:
    """The error quotes the name of a file, and the value of a variable, in the states of task, flow and table."""
    path = pipeline(PREPARE.replace("name: try", "name: leaking"))
    for image in (path.parent / "images").iterdir():
        image.unlink()
    (path.parent / "images" / f"{TOKEN}.png").write_bytes(b"no image")
    code, output = call(opened, "run", str(path), HF_TOKEN=f"{MARK} plain")
    assert code == 1
    assert "***" in output
    only = json.dumps({"flow_runs": {"name": {"any_": ["leaking"]}}}).encode()
    for kind in ("flow_runs", "task_runs", "artifacts"):
        request = Request(f"{prefect_server}/{kind}/filter", only, {"Content-Type": "application/json"})
        recorded = ""
        for _ in range(120):  # the server records the states of tasks later
            with urlopen(request, timeout=60) as answer:
                recorded = answer.read().decode()
            if "***" in recorded:
                break
            time.sleep(0.5)
        assert "***" in recorded, kind
        assert MARK not in recorded
    assert leaks(opened.path, output) == []


def test_origin_of_a_package_is_recorded_without_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fromgit-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: fromgit\nVersion: 1.0\n")
    origin: Mapping[str, object] = {"url": f"https://{MARK}@host/x.git", "vcs_info": {"commit_id": "abc"}}
    (folder / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "fromgit==1.0 @ https://***@host/x.git abc" in list_distributions()


def test_the_search_finds_a_secret_in_a_text_a_file_and_a_database(opened: Home) -> None:
    assert leaks(opened.path, "a text") == []
    lineage = Lineage(opened.lineage_url)
    lineage.start_run(f"named {MARK}", {})
    lineage.close()
    assert leaks(opened.path, f"x{MARK}y") == [f"x{MARK}y", str(opened.lineage_db)]
