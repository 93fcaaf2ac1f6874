"""Exports and imports optimizer state for checkpoints, and reads estimated rates and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_engine.training.checkpoint import Checkpoint


def estimated_rate(optimizer: torch.optim.Optimizer) -> float:
    """Returns the optimizer's estimated factor on the rates; 1 if it estimates none."""
    return float(optimizer.param_groups[0].get("d", 1.0))


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Swaps the optimizer's averaged weights into the parameters; restores them bit for bit on exit.

    Does nothing for optimizers without an average. The optimizer's own switch back would change the last bits, so a run
    would depend on the number of validations.
    """
    if not has_average(optimizer):
        yield
        return
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    previous = [value.detach().clone() for value in parameters]
    apply_average(optimizer)
    try:
        yield
    finally:
        with torch.no_grad():
            for value, old in zip(parameters, previous, strict=True):
                value.copy_(old)
        for group in optimizer.param_groups:
            group["train_mode"] = True


def has_average(optimizer: torch.optim.Optimizer) -> bool:
    """Returns True if an optimizer averages the parameters (schedule-free)."""
    return "train_mode" in optimizer.param_groups[0]


def apply_average(optimizer: torch.optim.Optimizer) -> None:
    """Replaces the parameters by the optimizer's average; does nothing if it has none."""
    if has_average(optimizer):
        with torch.no_grad():
            optimizer.eval()  # type: ignore[attr-defined]


def export_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the state of an optimizer: its tensors by name, and all other values as JSON.

    Includes the state of each parameter, nested as a library likes, and group values that the optimizer learned, such
    as an estimated rate.
    """
    tensors: dict[str, Tensor] = {}
    whole = optimizer.state_dict()
    groups = {number: _learned_values(group) for number, group in enumerate(whole["param_groups"])}
    facts = {
        "state": _split(whole["state"], "optimiser/state", tensors),
        "groups": _split(groups, "optimiser/groups", tensors),
    }
    return _unshared(tensors), facts


def import_state(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Restores a state of `export_state` into an optimizer of the same parameters; copies the tensors."""
    facts = checkpoint.facts["optimiser"]
    state = _join(facts["state"], "optimiser/state", checkpoint.tensors)
    learned = _join(facts["groups"], "optimiser/groups", checkpoint.tensors)
    fresh = optimizer.state_dict()["param_groups"]
    groups = [{**group, **learned.get(str(number), {})} for number, group in enumerate(fresh)]
    optimizer.load_state_dict(
        {"state": {int(number): values for number, values in state.items()}, "param_groups": groups}
    )


def _learned_values(group: Mapping[str, Any]) -> dict[str, Any]:
    # The loop sets the rate in each step. Infinite values (an unbounded growth) are options, not state.
    values = {key: value for key, value in group.items() if key not in ("params", "lr")}
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, Tensor | bool | int) or (isinstance(value, float) and math.isfinite(value))
    }


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Libraries share tensors between parameters and groups; safetensors refuses shared memory.
    pointers: set[int] = set()
    unshared: dict[str, Tensor] = {}
    for name, value in tensors.items():
        unshared[name] = value.clone() if value.data_ptr() in pointers else value
        pointers.add(value.data_ptr())
    return unshared


def _split(tree: Mapping[Any, Any], path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    # Returns the tree without its tensors, which are added to `tensors` under their paths.
    rest: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Tensor):
            tensors[f"{path}/{key}"] = value
        elif isinstance(value, Mapping):
            rest[str(key)] = _split(value, f"{path}/{key}", tensors)
        else:
            rest[str(key)] = value
    return rest


def _join(rest: Mapping[str, Any], path: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    tree: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in rest.items()}
    for name, value in tensors.items():
        if not name.startswith(f"{path}/"):
            continue
        *parents, key = name[len(path) + 1 :].split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value.clone()
    return tree
