"""Tests what MLflow's own server and interface show of a home, in a real browser."""

import re
import shutil
import subprocess

import pytest

from tests.support.mlflow_server import mlflow_server

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def server(home):
    """Yields the address of MLflow's server over the home."""
    with mlflow_server(home.mlflow_url) as address:
        yield address


def read_page(address, folder) -> str:
    """Returns the text of a page after its scripts ran."""
    browser = next(path for name in CHROMIUM if (path := shutil.which(name)))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    command += ["--virtual-time-budget=60000", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return " ".join(re.sub(r"<(style|script)\b.*?</\1>|<[^>]*>", " ", done.stdout, flags=re.DOTALL).split())


@pytest.mark.needs("chromium")
def test_model_page_shows_name_version_alias_and_description(synced, register, request, tmp_path):
    register(synced, b"weights", alias_request="candidate")
    server = request.getfixturevalue("server")
    text = read_page(f"{server}/#/models/zorb/versions/1", tmp_path / "browser")
    for phrase in ("zorb", "Version 1", "candidate", "Model card", "Bill of materials", "loraline.sha256"):
        assert phrase in text, text
    assert "clip_t" in text, "the figures are in the description"
    missing = read_page(f"{server}/#/models/zorb/versions/2", tmp_path / "browser")
    assert "candidate" not in missing
