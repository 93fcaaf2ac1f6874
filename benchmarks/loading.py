"""Compares reading an adapter, from a file and from the store, with safetensors' `load_file`, in processor time.

    python -m benchmarks.loading [--rounds 21]

Rounds are interleaved in one process on one thread; each ratio is the median of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.adapters.published import published_module_shapes
from lora_engine.adapters.select import select_modules
from lora_engine.families import families
from lora_engine.formats import read_bundle, write_adapter
from registry.store.artifacts import Store


def make_adapter(rank: int) -> Adapter:
    """Returns a LoRA of all attention layers of Stable Diffusion 1.5."""
    unet = families["sd"].unet
    assert unet is not None
    shapes = published_module_shapes(unet.published)
    draw = torch.Generator().manual_seed(0)
    modules = {}
    for name in select_modules(shapes, ["attention"]):
        rows, columns = shapes[name][:2]
        down, up = torch.randn(rank, columns, generator=draw), torch.randn(rows, rank, generator=draw)
        modules[name] = LoraDelta(down.half(), up.half(), float(rank))
    return Adapter(modules, "sd")


def measure(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each round by name."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            began = time.process_time()
            run()
            times[name].append(time.process_time() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for rank in (16, 128):
        adapter = make_adapter(rank)
        names = list(adapter.modules)
        for form in ("kohya", "peft"):
            with tempfile.TemporaryDirectory() as folder:
                target = Path(folder) / ("adapter" if form == "peft" else "adapter.safetensors")
                file = write_adapter(target, adapter, format=form)[0]
                store = Store(Path(folder) / "store")
                ref = store.put_files("adapter", {"adapter.safetensors": file})
                copy = Path(folder) / "copy.safetensors"
                checkout = partial(store.checkout_file, ref, "adapter.safetensors", copy)
                work = {
                    "load_file": partial(load_file, file),
                    "read_bundle": partial(read_bundle, target, names),
                    "checkout from the store": checkout,
                }
                times = measure(work, rounds)
                ratios = {
                    name: statistics.median(a / b for a, b in zip(times[name], times["load_file"], strict=True))
                    for name in work
                }
                shown = ", ".join(
                    f"{name} {1000 * statistics.median(times[name]):.2f} ms ({ratios[name]:.2f})" for name in work
                )
                print(f"rank {rank:3} {form:6} {file.stat().st_size >> 10:6} KiB: {shown}", flush=True)


if __name__ == "__main__":
    main()
