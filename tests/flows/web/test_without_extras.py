"""The server without the packages of its extras."""

from __future__ import annotations

import sys

import pytest

from flows.web.app import WebSettings, create_app
from tasks.errors import SpecError
from tests.flows.web.served import Served


def test_a_page_without_gradio_is_refused_and_the_routes_work_without_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SpecError, match=r"pip install 'loraline\[studio\]'.*--no-studio"):
        create_app(served.service, WebSettings(studio=True))
    assert "/v1/jobs" in create_app(served.service, WebSettings(studio=False)).openapi()["paths"]
