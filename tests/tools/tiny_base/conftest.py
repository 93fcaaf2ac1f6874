from __future__ import annotations

from pathlib import Path

import pytest

from lora_engine.bases.tiny import folder


@pytest.fixture(scope="session")
def weights() -> Path:
    """The folder of the embedded base."""
    return folder()
