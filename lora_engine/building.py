"""Locks the construction of models, tokenizers and schedulers by transformers and diffusers.

Pipeline steps run in threads of one process, and two of them may load a base at the same time. While it builds a model,
transformers patches torch: without the lock, one thread sees the meta tensors of the other. Both libraries also import
modules lazily then, which is not thread-safe: one of two threads may see a partly initialized module.
"""

from __future__ import annotations

import threading

BUILDING = threading.RLock()
