"""The server under load on loopback: no error, bounded memory, equal shares of tenants."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.serving_load import run_load


@pytest.mark.nightly
def test_half_an_hour_of_load_gives_no_error_and_the_memory_of_the_server_stays_bounded(tmp_path: Path) -> None:
    figures, code = run_load(tmp_path, 1800)
    assert code == 0
    assert figures["unexpected"] == [], figures
    assert figures["drawn"] > 100
    assert figures["memory_growth_mib"] < 150, figures
    assert figures["fairness"] > 0.6, figures
