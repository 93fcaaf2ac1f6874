"""The module names of diffusion transformers (FLUX, Stable Diffusion 3), whose original layers fuse several modules.

One file a family, found by itself; `dit` looks names up, `fused` takes rows apart and together, `names` is what codecs
ask.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
