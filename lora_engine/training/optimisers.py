"""Optimisers by name. What they are given moves; when, is the loop's affair."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lora_engine.registries import Registry
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
