"""The networks of `training_step`: the frozen one, PEFT's, kohya's and ours, with the same weights and factors.

kohya's own code is that of a checkout of sd-scripts, which SD_SCRIPTS names.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_engine.adapters import attach, create_adapter

CHECKOUT = os.environ.get("SD_SCRIPTS", "")
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


class Counter(TorchDispatchMode):
    """Counts the aten operations that are dispatched while the context is open."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Contender:
    """A network with its adapter, and its training step.

    Args:
        network: The network, with the adapter attached.
        batch: Noisy latents, timesteps, text states and target.
        factors: Names `MODULE.down` and `MODULE.up` to the trained factors; empty for the floor.
        to_input: Computes the gradient of the input, which the floor has instead of factors.
        autocast: Computes in the dtype of the network, as kohya's scripts do with factors in fp32.
    """

    def __init__(
        self,
        network: nn.Module,
        batch: tuple[Tensor, ...],
        factors: Mapping[str, Tensor],
        *,
        to_input: bool = False,
        autocast: bool = False,
    ) -> None:
        self.network, self.factors, self._batch = network, factors, batch
        self._to_input, self._autocast = to_input, autocast

    def loss(self) -> Tensor:
        noisy, timesteps, states, target = self._batch
        noisy = noisy.detach().requires_grad_(self._to_input)
        with torch.autocast(noisy.device.type, noisy.dtype, enabled=self._autocast):
            predicted = self.network(noisy, timesteps, states, return_dict=False)[0]
        return F.mse_loss(predicted.float(), target)

    def step(self) -> None:
        torch.autograd.backward(self.loss())
        self.clear()

    def clear(self) -> None:
        for value in self.factors.values():
            value.grad = None

    def operations(self) -> int:
        with Counter() as counter:
            self.step()
        return counter.count

    def saved(self) -> int:
        frozen = (*self.network.parameters(), *self.network.buffers())
        excluded = {value.untyped_storage().data_ptr() for value in (*frozen, *self.factors.values())}
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
        self.clear()
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
    """Returns the floor, PEFT, kohya if there is a checkout, and ours: one set of weights and the same factors."""
    frozen = make_network(shape, device, dtype)
    inputs = make_batch(shape, batch, device, dtype)
    adapter = create_adapter({"unet": frozen}, targets, "lora", rank, generator=torch.Generator().manual_seed(2))
    draw = torch.Generator().manual_seed(3)
    moved = {
        name: delta.with_factors({**delta.factors(), "up": 0.01 * torch.randn(delta.up.shape, generator=draw)})  # type: ignore[attr-defined]
        for name, delta in adapter.modules.items()
    }
    values = {
        f"{name.removeprefix('unet.')}.{factor}": value
        for name, delta in moved.items()
        for factor, value in delta.factors().items()
    }
    contenders = {"floor": Contender(frozen, inputs, {}, to_input=True)}
    contenders["peft"] = _contender(share_weights(frozen), inputs, values, attach_peft, rank)
    if CHECKOUT:
        contenders["kohya"] = _contender(share_weights(frozen), inputs, values, attach_kohya, rank)
    ours = share_weights(frozen)
    attach({"unet": ours}, type(adapter)(moved), trainable=True)
    if compiled:
        ours.compile_repeated_blocks()  # type: ignore[operator]
    named = {name.replace(".factors", ""): value for name, value in ours.named_parameters() if value.requires_grad}
    contenders["loraline"] = Contender(ours, inputs, named)
    return contenders


def _contender(
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    values: Mapping[str, Tensor],
    attach_peer: Callable[[nn.Module, list[str], int], dict[str, nn.Parameter]],
    rank: int,
) -> Contender:
    """Returns a peer with the adapter attached by its own code, and the values of our factors."""
    modules = [name.removesuffix(".down") for name in values if name.endswith(".down")]
    factors = attach_peer(network, modules, rank)
    if factors.keys() != values.keys():
        raise SystemExit(f"a peer trains different factors: {sorted(factors.keys() ^ values.keys())[:4]}")
    with torch.no_grad():
        for name, parameter in factors.items():
            parameter.copy_(values[name].reshape(parameter.shape))
            parameter.data = parameter.data.to(inputs[0].device)
    mixed = attach_peer is attach_kohya and inputs[0].dtype != torch.float32
    return Contender(network, inputs, factors, autocast=mixed)


def attach_peft(network: nn.Module, modules: list[str], rank: int) -> dict[str, nn.Parameter]:
    """Attaches PEFT's LoRA to the modules, in place; returns its factors."""
    from peft import LoraConfig, inject_adapter_in_model

    exact = "|".join(name.replace(".", r"\.") for name in modules)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=f"({exact})"), network)
    parts = {".lora_A.default.weight": ".down", ".lora_B.default.weight": ".up"}
    return {
        name.removesuffix(theirs) + ours: value
        for name, value in network.named_parameters()
        for theirs, ours in parts.items()
        if name.endswith(theirs)
    }


def attach_kohya(network: nn.Module, modules: list[str], rank: int) -> dict[str, nn.Parameter]:
    """Attaches the LoRA of kohya's checkout to the modules, in place; returns its factors.

    Its network adapts every layer of the blocks, as with `conv_dim`; those that are not among the modules are dropped.
    """
    peer = _import_kohya().LoRANetwork([], network, lora_dim=rank, alpha=rank, conv_lora_dim=rank, conv_alpha=rank)
    names = {f"lora_unet_{name.replace('.', '_')}": name for name in modules}
    peer.unet_loras = [layer for layer in peer.unet_loras if layer.lora_name in names]
    peer.apply_to([], network, apply_text_encoder=False)
    return {
        f"{names[layer.lora_name]}.{factor}": getattr(layer, f"lora_{factor}").weight
        for layer in peer.unet_loras
        for factor in ("down", "up")
    }


def _import_kohya() -> Any:
    """Returns `networks.lora` of the checkout; image libraries that it imports and does not use may be missing."""
    sys.path.insert(0, CHECKOUT)
    unused = ("cv2", "torchvision", "torchvision.transforms")
    missing = [name for name in unused if importlib.util.find_spec(name.partition(".")[0]) is None]
    with patch.dict(sys.modules, {name: MagicMock() for name in missing}):
        module = importlib.import_module("networks.lora")
    module.logger.setLevel("WARNING")
    return module


def share_weights(network: nn.Module) -> nn.Module:
    """Returns another module tree with the same weights."""
    memo = {id(value): value for value in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, memo)


def agree(contenders: Mapping[str, Contender]) -> float:
    """Returns the largest relative difference between our gradients and those of a peer."""
    gradients: dict[str, dict[str, Tensor]] = {}
    for name in list(contenders)[1:]:
        torch.autograd.backward(contenders[name].loss())
        factors = contenders[name].factors.items()
        gradients[name] = {key: value.grad.flatten(1) for key, value in factors if value.grad is not None}
        contenders[name].clear()
    ours = gradients.pop("loraline")
    if any(theirs.keys() != ours.keys() for theirs in gradients.values()):
        raise SystemExit("a peer has gradients of other factors")
    return max(
        float((theirs[key] - ours[key]).norm() / theirs[key].norm()) for theirs in gradients.values() for key in ours
    )
