"""The programs that docs/serving-clients.md shows, run as they are against a server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from flows.web.a1111_lists import list_routes
from flows.web.a1111_models import _NEUTRAL, ImageToImageBody, TextToImageBody
from flows.web.openai_models import EditBody
from tests.flows.web.served import Served

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "serving-clients.md").read_text()


def test_the_programs_of_the_page_run(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert "8188" in block
        code = (
            block.replace("8188", str(served.port)).replace("steps=20", "steps=2").replace('"steps": 20', '"steps": 2')
        )
        names: dict[str, object] = {}
        exec(compile(code, "page", "exec"), names)
        if "client" in names:
            names["client"].close()  # type: ignore[attr-defined]
    with Image.open(tmp_path / "zorb.png") as image:
        assert image.size == (32, 32)
    assert capsys.readouterr().out.splitlines()[-2:] == ["['zorb@1']", "7 32x32"]


def test_the_page_names_every_field_and_list() -> None:
    fields = {*TextToImageBody.model_fields, *ImageToImageBody.model_fields, *EditBody.model_fields}
    unnamed = {"save_images", "force_task_id", "script_args", "mask_blur_x", "mask_blur_y", "hr_upscaler"}
    unnamed |= {"hr_second_pass_steps", "override_settings"}
    assert [name for name in sorted(fields - unnamed) if name not in PAGE] == []
    refused = [name for name in _NEUTRAL if name not in {"hr_additional_modules"} and not name.startswith("firstphase")]
    assert [name for name in refused if re.sub(r"^s_.*", "s_*", name) not in PAGE] == []
    routes = [route.path.rpartition("/")[2] for route in list_routes.routes]  # type: ignore[attr-defined]
    assert [name for name in routes if not name.startswith("refresh-") and name not in PAGE] == []
