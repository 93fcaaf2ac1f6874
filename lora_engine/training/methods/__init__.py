"""Training methods by name: each returns the phases of a run. None has a loop of its own.

Every module of this package is imported. To add a method, add a file that registers it.
"""

from importlib import import_module
from pkgutil import iter_modules

from lora_engine.training.methods.context import BatchTransform, Method, MethodContext, methods, predict

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")

__all__ = ["BatchTransform", "Method", "MethodContext", "methods", "predict"]
