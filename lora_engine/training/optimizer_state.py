"""What optimisers keep: as plain tensors and JSON values for checkpoints, the rates they found, the means they hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_engine.training.checkpoint import Checkpoint


def estimated_rate(optimiser: torch.optim.Optimizer) -> float:
    """The factor on the rates that an optimiser has found by itself; 1 for those that find none."""
    return float(optimiser.param_groups[0].get("d", 1.0))


@contextmanager
def averaged(optimiser: torch.optim.Optimizer) -> Iterator[None]:
    """While it is open, the parameters are the mean that the optimiser keeps; afterwards, bit for bit as before.

    Does nothing for optimisers that keep none. Going there and back by the optimiser's own arithmetic would change the
    last bits, so that a run would depend on how often it was looked at.
    """
    if not has_mean(optimiser):
        yield
        return
    parameters = [value for group in optimiser.param_groups for value in group["params"]]
    before = [value.detach().clone() for value in parameters]
    take_mean(optimiser)
    try:
        yield
    finally:
        with torch.no_grad():
            for value, old in zip(parameters, before, strict=True):
                value.copy_(old)
        for group in optimiser.param_groups:
            group["train_mode"] = True


def has_mean(optimiser: torch.optim.Optimizer) -> bool:
    """Whether an optimiser keeps a mean of the parameters (schedule-free)."""
    return "train_mode" in optimiser.param_groups[0]


def take_mean(optimiser: torch.optim.Optimizer) -> None:
    """Puts the mean that an optimiser keeps into the parameters, for good; nothing where it keeps none."""
    if has_mean(optimiser):
        with torch.no_grad():
            optimiser.eval()  # type: ignore[attr-defined]


def export_state(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimiser: its tensors by name, and what is not a tensor, as JSON values.

    That is the state of each parameter, however deep a library nests it, and what an optimiser has learned about whole
    groups, such as the rate that it found.
    """
    tensors: dict[str, Tensor] = {}
    whole = optimiser.state_dict()
    groups = {number: _learned(group) for number, group in enumerate(whole["param_groups"])}
    facts = {
        "state": _split(whole["state"], "optimiser/state", tensors),
        "groups": _split(groups, "optimiser/groups", tensors),
    }
    return _apart(tensors), facts


def import_state(optimiser: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Puts a state that `export_state` gave back into an optimiser of the same parameters; copies the tensors."""
    facts = checkpoint.facts["optimiser"]
    state = _join(facts["state"], "optimiser/state", checkpoint.tensors)
    learned = _join(facts["groups"], "optimiser/groups", checkpoint.tensors)
    fresh = optimiser.state_dict()["param_groups"]
    groups = [{**group, **learned.get(str(number), {})} for number, group in enumerate(fresh)]
    optimiser.load_state_dict({"state": {int(number): of for number, of in state.items()}, "param_groups": groups})


def _learned(group: Mapping[str, Any]) -> dict[str, Any]:
    # The rate is set anew in each step. What is not finite (an unbounded growth) was set when it was built.
    kept = {key: value for key, value in group.items() if key not in ("params", "lr")}
    return {
        key: value
        for key, value in kept.items()
        if isinstance(value, Tensor | bool | int) or (isinstance(value, float) and math.isfinite(value))
    }


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Libraries let parameters and groups share a tensor; a file holds it once for each.
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        found[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return found


def _split(tree: Mapping[Any, Any], path: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    # The tree without its tensors, which go to `tensors` under their paths.
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
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value.clone()
    return tree
