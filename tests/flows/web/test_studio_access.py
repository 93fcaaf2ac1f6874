"""The studio behind the checks of the server, in a real browser: signing in, Gradio's events, the content policy."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio
import httpx
import pytest
import uvicorn

from flows.web.app import WebSettings, create_app
from flows.web.callers import caller_of
from flows.web.server import Listening, open_socket
from flows.web.studio import page as studio_page
from lora_engine.serving.engine import PlainEngine
from registry.errors import IdentityError
from registry.policy.actors import acting_as, establish_actor
from registry.versions.versions import Versions
from tasks.serving.service import ImageService, ServiceSettings
from tests.flows.browser import browsed
from tests.flows.web.server import copy_home, write_tokens


def _add_probe(studio: Any) -> None:
    """Adds a tab that shows as whom an event acts."""

    def ask(request: gradio.Request) -> str:
        caller = caller_of(request)
        with closing(Versions(studio.service.home)) as versions:
            try:
                own = str(establish_actor(versions))
            except IdentityError:
                own = "nobody"
            with acting_as(caller.actor):
                return f"acts as {establish_actor(versions)} of {caller.tenant}, by itself as {own}"

    shown = gradio.Textbox(label="Answer")
    gradio.Button("Who").click(ask, None, shown)


@pytest.fixture
def address(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str]]:
    """Yields the address of a server with the studio, and a token."""
    monkeypatch.setitem(studio_page.TABS, "Probe", _add_probe)
    home = copy_home(tmp_path_factory, tmp_path / "home")
    (token,) = write_tokens(tmp_path / "tokens.yaml", ("ann@example.com", "lab"))
    service = ImageService(home, ServiceSettings(), PlainEngine("tiny"))
    sock = open_socket(Listening(port=0))
    running = threading.Event()
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        # Gradio makes an event loop that it does not close where none runs.
        app = create_app(service, WebSettings(tokens=tmp_path / "tokens.yaml", studio=True))
        servers.append(uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none")))
        running.set()
        await servers[0]._serve([sock])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert running.wait(120)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", token
    finally:
        servers[0].should_exit = True
        thread.join()
        service.close()


@pytest.mark.nightly
@pytest.mark.needs("chromium")
def test_a_user_signs_in_on_the_page_and_its_events_act_as_the_user(address: tuple[str, str], tmp_path: Path) -> None:
    url, token = address
    with browsed(tmp_path / "browser") as page:
        page.open(f"{url}/studio")
        page.wait_for_text("Sign in")
        page.type("Token", "wrong")
        page.click("Sign in")
        page.wait_for_text("This token is not valid.")
        page.type("Token", token)
        page.click("Sign in")
        page.wait_for_text("Probe")
        page.evaluate(
            "window.refused = []; document.addEventListener('securitypolicyviolation', "
            "event => window.refused.push(event.violatedDirective + ' ' + event.blockedURI))"
        )
        page.click("Probe")
        page.click("Who")
        expected = "acts as ann@example.com of lab, by itself as nobody"
        field = "[...document.querySelectorAll('textarea, input')].map(field => field.value).join('|')"
        deadline = time.monotonic() + 60
        while expected not in page.evaluate(field):
            assert time.monotonic() < deadline, page.evaluate(field)
            time.sleep(0.3)
        assert [line for line in page.evaluate("window.refused") if "font" not in line] == []
        assert page.evaluate("document.cookie") == "", "scripts do not see the session"
        page.open(f"{url}/logout")
        page.click("Sign out ann@example.com")
        page.wait_for_text("Token")
        page.open(f"{url}/studio")
        page.wait_for_text("Sign in")


def test_the_routes_of_the_studio_are_behind_the_checks(address: tuple[str, str]) -> None:
    url, token = address
    bearer = {"Authorization": f"Bearer {token}"}
    for path in ("/studio/", "/studio/config", "/studio/gradio_api/info"):
        assert httpx.get(url + path).status_code == 401, path
        assert httpx.get(url + path, headers={**bearer, "Host": "evil.example"}).status_code == 400
    page = httpx.get(f"{url}/studio/", headers=bearer)
    assert page.status_code == 200
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    upload = {"files": ("a.html", b"<script>alert(1)</script>", "text/html")}
    for headers in ({"Origin": "http://evil.example"}, {}, {"Sec-Fetch-Site": "cross-site"}):
        answer = httpx.post(f"{url}/studio/gradio_api/upload", files=upload, headers=headers)
        assert answer.status_code in {401, 403}
