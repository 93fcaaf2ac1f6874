"""Reads a pickled file in a sandboxed process: `python -m lora_engine.formats.pickle_child FILE FOLDER LIMITS`.

It sets its resource limits before it opens the file, reads with `weights_only=True`, and writes `tensors.safetensors`
and `answer.json` into the folder. Only `pickles` starts it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch

from lora_engine.errors import AdapterError
from lora_engine.files import atomic_write, canonical_json
from lora_engine.formats.pickles import over_memory
from lora_engine.formats.safetensors_io import write_safetensors

# Globals in the first checkpoints of Stable Diffusion. Each becomes an `Inert` object; nothing of these packages is
# imported or called.
INERT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
# torch's message for a global that is not allowed, without its advice to disable `weights_only`.
_REFUSED = re.compile(r"Unsupported (?:global|class|operand|object|type)[^\n]*?(?= by default|\n|$)|Trying to [^\n]*")


class Inert:
    """Replaces a global that is not needed; accepts any argument and does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _Walk:
    """Converts the loaded object into JSON nodes and a table of tensors.

    Args:
        limits: Fields of `PickleLimits` by name.
    """

    def __init__(self, limits: dict[str, int]) -> None:
        self.limits = limits
        self.tensors: dict[str, torch.Tensor] = {}
        self.dropped: list[str] = []
        self._values = 0
        self._bytes = 0

    def node(self, value: Any, path: str = "", depth: int = 0) -> dict[str, Any] | None:
        """Returns the node of a value, or None if the value is dropped.

        Raises:
            AdapterError: A limit is exceeded, or a tensor cannot be stored.
        """
        self._values += 1
        self._check_limit("values", self._values, "values")
        self._check_limit("depth", depth, "levels of containers")
        if isinstance(value, torch.Tensor):
            return {"tensor": self._keep(value, path)}
        if isinstance(value, dict):
            return {"dict": [entry for pair in value.items() if (entry := self._entry(pair, path, depth))]}
        if isinstance(value, list | tuple):
            nodes = (self.node(item, f"{path}[{number}]", depth + 1) for number, item in enumerate(value))
            return {"list": [node or {"value": None} for node in nodes]}
        if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
            return {"value": value}
        self._drop(path, value)
        return None

    def _entry(self, pair: tuple[Any, Any], path: str, depth: int) -> list[Any] | None:
        key, value = pair
        if not isinstance(key, str | int):
            self._drop(path, key)
            return None
        node = self.node(value, f"{path}.{key}" if path else str(key), depth + 1)
        return None if node is None else [key, node]

    def _keep(self, value: torch.Tensor, path: str) -> str:
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise AdapterError(f"the tensor {path!r} is {value.layout} on {value.device}", allowed="a dense tensor")
        # A tensor of one stored number may claim any shape (stride 0), so count the bytes of the expanded tensor.
        self._bytes += value.numel() * value.element_size()
        self._check_limit("unpacked", self._bytes, "bytes of tensors")
        self._check_limit("tensors", len(self.tensors) + 1, "tensors")
        name = f"t{len(self.tensors)}"
        self.tensors[name] = value.detach()
        return name

    def _drop(self, path: str, value: object) -> None:
        if len(self.dropped) < 100:
            self.dropped.append(f"{path or 'at the top'}: {type(value).__name__}")

    def _check_limit(self, rule: str, count: int, noun: str) -> None:
        if count > self.limits[rule]:
            raise AdapterError(f"it holds {count} {noun} or more, and {self.limits[rule]} are allowed")


def main(path: Path, folder: Path, limits: dict[str, int]) -> None:
    """Reads the file and writes `answer.json`."""
    _limit(path.stat().st_size, limits)
    try:
        walk = _Walk(limits)
        content = walk.node(_load(path))
        write_safetensors(folder / "tensors.safetensors", walk.tensors, {}, finite=False)  # its reader checks
        answer = {"content": content or {"value": None}, "dropped": walk.dropped}
    except AdapterError as error:
        answer = {"problem": error.problem}
    except MemoryError:
        answer = {"problem": over_memory(limits["memory"])}
    except Exception as error:
        # A hostile file can make the loader raise anything; this process ends after it.
        answer = {"problem": _explain(error, limits)}
    atomic_write(folder / "answer.json", canonical_json(answer))


def _load(path: Path) -> Any:
    inert = [(Inert, name) for name in INERT]
    with torch.serialization.safe_globals(inert):  # type: ignore[arg-type]  # pairs are documented, but not annotated
        if path.open("rb").read(2) == b"PK":
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        return torch.load(str(path), map_location="cpu", weights_only=True)


def _limit(size: int, limits: dict[str, int]) -> None:
    try:
        import resource
    except ImportError:
        # Windows has no such limits; the loader's rules and the parent's timeout still apply.
        return
    # Memory that torch has already mapped does not count. A file in the old format is read and then copied.
    used = 0
    with contextlib.suppress(OSError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    bounds = {
        resource.RLIMIT_CPU: limits["seconds"],
        resource.RLIMIT_AS: used + limits["memory"] + 3 * size,
        resource.RLIMIT_FSIZE: limits["unpacked"] + (1 << 30),
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in bounds.items():
        hard = resource.getrlimit(kind)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # Some systems define a limit but do not support it.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (bound, bound))


def _explain(error: Exception, limits: dict[str, int]) -> str:
    text = str(error)
    if "alloc" in text and "memory" in text:
        return over_memory(limits["memory"])
    match = _REFUSED.search(text)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    reason = (match.group() if match else first)[:300]
    return f"it cannot be read as tensors and plain values, and nothing else is read ({reason})"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
