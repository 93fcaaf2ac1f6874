"""Saves the adapter at intervals during training, each time as a file that every program can load."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_engine.adapters import Adapter
from lora_engine.files import atomic_write
from lora_engine.formats import Card, read_bundle, write_adapter
from lora_engine.formats.embeddings import Embedding
from lora_engine.training.record import saved_name, with_saved

_STEP = re.compile(r"step-(\d{6,})(\.safetensors)?")


@dataclass(frozen=True)
class SavedAdapters:
    """Saves the adapters of a run in a work folder, and copies them into the artifact.

    Attributes:
        current: Returns the adapter and the learned tokens as they would be written now.
        card: Card of the run's result.
        folder: Folder of the files until the run is finished.
        run: Digest of everything that the steps of the run depend on; names the subfolder.
        every: Steps between saved adapters.
    """

    current: Callable[[], tuple[Adapter, tuple[Embedding, ...]]]
    card: Card
    folder: Path
    run: str
    every: int

    def save(self, done: int, loss: float | None) -> None:
        """Writes the adapter after so many steps, with its validation loss (None without validation).

        Raises:
            OSError: The file cannot be written; earlier ones are untouched.
        """
        adapter, embeddings = self.current()
        card = with_saved(self.card, done, loss)
        write_adapter(self._folder / _file(done), adapter, card=card, embeddings=embeddings)

    def take_over(self, folder: Path, run: str, done: int) -> None:
        """Copies the files of another run, up to a number of steps, which this one continues."""
        copy_steps(folder / run[:16], self._folder, done)

    def copy(self, out: Path, total: int) -> list[tuple[int, float | None]]:
        """Copies the files into the folder `saved` of an artifact, with the card of the finished run.

        Args:
            out: Folder of the artifact.
            total: Steps of the run.

        Returns:
            Step and validation loss of each.
        """
        saved: list[tuple[int, float | None]] = []
        for step in range(self.every, total + 1, self.every):
            file = self._folder / _file(step)
            if file.is_file():  # not of steps that an earlier run took without saving
                bundle = read_bundle(file)
                loss = bundle.card.recipe["saved"]["validation_loss"]
                card = with_saved(self.card, step, loss)
                write_adapter(out / saved_name(step), bundle.adapter, card=card, embeddings=bundle.embeddings)
                saved.append((step, loss))
        return saved

    @property
    def _folder(self) -> Path:
        return self.folder / self.run[:16]


def copy_steps(source: Path, target: Path, done: int) -> None:
    """Copies the entries `step-N`, files or folders of files, with N up to `done`; existing ones stay."""
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match and int(match[1]) <= done:
            for file in sorted(path.iterdir()) if path.is_dir() else (path,):
                copy = target / file.relative_to(source)
                if not copy.exists():
                    atomic_write(copy, file.read_bytes())


def _file(step: int) -> str:
    return Path(saved_name(step)).name
