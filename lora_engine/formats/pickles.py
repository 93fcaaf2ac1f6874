"""Reading pickled tensors (`.pt`, `.pth`, `.ckpt`, `.bin`) without ever unpickling in this process.

What the file claims is checked here; `pickle_child`, a process with limits on memory, time and disk, then reads it with
`weights_only=True` and hands it over as safetensors and JSON. Nothing is written as a pickle, here or there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from torch import Tensor

import lora_engine
from lora_engine.errors import AdapterError
from lora_engine.files import canonical_json
from lora_engine.formats.safetensors_io import Limits, read_safetensors

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_REMEDY = "ask its maker for a .safetensors file, and do not open this one by other means unless you trust its maker"
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LANG")
_ANSWER = 256 << 20
_POLL = 0.2
# The C library asks for more than half of this at a time.
_LEAST_ROOM = 256 << 10


@dataclass(frozen=True)
class PickleLimits:
    """How much a pickled file may claim and its reading may cost.

    Attributes:
        file: Bytes of the file.
        tensors: Number of tensors, and of entries in the archive.
        unpacked: Bytes of all tensors together, each laid out in full.
        structure: Bytes of the pickle proper, without the tensors' contents.
        values: Values of all kinds, tensors among them.
        depth: Levels of containers in containers.
        memory: Bytes that the reading process may take beside the file itself.
        seconds: Of processor time; twice that by the clock.
    """

    file: int = 32 << 30
    tensors: int = 100_000
    unpacked: int = 32 << 30
    structure: int = 64 << 20
    values: int = 1_000_000
    depth: int = 64
    memory: int = 1 << 30
    seconds: int = 900


PICKLE_LIMITS = PickleLimits()


@dataclass(frozen=True)
class Unpickled:
    """What was in a pickled file, while its temporary folder lasts.

    Attributes:
        tensors: A safetensors file with the tensors, named as `content` refers to them.
        content: The structure: a dict is `{"dict": [[key, node], ...]}`, a list `{"list": [node, ...]}`, a tensor
            `{"tensor": name}`, anything plain `{"value": ...}`.
        dropped: Places and kinds of what was neither, and was left out.
    """

    tensors: Path
    content: Mapping[str, Any]
    dropped: tuple[str, ...]


def is_pickled(path: Path) -> bool:
    """Whether a file is one that torch pickled, by its ending or by its first bytes."""
    if path.suffix.lower() in SUFFIXES:
        return True
    with path.open("rb") as file:
        start = file.read(9)
    # The length at the head of a safetensors file may begin with the same bytes; but a brace follows it.
    return start.startswith(_STARTS) and not start.endswith(b"{")


def read_pickle(path: Path, *, limits: PickleLimits = PICKLE_LIMITS) -> Any:
    """What a pickled file holds: dicts and lists of tensors (on the CPU, in their dtype), numbers and texts.

    Args:
        path: A `.pt`, `.pth`, `.ckpt` or `.bin` file of torch.
        limits: What it may claim and cost.

    Raises:
        AdapterError: Not such a file, over a limit, or it holds something that is no tensor and no plain value. Nothing
            of it has run.
    """
    with unpickled(path, limits=limits) as found:
        # A copy, as the file that the tensors are mapped from is about to be deleted.
        tensors = {name: tensor.clone() for name, tensor in read_safetensors(found.tensors, _limits(limits))[0].items()}
        return _rebuild(found.content, tensors)


@contextlib.contextmanager
def unpickled(path: Path, *, limits: PickleLimits = PICKLE_LIMITS) -> Iterator[Unpickled]:
    """As `read_pickle`, with the tensors in a safetensors file that lasts as long as the context; none is in memory.

    Raises:
        AdapterError: As `read_pickle`.
    """
    _check(path, limits)
    with tempfile.TemporaryDirectory(prefix="loraline-") as folder:
        answer = _run_child(path.resolve(), Path(folder), limits)
        if "content" not in answer:
            raise AdapterError(
                str(answer.get("problem", "the reading process gave no reason")),
                where=str(path),
                allowed="tensors, numbers and texts in dicts and lists",
                remedy=_REMEDY,
            )
        dropped = tuple(str(entry) for entry in answer.get("dropped", ()))
        yield Unpickled(Path(folder) / "tensors.safetensors", answer["content"], dropped)


def _check(path: Path, limits: PickleLimits) -> None:
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such file"
        raise AdapterError(what, where=str(path), allowed=f"a file of torch ({', '.join(SUFFIXES)})", remedy="check it")
    size = path.stat().st_size
    if size > limits.file:
        raise AdapterError(f"the file has {size} bytes", where=str(path), allowed=f"at most {limits.file}")
    with path.open("rb") as file:
        start = file.read(9)
    if start.endswith(b"{") or not start.startswith(_STARTS):
        hint = "it looks like safetensors: rename it to .safetensors" if start.endswith(b"{") else _REMEDY
        raise AdapterError(
            "this is no file that torch saved", where=str(path), allowed=", ".join(SUFFIXES), remedy=hint
        )
    if start.startswith(b"PK"):
        _check_archive(path, size, limits)


def _check_archive(path: Path, size: int, limits: PickleLimits) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise AdapterError(f"the archive is damaged: {error}", where=str(path), remedy="download it again") from error
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    claimed = sum(entry.file_size for entry in entries)
    structure = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
    rules = (
        (len(entries) > limits.tensors, f"the archive has {len(entries)} entries", f"at most {limits.tensors}"),
        (bool(packed), f"{len(packed)} entries are compressed, such as {packed[:1]}", "entries as torch stores them"),
        (claimed > min(size, limits.unpacked), f"its entries claim {claimed} bytes of a file of {size}", "no more"),
        (structure > limits.structure, f"the pickle in it has {structure} bytes", f"at most {limits.structure}"),
    )
    for broken, problem, allowed in rules:
        if broken:
            raise AdapterError(problem, where=str(path), allowed=allowed, remedy=_REMEDY)


def _run_child(path: Path, folder: Path, limits: PickleLimits) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "lora_engine.formats.pickle_child", str(path), str(folder)]
    with (folder / "stderr").open("w+b") as stderr:
        child = subprocess.Popen(
            [*command, canonical_json(asdict(limits)).decode()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=_environment(),
            cwd=folder,
            start_new_session=True,
        )
        try:
            code = _wait(child, time.monotonic() + 2 * limits.seconds)
        except TimeoutError:
            return {"problem": f"reading it took more than {2 * limits.seconds} seconds, which is the limit"}
        except MemoryError:
            return {"problem": over_memory(limits.memory)}
        finally:
            # Also where the caller was interrupted while it waited.
            child.kill()
            child.wait()
        answer = folder / "answer.json"
        if code == 0 and answer.is_file() and answer.stat().st_size <= _ANSWER:
            found = json.loads(answer.read_bytes())
            return found if isinstance(found, dict) else {}
        return {"problem": _death(code, stderr, limits)}


def _wait(child: subprocess.Popen[bytes], deadline: float) -> int:
    while True:
        try:
            return child.wait(timeout=max(0.0, min(_POLL, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                raise TimeoutError from None
            # An interpreter that finds no room even for its error can try for ever (CPython 3.11, `exception_unwind`).
            if _is_out_of_memory(child.pid):
                raise MemoryError from None


def _is_out_of_memory(pid: int) -> bool:
    """Whether the process has taken what it may, as far as the system tells."""
    try:
        import resource

        limit = resource.prlimit(pid, resource.RLIMIT_AS)[0]
        taken = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, AttributeError, OSError, IndexError):
        return False
    return limit != resource.RLIM_INFINITY and limit - taken < _LEAST_ROOM


def over_memory(limit: int) -> str:
    """The problem of a file whose reading takes too much memory."""
    return f"reading it takes more than the {limit} bytes of memory allowed beside the file"


def _death(code: int, stderr: IO[bytes], limits: PickleLimits) -> str:
    stderr.seek(0)
    lines = stderr.read()[-2000:].decode(errors="replace").strip().splitlines()
    bounds = f"{limits.seconds} s of processor time, {limits.memory} bytes of memory beside the file"
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"the process that read it {how} (its limits: {bounds}){f'; it said: {lines[-1][:300]}' if lines else ''}"


def _environment() -> dict[str, str]:
    # No setting of the caller reaches the child that could make torch unpickle freely, and no credentials.
    kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    package = str(Path(lora_engine.__file__).resolve().parents[1])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in paths),
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
        "OMP_NUM_THREADS": "1",
    }


def _limits(limits: PickleLimits) -> Limits:
    return Limits(file=limits.unpacked + (1 << 30), tensors=limits.tensors)


def _rebuild(node: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    if "tensor" in node:
        return tensors[str(node["tensor"])]
    if "dict" in node:
        return {key: _rebuild(value, tensors) for key, value in node["dict"]}
    if "list" in node:
        return [_rebuild(value, tensors) for value in node["list"]]
    return node.get("value")
