"""Draws sample images during training from fixed seeds, into the work folder, and copies them into the artifact.

Drawing changes no weight and no generator of the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.data.pixels import write_png
from lora_engine.files import atomic_write, canonical_json, sha256_bytes
from lora_engine.inference.generate import generate
from lora_engine.training.distributed import ProcessGroup
from lora_engine.training.saved import copy_steps
from lora_engine.training.specs.sample_prompts import SampleRequest
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
        run: Digest of everything that the steps of the run depend on; samples of other runs are not reused.
        on_drawn: Called with the steps done and the files that were drawn.
        group: The processes that draw together, as a split network needs; the main process writes.
    """

    base: BaseModel
    samples: Samples
    folder: Path
    run: str
    on_drawn: Callable[[int, Sequence[Path]], None] = lambda step, files: None
    group: ProcessGroup = field(default_factory=ProcessGroup)

    def _folder(self, parent: Path, run: str) -> Path:
        # Samples at other intervals are the same images.
        drawn = self.samples.model_dump(mode="json", exclude={"every"})
        return parent / sha256_bytes(canonical_json({"run": run, "samples": drawn}))[:16]

    def __post_init__(self) -> None:
        """Checks that the base can draw every size.

        Raises:
            SettingsError: It cannot.
        """
        for request in self.samples.requests():
            default = self.base.default_size
            self.base.latent_shape((request.height or default[0], request.width or default[1]))

    def draw(self, done: int) -> None:
        """Draws the samples after so many steps; does nothing if all exist. A full disk costs the samples only."""
        requests = self.samples.requests()
        folder = self._folder(self.folder, self.run) / f"step-{done:06d}"
        files = [folder / f"{request.number:02d}-{request.seed}.png" for request in requests]
        # One answer for all: each process of a split network waits for the others in every forward pass.
        if not self.group.any(not all(file.is_file() for file in files)):
            return
        images = _draw(self.base, requests)
        if not self.group.is_main_process:
            return
        try:
            for file, image in zip(files, images, strict=True):
                write_png(file, image)
        except OSError as error:
            _log.warning("sample images cannot be written (%s); the training continues", error.strerror)
            return
        self.on_drawn(done, files)

    def take_over(self, folder: Path, run: str, done: int) -> None:
        """Copies the samples of another run, up to a number of steps, which this one continues."""
        if self.group.is_main_process:
            copy_steps(self._folder(folder, run), self._folder(self.folder, self.run), done)

    def copy(self, out: Path) -> None:
        """Copies the samples and their settings into the folder `samples` of an artifact."""
        if not self.group.is_main_process:
            return
        for file in sorted(self._folder(self.folder, self.run).glob("step-*/*.png")):
            if int(file.parent.name.removeprefix("step-")) % self.samples.every == 0:
                atomic_write(out / _FOLDER / file.parent.name / file.name, file.read_bytes())
        atomic_write(out / _FOLDER / ABOUT, canonical_json(self.samples.model_dump(mode="json")))


def _draw(base: BaseModel, requests: Sequence[SampleRequest]) -> list[Tensor]:
    """Returns the images in the order of the requests; those of equal settings are drawn together."""
    images: dict[int, Tensor] = {}
    for settings in dict.fromkeys(request.settings for request in requests):
        indices = [index for index, request in enumerate(requests) if request.settings == settings]
        first = requests[indices[0]]
        drawn = generate(
            base,
            [requests[index].text for index in indices],
            seeds=[requests[index].seed for index in indices],
            steps=first.steps,
            guidance=first.guidance,
            negative=first.negative,
            width=first.width,
            height=first.height,
            sampler=first.sampler,
        )
        images |= dict(zip(indices, drawn, strict=True))
    return [images[index] for index in range(len(requests))]
