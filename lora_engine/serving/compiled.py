"""The compiled engine: a network that is compiled once, with adapters that come and go as values of fixed shapes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lora_engine.adapters.rows import RowAdapters
from lora_engine.adapters.select import select_modules
from lora_engine.adapters.tree import module_shapes
from lora_engine.bases.base import BaseModel
from lora_engine.errors import EngineError, SettingsError
from lora_engine.inference.draw import DrawSettings
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.serving.adapter_cache import AdapterCache
from lora_engine.serving.batch import OwnRows, draw_together, predict_rows, split_by_job
from lora_engine.serving.dynamic import DynamicEngine
from lora_engine.serving.engine import DrawnImages, ImageJob
from lora_engine.serving.engines import CompiledOptions
from lora_engine.serving.grouping import has_one_pass, is_simple
from lora_engine.serving.lockstep import PredictionInput

_log = logging.getLogger(__name__)
_MAX_SHAPES = 8
"""Graphs that torch keeps per function before it stops compiling."""


class CompiledEngine(DynamicEngine):
    """Draws jobs with a compiled network; another adapter or weight compiles nothing.

    The chosen layers always add a product of the chosen rank for each row of the batch, whose factors are values that
    change; adapters of a lower rank are padded with zeros. Batches are padded to the compiled numbers of images. All
    shapes are compiled at the start. A job that does not fit them is drawn as the dynamic engine draws it, without
    compiling; see `obstacle`.

    Args:
        base: The base, or a name for `load_base`.
        options: The options.

    Raises:
        SettingsError: A size is not one of the base, there are more than eight shapes, or no layer is chosen.
        EngineError: The network cannot be compiled on this machine.
    """

    options: CompiledOptions

    def __init__(self, base: str | BaseModel, options: CompiledOptions | None = None) -> None:
        chosen = options or CompiledOptions()
        super().__init__(base, chosen)
        self._sizes = chosen.sizes or (self._base.default_size,)
        self._batches = sorted({*chosen.batches, chosen.max_images})
        if len(self._sizes) * len(self._batches) > _MAX_SHAPES:
            raise SettingsError(
                f"{len(self._sizes)} sizes and {len(self._batches)} batches are to be compiled",
                allowed=f"at most {_MAX_SHAPES} combinations",
                remedy="leave some out; others are drawn without compiling",
            )
        shapes = {name: shape for name, shape in module_shapes(self._base).items() if len(shape) > 1}
        names = [name for name in select_modules(shapes, chosen.targets) if not name.startswith("text_encoder")]
        self._names = frozenset(names)
        self._rows = RowAdapters(self._base, modules=names, rank=chosen.rank)
        self._shapes = _CompiledShapes(1 if self._base.distilled else 2, self._batches)
        self._compile_shapes()

    def obstacle(self, job: ImageJob) -> str | None:
        """Returns why a job is not drawn by the compiled network; None if it is."""
        size = job.settings.size or (self._base.default_size if job.settings.image is None else None)
        if size not in self._sizes:
            return f"the size {size} is not compiled"
        if not is_simple(job):
            return "a setting needs passes of its own"
        ranks: dict[str, int] = {}
        for file, name in job.files:
            if found := self._adapters.row_obstacle(file):
                return f"{name}: {found}"
            for module, (_, up) in self._adapters.row_factors(file).modules.items():
                ranks[module] = ranks.get(module, 0) + len(up)
        if other := sorted(ranks.keys() - self._names):
            return f"the network is compiled without products for {other[0]}"
        if max(ranks.values(), default=0) > self.options.rank:
            return f"the adapters have rank {max(ranks.values())} together, and {self.options.rank} is compiled"
        return None

    def shares_batch(self, first: ImageJob, other: ImageJob) -> bool:
        """Returns True for jobs of the compiled network of one size, or for others as the dynamic engine does."""
        is_compiled = self.obstacle(first) is None
        if is_compiled != (self.obstacle(other) is None):
            return False
        if not is_compiled:
            return super().shares_batch(first, other)
        return has_one_pass(first, other, self.options.max_images) and self._have_same_options(first, other)

    def close(self) -> None:
        """Puts the layers of the base back."""
        self._rows.remove()

    def _draw(self, jobs: Sequence[ImageJob]) -> list[DrawnImages | EngineError]:
        obstacles = [obstacle for job in jobs if (obstacle := self.obstacle(job))]
        if obstacles:
            _log.warning("drawn without the compiled network: %s", obstacles[0])
            with self._uncompiled():
                return super()._draw(jobs)
        mode = _CompiledRows(self._base, self._rows, self._adapters, self._shapes)
        return draw_together(self._base, self._adapters, jobs, mode)

    @contextmanager
    def _uncompiled(self) -> Iterator[None]:
        self._rows.suspend()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._rows.resume()

    def _compile_shapes(self) -> None:
        from torch._dynamo.exc import TorchDynamoException

        (network,) = (part for name, part in self._base.modules.items() if not name.startswith("text_encoder"))
        empty, negative = parse_prompt(""), parse_prompt("", is_negative=True)
        try:
            network.compile(backend=self.options.backend, dynamic=False)
            for size in self._sizes:
                self._base.latent_shape(size)
                for images in self._batches:
                    settings = DrawSettings(tuple(range(images)), steps=1, guidance=2.0, size=size)
                    with self._shapes.compiling():
                        (result,) = self._draw([ImageJob(empty, negative, settings)])
                    if isinstance(result, EngineError):
                        raise result
        except TorchDynamoException as error:
            raise EngineError(
                f"torch.compile failed: {str(error).strip().splitlines()[0][:300]}",
                where=f"backend {self.options.backend!r}",
                remedy="install a C++ compiler, choose another backend, or use the engine dynamic",
            ) from error


class _CompiledShapes:
    """The shapes that the network was compiled for.

    Args:
        copies: Rows per image: two with a negative prediction.
        batches: Images per batch, sorted.
    """

    def __init__(self, copies: int, batches: Sequence[int]) -> None:
        self._rows = [copies * images for images in batches]
        self._known: set[tuple[Any, ...]] = set()
        self._is_compiling = False

    def __contains__(self, prediction: PredictionInput) -> bool:
        if self._is_compiling:
            self._known.add((len(prediction), prediction.shapes))
        return (len(prediction), prediction.shapes) in self._known

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Adds the shapes that are predicted while the context is open."""
        self._is_compiling = True
        try:
            yield
        finally:
            self._is_compiling = False

    def padded(self, rows: int) -> int:
        """Returns the smallest compiled number of rows that holds this many, or the largest."""
        return next((size for size in self._rows if size >= rows), self._rows[-1])


class _CompiledRows(OwnRows):
    def __init__(self, base: BaseModel, rows: RowAdapters, adapters: AdapterCache, shapes: _CompiledShapes) -> None:
        super().__init__(base, rows, adapters)
        self._shapes = shapes

    def predict_alike(self, together: Mapping[int, PredictionInput]) -> Mapping[int, Tensor]:
        """Predicts for jobs of equal shapes, in padded batches."""
        every = PredictionInput.cat(list(together.values()))
        owners = [self.own_rows(number) for number, prediction in together.items() for _ in range(len(prediction))]
        parts, first = list[Tensor](), 0
        while first < len(every):
            size = self._shapes.padded(len(every) - first)
            last = min(first + size, len(every))
            chosen = [min(row, last - 1) for row in range(first, first + size)]
            self._rows.set_rows([(1, owners[row]) for row in chosen])
            parts.append(self._predict(every.index(chosen))[: last - first])
            first = last
        return split_by_job(together, torch.cat(parts))

    def _predict(self, padded: PredictionInput) -> Tensor:
        # Some samplers have whole timesteps and others do not; the network computes with floats in any case.
        padded = PredictionInput(padded.noisy, padded.timesteps.to(torch.float32), padded.conditioning)
        if padded in self._shapes:
            return predict_rows(self._base, padded)
        with torch.compiler.set_stance("force_eager"):
            return predict_rows(self._base, padded)
