"""The studio's tabs Draw, Compare and Grid in a browser."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from flows.web.studio.page import MAX_UPLOAD
from registry.home import Home
from tests.flows.browser import Page, browsed
from tests.flows.made import bring_in, write_random
from tests.flows.shared import copy_trained
from tests.flows.web.studio_server import UNLABELED, ServedStudio, served_studio

pytestmark = pytest.mark.needs("chromium")
_FOCUSED = """(() => {
  const field = document.activeElement;
  const labels = field.labels && [...field.labels].map(label => label.innerText).join(" ");
  return [field.role, field.innerText, field.ariaLabel, labels, field.tagName].filter(Boolean).join("|");
})()"""


@pytest.fixture(scope="module")
def studio(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedStudio]:
    """Yields a studio with `small@1`, which was evaluated and is staging, and the imported `small@2`."""
    folder = tmp_path_factory.mktemp("studio")
    home = copy_trained(trained_home, folder / "trained").home
    bring_in(home, write_random(folder / "second.safetensors", 5, rank=4), "small", trigger="sks")
    with served_studio(home) as served:
        yield served


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsed(tmp_path_factory.mktemp("browser")) as page:
        page.watch_requests()
        yield page


@pytest.fixture
def page(studio: ServedStudio, browser: Page) -> Iterator[Page]:
    """Yields the page with its cards; nothing may come from another host, and no script may fail."""
    browser.resize(1280, 1600)
    browser.requests.clear()
    browser.errors.clear()
    browser.open(studio.address)
    browser.wait_for("document.querySelector('.studio-cards li')")
    yield browser
    origin = studio.address.removesuffix("studio/")
    foreign = [url for url in browser.requests if not url.startswith((origin, "data:", "blob:"))]
    assert browser.requests
    assert foreign == []
    assert browser.errors == []


_FIELD = """[...document.querySelectorAll(`input[aria-label=${JSON.stringify(LABEL)}]`),
  ...[...document.querySelectorAll("label")].filter(one => one.innerText.includes(LABEL))
    .map(one => one.control || one.querySelector("input, textarea")).filter(Boolean)][0]"""


def value_of(page: Page, label: str) -> str:
    """Returns the value of the field of a label."""
    return str(page.evaluate(f"({_FIELD}).value".replace("LABEL", json.dumps(label))))


def wait_for_value(page: Page, label: str, part: str) -> None:
    script = f"(({_FIELD}) || {{value: ''}}).value.includes(PART)"
    script = script.replace("LABEL", json.dumps(label)).replace("PART", json.dumps(part))
    page.wait_for(script, f"{label} has not {part!r}")


def use_first_card(page: Page) -> None:
    page.evaluate("document.querySelector('button[data-choice^=\"use:\"]').click()")
    page.wait_for_text("Weight of small")


def open_section(page: Page, title: str) -> None:
    script = "[...document.querySelectorAll('button.label-wrap')].filter(one => one.innerText.includes(TITLE))[0]"
    page.evaluate(f"{script}.click()".replace("TITLE", json.dumps(title)))


def wait_for_status(page: Page, text: str) -> None:
    page.wait_for(
        "[...document.querySelectorAll('.studio-status')]"
        f".some(one => one.offsetParent && one.innerText.includes({json.dumps(text)}))",
        f"no status {text!r}",
    )


def test_a_used_card_is_drawn_at_its_weight_and_the_page_has_the_files_of_the_service(
    page: Page, studio: ServedStudio
) -> None:
    page.type("Prompt", "a red")
    page.evaluate("document.querySelector('button[data-choice^=\"words:\"]').click()")
    wait_for_value(page, "Whole prompt", "a red, ")
    use_first_card(page)
    page.type("Weight of small", "0.5")
    wait_for_value(page, "Whole prompt", "unet=0.5>")
    page.type("Steps", "2")
    page.click("Draw")
    wait_for_status(page, "Drawn: seed")
    job = studio.service.jobs()[-1]
    assert job.adapters == ("small@1",)
    assert job.request.prompt == value_of(page, "Whole prompt") == "a red, zorb <lora:small@staging:te=1:unet=0.5>"
    page.wait_for("document.querySelectorAll('.studio-images .grid-wrap img').length === 2")
    sources = page.evaluate("[...document.querySelectorAll('.studio-images .grid-wrap img')].map(one => one.src)")
    files = [httpx.get(source).content for source in sources]
    assert files == studio.service.images(job.id)
    with Image.open(io.BytesIO(files[1])) as image:
        assert f"Seed: {job.request.seed + 1}," in image.text["parameters"]  # type: ignore[attr-defined]


def test_a_running_job_shows_its_image_and_is_canceled(page: Page, studio: ServedStudio) -> None:
    page.type("Prompt", "a blue ring")
    page.type("Steps", "150")
    page.type("Number of images", "16")
    page.click("Draw")
    page.wait_for("document.querySelector('#draw-status img[src^=\"data:image/png\"]')", "no preview")
    page.wait_for("document.querySelector('#draw-status progress').value > 0")
    page.click("Cancel")
    wait_for_status(page, "Canceled.")
    assert studio.service.jobs()[-1].state == "canceled"


def test_an_error_is_shown_as_the_message_of_the_project(page: Page, studio: ServedStudio) -> None:
    before = len(studio.service.jobs())
    page.type("Prompt", "a ring <lora:missing@9:1>")
    page.click("Draw")
    page.wait_for("document.querySelector('#draw-status [role=alert]')", "no alert")
    assert "missing" in page.evaluate("document.querySelector('#draw-status').innerText")
    assert len(studio.service.jobs()) == before


def test_a_png_restores_prompt_adapters_and_settings(page: Page, studio: ServedStudio, tmp_path: Path) -> None:
    from tasks.operations.draw_request import DrawRequest

    prompt = "a green ring <lora:small@2:te=0.25:unet=0@0,1@0.5>"
    job = studio.service.submit(DrawRequest(prompt, negative="blue", seed=77, steps=3, sampler="euler_a"))
    assert studio.service.wait(job.id, 60).error is None
    file = tmp_path / "drawn.png"
    file.write_bytes(studio.service.images(job.id)[0])
    open_section(page, "Settings from an image")
    page.upload("input[type=file][accept*='.png']", file)
    wait_for_value(page, "Whole prompt", prompt)
    wait_for_value(page, "Seed", "77")
    assert [value_of(page, name) for name in ("Negative prompt", "Steps", "Sampler")] == ["blue", "3", "euler_a"]
    page.wait_for_text("Weight of small (scheduled)")


def test_regions_and_noise_are_set_with_the_keyboard_and_come_back_from_the_image(
    page: Page, studio: ServedStudio, tmp_path: Path
) -> None:
    page.resize(390, 844)
    page.type("Prompt", "a wall")
    page.type("Steps", "2")
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "Advanced")
    page.press("Enter")
    page.wait_for_text("One a line: LEFT,TOP,RIGHT,BOTTOM=PROMPT")
    texts = {"Regions": "0,0,0.5,1=a ring <lora:small@1:0.5>", "Variation": "8:0.2", "Seed size": "48x32"}
    for label, text in texts.items():
        tab_to(page, label)
        page.write(text)
    for label, number in (("Adapter guidance", "2"), ("Clip skip", "2")):
        page.type(label, number)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate(UNLABELED) == []
    page.click("Draw")
    wait_for_status(page, "Drawn: seed")
    job = studio.service.jobs()[-1]
    assert job.adapters == ("small@1",)
    request = job.request
    assert (request.regions, str(request.variation), request.seed_size) == ((texts["Regions"],), "8:0.2", (32, 48))
    assert (request.adapter_guidance, request.clip_skip) == (2.0, 2)
    file = tmp_path / "drawn.png"
    file.write_bytes(studio.service.images(job.id)[0])
    page.open(studio.address)
    page.wait_for("document.querySelector('.studio-cards li')")
    open_section(page, "Advanced")
    open_section(page, "Settings from an image")
    page.upload("input[type=file][accept*='.png']", file)
    wait_for_value(page, "Regions", "0,0,0.5,1=a ring <lora:small@1:0.5:ag=2>")
    assert [value_of(page, name) for name in ("Variation", "Seed size", "Clip skip")] == ["8:0.2", "48x32", "2"]


def test_versions_are_compared_with_their_metrics_at_the_same_seeds(page: Page, studio: ServedStudio) -> None:
    page.type("Steps", "2")
    page.click("Compare")
    wait_for_value(page, "Adapter to compare", "small")
    page.type("Prompt of the comparison", "a red zorb")
    page.evaluate("[...document.querySelectorAll('button.primary')].filter(one => one.offsetParent)[0].click()")
    wait_for_status(page, "Drawn: 6 images")
    jobs = studio.service.jobs()[-3:]
    assert [job.adapters for job in jobs] == [(), ("small@1",), ("small@2",)]
    assert len({job.request.seed for job in jobs}) == 1
    page.wait_for("document.querySelector('.studio-metrics').innerText.includes('validation_loss')")
    assert page.evaluate("document.querySelector('.studio-metrics').innerText").startswith("Metrics")
    page.wait_for("[...document.querySelectorAll('.slider-wrap img, .image-container img')].length >= 2", "no slider")


def test_a_grid_is_drawn_and_the_settings_of_a_cell_come_back(page: Page, studio: ServedStudio) -> None:
    page.type("Steps", "2")
    page.click("Grid")
    wait_for_value(page, "Varied adapter", "small@staging")
    page.type("Prompt of the grid", "a zorb <lora:small@2:0.3>")
    page.type("X values", "0, 1")
    page.type("Y values", "5, 6")
    page.click("Draw the grid")
    wait_for_status(page, "Drawn: 4 images")
    jobs = studio.service.jobs()[-4:]
    assert {job.adapters for job in jobs} == {("small@2", "small@1")}
    assert [job.request.seed for job in jobs] == [5, 5, 6, 6]
    page.wait_for("document.querySelector('.studio-sheet img')", "no sheet")
    calls = "performance.getEntriesByType('resource').filter(one => one.name.endsWith('/run/predict')).length"
    before = page.evaluate(calls)
    page.evaluate(
        "[...document.querySelectorAll('[aria-label=\"Thumbnail 3 of 4\"]')].filter(one => one.offsetParent)[0].click()"
    )
    page.wait_for(f"{calls} > {before}", "the choice is not sent")
    page.click("Use its settings in Draw")
    wait_for_value(page, "Seed", "6")
    wait_for_value(page, "Whole prompt", "a zorb <lora:small@2:0.3> <lora:small@1:0>")


@pytest.mark.parametrize("is_dark", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_every_tab_fits_390_pixels_and_labels_its_controls(page: Page, is_dark: bool) -> None:
    page.resize(390, 844, is_dark=is_dark)
    for tab in ("Draw", "Compare", "Grid"):
        page.evaluate(
            "[...document.querySelectorAll('[role=tab]')]"
            f".filter(one => one.innerText.trim() === {json.dumps(tab)}).pop().click()"
        )
        page.wait_for("document.querySelector('[role=tab][aria-selected=true]')")
        if tab == "Draw":
            use_first_card(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate(UNLABELED) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.strip("rgba()").split(",")[:3])) < 384) is is_dark


def tab_to(page: Page, start: str) -> None:
    """Presses Tab until the element whose role, text, label and kind begin with a text has the focus."""
    for _ in range(150):
        if str(page.evaluate(_FOCUSED)).startswith(start):
            return
        page.press("Tab")
    raise AssertionError(f"Tab does not reach {start!r}")


def test_an_image_is_chosen_and_drawn_with_the_keyboard_alone(page: Page, studio: ServedStudio) -> None:
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "Prompt")
    page.write("a yellow ring")
    tab_to(page, "number input for Steps")
    page.press_all("2")
    tab_to(page, "Use|Use zorb ring")
    page.press("Enter")
    page.wait_for_text("Weight of small")
    wait_for_value(page, "Whole prompt", "a yellow ring <lora:small@staging:1>")
    tab_to(page, "Draw|BUTTON")
    page.press("Enter")
    wait_for_status(page, "Drawn: seed")
    assert studio.service.jobs()[-1].request.prompt == "a yellow ring <lora:small@staging:1>"


def test_a_schedule_is_edited_with_the_keyboard_alone(page: Page) -> None:
    use_first_card(page)
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "Weight over the steps")
    page.press("Enter")
    page.wait_for_text("Points of the schedule")
    tab_to(page, "Add a point")
    page.press("Enter")
    page.wait_for("document.querySelector('[data-testid=cell-1-1]')", "no second row")
    for _ in range(20):
        if "gridcell" in page.evaluate(_FOCUSED):
            break
        page.press("Tab", shift=True)
    cells = {"cell-0-0": None, "cell-0-1": "0.25", "cell-1-1": "0.75", "cell-1-0": "50"}
    for key, (cell, value) in zip(("", "ArrowRight", "ArrowDown", "ArrowLeft"), cells.items(), strict=True):
        if key:
            page.press(key)
        page.wait_for(f"document.activeElement.dataset.testid === '{cell}'", f"{key} does not lead to {cell}")
        if value is not None:
            page.press("Enter")
            page.wait_for("document.activeElement.tagName === 'TEXTAREA'", "the cell is not edited")
            page.press_all(value)
            page.press("Enter")
            page.wait_for(f"document.querySelector('[data-testid={cell}]').innerText.includes('{value}')")
    page.wait_for("document.querySelector('.studio-curve svg').ariaLabel.includes('0.25@0,0.75@0.5')", "no curve")
    tab_to(page, "Use this schedule")
    page.press("Enter")
    wait_for_value(page, "Whole prompt", "<lora:small@staging:te=1:unet=0.25@0,0.75@0.5>")
    page.wait_for_text("Weight of small (scheduled)")


def test_files_of_the_home_and_large_uploads_are_refused(studio: ServedStudio) -> None:
    home: Home = studio.service.home
    for path in (home.lineage_db, home.path / "serving" / "adapters", Path("/etc/passwd"), Path(__file__)):
        assert path.exists()
        assert httpx.get(f"{studio.address}gradio_api/file={path}").status_code == 403
    large = {"files": ("large.png", bytes(MAX_UPLOAD + 1))}
    assert httpx.post(f"{studio.address}gradio_api/upload", files=large).status_code == 413
    small = httpx.post(f"{studio.address}gradio_api/upload", files={"files": ("small.png", b"x")}).json()
    assert Path(small[0]).is_relative_to(home.path / "serving" / "studio")
    assert base64.b64encode(Path(small[0]).read_bytes()) == b"eA=="
