"""`loraline serve --engine NAME --set OPTION=VALUE`: what reaches the engine, and what is refused."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from fastapi import FastAPI

from flows.web.app import create_app
from lora_engine.serving.engines import ENGINES
from registry.home import Home
from tasks.serving import EngineName
from tests.flows.commands import loraline_here
from tests.flows.web.server import copy_home

PAGE = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
COMPILED = [
    part for option in ("backend=eager", "rank=2", "max_images=1", "targets=unet.conv_in") for part in ("--set", option)
]
BODY = {"prompt": "a ring", "steps": 1, "seed": 5}


def test_the_names_of_the_verb_are_those_of_the_engines() -> None:
    assert get_args(EngineName) == tuple(ENGINES)


def test_the_page_has_the_options_of_each_engine() -> None:
    for name, engine in ENGINES.items():
        (row,) = re.findall(rf"^\| `{name}` \|[^|]*(?:`rank`)?[^|]*\| (.*) \|$", PAGE, re.MULTILINE)
        assert re.findall(r"`(\w+)`", row) == [option for option in engine.options.model_fields if option != "adapters"]


def answers_of(ask: Callable[[httpx.Client], Any], *arguments: str, home: Path) -> Any:
    """Runs a verb that serves in this process, until a client has asked it; returns what the client got."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers: list[Any] = []
    has_ended = threading.Event()

    def ask_when_ready() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            while not has_ended.is_set():
                try:
                    client.get("/readyz").raise_for_status()
                except httpx.HTTPError:
                    time.sleep(0.05)
                    continue
                answers.append(ask(client))
                os.kill(os.getpid(), signal.SIGTERM)  # which the server handles
                return

    asking = threading.Thread(target=ask_when_ready)
    asking.start()
    try:
        completed = loraline_here(*arguments, "--port", str(port), home=home)
    finally:
        has_ended.set()
        asking.join()
    assert completed.returncode == 0, completed.stderr
    assert "Traceback" not in completed.stderr
    return answers[0]


def serve_once(monkeypatch: pytest.MonkeyPatch, home: Path, *arguments: str) -> tuple[FastAPI, dict[str, Any]]:
    """Runs `serve` until it has answered one request; returns the application and the answer."""
    applications: list[FastAPI] = []

    def create(*parts: Any) -> FastAPI:
        applications.append(create_app(*parts))
        return applications[-1]

    monkeypatch.setattr("flows.web.serving.create_app", create)
    answer = answers_of(
        lambda client: client.post("/v1/images", json=BODY).json(), "serve", "--no-studio", *arguments, home=home
    )
    return applications[0], answer


@pytest.mark.parametrize("option", ["--browser", "--no-browser"])
# Gradio leaves open the event loop in which it builds a page outside of a server's.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_the_verb_studio_serves_the_page_and_opens_it_if_asked(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    home = copy_home(tmp_path_factory, tmp_path / "home")
    page = answers_of(lambda client: client.get("/studio/").raise_for_status(), "studio", option, home=home.path)
    assert "Loraline studio" in page.text
    assert opened == ([] if option == "--no-browser" else [str(page.url).rstrip("/")])
    gc.collect()


@pytest.mark.parametrize(
    ("arguments", "adapters", "options"),
    [
        (("static", "--adapter", "zorb:0.5"), ["zorb@1"], {"max_images": 3, "adapters": "<lora:zorb@1:0.5>"}),
        (("dynamic", "--set", "cache_bytes=1000"), [], {"max_images": 3, "cache_bytes": 1000}),
        pytest.param(
            ("compiled", *COMPILED),
            [],
            {"max_images": 1, "backend": "eager", "rank": 2, "targets": "unet.conv_in"},
            marks=pytest.mark.nightly,  # compiling takes seconds
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


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Returns a home that no test changes."""
    return copy_home(tmp_path_factory, tmp_path_factory.mktemp("engines") / "home")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("backend=no-such-backend", "torch.compile failed"),
        ("sizes=[[15, 16]]", "cannot generate images of 15 x 16"),
        ("sizes=[[32, 8], [32, 16], [32, 24], [32, 32], [32, 40], [32, 48], [32, 56], [32, 64], [32, 72]]", "9 sizes"),
        ("targets=nothing", "target 'nothing' matches no module"),
    ],
)
def test_the_compiled_engine_refuses_what_the_verb_asks_of_it(home: Home, option: str, message: str) -> None:
    line = ["serve", "--port", "0", "--no-studio", "--engine", "compiled", *COMPILED, "--set", option]
    completed = loraline_here(*line, home=home.path)
    assert completed.returncode in {1, 2}
    assert message in completed.stderr


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
    home: Home, arguments: tuple[str, ...], messages: tuple[str, ...]
) -> None:
    completed = loraline_here("serve", "--port", "0", "--no-studio", "--engine", *arguments, home=home.path)
    assert (completed.returncode, completed.stdout) == (2, "")
    assert [message for message in messages if message not in completed.stderr] == []
