"""Imports what steps need in one thread, before any of them starts.

Steps run in threads of one process. Where two threads first import modules that need each other, Python hands one of
them a module that is only half made, and transformers then says `cannot import name 'AutoTokenizer'`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

from lora_engine.bases.families import families
from lora_engine.bases.source import resolve_base
from tasks.job import Job
from tasks.step import locate_base


def import_for(jobs: Iterable[Job]) -> None:
    """Imports every module that these steps declare, in this thread; what only others need is not imported."""
    for job in jobs:
        declared = job.kind.imports
        for module in declared(job.spec, job.folder) if declared else ():
            importlib.import_module(module)


def base_module(base: str, folder: Path) -> str:
    """Returns the name of the module that loads a base; importing it imports all classes that the base is made of.

    Args:
        base: As the pipeline file names it.
        folder: The folder of the pipeline file.
    """
    return families[resolve_base(locate_base(base, folder)).family].module
