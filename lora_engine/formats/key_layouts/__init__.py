"""Factor keys of each adapter kind, one file per kind; importing the package fills the layouts of `key_layout`.

A new kind adds a file here.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
