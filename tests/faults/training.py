"""Defines the piece of work that trains: a short run and a longer one that continues it, with saved adapters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.bases.conditioning import Conditioning
from lora_engine.files import sha256_bytes
from lora_engine.formats import Bundle, Card, write_adapter
from lora_engine.formats.embeddings import Embedding
from lora_engine.seeds import generator
from lora_engine.training.batches import Batch
from lora_engine.training.checkpoint import Checkpoint, Checkpoints
from lora_engine.training.loop import FitOptions, fit
from lora_engine.training.losses import DenoisingLoss
from lora_engine.training.phases import ParameterGroup, Phase
from lora_engine.training.saved import SavedAdapters
from lora_engine.training.states import StateFolder
from registry.home import Home

_MODULE = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
SHORT, LONG = 2, 4


def train(home: Path, seed: int, tell: Callable[[str], None]) -> None:
    """Trains for two steps, then for four, which continue the two."""
    states = Home.open(home).cache / "states"
    for steps in (SHORT, LONG):
        tell(f"trained {seed}-{steps} {steps} {_train(states / f'{seed}-{steps}', seed, steps)}")


def import_all(folder: Path) -> None:
    """Trains once in this process, so that forked processes do not import what torch imports on first use."""
    _train(folder / "0-1", 0, 1)


def _train(folder: Path, seed: int, steps: int) -> str:
    """Returns the digest of the adapter and of the saved ones."""
    state, card = StateFolder(folder, shared=True), Card(title="trial")
    down = torch.randn(2, 4, generator=generator(seed, "down"))
    up = nn.Parameter(torch.zeros(4, 2))

    def current() -> tuple[Adapter, tuple[Embedding, ...]]:
        return Adapter({_MODULE: LoraDelta(down, up.detach().clone(), 2.0)}, "sd"), ()

    def batch(number: int) -> Batch:
        latents, noise = torch.randn(2, 3, 4, generator=generator(seed, number))
        return Batch(latents, noise, torch.zeros(3, dtype=torch.int64), Conditioning({}), 3)

    def predict(made: Batch) -> tuple[Tensor, Tensor]:
        return made.latents @ down.T @ up.T, made.noise

    phase = Phase("trial", steps, (ParameterGroup({"up": up}, 0.1),), batch, predict, (DenoisingLoss(),))
    saved = SavedAdapters(current, card, folder / "saved", "run" * 6, 1)

    def continue_from(checkpoint: Checkpoint, done: int) -> None:
        if checkpoint.folder is not None:
            saved.take_over(checkpoint.folder.parent / "saved", "run" * 6, done)

    fit(
        [phase],
        [],
        FitOptions(checkpoint_every=1, save_every=1),
        checkpoints=Checkpoints(state.checkpoints, f"job {seed}", state.others),
        save_weights=saved.save,
        continue_from=continue_from,
    )
    out = folder / "out"
    saved.copy(out, steps)
    bundle = Bundle(current()[0], card)
    write_adapter(out / "adapter.safetensors", bundle.adapter, card=bundle.card)
    state.mark_finished(out / "adapter.safetensors")
    return sha256_bytes(b"".join(file.read_bytes() for file in sorted(out.rglob("*.safetensors"))))


def state_violations(home: Path, promised: Iterable[str]) -> list[str]:
    """Returns the violated invariants of training states, from plain files: bytes and promises."""
    violated = []
    for file in (home / "cache" / "states").glob("*/checkpoints/step-*.safetensors"):
        if hashlib.sha256(file.read_bytes()).hexdigest()[:16] != file.stem.rpartition("-")[2]:
            violated.append(f"I6: the checkpoint {file.name} does not have the bytes of its digest")
    for line in promised:
        action, *words = line.split()
        if action == "trained":
            out = home / "cache" / "states" / words[0] / "out"
            content = b"".join(file.read_bytes() for file in sorted(out.rglob("*.safetensors")))
            if hashlib.sha256(content).hexdigest() != words[2]:
                violated.append(f"lost: {line}")
    return violated
