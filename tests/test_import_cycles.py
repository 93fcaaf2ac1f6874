"""The modules of the four packages import each other in one direction, imports inside of functions included."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from typing import Any

import grimp
import pytest

PACKAGES = ("flows", "tasks", "registry", "lora_engine")


def require_no_cycle(graph: Any) -> None:
    """Raises an error that has the cycle, if modules import each other in one."""
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()


def test_no_modules_import_each_other_in_a_cycle() -> None:
    """Imports for annotations alone do not count: they are not executed."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    assert len(graph.modules) > 700
    require_no_cycle(graph)


def test_an_import_inside_of_a_function_closes_a_cycle(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sample_of_cycles"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "upper.py").write_text("from sample_of_cycles.lower import load\n")
    (package / "lower.py").write_text("def load():\n    from sample_of_cycles import upper\n    return upper\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    graph = grimp.build_graph("sample_of_cycles", cache_dir=None)
    with pytest.raises(CycleError, match=r"sample_of_cycles\.upper"):
        require_no_cycle(graph)
