"""Defines the pipeline steps, one file each.

A step reads folders and its spec and writes one folder; loops and maths are in the engine. To add a step, add a file
here with a spec and a function under `@step`.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
