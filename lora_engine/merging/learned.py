"""Learning the weights of a merge: a few scalars, by gradient through the base's denoising loss.

The factors stay as they are; the merge itself is the exact weighted sum that the scalars say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_engine.adapters import Adapter, Delta, LayerOp, as_tree, innermost
from lora_engine.adapters.attach import check_fit
from lora_engine.adapters.layer import bias_of
from lora_engine.bases.base import BaseModel
from lora_engine.data.manifest import Manifest
from lora_engine.errors import DataError, NonFiniteError
from lora_engine.merging.spec import Learned, Weight
from lora_engine.merging.weights import weights_by_module
from lora_engine.progress import Progress, no_progress
from lora_engine.seeds import generator
from lora_engine.training.batches import Batch
from lora_engine.training.determinism import deterministic, gradients_off
from lora_engine.training.examples import Conditioner, Encoder, Example, read_examples
from lora_engine.training.methods import predict

Loss = Callable[[], Tensor]
_BLOCK = re.compile(r"[^.]+\.\w*blocks\.\d+(?=\.|$)")


def learn_weights(
    adapters: Sequence[Adapter],
    start: Sequence[Weight],
    base: BaseModel | Mapping[str, nn.Module],
    losses: Sequence[Loss],
    options: Learned,
    *,
    progress: Progress = no_progress,
) -> list[Weight]:
    """The weights whose merge makes the mean of the losses smallest, by Adam from a start.

    On a CPU the result depends on the arguments alone.

    Args:
        adapters: For the base; not changed, and not attached to it.
        start: One weight an adapter, as for a merge.
        base: What the losses compute with; its weights are not changed.
        losses: Each computes one part through the base and keeps the graph; one graph is held at a time.
        options: See `Learned`.
        progress: Told after each step, with the mean loss before it.

    Returns:
        One weight an adapter: a number where one number was given and one is learned, else numbers by pattern.

    Raises:
        AdapterError: An adapter does not fit the base.
        NonFiniteError: A loss is not finite.
    """
    tree = as_tree(base)
    for adapter in adapters:
        check_fit(tree, adapter)
    groups = [
        sorted({_group(name, options.per) for name in adapter.modules}) if adapter.modules else []
        for adapter in adapters
    ]
    components = {name.partition(".")[0] for adapter in adapters for name in adapter.modules}
    parts: Mapping[str, nn.Module] = base if isinstance(base, Mapping) else base.modules
    roots = [module for name, module in parts.items() if name in components]
    device = next(innermost(tree.get_module(next(iter(adapters[0].modules)))).parameters()).device
    offsets = [torch.zeros(len(names), device=device, requires_grad=True) for names in groups]
    tables = [weights_by_module(weight, adapter.modules) for weight, adapter in zip(start, adapters, strict=True)]
    sites = _sites(adapters, tables, groups, offsets, options.per)
    with gradients_off(roots), deterministic(wanted=device.type == "cpu"), _weighed(tree, sites):
        _descend(offsets, losses, options, progress)
    moved = [dict(zip(names, offset.tolist(), strict=True)) for names, offset in zip(groups, offsets, strict=True)]
    return [_result(weight, table, move, options.per) for weight, table, move in zip(start, tables, moved, strict=True)]


def denoising_losses(
    base: BaseModel, dataset: Path, work: Path, *, seed: int, timesteps: int, trains_text: bool
) -> list[Loss]:
    """The denoising loss of each picture of a dataset with its caption, under noise and timesteps that never change.

    Args:
        base: With nothing attached to it now; the losses compute with whatever is on it when they are called.
        dataset: A captioned folder with a manifest; its pictures to train on are taken.
        work: Where encoded pictures and texts are kept.
        seed: Of the noise, which is drawn by the picture's digest.
        timesteps: How many, in the middles of equal parts of the schedule.
        trains_text: Whether the text encoders have to be run each time.

    Raises:
        DataError: No pictures, or pictures without a caption.
    """
    examples = read_examples(dataset, Manifest.load(dataset), "train")
    if not examples:
        raise DataError("there are no pictures to learn from", where=str(dataset), remedy="lower heldout, or add some")
    encoder = Encoder(base, work)
    encoder.prepare(examples, [], lambda: None)
    conditioner: Conditioner = base.encode_text if trains_text else encoder.conditioning
    return [partial(_loss, base, encoder, conditioner, example, seed, timesteps) for example in examples]


def _loss(
    base: BaseModel, encoder: Encoder, conditioner: Conditioner, example: Example, seed: int, timesteps: int
) -> Tensor:
    count = base.noise.timesteps
    grid = ((torch.arange(timesteps) + 0.5) * count / timesteps).to(torch.int64).clamp(max=count - 1)
    clean = encoder.latents(example)
    noise = torch.randn(timesteps, *clean.shape, generator=generator(seed, "merge", "noise", example.digest))
    batch = Batch(
        latents=clean.expand(timesteps, *clean.shape).to(base.device),
        noise=noise.to(base.device),
        timesteps=grid.to(base.device),
        conditioning=conditioner([example.caption], example.size).index([0] * timesteps).to(base.device),
        instances=timesteps,
    )
    predicted, target = predict(base, batch)
    return F.mse_loss(predicted, target)


def _descend(offsets: Sequence[Tensor], losses: Sequence[Loss], options: Learned, progress: Progress) -> None:
    optimiser = torch.optim.Adam(list(offsets), lr=options.learning_rate)
    for step in range(options.steps):
        optimiser.zero_grad(set_to_none=True)
        mean = 0.0
        for loss in losses:
            part = loss() / len(losses)
            mean += float(part.detach())
            torch.autograd.backward(part)
        if options.pull:
            torch.autograd.backward(options.pull * torch.stack([offset.square().sum() for offset in offsets]).sum())
        if not torch.isfinite(torch.tensor(mean)):
            raise NonFiniteError(
                f"the loss of the merge is {mean!r} at step {step + 1}",
                remedy="lower learning_rate, or start from smaller weights",
            )
        optimiser.step()
        progress(step + 1, options.steps, {"loss": mean})


_Term = tuple[Delta, float, Tensor, int]


def _sites(
    adapters: Sequence[Adapter],
    tables: Sequence[Mapping[str, float]],
    groups: Sequence[Sequence[str]],
    offsets: Sequence[Tensor],
    per: str,
) -> dict[str, list[_Term]]:
    sites: dict[str, list[_Term]] = {}
    for adapter, table, names, offset in zip(adapters, tables, groups, offsets, strict=True):
        for name, delta in adapter.modules.items():
            place = names.index(_group(name, per))
            sites.setdefault(name, []).append((delta, table[name], offset, place))
    return sites


@contextmanager
def _weighed(tree: Any, sites: Mapping[str, Sequence[_Term]]) -> Iterator[None]:
    """Each layer adds its deltas, each times its weight, which keeps the graph."""
    handles = []
    try:
        for name, terms in sites.items():
            layer = innermost(tree.get_module(name))
            weight: Tensor = layer.weight  # type: ignore[assignment]
            device = weight.device
            here = [
                (delta.with_factors({key: factor.to(device) for key, factor in delta.factors().items()}), *rest)
                for delta, *rest in terms
            ]
            handles.append(layer.register_forward_hook(partial(_add_deltas, here, LayerOp.of(layer))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_deltas(terms: Sequence[Any], op: LayerOp, layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    total = out
    for delta, start, offset, place in terms:
        # A delta's part of the output is linear in its strength, so it is taken at 1 and weighed outside.
        part = delta.forward(inputs[0], out, weight, bias_of(layer), op) - out
        total = total + (start + offset[place]).to(part.dtype) * part
    return total


def _group(name: str, per: str) -> str:
    """The path above a module that shares a weight: its block, its component, or everything."""
    if per == "adapter":
        return "*"
    block = _BLOCK.match(name)
    if block:
        return block.group()
    parts = name.split(".")
    return parts[0] if parts[0].startswith("text_encoder") else ".".join(parts[:2])


def _result(start: Weight, table: Mapping[str, float], moved: Mapping[str, float], per: str) -> Weight:
    if isinstance(start, Mapping):
        return {name: number + moved[_group(name, per)] for name, number in table.items()}
    if per == "adapter":
        return start + moved["*"]
    return {group: start + move for group, move in moved.items()}
