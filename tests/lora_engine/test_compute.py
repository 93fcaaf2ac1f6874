"""The number of torch's threads: one for small bases, else `OMP_NUM_THREADS`; restored afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_engine.bases.source import resolve_base
from lora_engine.compute import THREADS, fitting_threads, threads

NO_TORCH = """
import sys
from lora_engine.compute import threads
with threads(1):
    assert "torch" not in sys.modules
    import torch
    assert torch.get_num_threads() == 1
print(torch.get_num_threads())
"""


@pytest.fixture
def unset_threads(monkeypatch):
    monkeypatch.delenv(THREADS, raising=False)


@pytest.fixture
def large(tmp_path: Path):
    """A base of more than 64 MiB, as a sparse file: its weights are not read."""
    folder = tmp_path / "large"
    shutil.copytree(resolve_base("tiny").folder, folder)
    os.truncate(folder / "unet" / "diffusion_pytorch_model.safetensors", 80 * 2**20)
    return resolve_base(str(folder))


def test_only_small_bases_use_one_thread(unset_threads, large):
    tiny = resolve_base("tiny")
    assert large.size > 64 * 2**20 > tiny.size > 2**20
    assert fitting_threads([tiny]) == fitting_threads([tiny, tiny]) == 1
    assert fitting_threads([large]) is fitting_threads([tiny, large]) is fitting_threads([]) is None


def test_the_environment_wins(monkeypatch):
    monkeypatch.setenv(THREADS, "2")
    assert fitting_threads([resolve_base("tiny")]) is None


def test_the_number_of_threads_is_restored(unset_threads):
    before = torch.get_num_threads()

    def fails() -> None:
        with threads(before + 2):
            assert (torch.get_num_threads(), os.environ[THREADS]) == (before + 2, str(before + 2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert torch.get_num_threads() == before
    assert THREADS not in os.environ
    with threads(None):
        assert torch.get_num_threads() == before


def test_setting_threads_does_not_import_torch():
    environment = {name: value for name, value in os.environ.items() if name != THREADS}
    run = subprocess.run([sys.executable, "-c", NO_TORCH], env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) == os.cpu_count()
