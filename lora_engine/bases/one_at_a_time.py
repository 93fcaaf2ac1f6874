"""A lock around the building of models: transformers and diffusers patch torch while they build one.

Steps of a pipeline run in threads of one process, and two of them may load a base at the same time; without this, one
finds tensors on the meta device that the other is about to fill.
"""

from __future__ import annotations

import threading

BUILDING = threading.RLock()
