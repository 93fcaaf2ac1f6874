"""Compares the training loop with the bare forward + backward + optimizer step.

    python benchmarks/loop_overhead.py [--base tiny] [--rounds 12] [--steps 10] [--batch 4]

Rounds alternate, so other load on the machine affects both alike. Bare: precomputed tensors, the adapted network, the
mean squared error, AdamW. Loop: `fit` with its batches (order, noise, timesteps, cached latents and texts), schedule,
clipping, checks for NaN and progress. Prints one JSON object. `overhead` is the median over pairs of rounds, in CPU
time on a CPU (little affected by other programs; use OMP_NUM_THREADS=1) and in wall time on other devices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from lora_engine.adapters import attach, create_adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.data.pixels import write_png
from lora_engine.files import sha256_file
from lora_engine.seeds import generator
from lora_engine.training.determinism import gradients_off
from lora_engine.training.examples import Encoder, Example
from lora_engine.training.loop import FitOptions, fit
from lora_engine.training.methods import MethodContext, methods
from lora_engine.training.methods.finetune import Finetune
from lora_engine.training.phases import Phase
from lora_engine.training.spec import TrainSettings


def make_examples(folder: Path, base: BaseModel, count: int) -> tuple[Example, ...]:
    examples = []
    for number in range(count):
        pixels = torch.rand(3, *base.default_size, generator=generator(0, "picture", number)) * 2 - 1
        file = folder / f"{number}.png"
        write_png(file, pixels)
        examples.append(Example(file, sha256_file(file), f"a sks star {number}", base.default_size))
    return tuple(examples)


def bare_steps(base: BaseModel, phase: Phase, steps: int, rate: float) -> Callable[[], None]:
    batches = [phase.batch(number) for number in range(steps)]
    parameters = list(phase.parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=base.device.type != "mps")
    ready = []
    for batch in batches:
        noisy = base.noise.add_noise(batch.latents, batch.noise, batch.timesteps)
        ready.append((noisy, base.noise.target(batch.latents, batch.noise, batch.timesteps), batch))

    def run() -> None:
        for noisy, target, batch in ready:
            loss = F.mse_loss(base.predict(noisy, batch.timesteps, batch.conditioning), target)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def timed(base: BaseModel, work: Callable[[], object]) -> float:
    clock = time.process_time if base.device.type == "cpu" else time.perf_counter

    def wait() -> None:
        if base.device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    start = clock()
    work()
    wait()
    return clock() - start


def measure(base: BaseModel, folder: Path, rounds: int, settings: TrainSettings) -> dict[str, object]:
    examples = make_examples(folder, base, 12)
    encoder = Encoder(base, folder)
    encoder.prepare(examples, [])
    adapter = create_adapter(
        base, settings.targets, settings.kind.name, settings.rank, generator=generator(0, "factors")
    )
    with attach(base, adapter, trainable=True) as attachment:
        parameters = dict(attachment.named_parameters())
        context = MethodContext(
            base, settings, parameters, examples, (), encoder.latents, encoder.conditioning, attachment.adapter_dropout
        )
        phases = methods[settings.method.name].phases(context)
        options = FitOptions(schedule="cosine")
        bare = bare_steps(base, phases[0], settings.steps, settings.learning_rate)

        def loop() -> None:
            fit(phases, base.modules.values(), options)

        def plain() -> None:
            with gradients_off(base.modules.values()):
                for value in parameters.values():
                    value.requires_grad_(True)
                bare()

        plain()
        loop()
        pairs = []
        for number in range(rounds):
            # The first to run alternates between rounds.
            order = (plain, loop) if number % 2 else (loop, plain)
            times = {work: timed(base, work) / settings.steps for work in order}
            pairs.append((times[plain], times[loop]))
    ratios = [loop_time / bare_time for bare_time, loop_time in pairs]
    return {
        "base": base.name,
        "device": str(base.device),
        "threads": torch.get_num_threads(),
        "batch": settings.batch,
        "bare_ms": round(1000 * statistics.median(pair[0] for pair in pairs), 3),
        "loop_ms": round(1000 * statistics.median(pair[1] for pair in pairs), 3),
        "overhead": round(statistics.median(ratios) - 1, 4),
        "overhead_of_fastest": round(min(pair[1] for pair in pairs) / min(pair[0] for pair in pairs) - 1, 4),
        "rounds": rounds,
        "steps": settings.steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--targets", default="attention")
    parser.add_argument("--at-most", type=float, help="Fail if the overhead is larger.")
    chosen = parser.parse_args()
    settings = TrainSettings(method=Finetune(), steps=chosen.steps, batch=chosen.batch, targets=chosen.targets)
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(load_base(chosen.base, device=chosen.device), Path(folder), chosen.rounds, settings)
    print(json.dumps(figures))
    if chosen.at_most is not None and float(str(figures["overhead"])) > chosen.at_most:
        raise SystemExit(f"the overhead {figures['overhead']} is larger than {chosen.at_most}")


if __name__ == "__main__":
    main()
