"""Module names of diffusion transformers (FLUX, Stable Diffusion 3), whose original layers fuse several modules.

Each family is one file, discovered by import. `dit` looks names up, `fused` splits and fuses rows, `names` is the
interface for codecs.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
