"""The steps of a pipeline, one file each; importing the package fills `tasks.step.STEPS`.

A step takes folders and its own spec and writes one folder. It holds no loops and no maths: those are the engine's.
To add a step, add a file here that declares its spec and is decorated with `tasks.step.step`.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
