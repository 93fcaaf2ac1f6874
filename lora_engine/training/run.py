"""`train`: from a dataset to an adapter in a folder. Prepares, attaches, lets the loop run, writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_engine.adapters import Adapter, LayerSettings, attach, create_adapter
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.source import resolve_base
from lora_engine.data.manifest import Manifest
from lora_engine.errors import DataError, InterruptedRun, SettingsError, TrainingError
from lora_engine.files import atomic_write, canonical_json, sha256_bytes
from lora_engine.formats import Card, write_adapter
from lora_engine.progress import Progress, no_progress
from lora_engine.seeds import generator
from lora_engine.training.checkpoint import Checkpoints
from lora_engine.training.examples import Conditioner, Encoder, Example, read_examples
from lora_engine.training.loop import FitOptions, History, fit
from lora_engine.training.methods import Workbench, methods
from lora_engine.training.prior import ClassPictures, prior_prompts
from lora_engine.training.spec import Prior, TrainSettings
from lora_engine.training.validation import picture_losses

ADAPTER = "adapter.safetensors"
CURVES = "training.json"
_POINTS = 500
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(
    settings: TrainSettings,
    base: str,
    dataset: Path,
    out: Path,
    work: Path,
    *,
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
        work: Caches and checkpoints; kept between tries of a job, which makes them resume.
        progress: Told after each step: steps done, steps in all, values; while class pictures are drawn, their number.
        stop: Asked often; True ends the run as soon as a checkpoint is written.

    Raises:
        BaseModelError: The base cannot be found or read.
        DataError: The dataset cannot be used.
        SettingsError: The settings do not suit the base or the dataset.
        InterruptedRun: `stop` said so.
        NonFiniteError: NaN or Inf turned up.
        TrainingError: Memory ran out.
    """
    job = _Job(settings, dataset, work, progress, stop)
    try:
        adapter, card, history = job.run(base)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise TrainingError(
            "memory ran out",
            where="training",
            remedy=f"set batch lower (it is {settings.batch}) and accumulate higher (it is {settings.accumulate}) by "
            "the same factor, set precision to bf16, choose fewer targets, or prepare the pictures at a lower "
            "resolution; the next run continues from the last checkpoint",
        ) from error
    curves = {
        "loss": _thin(history.loss),
        "lr": _thin(history.rate),
        "validation_loss": [list(entry) for entry in history.validation],
        "trained_on": card.data,
    }
    atomic_write(out / CURVES, canonical_json(curves))
    write_adapter(out / ADAPTER, adapter, card=card)


@dataclass(frozen=True)
class _Job:
    settings: TrainSettings
    dataset: Path
    work: Path
    progress: Progress
    stop: Callable[[], bool]

    def run(self, base_name: str) -> tuple[Adapter, Card, History]:
        settings = self.settings
        source = resolve_base(base_name)
        manifest = Manifest.load(self.dataset)
        examples, heldout = self._read_pictures(manifest)
        self._check()
        base = load_base(source, dtype=_PRECISIONS[settings.precision])
        for size in {example.size for example in (*examples, *heldout)}:
            base.latent_shape(size)
        fresh = create_adapter(
            base,
            settings.targets,
            settings.kind.name,
            settings.rank,
            settings.alpha,
            options=settings.kind.options(),
            overrides=_overrides(settings),
            generator=generator(settings.seed, "factors"),
        )
        encoder = Encoder(base, self.work)
        class_examples = self._class_pictures(base, manifest, examples)
        pictures = (*examples, *class_examples, *heldout)
        encoder.prepare(pictures, [""] if settings.caption_dropout else [], self._check)
        history, trained = self._fit(base, fresh, encoder, (examples, class_examples, heldout))
        return trained, _card(settings, base, manifest), history

    def _fit(
        self, base: BaseModel, fresh: Adapter, encoder: Encoder, pictures: tuple[tuple[Example, ...], ...]
    ) -> tuple[History, Adapter]:
        settings, (examples, class_examples, heldout) = self.settings, pictures
        trains_text = any(name.startswith("text_encoder") for name in fresh.modules)
        conditioner: Conditioner = base.encode_text if trains_text else encoder.conditioning
        with attach(base, fresh, trainable=True) as attachment:
            bench = Workbench(
                base=base,
                settings=settings,
                parameters=dict(attachment.named_parameters()),
                examples=examples,
                class_examples=class_examples,
                latents=encoder.latents,
                conditioner=conditioner,
                dropping=attachment.dropping,
            )
            history = fit(
                methods[settings.method].phases(bench),
                base.modules.values(),
                _options(settings),
                checkpoints=Checkpoints(self.work / "checkpoints", self._digest(base, pictures)),
                validate=lambda: _mean(picture_losses(base, encoder.latents, conditioner, heldout, seed=settings.seed)),
                progress=self.progress,
                stop=self.stop,
            )
            return history, attachment.adapter().to(device="cpu").settled()

    def _check(self) -> None:
        if self.stop():
            raise InterruptedRun("stopped while preparing; what is prepared is kept")

    def _digest(self, base: BaseModel, pictures: tuple[tuple[Example, ...], ...]) -> str:
        job = {
            "format": 1,
            "settings": self.settings.model_dump(mode="json"),
            "base": base.fingerprint,
            "device": base.device.type,
            "pictures": [[[example.digest, example.caption] for example in group] for group in pictures],
        }
        return sha256_bytes(canonical_json(job))

    def _read_pictures(self, manifest: Manifest) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        examples = read_examples(self.dataset, manifest, "train")
        if not examples:
            raise DataError(
                "there are no pictures to train on", where=str(self.dataset), remedy="lower heldout, or add some"
            )
        if not self.settings.validate_every:
            return examples, ()
        heldout = read_examples(self.dataset, manifest, "heldout")
        if not heldout:
            raise SettingsError(
                f"validate_every is {self.settings.validate_every}, and the dataset holds no pictures out",
                remedy="set heldout above 0 in the ingest step, or validate_every to 0",
            )
        return examples, heldout

    def _class_pictures(self, base: BaseModel, manifest: Manifest, examples: Sequence[Example]) -> tuple[Example, ...]:
        if not methods[self.settings.method].uses_prior:
            return ()
        prior = self.settings.prior or Prior()

        def told(number: int) -> None:
            self._check()
            self.progress(0, self.settings.steps, {"class_pictures": float(number)})

        prompts = prior_prompts(prior, manifest.class_word)
        drawing = ClassPictures(base, prior, prompts, self.work / "class", self.settings.seed, told)
        return drawing.draw([example.size for example in examples])


def _overrides(settings: TrainSettings) -> dict[str, LayerSettings]:
    found = {}
    for pattern, special in settings.overrides.items():
        kind = special.kind or settings.kind
        alpha = special.alpha or (None if special.rank else settings.alpha)
        found[pattern] = LayerSettings(kind.name, special.rank or settings.rank, alpha, kind.options())
    return found


def _options(settings: TrainSettings) -> FitOptions:
    return FitOptions(
        schedule=settings.schedule,
        warmup=settings.warmup,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        accumulate=settings.accumulate,
        checkpoint_every=settings.checkpoint_every,
        validate_every=settings.validate_every,
    )


def _card(settings: TrainSettings, base: BaseModel, manifest: Manifest) -> Card:
    return Card(
        title=" ".join(word for word in (manifest.trigger, manifest.class_word) if word),
        base=base.name,
        base_fingerprint=base.fingerprint,
        trigger=manifest.trigger,
        class_word=manifest.class_word,
        recipe=settings.model_dump(mode="json"),
        data=sorted({picture.sha256 for picture in manifest.of_split("train")}),
        seed=settings.seed,
    )


def _thin(values: Sequence[float]) -> list[list[float]]:
    # Every step up to 500 of them; then evenly spread ones, with the first and the last.
    count = len(values)
    if count <= _POINTS:
        steps = list(range(count))
    else:
        steps = sorted({round(place * (count - 1) / (_POINTS - 1)) for place in range(_POINTS)})
    return [[step + 1, values[step]] for step in steps]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        phrase in text for phrase in ("out of memory", "can't allocate memory", "not enough memory")
    )
