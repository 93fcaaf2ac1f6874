"""Sample pictures while an adapter is trained: from fixed seeds, kept beside the checkpoints, copied into the artifact.

Drawing moves no weight and no generator of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_engine.bases.base import BaseModel
from lora_engine.data.pixels import write_png
from lora_engine.files import atomic_write, canonical_json
from lora_engine.inference.generate import generate
from lora_engine.training.specs.samples import Samples

FOLDER = "samples"
ABOUT = "samples.json"


@dataclass(frozen=True)
class SampleWriter:
    """Draws the samples of a run.

    Attributes:
        base: With the adapter attached.
        samples: Which.
        folder: Where they are kept until the run is through.
        job: Digest of all that the job depends on; the samples of another job are not taken for its own.
    """

    base: BaseModel
    samples: Samples
    folder: Path
    job: str

    def draw(self, done: int) -> None:
        """Draws those of the moment after so many steps; what is there already is not drawn again."""
        wanted = [
            (number, prompt, seed) for number, prompt in enumerate(self.samples.prompts) for seed in self.samples.seeds
        ]
        folder = self.folder / self.job[:16] / f"step-{done:06d}"
        files = [folder / f"{number:02d}-{seed}.png" for number, _, seed in wanted]
        if all(file.is_file() for file in files):
            return
        pictures = generate(
            self.base,
            [prompt for _, prompt, _ in wanted],
            seeds=[seed for _, _, seed in wanted],
            steps=self.samples.steps,
            guidance=self.samples.guidance,
        )
        for file, picture in zip(files, pictures, strict=True):
            write_png(file, picture)

    def copy(self, out: Path) -> None:
        """Puts them, and what they show, into the folder `samples` of an artifact."""
        for file in sorted((self.folder / self.job[:16]).glob("step-*/*.png")):
            atomic_write(out / FOLDER / file.parent.name / file.name, file.read_bytes())
        atomic_write(out / FOLDER / ABOUT, canonical_json(self.samples.model_dump(mode="json")))
