"""Registries: entries of installed packages, and the errors of faulty ones."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_engine import registries
from lora_engine.errors import SettingsError
from lora_engine.evaluation.metrics import METRICS, Metric
from lora_engine.registries import Plugin, Registry
from lora_engine.training.methods import methods

GOOD = """
from lora_engine.evaluation.metrics import metric
broken_off = 3
@metric("Length", "lower", "Number of bytes.")
def length(evidence): ...
"""
Install = Callable[..., Registry[Metric]]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package with one entry point, and returns a registry that has not read it yet."""

    def write(points: str, module: str = GOOD, group: str = "loraline.metrics") -> Registry[Metric]:
        assert METRICS
        assert methods, "the real registries are complete before the package is installed"
        (tmp_path / "some_metrics.py").write_text(module)
        info = tmp_path / "some_metrics-2.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-metrics\nVersion: 2.1\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{points}\n")
        monkeypatch.syspath_prepend(tmp_path)
        registries._entry_points.cache_clear()
        return Registry("metric", entry=Metric, source="lora_engine.evaluation.metrics", group="loraline.metrics")

    yield write
    registries._entry_points.cache_clear()
    sys.modules.pop("some_metrics", None)


def test_an_installed_package_adds_an_entry(install: Install) -> None:
    registry = install("length = some_metrics:length")
    assert "some_metrics" not in sys.modules
    assert list(registry) == [*METRICS, "length"]
    assert registry["length"].title == "Length"
    assert registry.plugin("length") == Plugin("some-metrics", "2.1")
    assert registry.plugin("drift") is None


@pytest.mark.parametrize(
    ("points", "module", "problem"),
    [
        ("length = some_metrics:length", "import nothing_of_that_name", "cannot be imported: ModuleNotFoundError"),
        ("length = some_metrics:length", "1 / 0", "cannot be imported: ZeroDivisionError"),
        ("length = some_metrics:width", GOOD, "cannot be imported: AttributeError"),
        ("length = some_metrics:broken_off", GOOD, "is a int. Allowed: a lora_engine.evaluation.metrics.Metric"),
        ("drift = some_metrics:length", GOOD, "metric 'drift' is taken"),
        ("width = some_metrics:length", GOOD, "metric 'width' is named 'length'"),
    ],
)
def test_a_faulty_plugin_is_an_error_that_names_package_entry_rule_and_fix(
    install: Install, points: str, module: str, problem: str
) -> None:
    registry = install(points, module)
    for _ in range(2):
        with pytest.raises(SettingsError) as caught:
            registry["drift"]
        message = str(caught.value)
        assert problem in message
        assert "plug-in some-metrics 2.1" in message
        assert f"entry point {points}" in message
        assert "Fix: upgrade some-metrics, or remove it: pip uninstall some-metrics." in message
    assert "finetune" in methods, "other registries work"


def test_an_unknown_group_is_ignored_with_a_warning(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    registry = install("length = some_metrics:length", group="loraline.metric")
    assert "length" not in registry
    (warning,) = caplog.messages
    assert re.search(r"ignored: unknown group 'loraline.metric'.*loraline.metrics.*pip uninstall some-metrics", warning)


def test_an_entry_whose_implementation_is_missing_names_its_plugin(install: Install) -> None:
    registry = install("length = some_metrics:length")
    assert "length" in registry
    with pytest.raises(SettingsError, match=r"some-metrics 2.1.*'length' cannot be imported from 'nowhere:Thing'"):
        registries.import_target(registry, "length", "nowhere:Thing")
