"""Training methods by name, one file each: options, phases and title. None has a loop of its own.

Importing them imports no torch. To add a method, add a file with an entry; the setting `method`, the JSON Schema and
the tests over all methods follow from it.
"""

from lora_engine.training.methods.context import BatchTransform, Method, MethodContext, methods

__all__ = ["BatchTransform", "Method", "MethodContext", "methods"]
