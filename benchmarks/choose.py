"""Compares automatic settings with a grid by hand: `python -m benchmarks.choose RESULTS`.

Every row trains the embedded base on the images of `examples/zorb` with several seeds. An independent judge reads
images of captions that no training saw, half with crescents and half with the shapes that the base knew. The cost of a
row counts all of its optimizer steps, those of probes included. `RESULTS` is a file of JSON lines; a row in it is not
run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.prior import TOKEN, one_caption_per_shape
from lora_engine.adapters import attach
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.tiny import folder
from lora_engine.data.caption import caption
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.preprocess import preprocess
from lora_engine.data.spec import CaptionSettings, IngestSettings, PreprocessSettings
from lora_engine.formats import read_adapter
from lora_engine.inference.generate import generate
from lora_engine.training.examples import Encoder, read_examples
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings
from lora_engine.training.validation import image_losses
from tools.tiny_base.images import write_examples
from tools.tiny_base.judge import load_judge
from tools.tiny_base.measure import count_right
from tools.tiny_base.world import full_caption, scenes

IMAGES = Path(__file__).parent.parent / "examples" / "zorb" / "images"
COUNT = 48
"""Captions that are drawn of crescents, and as many of known shapes."""
USUAL: dict[str, Any] = {
    "method": "dreambooth",
    "prior": {"count": 10, "prompt": one_caption_per_shape()},
    "targets": "all",
    "batch": 6,
    "steps": 140,
    "warmup": 10,
}
GRID = {
    f"rank {rank}, rate {rate:g}": {"rank": rank, "learning_rate": rate}
    for rank in (4, 16, 48)
    for rate in (1e-3, 2e-3, 4e-3, 8e-3)
}
AUTOMATIC: dict[str, dict[str, Any]] = {
    "auto: all": {"steps": "auto", "learning_rate": "auto", "rank": "auto", "targets": "auto"},
    "auto: rate, steps": {"steps": "auto", "learning_rate": "auto", "rank": 8},
    "auto: rank, steps": {"steps": "auto", "learning_rate": 1.5e-3, "rank": "auto"},
    "auto: steps": {"steps": "auto", "learning_rate": 1.5e-3, "rank": 8},
}
"""Rows of automatic settings; the others are the defaults of the base."""


def make_dataset(images: Path, into: Path, heldout: float) -> Path:
    """Makes a captioned dataset of a folder of images; returns its folder."""
    ingest(images, into / "photos", IngestSettings(heldout=heldout))
    preprocess(into / "photos", into / "prepared", PreprocessSettings(resolution=32))
    caption(into / "prepared", into / "captions", CaptionSettings(trigger=TOKEN, class_word="ring"))
    return into / "captions"


class IndependentJudge:
    """Judges an adapter by images and losses that no training and no selection saw.

    Args:
        base: The base, with nothing attached.
        folder: Folder for fresh drawings, which share no scene with the training images.
    """

    def __init__(self, base: BaseModel, folder_: Path) -> None:
        self._base, self._judge = base, load_judge(folder())
        self._new, self._known = scenes(901, COUNT, "concept"), scenes(902, COUNT, "train")
        write_examples(folder_ / "images", "concept", 64, 903, TOKEN)
        dataset = make_dataset(folder_ / "images", folder_, 0.0)
        self._fresh = read_examples(dataset, Manifest.load(dataset), "train")
        self._encoder = Encoder(base, folder_ / "cache")
        self._encoder.prepare(self._fresh, [])

    def examine(self, file: Path, *, draws: bool = True) -> dict[str, float]:
        """Returns the figures of an adapter file; `score` is the mean share of right images of both halves.

        Without drawings it is the loss alone.
        """
        with attach(self._base, read_adapter(file)[0]):
            losses = image_losses(self._base, self._encoder.latents, self._encoder.conditioning, self._fresh)
            rights = {}
            for name, requests, word in (("new", self._new, TOKEN), ("known", self._known, None)) if draws else ():
                prompts = [full_caption(scene, word=word) for scene in requests]
                seeds = [scene.seed for scene in requests]
                drawn = generate(self._base, prompts, seeds=seeds, steps=12, batch=24)
                rights[name] = count_right(self._judge.read(drawn), requests)["all"]
        return {**({"score": mean(rights.values())} if rights else {}), **rights, "loss": mean(losses)}


def rows(only: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the title and the settings of each row whose title starts with a text."""
    yield from ((title, change) for title, change in (GRID | AUTOMATIC).items() if title.startswith(only))


def run(
    title: str, change: Mapping[str, Any], seed: int, dataset: Path, into: Path, judge: IndependentJudge
) -> dict[str, Any]:
    """Trains a row and returns its figures and cost."""
    settings = TrainSettings.model_validate({**USUAL, **change, "seed": seed})
    out, started = into / f"{title} {seed}", time.process_time()
    train(settings, "tiny", dataset, out, out / "work", cache=into / "cache")
    seconds = time.process_time() - started
    record = json.loads((out / "training.json").read_bytes())
    probes = record.get("automatic", {}).get("learning_rate", {}).get("steps", 0)
    chosen = {name: entry["chosen"] for name, entry in record.get("automatic", {}).items()}
    return {
        "row": title,
        "seed": seed,
        "steps": record["loss"][-1][0] + probes,
        "cpu_seconds": round(seconds, 1),
        **judge.examine(out / "adapter.safetensors"),
        **({"chosen": chosen} if chosen else {}),
    }


def table(done: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of all rows: means over the seeds, the loss with its standard deviation."""
    lines = [
        "| row | seeds | score | new | known | loss on fresh images | steps | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for title in GRID | AUTOMATIC:
        runs = [entry for entry in done if entry["row"] == title]
        if runs:
            score, new, known, loss, steps, seconds = (
                mean(entry[key] for entry in runs) for key in ("score", "new", "known", "loss", "steps", "cpu_seconds")
            )
            spread = f" +- {stdev(entry['loss'] for entry in runs):.4f}" if len(runs) > 1 else ""
            figures = f"{score:.3f} | {new:.3f} | {known:.3f} | {loss:.4f}{spread} | {steps:.0f} | {seconds:.0f}"
            lines.append(f"| {title} | {len(runs)} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", default="", help="Run only rows whose title starts with this.")
    chosen = parser.parse_args()
    done = [json.loads(line) for line in chosen.results.read_text().splitlines()] if chosen.results.exists() else []
    base = load_base("tiny")
    with tempfile.TemporaryDirectory() as name:
        judge = IndependentJudge(base, Path(name) / "fresh")
        dataset = make_dataset(IMAGES, Path(name), 0.5)
        for seed in chosen.seeds:
            for title, change in rows(chosen.only):
                if not any(entry["row"] == title and entry["seed"] == seed for entry in done):
                    done.append(run(title, change, seed, dataset, Path(name), judge))
                    with chosen.results.open("a") as file:
                        file.write(json.dumps(done[-1]) + "\n")
                    print(done[-1], flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
