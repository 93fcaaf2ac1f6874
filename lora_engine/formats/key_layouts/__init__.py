"""How files spell each kind's factors, one file a kind; importing the package fills the styles of `formats.spelling`.

A new kind adds a file here.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
