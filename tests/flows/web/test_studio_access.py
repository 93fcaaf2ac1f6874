"""The studio behind the checks of the server, in a real browser: signing in, roles, tenants, the content policy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import gradio
import httpx
import pytest

from flows.web.callers import caller_of
from flows.web.studio import page as studio_page
from flows.web.studio.page_messages import cancel_own_job
from registry.entities import Event
from registry.errors import IdentityError
from registry.policy.actors import acting_as, establish_actor
from registry.versions.promotion import read_log
from registry.versions.versions import Versions
from tasks.operations.draw_request import DrawRequest
from tests.flows.browser import Page, browsed
from tests.flows.web.server import copy_home
from tests.flows.web.studio_server import ServedStudio, served_studio

ANN, EVE = "ann@example.com", "eve@example.com"
ROLES = f"roles: {{releaser: {{may: [stage, promote], members: [{ANN}]}}}}\n"


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


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedStudio]:
    """Yields a studio with `zorb@1` in production, `zorb@2`, and two users, of whom Ann alone may promote."""
    home = copy_home(tmp_path_factory, tmp_path_factory.mktemp("access") / "home")
    policy = home.path / "policy.yaml"
    policy.write_text(policy.read_text() + ROLES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(studio_page.TABS, "Probe", _add_probe)
        with served_studio(home, [(ANN, "lab"), (EVE, "guests")]) as served:
            yield served


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsed(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Page:
    """Returns the page of a browser that is not signed in."""
    browser.clear_cookies()
    return browser


def sign_in(page: Page, studio: ServedStudio, user: str) -> None:
    """Signs in with the form, as a user does."""
    page.open(studio.address)
    page.wait_for_text("Sign in")
    page.type("Token", studio.tokens[user])
    page.click("Sign in")
    page.wait_for_text("Loraline studio")
    page.wait_for("document.querySelector('[role=tab]')")


def sign_out(page: Page, studio: ServedStudio, user: str) -> None:
    page.open(f"{studio.origin}/logout")
    page.click(f"Sign out {user}")
    page.wait_for_text("Token")


def events(studio: ServedStudio, *actions: str) -> list[Event]:
    with closing(Versions(studio.service.home)) as versions:
        return [event for event in read_log(versions) if event.action in actions]


@pytest.mark.nightly
@pytest.mark.needs("chromium")
def test_a_user_signs_in_on_the_page_and_its_events_act_as_the_user(page: Page, studio: ServedStudio) -> None:
    page.open(studio.address)
    page.wait_for_text("Sign in")
    page.type("Token", "wrong")
    page.click("Sign in")
    page.wait_for_text("This token is not valid.")
    sign_in(page, studio, ANN)
    page.evaluate(
        "window.refused = []; document.addEventListener('securitypolicyviolation', "
        "event => window.refused.push(event.violatedDirective + ' ' + event.blockedURI))"
    )
    page.click("Probe")
    page.click("Who")
    expected = f"acts as {ANN} of lab, by itself as nobody"
    field = "[...document.querySelectorAll('textarea, input')].map(field => field.value).join('|')"
    deadline = time.monotonic() + 60
    while expected not in page.evaluate(field):
        assert time.monotonic() < deadline, page.evaluate(field)
        time.sleep(0.3)
    assert [line for line in page.evaluate("window.refused") if "font" not in line] == []
    assert page.evaluate("document.cookie") == "", "scripts do not see the session"
    sign_out(page, studio, ANN)
    page.open(studio.address)
    page.wait_for_text("Sign in")


@pytest.mark.nightly
@pytest.mark.needs("chromium")
def test_a_signed_in_user_without_a_role_is_refused_with_reasons_and_another_promotes(
    page: Page, studio: ServedStudio
) -> None:
    def review() -> None:
        page.click("Releases")
        page.wait_for_text("zorb@production")
        page.evaluate("document.querySelector('input[aria-label=Adapter]').focus()")
        page.press_all("zorb")
        page.press("Enter")
        page.wait_for("[...document.querySelectorAll('input')].some(field => field.value === 'zorb@2')")
        page.type("Reason, stored in the log", "release 12")
        page.click("Review")

    before = len(events(studio, "promote"))
    sign_in(page, studio, EVE)
    review()
    page.wait_for_text("Refused: move production from zorb@1 to zorb@2")
    page.wait_for_text(f"{EVE} has no role that may promote zorb")
    assert page.evaluate(
        "[...document.querySelectorAll('button')].find(b => b.innerText.trim() === 'Confirm').disabled"
    )
    sign_out(page, studio, EVE)
    assert len(events(studio, "promote")) == before
    sign_in(page, studio, ANN)
    review()
    page.wait_for_text(f"As {ANN}: move production from zorb@1 to zorb@2")
    page.click("Confirm")
    page.wait_for_text("Done: move production from zorb@1 to zorb@2")
    event = events(studio, "promote")[-1]
    assert (event.actor, event.reason, event.after) == (ANN, "release 12", 2)
    sign_out(page, studio, ANN)


@pytest.mark.needs("chromium")
def test_images_of_the_page_are_jobs_of_the_users_tenant_which_others_neither_see_nor_cancel(
    page: Page, studio: ServedStudio
) -> None:
    sign_in(page, studio, EVE)
    page.wait_for("document.querySelector('.studio-cards li')")
    page.type("Prompt", "a red ring")
    page.type("Steps", "2")
    page.click("Draw")
    page.wait_for_text("Drawn: seed")
    job = studio.service.jobs("guests")[-1]
    assert job.request.prompt == "a red ring"
    headers = {user: {"Authorization": f"Bearer {token}"} for user, token in studio.tokens.items()}
    seen = {user: httpx.get(f"{studio.origin}/v1/jobs", headers=headers[user]).json() for user in (ANN, EVE)}
    assert job.id in {one["id"] for one in seen[EVE]}
    assert job.id not in {one["id"] for one in seen[ANN]}
    long = studio.service.submit(DrawRequest("a ring", count=16, steps=150), tenant="guests")
    assert "Nothing is drawn" in cancel_own_job(studio.service, long.id, tenant="lab")
    assert "Nothing is drawn" in cancel_own_job(studio.service, "0" * 32, tenant="guests")
    assert not studio.service.job(long.id).state.is_final
    assert "Canceling" in cancel_own_job(studio.service, long.id, tenant="guests")
    assert studio.service.wait(long.id, 60).state == "canceled"
    sign_out(page, studio, EVE)


def test_the_routes_of_the_studio_are_behind_the_checks(studio: ServedStudio) -> None:
    bearer = {"Authorization": f"Bearer {studio.tokens[ANN]}"}
    for path in ("", "config", "gradio_api/info"):
        assert httpx.get(studio.address + path).status_code == 401, path
        assert httpx.get(studio.address + path, headers={**bearer, "Host": "evil.example"}).status_code == 400
    answer = httpx.get(studio.address, headers=bearer)
    assert answer.status_code == 200
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    upload = {"files": ("a.html", b"<script>alert(1)</script>", "text/html")}
    for headers in ({"Origin": "http://evil.example"}, {}, {"Sec-Fetch-Site": "cross-site"}):
        refused = httpx.post(f"{studio.address}gradio_api/upload", files=upload, headers=headers)
        assert refused.status_code in {401, 403}
