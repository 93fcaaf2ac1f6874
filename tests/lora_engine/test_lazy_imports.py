"""Modules and exported names are imported on their first use."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch

from lora_engine import lazy_torch

PACKAGES = ("lora_engine.formats", "lora_engine.checkpoints", "lora_engine.adapters", "tasks.operations.inspect_files")
HEAVY = ("torch", "diffusers", "transformers")


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_that_recognizes_files_imports_no_torch(package):
    code = f"import sys, {package}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_lazy_modules_have_the_attributes_of_torch():
    assert lazy_torch.torch.Tensor is torch.Tensor
    assert lazy_torch.nn.Linear is torch.nn.Linear
    assert lazy_torch.F.linear is torch.nn.functional.linear
    with pytest.raises(AttributeError, match="no_such_function"):
        _ = lazy_torch.torch.no_such_function


def test_every_exported_name_of_the_adapters_is_the_one_of_its_module():
    package = import_module("lora_engine.adapters")
    origins = {name: module for module, names in package._MODULES.items() for name in names.split()}
    assert sorted(origins) == sorted(package.__all__)
    for name, module in origins.items():
        assert getattr(package, name) is getattr(import_module(module), name)
        assert f"lora_engine.adapters.{name}" not in sys.modules, "a module would hide the name"
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = package.nothing_of_that_name
