"""Splits the frozen network among the processes of a run (FSDP), for bases that do not fit one GPU.

Each process keeps a share of every weight. The weights of a block are gathered while it computes, forward and backward.
Adapters are not split: they are small, and every process keeps all of them, as without sharding.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from lora_engine.adapters.adapted import AdaptedLayer, innermost
from lora_engine.bases.base import BaseModel
from lora_engine.errors import SettingsError
from lora_engine.training.device import denoisers_of
from lora_engine.training.distributed import ProcessGroup


def place_beside_network(base: BaseModel, device: torch.device) -> None:
    """Moves all but the network to a device; `shard_network` moves the network, of which the device holds a share."""
    networks = [network for _, network in denoisers_of(base)]
    for module in {*base.modules.values(), *filter(None, [getattr(base, "vae", None)])}:
        if module not in networks:
            module.to(device)
    base.device = device


def shard_network(base: BaseModel, group: ProcessGroup) -> None:
    """Splits the network among the processes, with everything attached to it; collective.

    Raises:
        SettingsError: The network has no blocks that can be split.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(base.device.type, (group.size,))
    # FSDP warns of in-place changes of a block's output. The networks make none: the results are those without FSDP.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for name, network in denoisers_of(base):
        own = {value for layer in _adapted(network) for value in layer.factors.parameters()}
        for layer in _adapted(network):
            _read_when_gathered(layer, base.device)
            layer.factors.to(base.device)
        for block in _blocks(network, name):
            fully_shard(block, mesh=mesh, ignored_params=own, reshard_after_forward=True)
        fully_shard(network, mesh=mesh, ignored_params=own, reshard_after_forward=True)


def _adapted(network: nn.Module) -> list[AdaptedLayer]:
    return [module for module in network.modules() if isinstance(module, AdaptedLayer)]


def _read_when_gathered(layer: AdaptedLayer, device: torch.device) -> None:
    """Makes an adapted layer read the weight in each use; a fused kernel keeps that of the time of its creation."""
    layer.fused_forward = layer.shared = None
    weight: Any = innermost(layer).weight
    innermost(layer).__dict__["meta_weight"] = torch.empty((), dtype=weight.dtype, device=device).expand(weight.shape)


def _blocks(network: Any, name: str) -> list[nn.Module]:
    classes = {*(getattr(network, "_repeated_blocks", None) or getattr(network, "_no_split_modules", None) or ())}
    blocks = [module for module in network.modules() if type(module).__name__ in classes]
    if not blocks:
        raise SettingsError("running.shard: the network has no blocks", where=name, remedy="leave running.shard out")
    return blocks
