"""Learns the weights of a merge by gradient descent on the base's denoising loss.

The factors do not change. The merge is the exact sum with the learned weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_engine.adapters import Adapter, Delta, LayerOp, as_tree, innermost
from lora_engine.adapters.attachment import check_fit
from lora_engine.adapters.layer import bias_of
from lora_engine.bases.base import BaseModel
from lora_engine.data.manifest import Manifest
from lora_engine.errors import DataError, NonFiniteError
from lora_engine.merging.spec import Weight
from lora_engine.merging.weights import weights_by_module
from lora_engine.progress import Progress, no_progress
from lora_engine.seeds import generator
from lora_engine.training.batches import Batch
from lora_engine.training.denoising import predict
from lora_engine.training.determinism import deterministic, gradients_off
from lora_engine.training.examples import Conditioner, Encoder, Example, encode_captions, read_examples

if TYPE_CHECKING:
    from lora_engine.merging.methods.learned import Learned

LossFunction = Callable[[], Tensor]
_BLOCK = re.compile(r"[^.]+\.\w*blocks\.\d+(?=\.|$)")


def learn_weights(
    adapters: Sequence[Adapter],
    start: Sequence[Weight],
    base: BaseModel | Mapping[str, nn.Module],
    losses: Sequence[LossFunction],
    options: Learned,
    *,
    progress: Progress = no_progress,
) -> list[Weight]:
    """Returns the weights that minimize the mean of the losses, found by Adam.

    On a CPU the result depends only on the arguments.

    Args:
        adapters: Adapters for the base, which are neither changed nor attached.
        start: Initial weights, one per adapter, as for a merge.
        base: The model that the losses use; its weights do not change.
        losses: Each computes one part of the loss and keeps the graph; one graph is in memory at a time.
        options: See `Learned`.
        progress: Called after each step with the mean loss before it.

    Returns:
        One weight per adapter: a number if the start is a number and `per` is `adapter`, else numbers by pattern.

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
    weighted_deltas = _weighted_deltas(adapters, tables, groups, offsets, options.per)
    with gradients_off(roots), deterministic(enabled=device.type == "cpu"), _deltas_added(tree, weighted_deltas):
        _descend(offsets, losses, options, progress)
    learned = [dict(zip(names, offset.tolist(), strict=True)) for names, offset in zip(groups, offsets, strict=True)]
    return [
        _result(weight, table, changes, options.per)
        for weight, table, changes in zip(start, tables, learned, strict=True)
    ]


def denoising_losses(
    base: BaseModel, dataset: Path, work: Path, *, seed: int, timesteps: int, trains_text: bool
) -> list[LossFunction]:
    """Returns the denoising loss of each training image of a dataset, with fixed noise and timesteps.

    Args:
        base: The model without adapters; the losses use the adapters that are attached when they are called.
        dataset: A captioned folder with a manifest.
        work: Cache folder of encoded images and texts.
        seed: Random seed of the noise, combined with the digest of the image.
        timesteps: Number of timesteps, in the middles of equal parts of the schedule.
        trains_text: True runs the text encoders in each step.

    Raises:
        DataError: There are no images, or an image has no caption.
    """
    examples = read_examples(dataset, Manifest.load(dataset), "train")
    if not examples:
        raise DataError("there are no images to learn from", where=str(dataset), remedy="lower heldout, or add images")
    encoder = Encoder(base, work)
    encoder.prepare(examples, [])
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
        conditioning=encode_captions(base, conditioner, [example.caption], [example]).index([0] * timesteps),
        instances=timesteps,
    )
    predicted, target = predict(base, batch)
    return F.mse_loss(predicted, target)


def _descend(offsets: Sequence[Tensor], losses: Sequence[LossFunction], options: Learned, progress: Progress) -> None:
    optimizer = torch.optim.Adam(list(offsets), lr=options.learning_rate)
    for step in range(options.steps):
        optimizer.zero_grad(set_to_none=True)
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
        optimizer.step()
        progress(step + 1, options.steps, {"loss": mean})


_WeightedDelta = tuple[Delta, float, Tensor, int]
"""A delta, its initial weight, the tensor of learned offsets, and its index there."""


def _weighted_deltas(
    adapters: Sequence[Adapter],
    tables: Sequence[Mapping[str, float]],
    groups: Sequence[Sequence[str]],
    offsets: Sequence[Tensor],
    per: str,
) -> dict[str, list[_WeightedDelta]]:
    by_module: dict[str, list[_WeightedDelta]] = {}
    for adapter, table, names, offset in zip(adapters, tables, groups, offsets, strict=True):
        for name, delta in adapter.modules.items():
            index = names.index(_group(name, per))
            by_module.setdefault(name, []).append((delta, table[name], offset, index))
    return by_module


@contextmanager
def _deltas_added(tree: Any, weighted_deltas: Mapping[str, Sequence[_WeightedDelta]]) -> Iterator[None]:
    """Adds the weighted deltas to the output of each layer, with gradients for the weights."""
    handles = []
    try:
        for name, deltas in weighted_deltas.items():
            layer = innermost(tree.get_module(name))
            weight: Tensor = layer.weight  # type: ignore[assignment]
            device = weight.device
            moved = [
                (delta.with_factors({key: factor.to(device) for key, factor in delta.factors().items()}), *rest)
                for delta, *rest in deltas
            ]
            handles.append(layer.register_forward_hook(partial(_add_deltas, moved, LayerOp.of(layer))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add_deltas(
    deltas: Sequence[Any], op: LayerOp, layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor
) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    total = out
    for delta, start, offset, index in deltas:
        # The output is linear in the multiplier: compute it at 1, and weight it outside.
        part = delta.forward(inputs[0], out, weight, bias_of(layer), op) - out
        total = total + (start + offset[index]).to(part.dtype) * part
    return total


def _group(name: str, per: str) -> str:
    """Returns the pattern of the modules that share a weight: a block, a component, or all."""
    if per == "adapter":
        return "*"
    block = _BLOCK.match(name)
    if block:
        return block.group()
    parts = name.split(".")
    return parts[0] if parts[0].startswith("text_encoder") else ".".join(parts[:2])


def _result(start: Weight, table: Mapping[str, float], changes: Mapping[str, float], per: str) -> Weight:
    if isinstance(start, Mapping):
        return {name: number + changes[_group(name, per)] for name, number in table.items()}
    if per == "adapter":
        return start + changes["*"]
    return {group: start + change for group, change in changes.items()}
