"""Converting a 150 MB adapter against copying the file, and reading a 200 MB one against reading its bytes.

    python -m benchmarks.convert [--rounds 7] [--at-most 1.6]

Two measures, rounds interleaved, the median of the ratios in rounds. Time on the clock, until the bytes are on the disk
on both sides (`write_adapter` always waits for that, so the copy does too): what a person waits for. And processor time
of this process, kernel included, against a copy (`sendfile`) that stays in the page cache: what a busy machine pays.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
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


Rounds = dict[str, list[float]]


def rounds_of(works: dict[str, Callable[[], object]], rounds: int, folder: Path) -> tuple[Rounds, Rounds]:
    """Processor seconds and seconds on the clock of each work, by round."""
    processor: Rounds = {name: [] for name in works}
    clock: Rounds = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            os.sync()
            began = time.perf_counter()
            seconds = timed(work)
            passed = time.perf_counter() - began
            for path in folder.glob("out*"):
                path.unlink()
            if number:  # the first round warms up
                processor[name].append(seconds)
                clock[name].append(passed)
    return processor, clock


def ratio(one: list[float], other: list[float]) -> float:
    return round(statistics.median(mine / theirs for mine, theirs in zip(one, other, strict=True)), 2)


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
    processor, clock = rounds_of(works, rounds, folder)
    return {
        "megabytes": [round(path.stat().st_size / 1e6) for path in (small, large)],
        "processor_seconds": {name: round(statistics.median(values), 3) for name, values in processor.items()},
        "clock_seconds": {name: round(statistics.median(values), 3) for name, values in clock.items()},
        "over_copy_by_clock": {name: ratio(clock[f"to {name}"], clock["copy and fsync"]) for name in FORMATS},
        "over_copy_by_processor": {name: ratio(processor[f"to {name}"], processor["copy"]) for name in FORMATS},
        "decode_over_read": ratio(processor["read_adapter"], processor["read"]),
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
    ratios = found["over_copy_by_clock"]
    if chosen.at_most is not None and isinstance(ratios, dict) and max(ratios.values()) > chosen.at_most:
        raise SystemExit(f"a conversion costs {max(ratios.values())} copies, more than {chosen.at_most}")


if __name__ == "__main__":
    main()
