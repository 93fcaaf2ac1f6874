"""Compares a training step (forward + backward) with an adapter with the frozen network and with PEFT.

    OMP_NUM_THREADS=1 python -m benchmarks.training_step [--rounds 5] [--shape small wide] [--targets attention ...]
    python -m benchmarks.training_step --device cuda --dtype bf16 --shape sd15 --batch 1 4 16 [--compile]

The floor is the frozen network: forward, and backward to its input, with the same batch. Rounds alternate between the
floor, PEFT and Loraline, and the first to run rotates. `time` is the median over rounds of the ratio to the floor of
the same round, in CPU time of this process on a CPU and in wall time on other devices. `saved` is the number of bytes
that autograd saves for the backward pass, without parameters. `operations` is the number of aten operations dispatched
in forward and backward, views included. Prints one JSON object per case.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_engine.adapters import DictTree, attach, create_adapter
from lora_engine.adapters.select import select_modules
from lora_engine.adapters.tree import module_shapes

_SD = {
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "attention_head_dim": 8,
}
_XL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "use_linear_projection": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "small": {**_SD, "sample_size": 32, "block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 768},
    "wide": {
        **_XL,
        "sample_size": 32,
        "block_out_channels": (128, 256, 512),
        "transformer_layers_per_block": (1, 2, 4),
        "attention_head_dim": (2, 4, 8),
        "cross_attention_dim": 768,
    },
    "sd15": {**_SD, "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], None]


class Counter(TorchDispatchMode):
    """Counts the aten operations that are dispatched while the context is open."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Contender:
    """A network with its adapter, and its training step."""

    def __init__(self, network: nn.Module, batch: tuple[Tensor, ...], *, to_input: bool = False) -> None:
        self.network, self._batch, self._to_input = network, batch, to_input
        self.trained = [value for value in network.parameters() if value.requires_grad]

    def loss(self) -> Tensor:
        noisy, timesteps, states, target = self._batch
        noisy = noisy.detach().requires_grad_(self._to_input)
        return F.mse_loss(self.network(noisy, timesteps, states, return_dict=False)[0].float(), target)

    def step(self) -> None:
        torch.autograd.backward(self.loss())
        for value in self.trained:
            value.grad = None

    def operations(self) -> int:
        with Counter() as counter:
            self.step()
        return counter.count

    def saved(self) -> int:
        excluded = {
            value.untyped_storage().data_ptr() for value in (*self.network.parameters(), *self.network.buffers())
        }
        sizes: dict[int, int] = {}

        def keep(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage.data_ptr() not in excluded:
                sizes[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            loss = self.loss()
        total = sum(sizes.values())
        torch.autograd.backward(loss)
        for value in self.trained:
            value.grad = None
        return total


def make_network(shape: str, device: str, dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = UNet2DConditionModel(**SHAPES[shape])
    return network.requires_grad_(False).eval().to(device, dtype)


def make_batch(shape: str, batch: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    settings, draw = SHAPES[shape], torch.Generator().manual_seed(1)
    side = settings["sample_size"]
    noisy, target = (torch.randn(batch, 4, side, side, generator=draw) for _ in range(2))
    states = torch.randn(batch, 77, settings["cross_attention_dim"], generator=draw)
    timesteps = torch.randint(1000, (batch,), generator=draw)
    return noisy.to(device, dtype), timesteps.to(device), states.to(device, dtype), target.to(device)


def make_contenders(
    shape: str, targets: str, rank: int, batch: int, device: str, dtype: torch.dtype, compiled: bool
) -> dict[str, Contender]:
    """The floor, PEFT and ours: one set of weights, and the same factors in PEFT and ours."""
    from peft import LoraConfig, inject_adapter_in_model

    frozen = make_network(shape, device, dtype)
    inputs = make_batch(shape, batch, device, dtype)
    names = select_modules(module_shapes(DictTree({"unet": frozen})), targets)
    adapter = create_adapter({"unet": frozen}, targets, "lora", rank, generator=torch.Generator().manual_seed(2))
    draw = torch.Generator().manual_seed(3)
    moved = {
        name: delta.with_factors({**delta.factors(), "up": 0.01 * torch.randn(delta.up.shape, generator=draw)})  # type: ignore[attr-defined]
        for name, delta in adapter.modules.items()
    }
    ours, peers = share_weights(frozen), share_weights(frozen)
    attach({"unet": ours}, type(adapter)(moved), trainable=True)
    exact = "|".join(name.removeprefix("unet.").replace(".", r"\.") for name in names)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=f"({exact})"), peers)
    for name, delta in moved.items():
        layer = peers.get_submodule(name.removeprefix("unet."))
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(delta.down)  # type: ignore[attr-defined]
            layer.lora_B["default"].weight.copy_(delta.up)  # type: ignore[attr-defined]
    peers.to(device)
    if compiled:
        ours.compile_repeated_blocks()  # type: ignore[operator]
    return {
        "floor": Contender(frozen, inputs, to_input=True),
        "peft": Contender(peers, inputs),
        "loraline": Contender(ours, inputs),
    }


def share_weights(network: nn.Module) -> nn.Module:
    """Returns another module tree with the same weights."""
    memo = {id(value): value for value in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, memo)


def agree(contenders: dict[str, Contender]) -> float:
    """Returns the largest relative difference between our gradients and PEFT's."""
    gradients = []
    for name in ("peft", "loraline"):
        torch.autograd.backward(contenders[name].loss())
        pairs = [(key, value) for key, value in contenders[name].network.named_parameters() if value.requires_grad]
        named = {_plain(key): value.grad for key, value in pairs}
        gradients.append({key: value.flatten(1) for key, value in named.items() if value is not None})
        for _, value in pairs:
            value.grad = None
    first, second = gradients
    if first.keys() != second.keys():
        raise SystemExit(f"PEFT and Loraline train different factors: {sorted(first.keys() ^ second.keys())[:4]}")
    return max(float((first[key] - second[key]).norm() / first[key].norm()) for key in first)


def _plain(name: str) -> str:
    for peft_name, our_name in (
        (".lora_A.default.weight", ".down"),
        (".lora_B.default.weight", ".up"),
        (".factors", ""),
    ):
        name = name.replace(peft_name, our_name)
    return name


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
    if rounds:
        pairs = zip(times["loraline"], times["peft"], strict=True)
        figures["loraline_to_peft"] = round(statistics.median(ours / peft for ours, peft in pairs), 3)
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
