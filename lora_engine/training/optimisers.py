"""Optimisers by name, and their state as plain tensors. What they move, and when, is the loop's affair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_engine.registries import Registry
from lora_engine.training.checkpoint import Checkpoint
from lora_engine.training.phases import ParameterGroup

Build = Callable[[Sequence[ParameterGroup], float], torch.optim.Optimizer]

optimisers: Registry[Build] = Registry("optimiser")


def _adamw(groups: Sequence[ParameterGroup], weight_decay: float) -> torch.optim.Optimizer:
    # Loshchilov & Hutter 2019. One kernel for all tensors where the device has it.
    devices = {value.device.type for group in groups for value in group.parameters.values()}
    return torch.optim.AdamW(
        [{"params": list(group.parameters.values()), "lr": group.learning_rate} for group in groups],
        weight_decay=weight_decay,
        fused=devices <= {"cpu", "cuda"},
    )


optimisers.add("adamw", _adamw)


def export_state(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The state of an optimiser: its tensors by name, and what is not a tensor."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for number, state in optimiser.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser/{number}/{key}"] = value
            else:
                scalars.setdefault(str(number), {})[key] = value
    return tensors, scalars


def import_state(optimiser: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Puts a state that `export_state` gave back into an optimiser of the same parameters; copies the tensors."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in checkpoint.tensors.items():
        if name.startswith("optimiser/"):
            _, number, key = name.split("/", 2)
            state.setdefault(int(number), {})[key] = value.clone()
    for number, scalars in checkpoint.facts["optimiser"].items():
        state.setdefault(int(number), {}).update(scalars)
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
