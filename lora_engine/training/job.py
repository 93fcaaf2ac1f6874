"""Defines a training job: its arguments, what it attaches and scores, and what identifies its steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_engine.adapters import attach
from lora_engine.files import canonical_json, sha256_bytes
from lora_engine.inference.textual_inversion import attach_embeddings
from lora_engine.progress import Progress
from lora_engine.settings import without_later
from lora_engine.training.automatic import prefixes_up_to, scores_prefixes
from lora_engine.training.checkpoint import Checkpoints
from lora_engine.training.choosing import Check, Chooser, make_chooser
from lora_engine.training.continuing import AUTOMATIC, EPOCH, ORIGIN, SCORE
from lora_engine.training.device import compile_network
from lora_engine.training.distributed import ProcessGroup, ReadOnlyCheckpoints
from lora_engine.training.methods import MethodContext, methods
from lora_engine.training.prepared import Attached, Prepared
from lora_engine.training.rank_prefixes import with_prefixes
from lora_engine.training.resolve import count_epoch
from lora_engine.training.sharding import shard_network
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.continuing import fixed_settings
from lora_engine.training.states import StateFolder


@dataclass(frozen=True)
class TrainingJob:
    """A training run: the arguments of `train` and its process group.

    Args:
        group: The processes of the run, this one included.
        out: Folder of the artifact.
        automatic: Names of the settings that the training chooses.
        others: See `train`.
    """

    settings: TrainSettings
    dataset: Path
    work: Path
    cache: Path
    class_dataset: Path | None
    embedder: Path | None
    progress: Progress
    on_samples: Callable[[int, Sequence[Path]], None]
    stop: Callable[[], bool]
    group: ProcessGroup
    out: Path
    init: Path | None
    vae: str | None
    state: StateFolder
    automatic: tuple[str, ...] = ()

    @contextmanager
    def attached(self, prepared: Prepared) -> Iterator[Attached]:
        """Attaches adapter and tokens to the base, and yields what is trained; detaches both at the end."""
        settings, base, adapter = self.settings, prepared.base, prepared.adapter
        with ExitStack() as stack:
            attachment = stack.enter_context(attach(base, adapter, trainable=True)) if adapter.modules else None
            tokens = stack.enter_context(attach_embeddings(base, prepared.tokens, trainable=True))
            compile_network(base, settings.running)
            if settings.running.shard:
                shard_network(base, self.group)
            context = prepared.context(settings, attachment, dict(tokens.named_parameters()), self.embedder)
            phases = [self.group.phase(phase) for phase in methods[settings.method.name].phases(context)]
            if attachment is not None and "rank" in self.automatic:
                phases = [with_prefixes(phase, attachment, settings) for phase in phases]
            yield Attached(attachment, tokens, context, phases)

    def check(self, done: int, prepared: Prepared, attached: Attached) -> Check:
        """Returns the losses of a candidate, with that of training images if what is memorized has a limit."""
        rows = tuple(map(tuple, self.scores(prepared, attached)))
        trained = prepared.choice.trained if prepared.choice is not None else ()
        losses = self._averaged(prepared.losses(attached.context, trained)) if trained else []
        return Check(done, rows, statistics.fmean(losses) if losses else None)

    def scores(self, prepared: Prepared, attached: Attached) -> list[list[float]]:
        """Returns the loss of each unit of the images that score candidates, the same in all processes.

        Returns:
            One row; with `rank: auto` one per prefix of the ranks.
        """
        attachment, rows = attached.attachment, list[list[float]]()
        if attachment is None or "rank" not in self.automatic:
            return [self._unit_losses(prepared, attached.context)]
        for rank in prefixes_up_to(self.settings.rank):
            with attachment.first_ranks(rank):
                rows.append(self._unit_losses(prepared, attached.context))
        return rows

    def _unit_losses(self, prepared: Prepared, context: MethodContext) -> list[float]:
        return self._averaged(prepared.unit_losses(context))

    def _averaged(self, values: Sequence[float]) -> list[float]:
        """Returns values that are the same in all processes."""
        losses = torch.tensor(values, dtype=torch.float32, device=self.group.device)
        self.group.average([losses])
        return [float(loss) for loss in losses.tolist()]

    def chooser(self, prepared: Prepared) -> Chooser | None:
        """Returns what chooses the best step; None without images that score candidates."""
        choice = prepared.choice
        return None if choice is None else make_chooser(self.settings, choice.by, choice.heldout)

    def checkpoints_in(self, folder: Path, job: str, about: Mapping[str, Any] | None = None) -> Checkpoints:
        """Returns the checkpoints in a folder; only the main process writes them."""
        kind = Checkpoints if self.group.is_main_process else ReadOnlyCheckpoints
        return kind(folder, job, self.state.others if about is not None else (), about)

    def report_probe(self, number: int, done: int, total: int) -> None:
        """Reports the progress of a short training, which is no step of the run itself."""
        values = {"probe": float(number), "probe_step": float(done), "probe_steps": float(total)}
        if self.group.is_main_process:
            self.progress(0, self.settings.total_steps, values)

    def about(self, prepared: Prepared) -> dict[str, Any]:
        """Returns what checkpoints say about the run, for plans."""
        settings = without_later(self.settings, self.settings.model_dump(mode="json"))
        epoch, chooser = count_epoch(self.settings, prepared.images.examples), self.chooser(prepared)
        return {
            "settings": settings,
            EPOCH: epoch,
            ORIGIN: self.state.origin,
            **({AUTOMATIC: list(self.automatic)} if self.automatic else {}),
            **({SCORE: {"by": chooser.by, "every": chooser.every}} if chooser else {}),
        }

    def digest(self, prepared: Prepared) -> str:
        """Returns a digest of everything that the steps depend on, except their rates."""
        settings = without_later(self.settings, self.settings.model_dump(mode="json"))
        images, initial, choice = prepared.images, prepared.initial, prepared.choice
        chooser = self.chooser(prepared)
        job = {
            "format": 3,
            "settings": fixed_settings(settings),
            "base": prepared.base.fingerprint,
            "device": prepared.base.device.type,
            "pictures": [[example.identity() for example in group] for group in (images.examples, images.classes)],
            "init": initial and initial.sha256,
            "origin": self.state.origin,
            **({"choice": [example.identity() for example in choice.examples]} if choice else {}),
            **({"every": chooser.every} if chooser else {}),
            **({"prefixes": prefixes_up_to(self.settings.rank)} if "rank" in self.automatic else {}),
            **({"scored": "best prefix"} if scores_prefixes(self.settings, self.automatic) else {}),
        }
        vae = prepared.base.options.vae
        job |= {"vae": vae.fingerprint()} if vae else {}
        return sha256_bytes(canonical_json(job))
