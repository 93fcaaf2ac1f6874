"""Draws jobs that share a batch, with adapters that all have, or with those of each job on its own rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from lora_engine.adapters.attachment import Attachment
from lora_engine.adapters.row_factors import RowAdapter
from lora_engine.adapters.rows import ArrangementError, RowAdapters
from lora_engine.bases.base import BaseModel
from lora_engine.compute import measure_free
from lora_engine.errors import EngineError
from lora_engine.formats import Bundle
from lora_engine.inference import ComposedEngine
from lora_engine.inference.composition import Composition, compose
from lora_engine.inference.draw import Drawer
from lora_engine.inference.image_metadata import UsedAdapter
from lora_engine.inference.prompts.tags import AdapterTag
from lora_engine.serving.adapter_cache import AdapterCache, text_part
from lora_engine.serving.engine import DrawnImages, ImageJob
from lora_engine.serving.lockstep import Lockstep, PredictionInput, WaitingBase

Tagged = Sequence[tuple[AdapterTag, Bundle]]
Compose = Callable[[Tagged, ComposedEngine], AbstractContextManager[Composition]]


class CachedDrawer(Drawer):
    """Draws as `Drawer` does, with adapters from a cache.

    Args:
        base: The base.
        adapters: The adapters.
        composed: Puts the adapters on the base; None does it as `Drawer` does.
    """

    def __init__(self, base: BaseModel, adapters: AdapterCache, composed: Compose | None = None) -> None:
        super().__init__(base, measure_free=measure_free)
        self._adapters, self._own = adapters, composed

    def run(self, job: ImageJob) -> DrawnImages:
        """Draws a job.

        Raises:
            EngineError: See `Drawer.draw`; or an image has values that are not numbers.
        """
        pixels, drawing = self.draw(
            job.prompt, job.settings, files=job.files, negative=job.negative, on_step=job.on_step
        )
        broken = [seed for seed, image in zip(job.settings.seeds, pixels, strict=True) if image.isnan().any()]
        if broken:
            raise EngineError(
                f"the images of the seeds {broken!r} have values that are not numbers",
                remedy="lower the weights of the adapters, or load the base in float32",
            )
        return DrawnImages(pixels, drawing)

    def forget(self, file: Path) -> None:
        """Drops an adapter's file."""
        self._adapters.forget(file)

    def _bundle(self, file: Path) -> Bundle:
        return self._adapters.bundle(file)

    def _describe_adapter(self, file: tuple[Path, str]) -> UsedAdapter:
        return self._adapters.describe(*file)

    def _composed(self, adapters: Tagged, engine: ComposedEngine) -> AbstractContextManager[Composition]:
        return super()._composed(adapters, engine) if self._own is None else self._own(adapters, engine)


class BatchMode(Protocol):
    """How the jobs of a batch share the base."""

    def composed(self, job: ImageJob, number: int, adapters: Tagged) -> AbstractContextManager[Composition]:
        """Puts the adapters of a job in place."""
        ...

    def end_encoding(self, number: int) -> None:
        """Called by a job whenever it needs a prediction: its texts are encoded by then."""
        ...

    def predict(self, waiting: Mapping[int, PredictionInput]) -> Mapping[int, Tensor | EngineError]:
        """Predicts for all jobs that wait."""
        ...


def draw_together(
    base: BaseModel, adapters: AdapterCache, jobs: Sequence[ImageJob], mode: BatchMode
) -> list[DrawnImages | EngineError]:
    """Draws jobs at once; see `ImageEngine.draw`."""
    lockstep: Lockstep[DrawnImages] = Lockstep(mode.predict)

    def draw(number: int, job: ImageJob) -> DrawnImages:
        def predict(prediction: PredictionInput) -> Tensor:
            mode.end_encoding(number)
            return lockstep.predict(number, prediction)

        waiting: Any = WaitingBase(base, predict)
        composed = cast(Compose, lambda tagged, engine: mode.composed(job, number, tagged))
        return CachedDrawer(waiting, adapters, composed).run(job)

    return lockstep.run([lambda number=number, job=job: draw(number, job) for number, job in enumerate(jobs)])  # type: ignore[misc]


class SharedComposition:
    """All jobs have the same adapters with constant weights.

    Args:
        base: The base, with the adapters.
        composition: The adapters.
    """

    def __init__(self, base: BaseModel, composition: Composition) -> None:
        self._base, self._composition = base, composition

    def composed(self, job: ImageJob, number: int, adapters: Tagged) -> AbstractContextManager[Composition]:
        """See `BatchMode`."""
        del job, number, adapters
        return nullcontext(self._composition)

    def end_encoding(self, number: int) -> None:
        """See `BatchMode`; the text encoders keep the adapters, which all jobs have."""
        del number

    def predict(self, waiting: Mapping[int, PredictionInput]) -> Mapping[int, Tensor | EngineError]:
        """See `BatchMode`."""
        answers: dict[int, Tensor | EngineError] = {}
        for together in _by_shape(waiting):
            answers |= split_by_job(together, predict_rows(self._base, PredictionInput.cat(list(together.values()))))
        return answers


class OwnRows:
    """Each job has its own adapters, on its rows.

    Texts are encoded job by job, with the adapters of the job in the text encoders.

    Args:
        base: The base.
        rows: The adapters on its rows.
        adapters: The cache of the adapters.
    """

    def __init__(self, base: BaseModel, rows: RowAdapters, adapters: AdapterCache) -> None:
        self._base, self._rows, self._adapters = base, rows, adapters
        self._own: dict[int, list[RowAdapter]] = {}
        self._texts: dict[int, ExitStack] = {}
        self.packs_rows = False

    @contextmanager
    def composed(self, job: ImageJob, number: int, adapters: Tagged) -> Iterator[Composition]:
        """See `BatchMode`."""
        own = [RowAdapter(self._adapters.row_factors(file)) for file, _ in job.files]
        with ExitStack() as texts:
            parts = [(tag, text_part(bundle)) for tag, bundle in adapters]
            encoding = texts.enter_context(compose(self._base, parts, engine=job.settings.engine))
            self._own[number], self._texts[number] = own, texts
            yield _RowComposition(self._base.family, [tag for tag, _ in adapters], own, encoding, texts)

    def end_encoding(self, number: int) -> None:
        """See `BatchMode`; takes the adapters of the job off the text encoders, which the next job needs."""
        self._texts[number].close()

    def predict(self, waiting: Mapping[int, PredictionInput]) -> Mapping[int, Tensor | EngineError]:
        """See `BatchMode`."""
        answers: dict[int, Tensor | EngineError] = {}
        for together in _by_shape(waiting):
            try:
                answers |= self.predict_alike(together)
            except ArrangementError:
                self.packs_rows = True
                for number, prediction in together.items():
                    answers |= self.predict_alike({number: prediction})
        return answers

    def predict_alike(self, together: Mapping[int, PredictionInput]) -> Mapping[int, Tensor]:
        """Predicts for jobs of equal shapes."""
        self._rows.set_rows([(len(prediction), self._own[number]) for number, prediction in together.items()])
        return split_by_job(together, predict_rows(self._base, PredictionInput.cat(list(together.values()))))

    def own_rows(self, number: int) -> Sequence[RowAdapter]:
        """Returns the adapters of a job."""
        return self._own[number]


class _RowComposition(Composition):
    def __init__(
        self,
        family: str,
        tags: Sequence[AdapterTag],
        own: Sequence[RowAdapter],
        encoding: Composition,
        texts: ExitStack,
    ) -> None:
        # A row's adapter takes multipliers as an attachment does.
        attached = cast("Mapping[int, Attachment]", dict(enumerate(own)))
        super().__init__(family, tags, None, attached)
        self._encoding: Composition | None = encoding
        texts.callback(self._end_encoding)

    def set_step(
        self, step: int, steps: int, *, active: Collection[int] | None = None, is_enlarged: bool = False
    ) -> None:
        """See `Composition`."""
        if self._encoding is not None:
            self._encoding.set_step(step, steps, active=active, is_enlarged=is_enlarged)
        super().set_step(step, steps, active=active, is_enlarged=is_enlarged)

    def _end_encoding(self) -> None:
        self._encoding = None


def attempt(drawer: CachedDrawer, job: ImageJob) -> DrawnImages | EngineError:
    """Returns the images of a job that is drawn alone, or its error."""
    try:
        return drawer.run(job)
    except EngineError as error:
        return error


def _by_shape(waiting: Mapping[int, PredictionInput]) -> list[dict[int, PredictionInput]]:
    groups: dict[tuple[Any, ...], dict[int, PredictionInput]] = {}
    for number, prediction in waiting.items():
        groups.setdefault(prediction.shapes, {})[number] = prediction
    return list(groups.values())


@torch.no_grad()
def predict_rows(base: BaseModel, prediction: PredictionInput) -> Tensor:
    """Returns the prediction of a base for rows."""
    return base.predict(prediction.noisy, prediction.timesteps, prediction.conditioning)


def split_by_job(together: Mapping[int, PredictionInput], predicted: Tensor) -> dict[int, Tensor]:
    """Returns the rows of each job."""
    parts = torch.split(predicted, [len(prediction) for prediction in together.values()])
    return dict(zip(together, parts, strict=True))
