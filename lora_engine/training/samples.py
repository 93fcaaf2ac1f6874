"""Draws sample images during training from fixed seeds, into the work folder, and copies them into the artifact.

Drawing changes no weight and no generator of the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_engine.bases.base import BaseModel
from lora_engine.data.pixels import write_png
from lora_engine.files import atomic_write, canonical_json
from lora_engine.inference.generate import generate
from lora_engine.training.specs.samples import Samples

_log = logging.getLogger(__name__)
_FOLDER = "samples"
ABOUT = "samples.json"


@dataclass(frozen=True)
class SampleWriter:
    """Draws the samples of a run.

    Attributes:
        base: Base with the adapter attached.
        samples: Prompts, seeds and sampler settings.
        folder: Folder of the images until the run is finished.
        job: Digest of everything that the job depends on; samples of other jobs are not reused.
        on_drawn: Called with the steps done and the files that were drawn.
    """

    base: BaseModel
    samples: Samples
    folder: Path
    job: str
    on_drawn: Callable[[int, Sequence[Path]], None] = lambda step, files: None

    def draw(self, done: int) -> None:
        """Draws the samples after so many steps; does nothing if all exist. A full disk costs the samples only."""
        requests = [
            (number, prompt, seed) for number, prompt in enumerate(self.samples.prompts) for seed in self.samples.seeds
        ]
        folder = self.folder / self.job[:16] / f"step-{done:06d}"
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
        try:
            for file, image in zip(files, images, strict=True):
                write_png(file, image)
        except OSError as error:
            _log.warning("sample images cannot be written (%s); the training continues", error.strerror)
            return
        self.on_drawn(done, files)

    def copy(self, out: Path) -> None:
        """Copies the samples and their settings into the folder `samples` of an artifact."""
        for file in sorted((self.folder / self.job[:16]).glob("step-*/*.png")):
            atomic_write(out / _FOLDER / file.parent.name / file.name, file.read_bytes())
        atomic_write(out / _FOLDER / ABOUT, canonical_json(self.samples.model_dump(mode="json")))
