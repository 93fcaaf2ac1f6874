"""A vision-language model judges the images of an evaluation: with real classes, and on constructed cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_engine.captioning.source import CaptionerModel
from lora_engine.errors import BaseModelError, SettingsError
from lora_engine.evaluation.evidence import BASE, CANDIDATE, Evidence, ImageSet, Losses
from lora_engine.evaluation.first_lines import write_notices
from lora_engine.evaluation.judge import QUESTIONS, Judge
from lora_engine.evaluation.metrics import METRICS
from lora_engine.evaluation.plan import Request
from lora_engine.evaluation.run import evaluate
from lora_engine.evaluation.spec import EvaluateSettings
from lora_engine.progress import no_progress
from tests.support.untrained_captioners import write_captioner, write_judge

JUDGED = tuple(QUESTIONS)
SIDE = 32


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judge(tmp_path_factory.mktemp("judges") / "smol")


@pytest.fixture
def run(
    base: Path, adapters: dict[str, Path], make_dataset: Callable[..., Path], tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    dataset = make_dataset()

    def evaluated(progress: Any = no_progress, **change: Any) -> dict[str, Any]:
        settings = EvaluateSettings(**{"steps": 1, "seeds": 2, "embedder": "none", "image_embedder": "none", **change})
        return evaluate(settings, str(base), adapters["strong"], dataset, tmp_path / "out", progress=progress)

    return evaluated


def test_an_evaluation_with_a_judge_has_its_answers_and_its_digest(
    run: Callable[..., dict[str, Any]], judge: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    gate = {"judged_preference": {"min": 0.0, "max": 1.0, "of": "adapter"}}
    report = run(lambda done, total, _: seen.append((done, total)), judge=str(judge), gates=gate)
    metrics = report["metrics"]
    for name in ("judged_agreement", "judged_likeness"):
        assert all(1.0 <= metrics[name][role] <= 5.0 for role in ("base", "adapter")), name
        assert metrics[name]["difference"] != 0.0, name
    assert metrics["judged_preference"]["base"] == 0.5
    assert 0.0 <= metrics["judged_preference"]["adapter"] <= 1.0
    assert {tuple(metrics[name]["embedders"]) for name in JUDGED} == {(report["judge"]["sha256"],)}
    assert report["judge"]["name"] == "smol"
    assert report["judge"]["questions"] == {name: question.text for name, question in QUESTIONS.items()}
    assert report["judge"]["answered"]["judged_agreement"] > 0.5
    assert report["passed"] is True
    assert str(judge.parent) not in (tmp_path / "out" / "report.json").read_text()
    # 2 captions and 2 bare prompts x 2 seeds, 2 + 3 losses, by both; then per caption and seed 2 + 2 + 2 answers.
    assert seen[-1] == (50, 50)
    assert {total for _, total in seen} == {50}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    again = run(judge=str(judge), gates=gate)
    assert again == report, "the same answers each time"


def test_without_a_judge_a_report_has_no_trace_of_one_and_a_gate_on_it_is_refused(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    report = run()
    assert "judge" not in report
    assert not set(JUDGED) & {*report["metrics"], *report["unmeasured"]}
    assert "judge" not in report["settings"]
    assert "no vision-language model" in run(extra=["judged_likeness"])["unmeasured"]["judged_likeness"]
    with pytest.raises(SettingsError, match=r"'judged_agreement': no vision-language model \(judge\)"):
        run(gates={"judged_agreement": {"min": 0.0}})


def test_a_model_that_does_not_answer_is_refused_before_anything_is_drawn(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    mute = write_captioner(tmp_path / "mute", "idefics3")
    seen: list[int] = []
    with pytest.raises(SettingsError, match="judge 'mute' does not answer as asked: the digits 1 to 5 have"):
        run(lambda done, *_: seen.append(done), judge=str(mute))
    blip = write_captioner(tmp_path / "blip", "blip")
    with pytest.raises(BaseModelError, match="'blip' cannot judge"):
        run(lambda done, *_: seen.append(done), judge=str(blip))
    (mute / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        run(lambda done, *_: seen.append(done), judge=str(mute))
    assert seen == []
    assert not (tmp_path / "out").exists()


class BrightVlm:
    """Answers by brightness: prefers the brighter half, and the left one a little; rates brightness from 1 to 5."""

    def __init__(self, answered: float = 1.0) -> None:
        self.questions: list[str] = []
        self._answered = answered

    def plain(self, text: str) -> str:
        return text.replace("<image>", "")

    def answer(self, image: Image.Image, question: str, answers: Sequence[str]) -> list[float]:
        self.questions.append(question)
        light = np.asarray(image.convert("L"), dtype=np.float64) / 255.0
        if list(answers) == ["A", "B"]:
            left = 0.5 + 0.3 * float(np.sign(round(light[:, :SIDE].mean() - light[:, -SIDE:].mean(), 6))) + 0.1
            return [self._answered * left, self._answered * (1.0 - left)]
        level = round(4.0 * light[:, -SIDE:].mean())
        return [self._answered * float(number == level) for number in range(5)]


def answers_of(vlm: BrightVlm, base: float, candidate: float, tmp_path: Path) -> Evidence:
    def drawn(level: float) -> torch.Tensor:
        return torch.full((2, 3, SIDE, SIDE), round(255 * level), dtype=torch.uint8)

    request = Request("a zorb <image>", "a star <image>", (0, 1), (SIDE, SIDE), "g")
    images = ImageSet(request, {BASE: drawn(base), CANDIDATE: drawn(candidate)}, reference=torch.ones(3, SIDE, SIDE))
    sets: Any = {"with_trigger": (images,), "reference": (images,), "without_trigger": ()}
    source = CaptionerModel("bright", tmp_path, None, ())
    judgement = Judge(vlm, source).ask_all(sets, JUDGED, no_progress)  # type: ignore[arg-type]
    losses = Losses({}, (), ())
    return Evidence((BASE, CANDIDATE), sets, losses, judgement=judgement)


def values_of(name: str, evidence: Evidence) -> list[float]:
    measured = METRICS[name].measure(evidence)
    return [float(measured.values[role][0]) for role in (BASE, CANDIDATE)]


@pytest.mark.parametrize(("base", "candidate", "preference"), [(0.0, 1.0, 0.8), (1.0, 0.0, 0.2), (0.5, 0.5, 0.5)])
def test_a_liking_of_the_left_image_cancels_and_a_planted_difference_stays(
    base: float, candidate: float, preference: float, tmp_path: Path
) -> None:
    vlm = BrightVlm()
    evidence = answers_of(vlm, base, candidate, tmp_path)
    assert values_of("judged_preference", evidence) == pytest.approx([0.5, preference])
    ratings = [1.0 + round(4.0 * level) for level in (base, candidate)]
    assert values_of("judged_agreement", evidence) == values_of("judged_likeness", evidence) == pytest.approx(ratings)
    assert not [text for text in vlm.questions if "<image>" in text or "zorb" in text or "{prompt}" in text]


def test_the_share_of_answers_changes_no_score_and_is_noted_if_it_is_small(tmp_path: Path) -> None:
    full, small = (answers_of(BrightVlm(share), 0.0, 1.0, tmp_path) for share in (1.0, 0.2))
    for name in JUDGED:
        assert values_of(name, small) == pytest.approx(values_of(name, full))
    assert small.judgement is not None
    assert small.judgement.answered == pytest.approx(dict.fromkeys(JUDGED, 0.2))
    report = {"format": 2, "embedder": {}, "judge": {"answered": dict(small.judgement.answered)}}
    notices = list(write_notices(report))
    assert [text.partition(":")[0] for text in notices] == [
        f"The judge hardly answers the question of {name}" for name in JUDGED
    ]
    assert notices[0].endswith("its answers have 20% of the probability.")
    assert list(write_notices({**report, "judge": {"answered": {"judged_agreement": 0.9}}})) == []
