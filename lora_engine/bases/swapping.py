"""Keeps frozen weights in the CPU's memory and copies them to the device block by block, ahead of their use.

At most two blocks are on the device: the one in use and the one that is expected next. The expectation is what followed
the last time after the same two blocks, so that it holds for forward and backward passes, recomputed activations and
sampling alike. On CUDA the copy is made in a stream of its own while the block in use computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = re.compile(r"(.*(?:blocks|resnets|layers|attentions)\.\d+)\.")


def swapped_block(name: str) -> str:
    """Returns the innermost numbered block of a layer, or the name itself for a layer outside of blocks."""
    match = _BLOCK.match(name)
    return match[1] if match is not None else name


@dataclass(frozen=True)
class _Copy:
    """The weights of a block on the device: the tensors of each layer, and the end of the copy on CUDA."""

    layers: list[list[Tensor]]
    end: torch.cuda.Event | None

    def use(self, number: int) -> list[Tensor]:
        """Returns the tensors of a layer; work on the current stream waits for the copy."""
        tensors = self.layers[number]
        if self.end is not None:
            stream = torch.cuda.current_stream(tensors[0].device)
            stream.wait_event(self.end)
            for tensor in tensors:
                tensor.record_stream(stream)  # the memory is not reused before the work that reads it ends
        return tensors


class BlockSwapper:
    """The weights of blocks, of which at most two are on the device.

    Args:
        device: The device.

    Attributes:
        moves: Number of blocks that were copied.
        waits: Number of those that were copied only when they were needed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._stored: dict[str, list[list[Tensor]]] = {}
        self._copies: dict[str, _Copy] = {}
        self._last = ("", "")
        self._following: dict[tuple[str, str], str] = {}
        self.moves = self.waits = 0

    @property
    def resident(self) -> int:
        """Returns the number of blocks on the device."""
        return len(self._copies)

    def add(self, block: str, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Moves tensors of a layer to the CPU; returns a function that returns them on the device."""
        layers = self._stored.setdefault(block, [])
        layers.append([self._to_cpu(tensor) for tensor in tensors])
        number = len(layers) - 1
        return lambda: self._find(block).use(number)

    def _find(self, block: str) -> _Copy:
        if block != self._last[1]:
            self._following[self._last] = block
            self._last = (self._last[1], block)
            ahead = self._following.get(self._last, block)
            for name in self._copies.keys() - {block, ahead}:
                del self._copies[name]
            self.waits += block not in self._copies
            for name in dict.fromkeys((block, ahead)):
                if name not in self._copies:
                    self._copies[name] = self._copy(self._stored[name])
        return self._copies[block]

    def _copy(self, layers: list[list[Tensor]]) -> _Copy:
        self.moves += 1
        if self._stream is None:
            return _Copy([fetch(tensors, self._device) for tensors in layers], None)
        with torch.cuda.stream(self._stream):
            copies = [fetch(tensors, self._device) for tensors in layers]
            end = torch.cuda.Event()  # type: ignore[no-untyped-call]
            end.record(self._stream)
        return _Copy(copies, end)

    def _to_cpu(self, tensor: Tensor) -> Tensor:
        moved = tensor.cpu()
        return moved.pin_memory() if self._stream is not None else moved


def fetch(stored: list[Tensor], device: torch.device) -> list[Tensor]:
    """Returns tensors of the CPU's memory on a device."""
    return [tensor.to(device, non_blocking=True) for tensor in stored]
