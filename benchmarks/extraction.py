"""Compares extraction at rank 32 with a full SVD, on the shapes of Stable Diffusion 1.5's U-Net.

    python -m benchmarks.extraction [--rank 32] [--rounds 3] [--all] [--at-least 10]

CPU time, one thread, rounds interleaved, medians. Each shape is measured with a decaying spectrum (singular value k of
size 1 / k) plus Gaussian noise, and with pure Gaussian noise, the hardest case. `error` is the Frobenius error over the
minimum. Without `--all`, one shape of each relevant group is measured. Totals are weighted by the number of linear and
convolution layers of each shape. A shape that was not measured counts as the nearest by number of elements times the
smaller side.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_engine.adapters.published import published_module_shapes
from lora_engine.merging.budget import Budget
from lora_engine.merging.spectrum import leading_part

USUAL = (
    (320, 320), (768, 320), (320, 2880), (640, 640), (640, 768), (640, 5760), (1280, 1280), (1280, 768),
    (1280, 5120), (1280, 11520), (10240, 1280),
)  # fmt: skip


def shapes() -> Counter[tuple[int, int]]:
    """Returns the matrix shapes of the U-Net's linear and convolution layers, and the number of layers of each."""
    counts: Counter[tuple[int, int]] = Counter()
    for name, shape in published_module_shapes("sd15").items():
        if name.startswith("unet.") and len(shape) in (2, 4):
            counts[shape[0], torch.Size(shape[1:]).numel()] += 1
    return counts


def differences(shape: tuple[int, int], draw: torch.Generator) -> dict[str, Tensor]:
    size = min(*shape, 256)
    left, right = torch.randn(shape[0], size, generator=draw), torch.randn(size, shape[1], generator=draw)
    decaying = (left / torch.arange(1, size + 1)) @ right
    noise = torch.randn(shape, generator=draw)
    return {"falling": decaying + 0.02 * noise, "noise": noise}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure(shape: tuple[int, int], rank: int, rounds: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    errors, full, ours = {}, [], []
    for name, matrix in differences(shape, draw).items():
        for _ in range(rounds if name == "falling" else 1):
            seconds, (_, values, _) = timed(partial(torch.linalg.svd, matrix, full_matrices=False))
            full.append(seconds)
            seconds, part = timed(partial(leading_part, matrix, Budget(rank=rank), generator=draw))
            ours.append(seconds)
        least = float(values[rank:].double().square().sum()) ** 0.5
        rest = torch.addmm(matrix, part.left * part.values, part.right, alpha=-1.0)
        errors[name] = round(float(torch.linalg.vector_norm(rest, dtype=torch.float64)) / least, 5)
    ratios = [a / b for a, b in zip(full, ours, strict=True)]
    return {
        "shape": shape,
        "full_ms": round(1000 * statistics.median(full), 1),
        "ours_ms": round(1000 * statistics.median(ours), 1),
        "faster": round(statistics.median(ratios), 1),
        "error": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--all", action="store_true", help="Measure every shape; takes 15 minutes.")
    parser.add_argument("--at-least", type=float, help="Fail if the weighted ratio is smaller.")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    counts = shapes()
    selected = [shape for shape in sorted(counts) if chosen.all or shape in USUAL]
    figures = {}
    for shape in selected:
        figures[shape] = measure(shape, chosen.rank, chosen.rounds) | {"layers": counts[shape]}
        print(json.dumps(figures[shape]), flush=True)
    totals = {"full_ms": 0.0, "ours_ms": 0.0}
    for shape, count in counts.items():
        near = figures[min(figures, key=lambda measured: abs(cost(measured) - cost(shape)))]
        for name in totals:
            totals[name] += count * near[name] * cost(shape) / cost(near["shape"])
    ratio = totals["full_ms"] / totals["ours_ms"]
    worst = max(error for entry in figures.values() for error in entry["error"].values())
    print(json.dumps({"all_layers": totals, "faster": round(ratio, 1), "largest_error": worst}))
    if chosen.at_least is not None and ratio < chosen.at_least:
        raise SystemExit(f"{ratio:.1f} times as fast is less than {chosen.at_least}")


def cost(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1] * min(shape)


if __name__ == "__main__":
    main()
