import gc
import sys
from importlib.util import find_spec

import pytest

from lora_engine import lean


def test_an_installed_package_is_hidden_in_the_block_and_importable_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "OPTIONAL", ("this",))
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with lean.optional_hidden():
        assert find_spec("this") is None
        with pytest.raises(ImportError):
            import this  # noqa: F401
    assert find_spec("this") is not None


def test_a_package_that_is_imported_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "OPTIONAL", ("json", "not_installed_at_all"))
    import json

    with lean.optional_hidden():
        assert sys.modules["json"] is json
        assert find_spec("not_installed_at_all") is None
    assert sys.modules["json"] is json
    assert "not_installed_at_all" not in sys.modules


@pytest.mark.parametrize("name", lean.OPTIONAL)
def test_the_optional_packages_are_installed_here(name: str) -> None:
    assert find_spec(name) is not None, "a name that is never there would hide nothing"


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_in_the_block_and_its_objects_are_exempt_afterwards(enabled: bool) -> None:
    was_enabled, before = gc.isenabled(), gc.get_freeze_count()
    try:
        (gc.enable if enabled else gc.disable)()
        with lean.collection_paused():
            assert not gc.isenabled()
            kept = [[] for _ in range(1000)]
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() >= before + len(kept)
    finally:
        (gc.enable if was_enabled else gc.disable)()
