"""Compares training steps with and without cached latents and text embeddings.

    python -m benchmarks.caching [--base tiny] [--rounds 5] [--steps 8] [--batch 4]

Rounds alternate, so other load on the machine affects both alike. Cached: images and texts are encoded once and read
from the cache; `prepare_ms` is the cost of filling it, per image. Uncached: each step encodes its images and captions.
Prints one JSON object. `ratio` is the median over pairs of rounds of the time of an uncached step over a cached one, in
CPU time on a CPU (use OMP_NUM_THREADS=1) and in wall time on other devices. `same_losses` is true if both gave the same
losses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.loop_overhead import make_examples, timed
from lora_engine.adapters import attach, create_adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.conditioning import Conditioning
from lora_engine.seeds import generator
from lora_engine.training.examples import Encoder, Example, ImageSize
from lora_engine.training.loop import FitOptions, fit
from lora_engine.training.methods import MethodContext, methods
from lora_engine.training.methods.finetune import Finetune
from lora_engine.training.spec import TrainSettings


class Uncached:
    """An encoder without a cache: the same values, one image and one text at a time."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base

    @torch.no_grad()
    def latents(self, example: Example) -> Tensor:
        """Encodes one image; see `Encoder.latents`."""
        return self._base.encode_images(example.pixels()[None])[0].cpu()

    @torch.no_grad()
    def conditioning(self, texts: Sequence[str], size: ImageSize) -> Conditioning:
        """Encodes texts; see `Encoder.conditioning`."""
        return Conditioning.cat([self._base.encode_text([text], size).to("cpu") for text in texts])


class Runs:
    """Short trainings that differ only in the source of latents and conditionings."""

    def __init__(self, base: BaseModel, settings: TrainSettings, examples: tuple[Example, ...]) -> None:
        self._base, self._settings, self._examples = base, settings, examples

    def run(self, source: Encoder | Uncached) -> list[float]:
        """Trains from the start and returns the losses."""
        base, settings = self._base, self._settings
        kind, draw = settings.kind.name, generator(settings.seed, "factors")
        adapter = create_adapter(base, settings.targets, kind, settings.rank, generator=draw)
        with attach(base, adapter, trainable=True) as attachment:
            context = MethodContext(
                base=base,
                settings=settings,
                parameters=dict(attachment.named_parameters()),
                examples=self._examples,
                class_examples=(),
                latents=source.latents,
                conditioner=source.conditioning,
                adapter_dropout=attachment.adapter_dropout,
            )
            phases = methods[settings.method.name].phases(context)
            return fit(phases, base.modules.values(), FitOptions(schedule="cosine")).loss


def measure(base: BaseModel, folder: Path, rounds: int, settings: TrainSettings) -> dict[str, object]:
    """Returns the figures of one base."""
    examples = make_examples(folder, base, 12)
    encoder, uncached = Encoder(base, folder / "cache"), Uncached(base)
    prepare = timed(base, lambda: encoder.prepare(examples, [])) / len(examples)
    runs = Runs(base, settings, examples)
    same = runs.run(encoder) == runs.run(uncached)
    pairs = []
    for number in range(rounds):
        # The first to run alternates between rounds.
        order = (encoder, uncached) if number % 2 else (uncached, encoder)
        times = {source: timed(base, partial(runs.run, source)) / settings.steps for source in order}
        pairs.append((times[encoder], times[uncached]))
    ratios = sorted(without / cached for cached, without in pairs)
    return {
        "base": base.name,
        "device": str(base.device),
        "threads": torch.get_num_threads(),
        "batch": settings.batch,
        "cached_ms": round(1000 * statistics.median(pair[0] for pair in pairs), 2),
        "uncached_ms": round(1000 * statistics.median(pair[1] for pair in pairs), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
        "prepare_ms": round(1000 * prepare, 2),
        "same_losses": same,
        "rounds": rounds,
        "steps": settings.steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    chosen = parser.parse_args()
    settings = TrainSettings(method=Finetune(), steps=chosen.steps, batch=chosen.batch)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(load_base(chosen.base, device=chosen.device), Path(folder), chosen.rounds, settings)))


if __name__ == "__main__":
    main()
