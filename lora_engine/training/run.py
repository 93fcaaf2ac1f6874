"""`train`: from a dataset to an adapter in a folder. What is done in between is in `job`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lora_engine.errors import SettingsError, TrainingError
from lora_engine.files import atomic_write, canonical_json
from lora_engine.formats import write_adapter
from lora_engine.progress import Progress, no_progress
from lora_engine.training.determinism import deterministic
from lora_engine.training.device import choose_device
from lora_engine.training.distributed import process_group
from lora_engine.training.job import TrainingJob
from lora_engine.training.record import curves_of
from lora_engine.training.spec import TrainSettings

ADAPTER = "adapter.safetensors"
CURVES = "training.json"


def train(
    settings: TrainSettings,
    base: str,
    dataset: Path,
    out: Path,
    work: Path,
    *,
    cache: Path | None = None,
    class_dataset: Path | None = None,
    embedder: Path | None = None,
    progress: Progress = no_progress,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains an adapter and writes `adapter.safetensors` and `training.json` into `out`.

    On a CPU the bytes depend on the settings, the base and the dataset alone, however often the run was stopped.

    Args:
        settings: See `TrainSettings`.
        base: A name for `resolve_base`.
        dataset: A folder with a manifest, captioned and in the sizes to train in.
        out: Where the artifact goes; nothing is written before the training is through.
        work: Checkpoints; kept between tries of a job, which makes them resume.
        cache: Encoded pictures and texts, which any number of runs may share; None keeps them in `work`.
        class_dataset: A folder with a manifest: class pictures for prior preservation; None lets the base draw them.
        embedder: A folder with the model that `method.identity` is judged by; None takes the embedded one.
        progress: Told after each step: steps done, steps in all, values; while class pictures are drawn, their number.
        stop: Asked often; True ends the run as soon as a checkpoint is written.

    Raises:
        BaseModelError: The base cannot be found or read.
        DataError: The dataset cannot be used.
        SettingsError: The settings do not suit the base, the dataset or the device.
        InterruptedRun: `stop` said so.
        NonFiniteError: NaN or Inf turned up.
        TrainingError: Memory ran out.
    """
    try:
        with (
            process_group(settings.running.processes, choose_device(settings.running)) as team,
            deterministic(wanted=settings.running.deterministic),
        ):
            job = TrainingJob(
                settings, dataset, work, cache or work, class_dataset, embedder, progress, stop, team, out
            )
            bundle, history = job.run(base)
    except (MemoryError, RuntimeError) as error:
        if _is_not_deterministic(error):
            raise SettingsError(
                f"an operation has no deterministic form here ({str(error).splitlines()[0]})",
                where="running.deterministic",
                remedy="leave running.deterministic out, or train on a CPU",
            ) from error
        if not _is_out_of_memory(error):
            raise
        raise TrainingError(
            "memory ran out",
            where="training",
            remedy=f"set batch lower (it is {settings.batch}) and accumulate higher (it is {settings.accumulate}) by "
            "the same factor, set precision to bf16 and running.gradient_checkpointing to true, choose fewer targets, "
            "or prepare the pictures at a lower resolution; the next run continues from the last checkpoint",
        ) from error
    if not team.is_main_process:
        return
    atomic_write(out / CURVES, canonical_json(curves_of(history, bundle.card.data)))
    write_adapter(out / ADAPTER, bundle.adapter, card=bundle.card, embeddings=bundle.embeddings)


def _is_not_deterministic(error: BaseException) -> bool:
    # torch's words; the second ones where the workspace of cuBLAS was set to something else.
    return any(
        phrase in str(error) for phrase in ("deterministic implementation", "Deterministic behavior was enabled")
    )


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        phrase in text for phrase in ("out of memory", "can't allocate memory", "not enough memory")
    )
