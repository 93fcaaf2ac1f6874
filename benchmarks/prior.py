"""Measures what prior preservation preserves: `python -m benchmarks.prior`.

The embedded base learns a crescent from the same twelve images, with and without class images, with several seeds. The
judge, a separate model, classifies the images. Rows are means over the seeds, with minimum and maximum.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F

from lora_engine.adapters import attach
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.tiny import folder
from lora_engine.data.caption import caption
from lora_engine.data.ingest import ingest
from lora_engine.data.preprocess import preprocess
from lora_engine.data.spec import CaptionSettings, IngestSettings, PreprocessSettings
from lora_engine.embedding.embedder import Embedder, load_embedder
from lora_engine.formats import read_adapter
from lora_engine.inference.generate import generate
from lora_engine.training.methods.dreambooth import Dreambooth
from lora_engine.training.methods.finetune import Finetune
from lora_engine.training.run import train
from lora_engine.training.spec import Prior, TrainSettings
from tools.tiny_base.images import render, to_pixels, write_examples
from tools.tiny_base.judge import Judge, load_judge
from tools.tiny_base.measure import count_right
from tools.tiny_base.world import CONCEPT, SHAPES, Scene, full_caption, scenes

TOKEN = "zorb"


def with_prior(prompt: tuple[str, ...] | None) -> TrainSettings:
    return PLAIN.model_copy(update={"method": Dreambooth(), "prior": Prior(prompt=prompt, count=40)})


def one_caption_per_shape() -> tuple[str, ...]:
    """Returns the full caption of the first scene of each shape that the base knows."""
    captions = {scene.shape: full_caption(scene) for scene in reversed(scenes(333, 400, "train"))}
    return tuple(captions[shape] for shape in SHAPES)


PLAIN = TrainSettings(method=Finetune(), rank=8, targets="all", steps=150, batch=6, learning_rate=2e-3)
RUNS = {
    "finetune, no prior": PLAIN,
    "dreambooth, 40 images of the class word": with_prior(None),
    "dreambooth, 40 images of ten captions": with_prior(one_caption_per_shape()),
}


def make_dataset(into: Path) -> Path:
    """Makes a dataset of twelve captioned crescents, with the demo's steps."""
    write_examples(into / "images", "concept", 12, 7, TOKEN)
    ingest(into / "images", into / "photos", IngestSettings())
    preprocess(into / "photos", into / "prepared", PreprocessSettings(resolution=32))
    caption(into / "prepared", into / "captions", CaptionSettings(trigger=TOKEN, class_word="ring"))
    return into / "captions"


class Examiner:
    """Measures what a base learned and forgot, with the same prompts and seeds every time."""

    def __init__(self, base: BaseModel, judge: Judge, embedder: Embedder) -> None:
        self._base, self._judge, self._embedder = base, judge, embedder
        self._new, self._known = scenes(901, 24, "concept"), scenes(902, 48, "train")
        self._references = self._embedder.embed_images(to_pixels(render(self._new)))
        self._before = self._draw(self._known, None)

    def examine(self) -> dict[str, float]:
        """Returns the figures of the base with its current attachments."""
        new, known = self._draw(self._new, TOKEN), self._draw(self._known, None)
        return {
            "crescents read": mean(row["shape"] == CONCEPT for row in self._judge.read(new)),
            "paired CLIP-I": float(F.cosine_similarity(self._embedder.embed_images(new), self._references).mean()),
            "known right": count_right(self._judge.read(known), self._known)["all"],
            "known shapes": count_right(self._judge.read(known), self._known)["shape"],
            "drift (levels of 255)": float((known - self._before).square().mean().sqrt() * 127.5),
        }

    def _draw(self, requests: list[Scene], word: str | None) -> torch.Tensor:
        prompts = [full_caption(scene, word=word) for scene in requests]
        return generate(self._base, prompts, seeds=[scene.seed for scene in requests], steps=12, batch=24)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    count = parser.parse_args().seeds
    base = load_base("tiny")
    examiner = Examiner(base, load_judge(folder()), load_embedder())
    show("base alone", [examiner.examine()])
    with tempfile.TemporaryDirectory() as name:
        dataset = make_dataset(Path(name))
        for title, settings in RUNS.items():
            rows = []
            for seed in range(count):
                out = Path(name) / f"{title} {seed}"
                train(settings.model_copy(update={"seed": seed}), "tiny", dataset, out, out / "work")
                with attach(base, read_adapter(out / "adapter.safetensors")[0]):
                    rows.append(examiner.examine())
                show(f"{title}, seed {seed}", [rows[-1]])
            show(f"{title}: {count} seeds", rows)


def show(title: str, rows: list[dict[str, float]]) -> None:
    print(title, flush=True)
    for key in rows[0]:
        values = [row[key] for row in rows]
        spread = f"  ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        print(f"  {key:24} {mean(values):.3f}{spread}", flush=True)


if __name__ == "__main__":
    main()
