"""Drives a page in chromium over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

from tests.conftest import PROGRAMS

_FIND = """(() => {
  const shown = element => element.offsetParent !== null && element.innerText.trim() === TEXT;
  const all = [...document.querySelectorAll("button, a, li, [role=option], [role=button], .p-select-option, label")];
  const match = all.filter(shown).pop();
  if (match) match.click();
  return Boolean(match);
})()"""
_TYPE = """(() => {
  const label = [...document.querySelectorAll("label")].filter(one => one.innerText.includes(LABEL)).pop();
  const kinds = "input, textarea, select";
  const field = label && (label.control || label.querySelector(kinds) || label.parentElement.querySelector(kinds));
  if (!field) return false;
  const protos = {TEXTAREA: HTMLTextAreaElement, SELECT: HTMLSelectElement, INPUT: HTMLInputElement};
  const proto = protos[field.tagName];
  Object.getOwnPropertyDescriptor(proto.prototype, "value").set.call(field, VALUE);
  for (const name of ["input", "change"]) field.dispatchEvent(new Event(name, {bubbles: true}));
  return field.value === VALUE;
})()"""


_KEYS = {
    "Tab": 9,
    "Enter": 13,
    "Escape": 27,
    " ": 32,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Backspace": 8,
}
"""Key -> its code in Windows, which chromium needs."""


class Navigated(AssertionError):
    """The page was left while a script ran."""


class Page:
    """One page of a browser; every action waits until it is possible.

    Attributes:
        requests: Addresses that the page requested since `watch_requests`.
        errors: Uncaught errors of its scripts since then.
    """

    def __init__(self, socket: Any) -> None:
        self.socket, self.number = socket, 0
        self.requests: list[str] = []
        self.errors: list[str] = []

    def open(self, address: str) -> None:
        """Loads an address."""
        self._send("Page.navigate", url=address)

    def evaluate(self, script: str) -> Any:
        """Returns the value of a script."""
        return self._send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

    def click(self, text: str) -> None:
        """Clicks on the innermost visible control with this text."""
        self._wait(_FIND.replace("TEXT", json.dumps(text)), f"no control {text!r}")

    def type(self, label: str, value: str) -> None:
        """Types into the field of a label, or chooses in its list."""
        script = _TYPE.replace("LABEL", json.dumps(label)).replace("VALUE", json.dumps(value))
        self._wait(script, f"no field {label!r}")

    def wait_for_text(self, text: str) -> None:
        """Waits until the page shows a text."""
        self._wait(f"document.body.innerText.includes({json.dumps(text)})", f"no text {text!r}")

    def wait_for(self, script: str, problem: str = "the condition was never met") -> None:
        """Waits until a script is true."""
        self._wait(f"Boolean({script})", f"{problem}: {script}")

    def watch_requests(self) -> None:
        """Begins to collect `requests` and `errors`."""
        self._send("Network.enable")
        self._send("Runtime.enable")

    def resize(self, width: int, height: int, *, is_dark: bool = False) -> None:
        """Gives the page a size in pixels, and a light or dark color scheme."""
        self._send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._send("Emulation.setEmulatedMedia", features=[scheme])

    def set_cookie(self, name: str, value: str, origin: str) -> None:
        """Gives the browser a cookie that scripts do not see."""
        self._send("Network.setCookie", name=name, value=value, url=origin, httpOnly=True)

    def clear_cookies(self) -> None:
        """Deletes all cookies."""
        self._send("Network.clearBrowserCookies")

    def press(self, key: str, *, shift: bool = False) -> None:
        """Presses a key of `_KEYS`, or a character, in the focused element."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        event = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS.get(key, 0), "modifiers": 8 if shift else 0}
        self._send("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self._send("Input.dispatchKeyEvent", type="keyUp", **event)

    def press_all(self, text: str) -> None:
        """Replaces the content of the focused field, key by key."""
        self._send("Input.dispatchKeyEvent", type="keyDown", key="a", code="KeyA", modifiers=2, commands=["selectAll"])
        self._send("Input.dispatchKeyEvent", type="keyUp", key="a", code="KeyA", modifiers=2)
        for character in text:
            self.press(character)

    def click_at(self, x: float, y: float) -> None:
        """Clicks at a place of the page, in pixels."""
        for kind in ("mousePressed", "mouseReleased"):
            self._send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def write(self, text: str) -> None:
        """Writes a text into the focused element."""
        self._send("Input.insertText", text=text)

    def upload(self, selector: str, *files: Path) -> None:
        """Puts files into the input of a selector."""
        self.wait_for(f"document.querySelector({json.dumps(selector)})", "no file input")
        root = self._send("DOM.getDocument")["root"]["nodeId"]
        node = self._send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def screenshot(self, path: Path) -> None:
        """Writes what the page shows as a PNG file."""
        path.write_bytes(base64.b64decode(self._send("Page.captureScreenshot", format="png")["data"]))

    def _wait(self, script: str, problem: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not self._is_met(script):
            if time.monotonic() > deadline:
                raise AssertionError(f"{problem} in:\n{self.evaluate('document.body.innerText')}")
            time.sleep(0.3)

    def _is_met(self, script: str) -> bool:
        try:
            return bool(self.evaluate(script))
        except Navigated:
            return False

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            answer = json.loads(self.socket.recv(60))
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(answer["params"]["exceptionDetails"])[:1000])
            if answer.get("id") == self.number:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise Navigated(answer)
                assert "error" not in answer, answer
                return dict(answer["result"])


@contextmanager
def browsed(folder: Path) -> Iterator[Page]:
    """Yields an empty page of a browser whose profile is in the folder."""
    program = next(path for name in PROGRAMS["chromium"] if (path := shutil.which(name)))
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={folder}", "--window-size=1400,2000", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        file, deadline = folder / "DevToolsActivePort", time.monotonic() + 120
        while not file.exists() or not file.read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline, "the browser opened no port"
            time.sleep(0.2)
        port = file.read_text().split()[0]
        pages = httpx.get(f"http://127.0.0.1:{port}/json", timeout=60).json()
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        with connect(address, max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait()
