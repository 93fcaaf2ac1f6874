from __future__ import annotations

from pathlib import Path

import pytest

from lora_engine.bases.tiny import folder
from lora_engine.errors import BaseModelError


@pytest.fixture(scope="session")
def weights() -> Path:
    """The folder of the embedded base."""
    try:
        return folder()
    except BaseModelError as error:
        pytest.skip(str(error))
