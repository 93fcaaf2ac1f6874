"""Compares the conversion of a 150 MB adapter with a file copy, and decoding 200 MB with reading the bytes.

    python -m benchmarks.convert [--rounds 7] [--at-most 1.6]

Rounds are interleaved; figures are medians of the ratios in rounds. Wall time runs until the bytes are on the disk on
both sides, because `write_adapter` always syncs. CPU time of this process, kernel included, is compared with a copy
(`sendfile`) that stays in the page cache.
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
from lora_engine.adapters.published import published_module_shapes
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
    """Returns CPU seconds and wall seconds of each function, by round."""
    cpu: Rounds = {name: [] for name in works}
    wall: Rounds = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            os.sync()
            start = time.perf_counter()
            seconds = timed(work)
            elapsed = time.perf_counter() - start
            for path in folder.glob("out*"):
                path.unlink()
            if number:  # the first round warms up
                cpu[name].append(seconds)
                wall[name].append(elapsed)
    return cpu, wall


def ratio(first: list[float], second: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(first, second, strict=True)), 2)


def synced(path: Path) -> None:
    """Copies a file and syncs it to the disk."""
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
    cpu, wall = rounds_of(works, rounds, folder)
    return {
        "megabytes": [round(path.stat().st_size / 1e6) for path in (small, large)],
        "processor_seconds": {name: round(statistics.median(values), 3) for name, values in cpu.items()},
        "clock_seconds": {name: round(statistics.median(values), 3) for name, values in wall.items()},
        "over_copy_by_clock": {name: ratio(wall[f"to {name}"], wall["copy and fsync"]) for name in FORMATS},
        "over_copy_by_processor": {name: ratio(cpu[f"to {name}"], cpu["copy"]) for name in FORMATS},
        "decode_over_read": ratio(cpu["read_adapter"], cpu["read"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--at-most", type=float, help="Fail if a conversion costs more copies than this.")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        figures = measure(Path(name), chosen.rounds)
    print(json.dumps(figures))
    ratios = figures["over_copy_by_clock"]
    if chosen.at_most is not None and isinstance(ratios, dict) and max(ratios.values()) > chosen.at_most:
        raise SystemExit(f"a conversion costs {max(ratios.values())} copies, more than {chosen.at_most}")


if __name__ == "__main__":
    main()
