"""A lock around the building of models, tokenizers and schedulers by transformers and diffusers.

Steps of a pipeline run in threads of one process, and two of them may load a base at the same time. While it builds a
model, transformers patches torch; without the lock, one thread finds tensors on the meta device that the other is about
to fill. Both libraries also import modules by the names in a configuration then, and such imports are not safe in
threads: a module that two threads import at once may be half made in one of them.
"""

from __future__ import annotations

import threading

BUILDING = threading.RLock()
