"""Tests what MLflow's own server and interface show of a home, in a real browser."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def server(home):
    """Yields the address of MLflow's server over the home."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    # Without MLflow's eight job processes for language models, which these tests do not use.
    environment = os.environ | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "DO_NOT_TRACK": "true",
    }
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment, "start_new_session": True}
    process = subprocess.Popen([*command, "--backend-store-uri", home.mlflow_url], **quiet)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/health", process)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def wait_for(address, process):
    for _ in range(600):
        assert process.poll() is None
        try:
            with urllib.request.urlopen(address, timeout=10) as response:
                assert response.status == 200
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"{address} does not respond")


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
