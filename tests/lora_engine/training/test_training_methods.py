"""Every method: what it writes, what it moves and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lora_engine.bases.base import load_base
from lora_engine.errors import AdapterError, DataError, SettingsError
from lora_engine.formats import read_adapter, read_bundle
from lora_engine.training.methods import methods
from lora_engine.training.spec import TrainSettings
from tests.lora_engine.training.runs import Runs, curves_of, factors_of

WORD: dict[str, Any] = {"token": "sks", "vectors": 2, "word_rate": 0.02}
ALTERNATING = {"count": 3, "steps": 2, "batches": "alternating"}
TEXT = ["attention", "text"]
VARIANTS: dict[str, dict[str, Any]] = {
    "finetune": {"method": "finetune"},
    "dreambooth": {"method": "dreambooth"},
    "alternating": {"method": "dreambooth", "prior": ALTERNATING},
    "preservation": {"method": {"name": "finetune", "preservation": {"weight": 2.0}}},
    "inpainting": {"method": "inpainting"},
    "masked": {"method": {"name": "finetune", "mask": {"temperature": 2.0}}},
    "identity": {"method": {"name": "finetune", "identity": {"until": 1.0}}},
}
WORDS: dict[str, dict[str, Any]] = {
    "textual-inversion": {"method": {"name": "textual-inversion", **WORD}},
    "pivotal": {"method": {"name": "pivotal", **WORD}},
}


def test_every_method_is_among_those_that_are_tried() -> None:
    changes = (VARIANTS | WORDS).values()
    assert {TrainSettings.model_validate({"steps": 1, **change}).method.name for change in changes} == set(methods)


def test_what_a_method_does_counts(runs: Runs, masked: Path) -> None:
    losses = {}
    for name, change in VARIANTS.items():
        curve = curves_of(runs(name, steps=2, dataset=masked, work="work", **change))["loss"]
        losses[name] = tuple(loss for _, loss in curve)
    assert len(set(losses.values())) == len(VARIANTS)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "finetune", "targets": ["all", "text"]},
        {"method": {"name": "finetune", "preservation": {}}, "targets": TEXT},
        WORDS["textual-inversion"],
        WORDS["pivotal"],
        VARIANTS["identity"],
    ],
    ids=["everything", "preservation of text encoders", "textual-inversion", "pivotal", "identity"],
)
def test_the_base_is_as_it_was_whatever_moves(bases: dict[str, Path], runs: Runs, change: dict[str, Any]) -> None:
    loaded: list[Any] = []

    def keep(*arguments: Any, **named: Any) -> Any:
        loaded.append(load_base(*arguments, **{**named, "device": "cpu"}))
        return loaded[-1]

    runs.load = keep
    runs(shape="small-sdxl", steps=2, **change)
    (used,), untouched = loaded, load_base(str(bases["small-sdxl"]), device="cpu")
    assert used.modules.keys() == untouched.modules.keys()
    for part, mine in used.modules.items():
        fresh = untouched.modules[part].state_dict()
        assert list(mine.state_dict()) == list(fresh)
        assert all(torch.equal(value, fresh[key]) for key, value in mine.state_dict().items())
    fresh_vae: Any = untouched
    assert all(torch.equal(a, b) for a, b in zip(used.vae.parameters(), fresh_vae.vae.parameters(), strict=True))
    assert type(used.tokenizer) is type(fresh_vae.tokenizer)


def test_an_inversion_writes_the_word_and_no_adapter(bases: dict[str, Path], runs: Runs) -> None:
    bundle = read_bundle(runs(shape="small-sdxl", **WORDS["textual-inversion"]) / "adapter.safetensors")
    assert not bundle.adapter.modules
    base: Any = load_base(str(bases["small-sdxl"]), device="cpu")
    assert (bundle.adapter.base, bundle.adapter.fingerprint) == (base.family, base.fingerprint)
    (word,) = bundle.embeddings
    assert (word.token, word.count, list(word.vectors)) == ("sks", 2, ["text_encoder", "text_encoder_2"])
    rows = base.modules["text_encoder"].get_input_embeddings().weight
    star = rows[base.tokenizer("star", add_special_tokens=False)["input_ids"][:2]]
    assert 0 < (word.vectors["text_encoder"] - star).abs().max() < 1
    assert bundle.card.trigger == "sks"


def test_a_word_alone_is_refused_where_an_adapter_is_needed(runs: Runs) -> None:
    out = runs(steps=1, **WORDS["textual-inversion"])
    with pytest.raises(AdapterError, match="'sks' alone"):
        read_adapter(out / "adapter.safetensors")


@pytest.mark.parametrize(("rate", "moves"), [(0.0, False), (1e-2, True)])
def test_pivotal_tuning_moves_the_adapter_last_and_the_word_as_told(runs: Runs, rate: float, moves: bool) -> None:
    words = []
    for steps, share in ((4, 0.5), (6, 1 / 3)):
        method = {"name": "pivotal", **WORD, "tuning_rate": rate, "inversion": share}
        out = runs(f"{steps}", method=method, steps=steps, schedule="constant")
        ups = [value for name, value in factors_of(out).items() if name.endswith("up")]
        assert ups
        assert all(value.any() for value in ups)
        words.append(read_bundle(out / "adapter.safetensors").embeddings[0].vectors["text_encoder"])
    # Both inversions have two steps; what the tunings of two and of four steps do to the word is the rate's affair.
    assert torch.equal(*words) is not moves


def test_class_pictures_may_be_given(runs: Runs, make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    given = {"class_dataset": make_dataset().rename(tmp_path / "classes")}
    subject = make_dataset()
    runs("out", dataset=subject, work="work", passed=given, method="dreambooth")
    assert (tmp_path / "work").exists()
    assert not (tmp_path / "work" / "class").exists()
    with pytest.raises(SettingsError, match="looks at no class pictures"):
        runs("other", dataset=subject, passed=given)


def test_class_pictures_of_other_sizes_need_batches_of_their_own(
    runs: Runs, make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    given = {"class_dataset": make_dataset([24] * 4).rename(tmp_path / "classes")}
    subject = make_dataset()
    with pytest.raises(DataError, match="16 x 16"):
        runs(dataset=subject, passed=given, method="dreambooth")
    out = runs(dataset=subject, passed=given, method="dreambooth", prior=ALTERNATING)
    assert len(curves_of(out)["loss"]) == 4


@pytest.mark.parametrize(
    ("change", "about", "problem"),
    [
        ({"method": {"name": "textual-inversion", "token": "nowhere"}}, {}, "none of the 5 captions"),
        ({"method": {"name": "textual-inversion", "token": "s/s"}}, {"caption": "a s/s"}, "path"),
        ({"method": {"name": "finetune", "preservation": {}}}, {"class_word": None}, "caption of the class"),
        ({"method": "pivotal", "steps": 1}, {}, "two phases"),
    ],
)
def test_what_a_method_lacks_is_refused_before_training(
    runs: Runs,
    make_dataset: Callable[..., Path],
    tmp_path: Path,
    change: dict[str, Any],
    about: dict[str, Any],
    problem: str,
) -> None:
    with pytest.raises(SettingsError, match=problem):
        runs(dataset=make_dataset(**about), **change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"method": {"name": "dreambooth", "preservation": {}}}, "preservation and class pictures"),
        ({"method": {"name": "textual-inversion", "preservation": {}}}, r"textual-inversion\.preservation"),
        ({"method": {"name": "inpainting", "mask": {}}}, r"inpainting\.mask"),
        ({"method": {"name": "finetune", "inversion": 0.5}}, r"finetune\.inversion"),
        ({"method": "textual-inversion", "prior": {}}, "prior belongs to method 'dreambooth'"),
        ({"method": {"name": "pivotal", "inversion": 1.0}}, r"pivotal\.inversion"),
        ({"method": {"name": "finetune", "mask": {"temperature": 0}}}, r"finetune\.mask\.temperature"),
    ],
)
def test_options_that_do_not_belong_to_a_method_are_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TrainSettings.model_validate({"steps": 1, **change})


def test_a_base_made_for_inpainting_needs_the_method(runs: Runs) -> None:
    factors = factors_of(runs(shape="small-sd-inpainting", method="inpainting", validate_every=2))
    ups = [value for name, value in factors.items() if name.endswith("up")]
    assert ups
    assert all(value.any() for value in ups)
    with pytest.raises(SettingsError, match="made for inpainting"):
        runs("other", shape="small-sd-inpainting")
