"""`loraline serve --engine NAME --set OPTION=VALUE`: what reaches the engine, and what is refused."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from fastapi import FastAPI

from flows.web.app import create_app
from lora_engine.serving.engines import ENGINES
from tasks.serving import EngineName
from tests.flows.commands import loraline_here
from tests.flows.web.server import copy_home

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
BODY = {"prompt": "a ring", "steps": 1, "seed": 5}


def test_the_names_of_the_verb_are_those_of_the_engines() -> None:
    assert get_args(EngineName) == tuple(ENGINES)


def test_the_page_has_the_options_of_each_engine() -> None:
    for name, engine in ENGINES.items():
        (row,) = re.findall(rf"^\| `{name}` \|[^|]*(?:`rank`)?[^|]*\| (.*) \|$", PAGE, re.MULTILINE)
        assert re.findall(r"`(\w+)`", row) == [option for option in engine.options.model_fields if option != "adapters"]


def serve_once(monkeypatch: pytest.MonkeyPatch, home: Path, *arguments: str) -> tuple[FastAPI, dict[str, Any]]:
    """Runs the verb in this process until it has answered one request; returns the application and the answer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    applications: list[FastAPI] = []

    def create(*parts: Any) -> FastAPI:
        applications.append(create_app(*parts))
        return applications[-1]

    monkeypatch.setattr("flows.web.serving.create_app", create)
    answers: list[dict[str, Any]] = []
    has_ended = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            while not has_ended.is_set():
                try:
                    client.get("/readyz").raise_for_status()
                except httpx.HTTPError:
                    time.sleep(0.05)
                    continue
                answers.append(client.post("/v1/images", json=BODY).json())
                os.kill(os.getpid(), signal.SIGTERM)  # which the server handles
                return

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        completed = loraline_here("serve", "--port", str(port), "--no-studio", *arguments, home=home)
    finally:
        has_ended.set()
        asking.join()
    assert completed.returncode == 0, completed.stderr
    assert "Traceback" not in completed.stderr
    return applications[0], answers[0]


@pytest.mark.parametrize(
    ("arguments", "adapters", "options"),
    [
        (("static", "--adapter", "zorb:0.5"), ["zorb@1"], {"max_images": 3, "adapters": "<lora:zorb@1:0.5>"}),
        (("dynamic", "--set", "cache_bytes=1000"), [], {"max_images": 3, "cache_bytes": 1000}),
        (
            (
                "compiled",
                "--set",
                "backend=eager",
                "--set",
                "rank=2",
                "--set",
                "max_images=1",
                "--set",
                "targets=unet.conv_in",
            ),
            [],
            {"max_images": 1, "backend": "eager", "rank": 2},
        ),
    ],
)
def test_the_options_of_the_verb_reach_the_engine_which_draws(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    adapters: list[str],
    options: dict[str, Any],
) -> None:
    home = copy_home(tmp_path_factory, tmp_path / "home")
    application, answer = serve_once(monkeypatch, home.path, "--batch", "3", "--engine", *arguments)
    assert answer["job"]["state"] == "completed", answer
    assert answer["job"]["adapters"] == adapters
    engine = application.state.service._thread._parts.engine
    assert type(engine.options) is ENGINES[arguments[0]].options
    assert {name: getattr(engine.options, name) for name in options} == options


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (("dynamic", "--set", "rank=3"), ("rank", "Allowed: max_images, cache_bytes")),
        (("compiled", "--set", "rank=0"), ("rank", "greater than or equal to 1")),
        (("compiled", "--set", "rank=many"), ("rank", "valid integer")),
        (("static", "--set", "adapters=<lora:zorb:1>"), ("adapters", "--adapter")),
        (("static", "--set", "max_images"), ("max_images", "NAME=VALUE")),
        (("dynamic", "--adapter", "zorb"), ("takes adapters by request", "'static'")),
        (("fast",), ("fast", "static")),
    ],
)
def test_an_option_that_the_engine_does_not_have_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, arguments: tuple[str, ...], messages: tuple[str, ...]
) -> None:
    home = copy_home(tmp_path_factory, tmp_path / "home")
    completed = loraline_here("serve", "--port", "0", "--no-studio", "--engine", *arguments, home=home.path)
    assert (completed.returncode, completed.stdout) == (2, "")
    assert [message for message in messages if message not in completed.stderr] == []
