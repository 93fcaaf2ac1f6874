"""`Serving`: `loraline serve` as a process on loopback, and the application in this process."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.home import Home
from tests.flows.commands import PLAIN
from tests.flows.shared import fill_once

TIMEOUT = 120.0


class Serving:
    """A home, and `loraline serve` on it.

    Args:
        home: The home.
        variables: More environment variables.
    """

    def __init__(self, home: Home, **variables: str) -> None:
        self.home = home
        own = {"LORALINE_HOME": str(home.path), "OMP_NUM_THREADS": "1"}
        self.environment = os.environ | PLAIN | own | variables
        self.address = ""

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Starts the command, and returns when it answers."""
        line = [sys.executable, "-c", "from flows.cli import start; start()", "serve", "--json", "--port", "0"]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*line, *arguments], env=self.environment, start_new_session=True, **pipes)
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 300)[0], "not ready after 300 s"
        answer = process.stdout.readline()
        assert answer, process.communicate()[1]
        self.address = json.loads(answer)["address"]
        return process

    @contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Runs the server inside a `with` block, and kills it at the end unless it was stopped."""
        process = self.start(*arguments)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def client(self, token: str = "", **options: Any) -> httpx.Client:
        """Returns a client of the server."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.Client(base_url=self.address, headers=headers, timeout=TIMEOUT, **options)


def stop(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Sends SIGTERM, and returns the exit code and standard error."""
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=TIMEOUT)[1]
    return process.returncode, errors


def read_events(lines: Iterator[str] | Sequence[str]) -> list[dict[str, Any]]:
    """Returns the data of server-sent events."""
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def write_tokens(path: Path, *users: tuple[str, str]) -> list[str]:
    """Makes a token for each user and tenant, and returns the tokens."""
    from flows.web.tokens import add_token

    return [add_token(path, user, tenant, None)[0] for user, tenant in users]


def make_home(folder: Path) -> Home:
    """Returns a home with `zorb@1` (production), `zorb@2` and `ring@1` (production) for the embedded base."""
    from contextlib import closing

    from registry.versions.promotion import promote
    from registry.versions.versions import Versions
    from tests.flows.made import bring_in, write_random

    home = Home.open(folder / "home")
    # Imported adapters have no evaluation, which the default policy of production needs.
    policy = "aliases: {production: {needs_evaluation: false, needs_gate: false, needs_consent: none}}\n"
    (home.path / "policy.yaml").write_text(policy)
    for seed, name in enumerate(["zorb", "zorb", "ring"]):
        bring_in(home, write_random(folder / f"{seed}.safetensors", seed), name)
    with closing(Versions(home)) as versions:
        for name in ("zorb", "ring"):
            promote(versions, name, 1, "production", reason="a test")
    return home


def copy_home(factory: pytest.TempPathFactory, folder: Path) -> Home:
    """Returns a copy of the home of `make_home`, which one worker makes once."""
    from registry.versions.versions import Versions

    source = fill_once(factory, "serving", lambda path: make_home(path) and None)
    shutil.copytree(source / "home", folder)
    home = Home.open(folder)
    Versions(home).close()  # opening a moved home rewrites the addresses of MLflow
    return home
