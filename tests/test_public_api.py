"""The names that `lora_engine` and `registry` export: frozen, at most 30 each, all importable, and imported late."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

NAMES = {
    "lora_engine": (
        "METHODS Adapter AdapterError Attachment BaseModel BaseModelError Card Delta Embedding EngineError "
        "LoadedAdapter SettingsError TrainSettings TrainingError attach codecs collapse create_adapter generate "
        "inspect kinds load load_base merge methods module_shapes read_safetensors resize train write_safetensors"
    ),
    "registry": (
        "AdapterVersion AliasPolicy ArtifactRef Conflict Decision Event Execution Home HomeError Lineage LineageError "
        "PromotionError Refused RegisteredVersion Registry RegistryError Run Store StoreError UnknownName "
        "UnknownVersion VersionError Versions Walk"
    ),
}
HEAVY = ("torch", "numpy", "diffusers", "transformers", "mlflow", "sqlalchemy", "prefect", "pydantic")


@pytest.mark.parametrize("package", NAMES)
def test_the_public_names_are_these_and_each_can_be_imported(package: str) -> None:
    module = import_module(package)
    assert sorted(module.__all__) == sorted(NAMES[package].split())
    assert len(module.__all__) <= 30
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)


@pytest.mark.parametrize("package", NAMES)
def test_the_reference_describes_every_public_class_and_function(package: str) -> None:
    exported = {name: getattr(import_module(package), name) for name in import_module(package).__all__}
    described = {name: thing for name, thing in exported.items() if callable(thing)}
    assert len(described) > 15
    assert [name for name, thing in described.items() if not (thing.__doc__ or "").strip()] == []


@pytest.mark.parametrize("package", NAMES)
def test_an_unknown_name_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = import_module(package).nothing_of_that_name


@pytest.mark.parametrize("package", NAMES)
def test_importing_a_package_imports_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
