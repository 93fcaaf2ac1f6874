"""Draws several jobs at once: each in a thread of its own, and the predictions of all in one batch.

One thread computes at a time, until it needs a prediction. When all wait for one, their rows are predicted together.
So a job keeps its own prompt, sampler, seeds and callback, and ends or fails without the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lora_engine.bases.base import BaseModel
from lora_engine.bases.conditioning import Conditioning
from lora_engine.errors import EngineError

Result = TypeVar("Result")


@dataclass(frozen=True)
class PredictionInput:
    """The arguments of a call of `BaseModel.predict`."""

    noisy: Tensor
    timesteps: Tensor
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.noisy)

    @property
    def shapes(self) -> tuple[Any, ...]:
        """The shapes and dtypes of a row; rows with equal ones can be predicted together."""
        tensors = {"": self.noisy, **self.conditioning.tensors}
        return tuple((name, tuple(value.shape[1:]), value.dtype) for name, value in sorted(tensors.items()))

    def index(self, rows: Sequence[int]) -> PredictionInput:
        """Returns the given rows; a row may occur more than once."""
        chosen = torch.as_tensor(rows, device=self.noisy.device)
        return PredictionInput(self.noisy[chosen], self.timesteps[chosen], self.conditioning.index(rows))

    @staticmethod
    def cat(parts: Sequence[PredictionInput]) -> PredictionInput:
        """Concatenates the rows of all parts."""
        if len(parts) == 1:
            return parts[0]
        return PredictionInput(
            torch.cat([part.noisy for part in parts]),
            torch.cat([part.timesteps for part in parts]),
            Conditioning.cat([part.conditioning for part in parts]),
        )


PredictTogether = Callable[[Mapping[int, PredictionInput]], Mapping[int, Tensor | EngineError]]
"""Takes the predictions that jobs wait for by the number of the job; returns all of them, or their errors."""


class Lockstep(Generic[Result]):
    """Runs jobs until they end.

    Args:
        answer: Called with the predictions of all jobs that have not ended.
    """

    def __init__(self, answer: PredictTogether) -> None:
        self._answer = answer
        self._changed = threading.Condition()
        self._waiting: dict[int, PredictionInput] = {}
        self._answers: dict[int, Tensor | EngineError] = {}
        self._ended, self._is_over = 0, False

    def run(self, jobs: Sequence[Callable[[], Result]]) -> list[Result | EngineError]:
        """Returns the result of each job, or its `EngineError`.

        Raises:
            Exception: Any other error of a job or of `answer`; all jobs have ended then.
        """
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        with ThreadPoolExecutor(len(jobs), "image") as pool:
            futures = [pool.submit(copy_context().run, self._run, job, device) for job in jobs]
            try:
                self._serve(len(jobs))
            finally:
                with self._changed:
                    self._is_over = True
                    self._changed.notify_all()
        results: list[Result | EngineError] = []
        for future in futures:
            try:
                results.append(future.result())
            except EngineError as error:
                results.append(error)
        return results

    def predict(self, number: int, prediction: PredictionInput) -> Tensor:
        """Returns a prediction of a job, which calls this in its thread.

        Raises:
            EngineError: The prediction failed.
        """
        self._waiting[number] = prediction
        self._changed.notify_all()
        self._changed.wait_for(lambda: number in self._answers or self._is_over)
        answer = self._answers.pop(number, None)
        if answer is None:
            raise EngineError("the batch of the job failed", where=f"job {number}")
        if isinstance(answer, EngineError):
            raise answer
        return answer

    def _run(self, job: Callable[[], Result], device: int | None) -> Result:
        if device is not None:
            torch.cuda.set_device(device)  # each thread has its own
        with self._changed:
            try:
                return job()
            finally:
                self._ended += 1
                self._changed.notify_all()

    def _serve(self, count: int) -> None:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: len(self._waiting) + self._ended == count)
                if not self._waiting:
                    return
                waiting, self._waiting = dict(sorted(self._waiting.items())), {}
                self._answers.update(self._answer(waiting))
                self._changed.notify_all()


class WaitingBase:
    """A base whose predictions are those of a `Lockstep`; everything else is that of the base itself.

    Args:
        base: The base.
        predict: Returns a prediction.
    """

    def __init__(self, base: BaseModel, predict: Callable[[PredictionInput], Tensor]) -> None:
        self._base, self._predict = base, predict

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """See `BaseModel`."""
        return self._predict(PredictionInput(noisy, timesteps, conditioning))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)
