"""Compares a training step (forward + backward) with an adapter with the frozen network, PEFT and kohya's sd-scripts.

    OMP_NUM_THREADS=1 python -m benchmarks.training_step [--rounds 5] [--shape small wide] [--targets attention ...]
    python -m benchmarks.training_step --device cuda --dtype bf16 --shape sd15 --batch 1 4 16 [--compile]

The floor is the frozen network: forward, and backward to its input, with the same batch. Rounds alternate between the
floor, PEFT, kohya (if SD_SCRIPTS names a checkout of sd-scripts) and Loraline, and the first to run rotates. `time` is
the median over rounds of the ratio to the floor of the same round, in CPU time of this process on a CPU and in wall
time on other devices. `saved` is the number of bytes that autograd saves for the backward pass, without parameters.
`operations` is the number of aten operations dispatched in forward and backward, views included. `apart` is the largest
relative difference of a gradient to that of a peer. Prints one JSON object per case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.step_contenders import SHAPES, Contender, agree, make_contenders

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], None]


def timed(step: Step, device: str, steps: int) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    wait: Step = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = clock()
    for _ in range(steps):
        step()
    wait()
    return (clock() - start) / steps


def peak(step: Step) -> int:
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def measure(contenders: dict[str, Contender], device: str, rounds: int, steps: int) -> dict[str, Any]:
    names = list(contenders)
    for contender in contenders.values():
        contender.step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(contenders[name].step, device, steps))
    figures: dict[str, Any] = {"floor_ms": round(1000 * statistics.median(times["floor"]), 2)} if rounds else {}
    floors = {"saved": contenders["floor"].saved(), "operations": contenders["floor"].operations()}
    figures |= {f"floor_{name}": value for name, value in floors.items()}
    for name in names[1:]:
        ratios = [seconds / floor for seconds, floor in zip(times[name], times["floor"], strict=True)]
        figures[name] = {
            **({"time": round(statistics.median(ratios), 3)} if rounds else {}),
            "saved": round(contenders[name].saved() / floors["saved"], 3),
            "operations": round(contenders[name].operations() / floors["operations"], 3),
        }
        if device == "cuda":
            figures[name]["peak_mb"] = round(peak(contenders[name].step) / 2**20)
    for name in names[1:-1] if rounds else ():
        pairs = zip(times["loraline"], times[name], strict=True)
        figures[f"loraline_to_{name}"] = round(statistics.median(ours / theirs for ours, theirs in pairs), 3)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["small", "wide"], choices=list(SHAPES))
    parser.add_argument("--targets", nargs="+", default=["attention", "attention+ff", "all"])
    parser.add_argument("--rank", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7, help="Rounds; 0 counts only bytes and operations.")
    parser.add_argument("--steps", type=int, default=1, help="Steps per network and round.")
    parser.add_argument("--compile", action="store_true", help="Compile our repeated blocks.")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for shape in chosen.shape:
        for batch in chosen.batch:
            for targets in chosen.targets:
                for rank in chosen.rank:
                    case = {"shape": shape, "targets": targets, "rank": rank, "batch": batch}
                    contenders = make_contenders(
                        shape, targets, rank, batch, chosen.device, DTYPES[chosen.dtype], chosen.compile
                    )
                    case["apart"] = float(f"{agree(contenders):.1e}")
                    figures = measure(contenders, chosen.device, chosen.rounds, chosen.steps)
                    print(json.dumps(case | figures), flush=True)


if __name__ == "__main__":
    main()
