"""Compares denoising with several adapters with the bare network and with PEFT.

    OMP_NUM_THREADS=1 python -m benchmarks.composing [--rounds 15] [--shape small] [--targets attention all]

Each contender has the same network weights and the same three adapters, and predicts the noise of two rows (guidance).
`constant` merges once; `schedule` changes all weights before each prediction and merges again; `attached` adds the
differences to the outputs; `peft` has three active adapters of PEFT. Rounds alternate between the contenders, and the
first to run rotates. Figures are medians over rounds of the ratio to the bare network in the same round, in CPU time.
`apart` is the largest difference to the prediction of PEFT, as a share of its largest value.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.step_contenders import SHAPES, make_batch, make_network, share_weights
from lora_engine.adapters import Adapter, attach, create_adapter
from lora_engine.adapters.merged_weights import MergedWeights

_ADAPTERS = 3
_MULTIPLIERS = (0.7, 0.4, -0.3)
Predict = Callable[[], Tensor]


def make_adapters(network: nn.Module, targets: str, rank: int, count: int = _ADAPTERS) -> list[Adapter]:
    """Returns adapters with random factors on the same layers."""
    adapters = []
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        adapter = create_adapter({"unet": network}, targets, "lora", rank, generator=draw)
        modules = {
            name: delta.with_factors(
                {**delta.factors(), "up": 0.01 * torch.randn(delta.factors()["up"].shape, generator=draw)}
            )
            for name, delta in adapter.modules.items()
        }
        adapters.append(Adapter(modules))
    return adapters


def make_contenders(shape: str, targets: str, rank: int) -> dict[str, Predict]:
    """Returns the predictions to time, by name; the first is the bare network."""
    network = make_network(shape, "cpu", torch.float32)
    noisy, timesteps, states, _ = make_batch(shape, 2, "cpu", torch.float32)
    adapters = make_adapters(network, targets, rank)

    def predictor(own: nn.Module, before: Callable[[], None] = lambda: None) -> Predict:
        def predict() -> Tensor:
            before()
            result: Tensor = own(noisy, timesteps, states, return_dict=False)[0]
            return result

        return predict

    networks = {name: share_weights(network) for name in ("constant", "schedule", "attached", "peft")}
    constant = MergedWeights({"unet": networks["constant"]}, adapters)
    constant.set_multipliers(lambda index, name: _MULTIPLIERS[index])
    schedule, step = MergedWeights({"unet": networks["schedule"]}, adapters), 0

    def change() -> None:
        nonlocal step
        step += 1
        schedule.set_multipliers(lambda index, name: _MULTIPLIERS[index] + 1e-9 * step)

    for adapter, multiplier in zip(adapters, _MULTIPLIERS, strict=True):
        attach({"unet": networks["attached"]}, adapter, multiplier)
    _inject(networks["peft"], adapters)
    steps = {name: predictor(own, change if name == "schedule" else lambda: None) for name, own in networks.items()}
    return {"bare": predictor(network), **steps}


def _inject(network: nn.Module, adapters: Sequence[Adapter]) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    for number, adapter in enumerate(adapters):
        exact = "|".join(name.removeprefix("unet.").replace(".", r"\.") for name in adapter.modules)
        rank = next(iter(adapter.modules.values())).rank
        assert rank is not None
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=f"({exact})")
        inject_adapter_in_model(config, network, adapter_name=f"a{number}")
    names = [f"a{number}" for number in range(len(adapters))]
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)
    for number, adapter in enumerate(adapters):
        for name, delta in adapter.modules.items():
            layer: Any = network.get_submodule(name.removeprefix("unet."))
            with torch.no_grad():
                layer.lora_A[f"a{number}"].weight.copy_(delta.factors()["down"])
                layer.lora_B[f"a{number}"].weight.copy_(delta.factors()["up"])
            layer.scaling[f"a{number}"] = _MULTIPLIERS[number]


@torch.no_grad()
def measure(shape: str, targets: str, rank: int, rounds: int) -> dict[str, Any]:
    """Returns the ratios of one case."""
    contenders = make_contenders(shape, targets, rank)
    outputs = {name: predict() for name, predict in contenders.items()}
    largest = outputs["peft"].abs().max()
    apart = {name: float((outputs[name] - outputs["peft"]).abs().max() / largest) for name in outputs}
    names, times = list(contenders), {name: list[float]() for name in contenders}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.process_time()
            contenders[name]()
            times[name].append(time.process_time() - start)
    ratios = {
        name: statistics.median(own / bare for own, bare in zip(times[name], times["bare"], strict=True))
        for name in names[1:]
    }
    return {
        "bare_ms": round(1000 * statistics.median(times["bare"]), 1),
        **{name: round(ratio, 3) for name, ratio in ratios.items()},
        "apart": {name: float(f"{apart[name]:.1e}") for name in names[1:-1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["small"], choices=list(SHAPES))
    parser.add_argument("--targets", nargs="+", default=["attention", "all"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for shape in chosen.shape:
        for targets in chosen.targets:
            case = {"shape": shape, "targets": targets, "rank": chosen.rank}
            print(json.dumps(case | measure(shape, targets, chosen.rank, chosen.rounds)), flush=True)


if __name__ == "__main__":
    main()
