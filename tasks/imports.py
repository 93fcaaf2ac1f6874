"""Imports the modules of steps in one thread, before any step starts.

Steps run in threads of one process. If two threads first import modules that need each other, one of them gets a
partially initialized module, and transformers fails with `cannot import name 'AutoTokenizer'`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

from lora_engine.bases.source import resolve_base
from lora_engine.lean import collection_paused
from tasks.job import Job
from tasks.step import locate_base


def import_for(jobs: Iterable[Job]) -> None:
    """Imports, in this thread, every module that these steps declare, and the kinds and formats if they read adapters.

    Raises:
        SettingsError: A plug-in names an object that cannot be imported.
    """
    with collection_paused():
        for job in jobs:
            declared = job.kind.imports
            for module in declared(job.spec, job.folder) if declared else ():
                importlib.import_module(module)
    if "lora_engine.formats" in sys.modules:
        from lora_engine.adapters import kinds
        from lora_engine.formats import codecs
        from lora_engine.formats.key_layout import load_factor_keys

        importlib.import_module("torch")  # which files are recognized without
        load_factor_keys()
        for entries in (kinds, codecs):
            tuple(entries.values())


def base_module(base: str, folder: Path) -> str:
    """Returns the name of the module that loads a base; importing it imports all classes of the base.

    Args:
        base: The base, as the pipeline file names it.
        folder: The folder of the pipeline file.
    """
    return resolve_base(locate_base(base, folder)).module
