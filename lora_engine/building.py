"""Locks the construction of models, tokenizers and schedulers by transformers and diffusers, and finishes it. No torch.

Pipeline steps run in threads of one process, and two of them may load a base at the same time. While it builds a model,
transformers patches torch: without the lock, one thread sees the meta tensors of the other. Both libraries also import
modules lazily then, which is not thread-safe: one of two threads may see a partly initialized module.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

BUILDING = threading.RLock()
_ALIGNMENT = 64


def align_weights(module: nn.Module) -> None:
    """Copies weights that are not aligned to 64 bytes into aligned memory.

    Memory-mapped weights have arbitrary addresses, and CPU kernels round differently at different alignments. Aligned
    weights give the same bits in every process.
    """
    for value in (*module.parameters(), *module.buffers()):
        if value.device.type == "cpu" and value.data_ptr() % _ALIGNMENT:
            value.data = value.detach().clone()


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Disables the progress bars of transformers until the block ends."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
