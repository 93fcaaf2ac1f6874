"""`train`: trains an adapter on a dataset and writes it to a folder. `fitting` does the work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lora_engine.errors import EngineError, SettingsError, TrainingError
from lora_engine.files import FilePath, atomic_write, canonical_json
from lora_engine.formats import write_adapter
from lora_engine.progress import Progress, no_progress
from lora_engine.training.determinism import deterministic
from lora_engine.training.device import choose_device, choose_precision
from lora_engine.training.distributed import process_group
from lora_engine.training.fitting import run_job
from lora_engine.training.job import TrainingJob
from lora_engine.training.record import curves_of
from lora_engine.training.spec import TrainSettings
from lora_engine.training.states import StateFolder

ADAPTER = "adapter.safetensors"
CURVES = "training.json"


def train(
    settings: TrainSettings,
    base: FilePath,
    dataset: FilePath,
    out: FilePath,
    work: FilePath,
    *,
    cache: FilePath | None = None,
    class_dataset: FilePath | None = None,
    embedder: FilePath | None = None,
    init: FilePath | None = None,
    vae: str | None = None,
    state: FilePath | None = None,
    origin: str = "",
    fresh: bool = False,
    progress: Progress = no_progress,
    on_samples: Callable[[int, Sequence[FilePath]], None] = lambda step, files: None,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains an adapter and writes `adapter.safetensors` and `training.json` into `out`.

    On a CPU the bytes depend on the settings, the base and the dataset only, not on interruptions.

    Args:
        settings: See `TrainSettings`.
        base: A name for `resolve_base`.
        dataset: A folder with a manifest, captioned and in the training sizes.
        out: Folder of the artifact; written only after the training has finished.
        work: Folder of checkpoints; a later run with the same folder resumes from them.
        cache: Folder of encoded images and texts, which runs may share; None uses `work`.
        class_dataset: A folder with a manifest: class images for prior preservation; None lets the base draw them.
        embedder: A folder with the model for `method.identity`; None uses the embedded one.
        init: An adapter file to start from; None starts with a difference of zero.
        vae: Another autoencoder for the base, a name for `resolve_vae`; None is the base's own.
        state: Folder of checkpoints that remain after the run, for longer runs to continue from; its sibling folders
            are those of other runs. None uses `work`, and continues no other run.
        origin: Digest of what the run was made from, for plans; stored in checkpoints.
        fresh: True repeats a finished run from step 0, and continues no other; an interrupted one resumes.
        progress: Called after each step: steps done, total steps, measurements (see `Point`); before the first step
            while class images are drawn (`class_images`) and while images and texts are encoded (`encoded`).
        on_samples: Called with the steps done and the files of sample images that were drawn.
        stop: Polled often; True writes a checkpoint and ends the run.

    Raises:
        BaseModelError: The base is not found or not readable.
        DataError: The dataset is unusable.
        SettingsError: The settings do not suit the base, the dataset or the device.
        InterruptedRun: `stop` returned True.
        NonFiniteError: NaN or Inf occurred.
        TrainingError: Memory ran out.
    """
    dataset, out, work, cache = Path(dataset), Path(out), Path(work), Path(cache or work)
    class_dataset, embedder = Path(class_dataset) if class_dataset else None, Path(embedder) if embedder else None
    try:
        with (
            process_group(settings.running.processes, choose_device(settings.running)) as group,
            deterministic(enabled=settings.running.deterministic),
        ):
            precision = choose_precision(settings.precision, group.device)
            settings = settings.model_copy(update={"precision": precision})
            states = StateFolder(Path(state) if state else work, shared=state is not None, origin=origin, fresh=fresh)
            with group.main_process_first():
                if group.is_main_process:
                    states.prepare()
            job = TrainingJob(
                settings=settings,
                dataset=dataset,
                work=work,
                cache=cache,
                class_dataset=class_dataset,
                embedder=embedder,
                progress=progress,
                on_samples=on_samples,
                stop=stop,
                group=group,
                out=out,
                init=Path(init) if init else None,
                vae=vae,
                state=states,
            )
            result = run_job(job, os.fspath(base))
    except (MemoryError, RuntimeError) as error:
        worded = _worded(error, settings)
        if worded is None:
            raise
        raise worded from error
    if not group.is_main_process:
        return
    bundle = result.bundle
    atomic_write(
        out / CURVES, canonical_json(curves_of(result.history, result.trained_on, result.saved, result.choices))
    )
    write_adapter(out / ADAPTER, bundle.adapter, card=bundle.card, embeddings=bundle.embeddings)
    states.mark_finished(out / ADAPTER)


def _worded(error: BaseException, settings: TrainSettings) -> EngineError | None:
    """Returns the error for missing determinism or memory; None for any other cause."""
    if _is_not_deterministic(error):
        return SettingsError(
            f"an operation has no deterministic implementation ({str(error).splitlines()[0]})",
            where="running.deterministic",
            remedy="leave running.deterministic out, or train on a CPU",
        )
    if not _is_out_of_memory(error):
        return None
    return TrainingError(
        "out of memory",
        where="training",
        remedy=f"lower batch ({settings.batch}) and raise accumulate ({settings.accumulate}) by the same factor, "
        "set precision to bf16 and running.gradient_checkpointing to true, choose fewer targets, or preprocess the "
        "images at a lower resolution; the next run resumes from the last checkpoint",
    )


def _is_not_deterministic(error: BaseException) -> bool:
    # torch's messages; the second one appears with another CUBLAS_WORKSPACE_CONFIG.
    return any(
        phrase in str(error) for phrase in ("deterministic implementation", "Deterministic behavior was enabled")
    )


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        phrase in text for phrase in ("out of memory", "can't allocate memory", "not enough memory")
    )
