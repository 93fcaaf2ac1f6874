"""Asks a vision-language model fixed questions about generated images, for the metrics of `metrics.judged`.

An answer is the mean of its scores, weighted by the probabilities that the model gives to the allowed answers (as
G-Eval, Liu et al. 2023), so it is not rounded to whole scores and nothing is drawn at random.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from lora_engine.captioning.source import CaptionerModel, resolve_judge
from lora_engine.captioning.vlm import Vlm, load_vlm
from lora_engine.data.captioner_options import VlmOptions
from lora_engine.data.images import open_image
from lora_engine.data.pixels import to_image
from lora_engine.errors import BaseModelError, SettingsError
from lora_engine.evaluation.evidence import BASE, LEAST_ANSWERED, ImageSet, RequestSet
from lora_engine.evaluation.plan import EvaluationPlan, Request
from lora_engine.progress import Progress

_GAP = 16
"""Share of the width of an image, as its reciprocal, that is left white between two."""


@dataclass(frozen=True)
class Question:
    """A question about an image, alone or beside another.

    Attributes:
        text: The question, with `{prompt}`.
        scores: Answer of one character -> score.
        of: The images that it is asked about.
        beside: What is shown beside an image, on its left: the real image of the same caption, or the base's image of
            the same seed, then also on its right with the scores turned around; empty for nothing.
    """

    text: str
    scores: Mapping[str, float]
    of: RequestSet
    beside: Literal["", "base", "reference"] = ""

    @property
    def orders(self) -> int:
        """Returns how often it is asked about an image."""
        return 2 if self.beside == "base" else 1

    def asks_about(self, role: str) -> bool:
        """Returns False for the base's images beside themselves."""
        return not (self.beside == "base" and role == BASE)


_ONE_TO_FIVE = {str(score): float(score) for score in range(1, 6)}
QUESTIONS: Mapping[str, Question] = {
    "judged_agreement": Question(
        'This image was generated from the text "{prompt}". How well does the image show what the text says? Answer '
        "with one digit only, from 1 (not at all) to 5 (all of it).",
        _ONE_TO_FIVE,
        "with_trigger",
    ),
    "judged_preference": Question(
        'Two images, left and right, were generated from the text "{prompt}". Which of them shows better what the text '
        "says? Answer with one letter only: A for the left image, B for the right image.",
        {"A": 0.0, "B": 1.0},
        "with_trigger",
        beside="base",
    ),
    "judged_likeness": Question(
        "The left image is real, the right image was generated. Do both show the same subject? Compare shape, colors "
        "and details of the subject, not its pose, its place and the background. Answer with one digit only, from 1 "
        "(another subject) to 5 (exactly the same subject).",
        _ONE_TO_FIVE,
        "reference",
        beside="reference",
    ),
}
"""Metric -> question."""


@dataclass(frozen=True)
class Judgement:
    """The answers of a judge.

    Attributes:
        fingerprint: SHA-256 over the files of the judge.
        values: Metric -> (request, role) -> scores by seed, float64 [seeds].
        answered: Metric -> mean probability of the allowed answers, all together.
    """

    fingerprint: str
    values: Mapping[str, Mapping[tuple[Request, str], Tensor]]
    answered: Mapping[str, float]


class Judge:
    """A vision-language model that answers the questions.

    Args:
        vlm: The model.
        source: Its files.
    """

    def __init__(self, vlm: Vlm, source: CaptionerModel) -> None:
        self._vlm, self.name, self.fingerprint = vlm, source.label, source.fingerprint()

    def describe(self, judgement: Judgement) -> dict[str, Any]:
        """Returns name, digest and questions for the report, and how much of the probability the answers had."""
        questions = {name: QUESTIONS[name].text for name in judgement.values}
        return {
            "name": self.name,
            "sha256": self.fingerprint,
            "questions": questions,
            "answered": dict(judgement.answered),
        }

    def check(self, request: Request) -> None:
        """Asks about a real image; call it before anything is drawn.

        Raises:
            SettingsError: The model does not answer as asked.
        """
        if request.file is None:
            raise ValueError(f"the request {request.prompt!r} has no reference image")
        _, answered = self._ask(QUESTIONS["judged_agreement"], open_image(request.file), request)
        if answered < LEAST_ANSWERED:
            raise SettingsError(
                f"judge {self.name!r} does not answer as asked: the digits 1 to 5 have {answered:.1%} of the "
                f"probability, {LEAST_ANSWERED:.0%} are needed",
                where="judge",
                remedy="choose a larger chat model, or leave judge out",
            )

    def ask_all(
        self, sets: Mapping[RequestSet, Sequence[ImageSet]], names: Collection[str], progress: Progress
    ) -> Judgement:
        """Asks the questions of the named metrics about the images of every model.

        Args:
            sets: The images.
            names: Metrics; those without a question are ignored.
            progress: Counts the answers.
        """
        asked = {name: QUESTIONS[name] for name in QUESTIONS if name in names}
        total = sum(_count(question, sets[question.of]) for question in asked.values())
        values: dict[str, dict[tuple[Request, str], Tensor]] = {}
        answered: dict[str, float] = {}
        done = 0
        for name, question in asked.items():
            values[name], shares = {}, []
            for images in sets[question.of]:
                for role, drawn in images.images.items():
                    # The base is as good as itself.
                    scores = [0.5] * len(drawn)
                    if question.asks_about(role):
                        answers = [
                            [self._ask(question, shown, images.request, turned) for shown, turned in orders]
                            for orders in _presentations(question, images, role)
                        ]
                        scores = [fmean(score for score, _ in pair) for pair in answers]
                        shares += [share for pair in answers for _, share in pair]
                        done += len(drawn) * question.orders
                        progress(done, total, {})
                    values[name][images.request, role] = torch.tensor(scores, dtype=torch.float64)
            answered[name] = fmean(shares)
        return Judgement(self.fingerprint, values, answered)

    def close(self) -> None:
        """Frees the memory of the model."""
        self._vlm.close()

    def _ask(
        self, question: Question, shown: Image.Image, request: Request, turned: bool = False
    ) -> tuple[float, float]:
        """Returns the expected score, and the probability of all allowed answers; `turned` swaps the scores."""
        text = question.text.replace("{prompt}", self._vlm.plain(request.prompt_without_trigger))
        probabilities = self._vlm.answer(shown, text, list(question.scores))
        answered = sum(probabilities)
        if not answered > 0.0:
            raise BaseModelError(f"judge {self.name!r} gives no probability to any answer", where="judge")
        scores = list(question.scores.values())
        score = sum(p * s for p, s in zip(probabilities, reversed(scores) if turned else scores, strict=True))
        return score / answered, answered


def load_judge(name: str) -> Judge:
    """Loads a judge; see `resolve_judge` for names and errors, `load_vlm` for those of loading."""
    source = resolve_judge(name)
    return Judge(load_vlm(source, VlmOptions(model=name, max_tokens=1)), source)


def count_answers(plan: EvaluationPlan, names: Collection[str], roles: int) -> int:
    """Returns the number of answers that `Judge.ask_all` counts.

    Args:
        plan: The requests.
        names: The metrics.
        roles: Number of models, the base included.
    """
    requests = {"with_trigger": plan.with_trigger, "reference": plan.reference}
    return sum(
        sum(len(request.seeds) for request in requests[question.of])
        * (roles - (0 if question.asks_about(BASE) else 1))
        * question.orders
        for name, question in QUESTIONS.items()
        if name in names
    )


def _count(question: Question, sets: Sequence[ImageSet]) -> int:
    asked = (drawn for images in sets for role, drawn in images.images.items() if question.asks_about(role))
    return question.orders * sum(len(drawn) for drawn in asked)


def _presentations(question: Question, images: ImageSet, role: str) -> Iterator[list[tuple[Image.Image, bool]]]:
    """Yields what is shown of each seed: images, and True for those whose answers have the scores of the other."""
    for seed, pixels in enumerate(images.images[role]):
        own = _to_image(pixels)
        if question.beside == "base":
            base = _to_image(images.images[BASE][seed])
            yield [(_side_by_side(base, own), False), (_side_by_side(own, base), True)]
        elif question.beside == "reference" and images.reference is not None:
            yield [(_side_by_side(to_image(images.reference), own), False)]
        else:
            yield [(own, False)]


def _to_image(pixels: Tensor) -> Image.Image:
    return to_image(pixels.float() / 127.5 - 1.0)


def _side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    gap = max(1, left.width // _GAP)
    both = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), (255, 255, 255))
    both.paste(left, (0, 0))
    both.paste(right, (left.width + gap, 0))
    return both
