"""Measures how good the chosen one of ten checkpoints is: `python -m benchmarks.best_checkpoint --seeds 5`.

Every run trains the embedded base on the images of `examples/zorb` and keeps all ten candidates. Two judges rank them
by what no training and no choice saw: the loss on 64 crescents, and the share of 96 drawings with every attribute right
(of new crescents and of known shapes).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.choose import IMAGES, USUAL, IndependentJudge, make_dataset
from lora_engine.bases.base import load_base
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings

STEPS, EVERY = 200, 20


@dataclass(frozen=True)
class Ranking:
    """The candidates of a run: step -> loss and score by the independent judges, and the chosen step."""

    chosen: int
    losses: dict[int, float]
    scores: dict[int, float]

    def place(self, by: str) -> int:
        """Returns the place of the chosen step among all, from 1; equal ones share a place."""
        values = self.losses if by == "loss" else {step: -score for step, score in self.scores.items()}
        return 1 + sum(value < values[self.chosen] for value in values.values())


def rank_candidates(seed: int, dataset: Path, into: Path, judge: IndependentJudge, *, draws: bool = True) -> Ranking:
    """Trains once and judges every candidate.

    Args:
        seed: Seed of the training.
        dataset: Half of its images are held out.
        into: Folder for the run.
        judge: The judge.
        draws: False judges by the loss alone.
    """
    choice = {"every": EVERY, "patience": 0}
    change = {"steps": STEPS, "warmup": 10, "rank": 16, "learning_rate": 2e-3, "save_every": EVERY, "seed": seed}
    settings = TrainSettings.model_validate({**USUAL, **change, "best_checkpoint": choice})
    train(settings, "tiny", dataset, into / f"{seed}", into / f"{seed}" / "work", cache=into / "cache")
    record = json.loads((into / f"{seed}" / "training.json").read_bytes())
    files = {step: into / f"{seed}" / "saved" / f"step-{step:06}.safetensors" for step in record["chosen"]["from"]}
    figures = {step: judge.examine(file, draws=draws) for step, file in files.items()}
    return Ranking(
        record["chosen"]["step"],
        {step: entry["loss"] for step, entry in figures.items()},
        {step: entry.get("score", 0.0) for step, entry in figures.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--loss-only", action="store_true", help="Judge by the loss alone, which takes a third.")
    chosen = parser.parse_args()
    base = load_base("tiny")
    with tempfile.TemporaryDirectory() as name:
        judge = IndependentJudge(base, Path(name) / "fresh")
        dataset = make_dataset(IMAGES, Path(name), 0.5)
        for seed in range(chosen.seeds):
            started = time.process_time()
            ranking = rank_candidates(seed, dataset, Path(name), judge, draws=not chosen.loss_only)
            places = {by: ranking.place(by) for by in ("loss", "score")}
            print(seed, ranking.chosen, places, ranking, f"{time.process_time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
