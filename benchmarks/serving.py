"""Compares ways to draw for several tenants, each with an adapter of its own.

    OMP_NUM_THREADS=1 python -m benchmarks.serving [--rounds 9] [--targets attention all] [--compiled]

`rows`: one prediction of four rows on a small network, in CPU time. `batch` has an adapter of its own on each row;
`one_by_one` predicts each row with its adapter attached; `merged` with its adapter merged into the weights. Ratios are
medians over rounds of the ratio to four rows without adapters; the first to run rotates. `switch_ms` is the time to put
four other adapters in place, `switch_share` that as a share of the image (20 steps of two rows each). `apart` is the
largest difference to the predictions one by one, as a share of the largest value.

`jobs`: four jobs of the dynamic engine on the embedded base, in one batch and one by one, texts and autoencoder
included; `ratio` is the median of the throughput. With `--compiled`, also the compiled engine (inductor, compiled for
batches of one and four images) beside the dynamic one, and the seconds that it compiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.composing import make_adapters
from benchmarks.step_contenders import make_batch, make_network, share_weights
from lora_engine.adapters import Adapter, attach
from lora_engine.adapters.merged_weights import MergedWeights
from lora_engine.adapters.row_factors import RowAdapter, RowFactors
from lora_engine.adapters.rows import RowAdapters
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.errors import EngineError
from lora_engine.formats import write_adapter
from lora_engine.inference.draw import DrawSettings
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.serving.compiled import CompiledEngine
from lora_engine.serving.dynamic import DynamicEngine
from lora_engine.serving.engine import ImageEngine, ImageJob
from lora_engine.serving.engines import CompiledOptions, DynamicOptions

TENANTS = 4
_MULTIPLIER, _STEPS = 0.7, 20
Predict = Callable[[], object]


def timed(predict: Predict) -> float:
    start = time.process_time()
    predict()
    return time.process_time() - start


def interleaved(contenders: Mapping[str, Predict], rounds: int) -> dict[str, list[float]]:
    """Returns the CPU seconds of each contender in each round."""
    names, times = list(contenders), {name: list[float]() for name in contenders}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(contenders[name]))
    return times


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(own, other, strict=True)), 3)


@torch.no_grad()
def measure_rows(targets: str, rank: int, rounds: int) -> dict[str, Any]:
    network = make_network("small", "cpu", torch.float32)
    noisy, timesteps, states, _ = make_batch("small", TENANTS, "cpu", torch.float32)
    adapters = make_adapters(network, targets, rank, TENANTS)
    batched, other, single = share_weights(network), share_weights(network), share_weights(network)
    rows = RowAdapters({"unet": batched})
    rows.set_rows(_rows_of(network, adapters))

    def predict(own: torch.nn.Module, chosen: slice = slice(None)) -> Tensor:
        result: Tensor = own(noisy[chosen], timesteps[chosen], states[chosen], return_dict=False)[0]
        return result

    def one_by_one() -> Tensor:
        parts = []
        for index, adapter in enumerate(adapters):
            with attach({"unet": single}, adapter, _MULTIPLIER):
                parts.append(predict(single, slice(index, index + 1)))
        return torch.cat(parts)

    def merged() -> Tensor:
        parts = []
        for index, adapter in enumerate(adapters):
            with MergedWeights({"unet": other}, [adapter]) as weights:
                weights.set_multipliers(lambda number, name: _MULTIPLIER)
                parts.append(predict(other, slice(index, index + 1)))
        return torch.cat(parts)

    expected = one_by_one()
    apart = float((predict(batched) - expected).abs().max() / expected.abs().max())
    times = interleaved(
        {
            "bare": lambda: predict(network),
            "batch": lambda: predict(batched),
            "one_by_one": one_by_one,
            "merged": merged,
        },
        rounds,
    )
    prepared = [_rows_of(network, adapters) for _ in range(rounds)]
    switches = [timed(lambda chosen=chosen: rows.set_rows(chosen)) for chosen in prepared]  # type: ignore[misc]
    bare, switch = statistics.median(times["bare"]), statistics.median(switches)
    return {
        "bare_ms": round(1000 * bare, 1),
        **{name: ratio(times[name], times["bare"]) for name in ("batch", "one_by_one", "merged")},
        "throughput": ratio(times["one_by_one"], times["batch"]),
        "switch_ms": round(1000 * switch, 1),
        "switch_share": round(switch / (_STEPS * 2 * bare), 4),  # four images of two rows are two batches of four
        "apart": float(f"{apart:.1e}"),
    }


def _rows_of(network: torch.nn.Module, adapters: Sequence[Adapter]) -> list[tuple[int, list[RowAdapter]]]:
    made = [RowAdapter(RowFactors.of({"unet": network}, adapter)) for adapter in adapters]
    for row in made:
        row.set_multipliers(lambda name: _MULTIPLIER)
    return [(1, [row]) for row in made]


def make_jobs(base: BaseModel, folder: Path, targets: str, rank: int) -> list[ImageJob]:
    jobs = []
    for index, adapter in enumerate(make_adapters(base.modules["unet"], targets, rank, TENANTS)):
        whole = Adapter(adapter.modules, base.family, base.fingerprint)
        (file,) = write_adapter(folder / f"{index}.safetensors", whole)
        settings = DrawSettings((index,), steps=_STEPS)
        prompt = parse_prompt(f"a red ring <lora:{index}:{_MULTIPLIER}>")
        jobs.append(ImageJob(prompt, parse_prompt("", is_negative=True), settings, ((file, file.name),)))
    return jobs


def draw_all(engine: ImageEngine, batches: Sequence[Sequence[ImageJob]]) -> None:
    for batch in batches:
        for result in engine.draw(batch):
            if isinstance(result, EngineError):
                raise result


def measure_jobs(targets: str, rank: int, rounds: int, *, compiled: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        base = load_base("tiny", device="cpu")
        jobs = make_jobs(base, Path(folder), targets, rank)
        engine = DynamicEngine(base, DynamicOptions())
        ways = {"one_by_one": [[job] for job in jobs], "batch": [jobs]}
        contenders: dict[str, Predict] = {
            name: lambda batches=batches: draw_all(engine, batches)  # type: ignore[misc]
            for name, batches in ways.items()
        }
        figures: dict[str, Any] = {}
        if compiled:
            start = time.perf_counter()
            options = CompiledOptions(rank=rank, targets=targets)
            other = CompiledEngine(load_base("tiny", device="cpu"), options)
            figures["compile_s"] = round(time.perf_counter() - start, 1)
            contenders["compiled_one_by_one"] = lambda: draw_all(other, ways["one_by_one"])
            contenders["compiled_batch"] = lambda: draw_all(other, ways["batch"])
        for contender in contenders.values():
            contender()
        times = interleaved(contenders, rounds)
        figures["one_by_one_ms"] = round(1000 * statistics.median(times["one_by_one"]), 1)
        return figures | {f"{name}_throughput": ratio(times["one_by_one"], times[name]) for name in list(times)[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["attention", "all"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compiled", action="store_true", help="Compile with inductor, which takes minutes.")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for targets in chosen.targets:
        case = {"targets": targets, "rank": chosen.rank}
        rows = measure_rows(targets, chosen.rank, chosen.rounds)
        print(json.dumps({"measure": "rows"} | case | rows), flush=True)
        jobs = measure_jobs(targets, chosen.rank, chosen.rounds, compiled=chosen.compiled)
        print(json.dumps({"measure": "jobs"} | case | jobs), flush=True)


if __name__ == "__main__":
    main()
