"""Provides the studio of a home with a comparison, with four users, in a browser."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.web.studio import trainings
from registry.entities import Event
from registry.home import Home
from registry.versions.promotion import read_log
from registry.versions.versions import Versions
from tests.flows.browser import Page, browsed
from tests.flows.made import bring_in, write_random
from tests.flows.shared import copy_trained
from tests.flows.web.studio_server import ServedStudio, served_studio

ROLES = """\
aliases:
  production:
    {votes: {against: base, at_least: 6}, needs_consent: none, needs_licence: none,
     needs_evaluation: false, needs_gate: false}
roles:
  voter: {may: [vote], members: [ann, ben]}
  releaser: {may: [stage, promote, revoke, endorse], members: [carl]}
  trainer: {may: [train], members: [carl]}
"""
WITHOUT_VOTES = ROLES.replace("votes: {against: base, at_least: 6}, ", "")
USERS = ("ann", "ben", "carl", "eve")


@dataclass
class StudioPage:
    """The page of a served home in a browser.

    Attributes:
        page: The browser's page.
        served: The studio.
        home: The home.
        digest: Digest of the comparison of small@1 against the base.
        project: The folder with the images.
    """

    page: Page
    served: ServedStudio
    home: Home
    digest: str
    project: Path

    def open(self, user: str, tab: str) -> None:
        """Loads the page as a user, and opens a tab."""
        self.page.resize(1400, 2000)
        self.served.sign_in(self.page, user)
        self.page.open("about:blank")
        self.page.open(self.served.address)
        self.show(tab)

    def show(self, tab: str) -> None:
        """Opens a tab."""
        find = "[...document.querySelectorAll('button[role=tab]')].find(tab => tab.innerText.trim() === TAB)"
        script = f"(tab => {{ if (tab) tab.click(); return Boolean(tab); }})({find})"
        self.page._wait(script.replace("TAB", json.dumps(tab)), f"no tab {tab}")

    def show_from_menu(self, tab: str) -> None:
        """Opens a tab for which the page has no space beside the others."""
        self.page.wait_for("document.querySelector('.overflow-menu button')", "no menu")
        self.page.evaluate("document.querySelector('.overflow-menu button').click()")
        self.page.click(tab)

    def expand(self, title: str) -> None:
        """Opens an accordion."""
        find = (
            "[...document.querySelectorAll('button')].find(b => b.offsetParent && b.innerText.trim().startsWith(TITLE))"
        )
        script = f"(b => {{ if (b) b.click(); return Boolean(b); }})({find})".replace("TITLE", json.dumps(title))
        self.page._wait(script, f"no accordion {title}")

    def wait(self, condition: Callable[[], object]) -> None:
        """Waits until a condition is met."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.page.evaluate("document.body.innerText")
            time.sleep(0.2)

    def events(self, *actions: str) -> list[Event]:
        """Returns the events of these actions."""
        with closing(Versions(self.home)) as versions:
            return [event for event in read_log(versions) if event.action in actions]


@pytest.fixture(scope="module")
def studio(compared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioPage]:
    """Yields the page of a copy of the home with a comparison; all tests of the module share it."""
    copy = copy_trained(compared_home, tmp_path_factory.mktemp("studio") / "project")
    project = copy.spec.parent
    (copy.home.path / "loraline.yaml").write_text(f"datasets: [{json.dumps(str(project))}]\n")
    home = Home.open(copy.home.path)
    for seed, name in ((3, "small"), (4, "waiting"), (5, "waiting")):
        bring_in(home, write_random(project / f"{seed}.safetensors", seed), name)
    (home.path / "policy.yaml").write_text(ROLES)
    digest = json.loads((project / "comparison.json").read_text())["comparison"]
    users = [(user, f"lab-{user}") for user in USERS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainings, "_SECONDS", 0.5)
        with served_studio(home, users) as served, browsed(tmp_path_factory.mktemp("browser")) as page:
            yield StudioPage(page, served, home, digest, project)
