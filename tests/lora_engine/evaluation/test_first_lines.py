from __future__ import annotations

from typing import Any

import pytest

from lora_engine.evaluation.first_lines import states_coverage, write_headline, write_notices


def entry(before: float, after: float, verdict: str, n: int = 16, side: str = "base") -> dict[str, Any]:
    interval = None if n < 6 else [after - before - 0.01, after - before + 0.01]
    return {
        side: before,
        "adapter": after,
        "difference": after - before,
        "n": n,
        "verdict": verdict,
        "interval": interval,
    }


def test_the_headline_begins_with_everything_that_is_worse() -> None:
    metrics = {"clip_i_paired": entry(0.5, 0.8, "better"), "clip_t": entry(0.316, 0.109, "worse")}
    lines = list(write_headline({"metrics": metrics}))
    assert lines[0] == "Worse than the base: agreement with the prompt (0.109 instead of 0.316)."
    assert lines[1].startswith("With the adapter, images are closer to the real ones")


def test_the_headline_names_what_is_worse_than_production() -> None:
    comparisons = {"production": {"validation_loss": entry(0.1, 0.2, "worse", side="other")}}
    lines = list(write_headline({"metrics": {}, "comparisons": comparisons}))
    assert lines == ["Worse than production: validation loss (0.200 instead of 0.100)."]


@pytest.mark.parametrize("verdict", ["unclear", "too few"])
def test_a_difference_without_a_verdict_is_no_headline(verdict: str) -> None:
    metrics = {"clip_i_paired": entry(0.5, 0.8, verdict, 4), "clip_t": entry(0.3, 0.1, verdict, 4)}
    lines = list(write_headline({"metrics": metrics}))
    assert len(lines) == 1
    assert "not clearly closer to the real ones" in lines[0]


def test_the_notices_name_what_limits_the_report() -> None:
    report = {
        "format": 2,
        "embedder": None,
        "missing_embedders": {"embedder": "the default org/clip is not at hand"},
        "metrics": {"validation_loss": entry(1.0, 0.9, "too few", 1)},
        "chosen": {"from": [1, 2], "step": 2, "by": "validation_loss", "on": [], "score": 0.8, "leave_one_out": 0.91},
        "left_out": [{"source": f"{k}.png", "sha256": "", "reason": "kin"} for k in range(7)],
        "truncated": ["long"],
        "unreadable": ["звезда"],
        "absent": {"production": "there is none"},
        "skipped_gates": ["gate clip_t against production: there is none"],
    }
    text = "\n".join(write_notices(report))
    for part in (
        "Likeness and agreement were not measured: there is no embedder of images and texts (the default org/clip",
        "fewer than 6 independent groups",
        "One pair says nothing about chance.",
        "The checkpoint of step 2 was chosen among 2 on these images: validation_loss 0.91 (leave-one-out).",
        "7 held-out images were left out: 0.png (kin)",
        "and 2 more",
        "1 prompts are longer than the embedder reads",
        "1 prompts have letters of another script than Latin",
        "Not compared with production: there is none.",
        "Not applicable, as it declares: gate clip_t against production",
    ):
        assert part in text, part


def test_a_report_of_format_1_and_one_without_limits_have_no_notices() -> None:
    metrics = {"clip_t": entry(0.3, 0.4, "better", 2)}
    assert list(write_notices({"metrics": metrics, "embedder": {"name": "x", "sha256": "y"}})) == []
    whole = {"format": 2, "embedder": {"name": "x", "sha256": "y"}, "metrics": {"clip_t": entry(0.3, 0.4, "better", 6)}}
    assert list(write_notices(whole)) == []


def test_the_coverage_is_stated_from_sixteen_groups_on() -> None:
    assert states_coverage({"metrics": {"a": entry(0, 1, "better", 16), "b": entry(0, 1, "too few", 3)}})
    assert not states_coverage({"metrics": {"a": entry(0, 1, "better", 16), "b": entry(0, 1, "better", 15)}})
    assert not states_coverage({"metrics": {"b": entry(0, 1, "too few", 3)}})
