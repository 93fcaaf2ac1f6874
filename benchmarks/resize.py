"""Compares resizing a whole adapter with the full SVD of each dense delta.

    python -m benchmarks.resize [--rank 64] [--to 16] [--rounds 3]

The adapter has the shapes of Stable Diffusion 1.5's attention layers. A full SVD of all of them takes minutes, so each
shape is sampled once per round, and the times are scaled by the number of layers of that shape. Ours are sampled and
scaled alike, and also measured on the whole adapter. Other libraries compute full matrices; the thin SVD is measured
too. CPU time, one thread. The results are compared by the relative Frobenius distance of the deltas.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.merging.budget import Budget
from lora_engine.merging.compress import compress_to
from lora_engine.merging.resize import resize

SHAPES = {
    # (out, in) of to_q, to_k, to_v, to_out.0 in self and cross attention: number of layers
    (320, 320): 5 * 6,
    (320, 768): 5 * 2,
    (640, 640): 5 * 6,
    (640, 768): 5 * 2,
    (1280, 1280): 6 * 6,
    (1280, 768): 6 * 2,
}


def random_delta(shape: tuple[int, int], rank: int, seed: int) -> LoraDelta:
    draw = torch.Generator().manual_seed(seed)
    # Trained adapters have a decaying spectrum.
    decay = torch.logspace(0, -2, rank)
    return LoraDelta(
        torch.randn(rank, shape[1], generator=draw) / shape[1] ** 0.5,
        torch.randn(shape[0], rank, generator=draw) * decay,
        float(rank),
    )


def by_full_svd(delta: LoraDelta, rank: int, *, full_matrices: bool) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(delta.up @ delta.down, full_matrices=full_matrices)
    return left[:, :rank] * values[:rank], right[:rank]


def timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--to", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-least", type=float, help="Fail if the speedup on the whole adapter is smaller.")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows, totals = [], {"ours": 0.0, "thin": 0.0, "full": 0.0}
    for index, (shape, count) in enumerate(SHAPES.items()):
        times: dict[str, list[float]] = {"ours": [], "thin": [], "full": []}
        worst = 0.0
        for number in range(chosen.rounds):
            delta = random_delta(shape, chosen.rank, 100 * index + number)
            for name, work in (
                ("ours", lambda delta=delta: compress_to(delta, Budget(chosen.to))),
                ("thin", lambda delta=delta: by_full_svd(delta, chosen.to, full_matrices=False)),
                ("full", lambda delta=delta: by_full_svd(delta, chosen.to, full_matrices=True)),
            ):
                times[name].append(timed(work))
            resized = compress_to(delta, Budget(chosen.to)).delta.delta_weight(torch.zeros(shape))
            up, down = by_full_svd(delta, chosen.to, full_matrices=False)
            worst = max(worst, distance(resized, up @ down))
        medians = {name: statistics.median(measured) for name, measured in times.items()}
        for name, seconds in medians.items():
            totals[name] += count * seconds
        rows.append(
            {
                "shape": list(shape),
                "count": count,
                "ours_ms": round(1000 * medians["ours"], 2),
                "thin_ratio": round(medians["thin"] / medians["ours"], 1),
                "full_ratio": round(medians["full"] / medians["ours"], 1),
                "distance": float(f"{worst:.1e}"),
            }
        )
    modules = [shape for shape, count in SHAPES.items() for _ in range(count)]
    adapter = Adapter({f"unet.{n}": random_delta(shape, chosen.rank, n) for n, shape in enumerate(modules)})
    whole = timed(lambda: resize(adapter, rank=chosen.to))
    figures = {
        "modules": len(modules),
        "rank": chosen.rank,
        "to": chosen.to,
        "whole_adapter_s": round(whole, 3),
        "ours_scaled_s": round(totals["ours"], 3),
        "full_svd_scaled_s": round(totals["full"], 1),
        "thin_svd_scaled_s": round(totals["thin"], 1),
        "faster_than_full_svd": round(totals["full"] / whole, 1),
        "faster_than_thin_svd": round(totals["thin"] / whole, 1),
        "shapes": rows,
    }
    print(json.dumps(figures, indent=1))
    if chosen.at_least is not None and totals["full"] / whole < chosen.at_least:
        raise SystemExit(f"only {totals['full'] / whole:.1f} times faster")


if __name__ == "__main__":
    main()
