"""Measures what each training method learns and forgets: `python -m benchmarks.methods`.

Every method trains the embedded base on the same twelve crescents for the same number of steps, with several seeds. The
judge, a separate model, classifies the images. Rows are means over the seeds, with minimum and maximum.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.prior import TOKEN, Examiner, make_dataset, one_caption_per_shape, show
from lora_engine.adapters import attach
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.tiny import folder
from lora_engine.embedding.embedder import load_embedder
from lora_engine.formats import read_bundle
from lora_engine.inference.textual_inversion import attach_embeddings
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings
from tools.tiny_base.judge import load_judge

LEARNING = {"token": TOKEN, "vectors": 2, "word_rate": 2e-2}
PRIOR = {"prompt": one_caption_per_shape(), "count": 40}
RUNS: dict[str, dict[str, Any]] = {
    "textual inversion": {"method": {"name": "textual-inversion", **LEARNING}},
    "pivotal, 30 % inversion": {"method": {"name": "pivotal", **LEARNING, "inversion": 0.3}},
    "finetune": {"method": "finetune"},
    "finetune with preservation": {"method": {"name": "finetune", "preservation": {"weight": 1.0}}},
    "finetune with identity": {"method": {"name": "finetune", "identity": {"weight": 0.1}}},
    "dreambooth": {"method": "dreambooth", "prior": PRIOR},
    "dreambooth, alternating": {"method": "dreambooth", "prior": {**PRIOR, "batches": "alternating"}},
}


def settings_of(change: dict[str, Any], seed: int, steps: int) -> TrainSettings:
    """Returns the settings of a row; rows differ only in the method and its options."""
    plain = {"rank": 8, "targets": "all", "batch": 6, "learning_rate": 2e-3, "steps": steps, "seed": seed}
    return TrainSettings.model_validate({**plain, **change})


def examine(base: BaseModel, examiner: Examiner, file: Path) -> dict[str, float]:
    """Returns the figures of the base with the adapter and learned tokens of a file."""
    bundle = read_bundle(file)
    with ExitStack() as stack:
        if bundle.adapter.modules:
            stack.enter_context(attach(base, bundle.adapter))
        stack.enter_context(attach_embeddings(base, bundle.embeddings))
        return examiner.examine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", default="", help="Run only rows whose title starts with this.")
    chosen = parser.parse_args()
    base = load_base("tiny")
    examiner = Examiner(base, load_judge(folder()), load_embedder())
    show("base alone", [examiner.examine()])
    with tempfile.TemporaryDirectory() as name:
        dataset = make_dataset(Path(name))
        for title, change in RUNS.items():
            if not title.startswith(chosen.only):
                continue
            rows = []
            for seed in range(chosen.seeds):
                out = Path(name) / f"{title} {seed}"
                train(
                    settings_of(change, seed, chosen.steps),
                    "tiny",
                    dataset,
                    out,
                    out / "work",
                    cache=Path(name) / "cache",
                )
                rows.append(examine(base, examiner, out / "adapter.safetensors"))
            show(f"{title}: {chosen.seeds} seeds, {chosen.steps} steps", rows)


if __name__ == "__main__":
    main()
