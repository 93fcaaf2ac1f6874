"""Draws sample images during training from fixed seeds, into the work folder, and copies them into the artifact.

Drawing changes no weight and no generator of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_engine.bases.base import BaseModel
from lora_engine.data.pixels import write_png
from lora_engine.files import atomic_write, canonical_json, sha256_bytes
from lora_engine.inference.generate import generate
from lora_engine.training.saved import copy_steps
from lora_engine.training.specs.samples import Samples

_FOLDER = "samples"
ABOUT = "samples.json"


@dataclass(frozen=True)
class SampleWriter:
    """Draws the samples of a run.

    Attributes:
        base: Base with the adapter attached.
        samples: Prompts, seeds and sampler settings.
        folder: Folder of the images until the run is finished.
        run: Digest of everything that the steps of the run depend on; samples of other runs are not reused.
    """

    base: BaseModel
    samples: Samples
    folder: Path
    run: str

    def _folder(self, parent: Path, run: str) -> Path:
        # Samples at other intervals are the same images.
        drawn = self.samples.model_dump(mode="json", exclude={"every"})
        return parent / sha256_bytes(canonical_json({"run": run, "samples": drawn}))[:16]

    def draw(self, done: int) -> None:
        """Draws the samples after so many steps; does nothing if all exist."""
        requests = [
            (number, prompt, seed) for number, prompt in enumerate(self.samples.prompts) for seed in self.samples.seeds
        ]
        folder = self._folder(self.folder, self.run) / f"step-{done:06d}"
        files = [folder / f"{number:02d}-{seed}.png" for number, _, seed in requests]
        if all(file.is_file() for file in files):
            return
        images = generate(
            self.base,
            [prompt for _, prompt, _ in requests],
            seeds=[seed for _, _, seed in requests],
            steps=self.samples.steps,
            guidance=self.samples.guidance,
        )
        for file, image in zip(files, images, strict=True):
            write_png(file, image)

    def take_over(self, folder: Path, run: str, done: int) -> None:
        """Copies the samples of another run, up to a number of steps, which this one continues."""
        copy_steps(self._folder(folder, run), self._folder(self.folder, self.run), done)

    def copy(self, out: Path) -> None:
        """Copies the samples and their settings into the folder `samples` of an artifact."""
        for file in sorted(self._folder(self.folder, self.run).glob("step-*/*.png")):
            if int(file.parent.name.removeprefix("step-")) % self.samples.every == 0:
                atomic_write(out / _FOLDER / file.parent.name / file.name, file.read_bytes())
        atomic_write(out / _FOLDER / ABOUT, canonical_json(self.samples.model_dump(mode="json")))
