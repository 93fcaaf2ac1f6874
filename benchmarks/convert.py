"""Converting a 150 MB adapter against copying the file, and reading a 200 MB one against reading its bytes.

    python -m benchmarks.convert [--rounds 7] [--at-most 1.6]

Processor time of this process, kernel included, imports not; rounds interleaved, the median of the ratios in rounds.
A copy is `sendfile` into a new file. Nothing is flushed to the disk on either side but by `write_adapter` itself, whose
share (`fsync`) is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.fuse import copy, make_adapter, timed
from lora_engine.bases.published import published_module_shapes
from lora_engine.formats import read_adapter, read_safetensors, write_adapter

FORMATS = ("loraline", "kohya", "diffusers")


def read_bytes(path: Path) -> None:
    """Reads a file into one buffer."""
    buffer = bytearray(path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < len(buffer):
            done += file.readinto(memoryview(buffer)[done:]) or len(buffer)


def convert(source: Path, target: Path, name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    adapter, card = read_adapter(source, shapes)
    write_adapter(target, adapter, format=name, card=card)


def rounds_of(works: dict[str, Callable[[], object]], rounds: int, folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            seconds = timed(work)
            for path in folder.glob("out*"):
                path.unlink()
            if number:  # the first round warms up
                found[name].append(seconds)
    return found


def synced(path: Path) -> None:
    """Copies a file and waits for the disk."""
    copy(path, path.with_name("out"))
    with path.with_name("out.0").open("rb") as file:
        os.fsync(file.fileno())


def measure(folder: Path, rounds: int) -> dict[str, object]:
    shapes = published_module_shapes("sd15")
    small, large = make_adapter(folder / "small.safetensors", 127), make_adapter(folder / "large.safetensors", 170)
    works: dict[str, Callable[[], object]] = {
        "copy": lambda: copy(small, folder / "out"),
        "copy and fsync": lambda: synced(small),
        "read": lambda: read_bytes(large),
        "read_safetensors": lambda: read_safetensors(large),
        "read_adapter": lambda: read_adapter(large, shapes),
    }
    for name in FORMATS:
        target = folder / f"out-{name}.safetensors"
        works[f"to {name}"] = lambda name=name, target=target: convert(small, target, name, shapes)  # type: ignore[misc]
    found = rounds_of(works, rounds, folder)
    ratios = {
        f"to {name}": round(
            statistics.median(one / other for one, other in zip(found[f"to {name}"], found["copy"], strict=True)), 2
        )
        for name in FORMATS
    }
    decoding = [one / other for one, other in zip(found["read_adapter"], found["read"], strict=True)]
    return {
        "megabytes": [round(path.stat().st_size / 1e6) for path in (small, large)],
        "seconds": {name: round(statistics.median(values), 3) for name, values in found.items()},
        "over_copy": ratios,
        "decode_over_read": round(statistics.median(decoding), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--at-most", type=float, help="fail where a conversion costs more copies than this")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), chosen.rounds)
    print(json.dumps(found))
    ratios = found["over_copy"]
    if chosen.at_most is not None and isinstance(ratios, dict) and max(ratios.values()) > chosen.at_most:
        raise SystemExit(f"a conversion costs {max(ratios.values())} copies, more than {chosen.at_most}")


if __name__ == "__main__":
    main()
