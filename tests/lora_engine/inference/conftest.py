from __future__ import annotations

import pytest

from lora_engine.bases.base import BaseModel, load_base
from tests.support.untrained import write_untrained_base


@pytest.fixture(scope="session", params=["small-sd", "small-sd-v", "small-sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("generate") / request.param
    return load_base(str(write_untrained_base(folder, request.param)), device="cpu")
