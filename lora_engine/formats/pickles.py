"""Reads pickled tensors (`.pt`, `.pth`, `.ckpt`, `.bin`) without unpickling in this process.

This module checks what the file claims. `pickle_child`, a process with limits on memory, time and disk, then reads it
with `weights_only=True` and returns safetensors and JSON. Neither writes a pickle.
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
from typing import IO, TYPE_CHECKING, Any

from lora_engine.errors import AdapterError
from lora_engine.files import FilePath, canonical_json
from lora_engine.formats.safetensors_io import Limits, read_safetensors

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_REMEDY = "ask its author for a .safetensors file, and do not open this one otherwise unless you trust its author"
_ENVIRONMENT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LANG")
_ANSWER = 256 << 20
_POLL = 0.2
# The C library requests more than half of this at a time.
_MIN_FREE_MEMORY = 256 << 10


@dataclass(frozen=True)
class PickleLimits:
    """Limits on what a pickled file may claim, and on the resources for reading it.

    Attributes:
        file: Bytes of the file.
        tensors: Number of tensors, and of entries in the archive.
        unpacked: Bytes of all expanded tensors together.
        structure: Bytes of the pickle itself, without the tensors' contents.
        values: Number of values of all kinds, including tensors.
        depth: Nesting depth of containers.
        memory: Bytes that the reading process may use besides the file itself.
        seconds: Seconds of CPU time; wall-clock time may be twice that.
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
    """The contents of a pickled file; valid while its temporary folder exists.

    Attributes:
        tensors: A safetensors file with the tensors; `content` refers to their names.
        content: The structure: a dict is `{"dict": [[key, node], ...]}`, a list `{"list": [node, ...]}`, a tensor
            `{"tensor": name}`, a plain value `{"value": ...}`.
        dropped: Paths and types of dropped objects.
    """

    tensors: Path
    content: Mapping[str, Any]
    dropped: tuple[str, ...]


def is_pickled(path: Path) -> bool:
    """Returns True for a file that torch pickled, by its suffix or its first bytes."""
    if path.suffix.lower() in SUFFIXES:
        return True
    with path.open("rb") as file:
        start = file.read(9)
    # The length of a safetensors header may begin with the same bytes, but a brace follows it.
    return start.startswith(_STARTS) and not start.endswith(b"{")


def read_pickle(path: FilePath, *, limits: PickleLimits = PICKLE_LIMITS) -> Any:
    """Returns the contents of a pickled file: dicts and lists of CPU tensors, numbers and strings.

    Args:
        path: A `.pt`, `.pth`, `.ckpt` or `.bin` file of torch.
        limits: Limits on what it may claim and cost.

    Raises:
        AdapterError: The file is no such file, exceeds a limit, or holds more than tensors and plain values. None of
            its code has run.
    """
    with unpickled(Path(path), limits=limits) as file:
        # Clone, because the tensors are mapped from a file that is about to be deleted.
        tensors = {name: tensor.clone() for name, tensor in read_safetensors(file.tensors, _limits(limits))[0].items()}
        return _rebuild(file.content, tensors)


@contextlib.contextmanager
def unpickled(path: Path, *, limits: PickleLimits = PICKLE_LIMITS) -> Iterator[Unpickled]:
    """Reads as `read_pickle`, but leaves the tensors in a safetensors file that exists until the context ends.

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
                allowed="tensors, numbers and strings in dicts and lists",
                remedy=_REMEDY,
            )
        dropped = tuple(str(entry) for entry in answer.get("dropped", ()))
        yield Unpickled(Path(folder) / "tensors.safetensors", answer["content"], dropped)


def _check(path: Path, limits: PickleLimits) -> None:
    if not path.is_file():
        problem = "not a regular file" if path.exists() else "no such file"
        raise AdapterError(
            problem, where=str(path), allowed=f"a file of torch ({', '.join(SUFFIXES)})", remedy="check the path"
        )
    size = path.stat().st_size
    if size > limits.file:
        raise AdapterError(f"the file has {size} bytes", where=str(path), allowed=f"at most {limits.file}")
    with path.open("rb") as file:
        start = file.read(9)
    if start.endswith(b"{") or not start.startswith(_STARTS):
        hint = "it looks like safetensors: rename it to .safetensors" if start.endswith(b"{") else _REMEDY
        raise AdapterError("the file was not saved by torch", where=str(path), allowed=", ".join(SUFFIXES), remedy=hint)
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
        (
            claimed > min(size, limits.unpacked),
            f"its entries claim {claimed} bytes of a file of {size}",
            "at most the size of the file",
        ),
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
            return {"problem": f"reading it exceeded the limit of {2 * limits.seconds} seconds"}
        except MemoryError:
            return {"problem": over_memory(limits.memory)}
        finally:
            # Also kill it if the caller was interrupted while waiting.
            child.kill()
            child.wait()
        answer = folder / "answer.json"
        if code == 0 and answer.is_file() and answer.stat().st_size <= _ANSWER:
            content = json.loads(answer.read_bytes())
            return content if isinstance(content, dict) else {}
        return {"problem": _exit_problem(code, stderr, limits)}


def _wait(child: subprocess.Popen[bytes], deadline: float) -> int:
    while True:
        try:
            return child.wait(timeout=max(0.0, min(_POLL, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                raise TimeoutError from None
            # An interpreter without memory for its own error can loop forever (CPython 3.11, `exception_unwind`).
            if _is_out_of_memory(child.pid):
                raise MemoryError from None


def _is_out_of_memory(pid: int) -> bool:
    """Returns True if the process has reached its memory limit; False if the system does not report it."""
    try:
        import resource

        limit = resource.prlimit(pid, resource.RLIMIT_AS)[0]
        used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, AttributeError, OSError, IndexError):
        return False
    return limit != resource.RLIM_INFINITY and limit - used < _MIN_FREE_MEMORY


def over_memory(limit: int) -> str:
    """Returns the problem text for a file that needs too much memory."""
    return f"reading it takes more than the {limit} bytes of memory allowed besides the file"


def _exit_problem(code: int, stderr: IO[bytes], limits: PickleLimits) -> str:
    stderr.seek(0)
    lines = stderr.read()[-2000:].decode(errors="replace").strip().splitlines()
    bounds = f"{limits.seconds} s of CPU time, {limits.memory} bytes of memory besides the file"
    exit_status = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    last_line = f"; last line of stderr: {lines[-1][:300]}" if lines else ""
    return f"the process that read it {exit_status} (its limits: {bounds}){last_line}"


def _environment() -> dict[str, str]:
    # The child gets no credentials and no setting that could disable `weights_only`.
    inherited = {name: os.environ[name] for name in _ENVIRONMENT_VARIABLES if name in os.environ}
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **inherited,
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
