"""Every method: its files, the parameters that it trains and its errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lora_engine.bases.base import load_base
from lora_engine.data.manifest import Manifest
from lora_engine.errors import AdapterError, DataError, SettingsError
from lora_engine.formats import read_adapter, read_bundle
from lora_engine.training.methods import methods
from lora_engine.training.spec import TrainSettings
from tests.lora_engine.training.runs import Runs, curves_of, factors_of

TOKEN: dict[str, Any] = {"token": "sks", "vectors": 2, "word_rate": 0.02}
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
TOKENS: dict[str, dict[str, Any]] = {
    "textual-inversion": {"method": {"name": "textual-inversion", **TOKEN}},
    "pivotal": {"method": {"name": "pivotal", **TOKEN}},
}


def test_every_method_is_tested() -> None:
    changes = (VARIANTS | TOKENS).values()
    assert {TrainSettings.model_validate({"steps": 1, **change}).method.name for change in changes} == set(methods)


def test_every_method_has_its_own_losses(runs: Runs, masked: Path) -> None:
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
        TOKENS["textual-inversion"],
        TOKENS["pivotal"],
        VARIANTS["identity"],
    ],
    ids=["everything", "preservation of text encoders", "textual-inversion", "pivotal", "identity"],
)
def test_the_base_is_unchanged_whatever_is_trained(bases: dict[str, Path], runs: Runs, change: dict[str, Any]) -> None:
    loaded: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        loaded.append(load_base(*arguments, **{**options, "device": "cpu"}))
        return loaded[-1]

    runs.load = load
    runs(shape="small-sdxl", steps=2, **change)
    (used,), untouched = loaded, load_base(str(bases["small-sdxl"]), device="cpu")
    assert used.modules.keys() == untouched.modules.keys()
    for part, module in used.modules.items():
        expected = untouched.modules[part].state_dict()
        assert list(module.state_dict()) == list(expected)
        assert all(torch.equal(value, expected[key]) for key, value in module.state_dict().items())
    fresh_vae: Any = untouched
    assert all(torch.equal(a, b) for a, b in zip(used.vae.parameters(), fresh_vae.vae.parameters(), strict=True))
    assert type(used.tokenizer) is type(fresh_vae.tokenizer)


def test_an_inversion_writes_the_token_and_no_adapter(bases: dict[str, Path], runs: Runs) -> None:
    bundle = read_bundle(runs(shape="small-sdxl", **TOKENS["textual-inversion"]) / "adapter.safetensors")
    assert not bundle.adapter.modules
    base: Any = load_base(str(bases["small-sdxl"]), device="cpu")
    assert (bundle.adapter.base, bundle.adapter.fingerprint) == (base.family, base.fingerprint)
    (embedding,) = bundle.embeddings
    assert (embedding.token, embedding.count, list(embedding.vectors)) == ("sks", 2, ["text_encoder", "text_encoder_2"])
    rows = base.modules["text_encoder"].get_input_embeddings().weight
    star = rows[base.tokenizer("star", add_special_tokens=False)["input_ids"][:2]]
    assert 0 < (embedding.vectors["text_encoder"] - star).abs().max() < 1
    assert bundle.card.trigger == "sks"


def test_a_token_without_adapter_is_refused_where_an_adapter_is_needed(runs: Runs) -> None:
    out = runs(steps=1, **TOKENS["textual-inversion"])
    with pytest.raises(AdapterError, match="only the embedding 'sks'"):
        read_adapter(out / "adapter.safetensors")


@pytest.mark.parametrize(("rate", "moves"), [(0.0, False), (1e-2, True)])
def test_pivotal_tuning_trains_the_adapter_last_and_the_token_at_its_rate(runs: Runs, rate: float, moves: bool) -> None:
    vectors = []
    for steps, share in ((4, 0.5), (6, 1 / 3)):
        method = {"name": "pivotal", **TOKEN, "tuning_rate": rate, "inversion": share}
        out = runs(f"{steps}", method=method, steps=steps, schedule="constant")
        ups = [value for name, value in factors_of(out).items() if name.endswith("up")]
        assert ups
        assert all(value.any() for value in ups)
        vectors.append(read_bundle(out / "adapter.safetensors").embeddings[0].vectors["text_encoder"])
    # Both inversions have two steps. The tunings of two and of four steps move the token only at a rate above 0.
    assert torch.equal(*vectors) is not moves


def test_class_images_may_come_from_a_dataset(runs: Runs, make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    with_classes = {"class_dataset": make_dataset().rename(tmp_path / "classes")}
    subject = make_dataset()
    runs("out", dataset=subject, work="work", arguments=with_classes, method="dreambooth")
    assert (tmp_path / "work").exists()
    assert not (tmp_path / "work" / "class").exists()
    with pytest.raises(SettingsError, match="uses no class images"):
        runs("other", dataset=subject, arguments=with_classes)


def test_class_images_beside_the_images_are_used_unless_others_are_given(
    runs: Runs, make_dataset: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_classes = {"class_dataset": make_dataset().rename(tmp_path / "classes")}
    subject = make_dataset()
    manifest = Manifest.load(subject)
    last = manifest.pictures[-1].model_copy(update={"split": "class", "caption": "a dog"})
    manifest.model_copy(update={"pictures": (*manifest.pictures[:-1], last)}).save(subject)
    own = runs("own", dataset=subject, work="work", method="dreambooth")
    assert not (tmp_path / "work" / "class").exists()
    assert caplog.text == ""
    other = runs("other", dataset=subject, arguments=with_classes, method="dreambooth")
    assert "the 1 class images of the dataset are not used: class_dataset is set" in caplog.text
    assert curves_of(own)["loss"] != curves_of(other)["loss"]
    caplog.clear()
    runs("none", dataset=subject)
    assert "the 1 class images of the dataset are not used: method 'finetune' uses none" in caplog.text


def test_class_images_of_other_sizes_need_alternating_batches(
    runs: Runs, make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    with_classes = {"class_dataset": make_dataset([24] * 4).rename(tmp_path / "classes")}
    subject = make_dataset()
    with pytest.raises(DataError, match="16 x 16"):
        runs(dataset=subject, arguments=with_classes, method="dreambooth")
    out = runs(dataset=subject, arguments=with_classes, method="dreambooth", prior=ALTERNATING)
    assert len(curves_of(out)["loss"]) == 4


@pytest.mark.parametrize(
    ("change", "dataset_change", "problem"),
    [
        ({"method": {"name": "textual-inversion", "token": "nowhere"}}, {}, "none of the 5 captions"),
        ({"method": {"name": "textual-inversion", "token": "s/s"}}, {"caption": "a s/s"}, "path"),
        ({"method": {"name": "finetune", "preservation": {}}}, {"class_word": None}, "no class caption"),
        ({"method": "pivotal", "steps": 1}, {}, "two phases"),
    ],
)
def test_missing_inputs_of_a_method_are_refused_before_training(
    runs: Runs,
    make_dataset: Callable[..., Path],
    tmp_path: Path,
    change: dict[str, Any],
    dataset_change: dict[str, Any],
    problem: str,
) -> None:
    with pytest.raises(SettingsError, match=problem):
        runs(dataset=make_dataset(**dataset_change), **change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"method": {"name": "dreambooth", "preservation": {}}}, "preservation and class images"),
        ({"method": {"name": "textual-inversion", "preservation": {}}}, r"textual-inversion\.preservation"),
        ({"method": {"name": "inpainting", "mask": {}}}, r"inpainting\.mask"),
        ({"method": {"name": "finetune", "inversion": 0.5}}, r"finetune\.inversion"),
        ({"method": "textual-inversion", "prior": {}}, "prior belongs to methods with class images"),
        ({"method": {"name": "pivotal", "inversion": 1.0}}, r"pivotal\.inversion"),
        ({"method": {"name": "finetune", "mask": {"temperature": 0}}}, r"finetune\.mask\.temperature"),
    ],
)
def test_options_that_do_not_belong_to_a_method_are_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TrainSettings.model_validate({"steps": 1, **change})


def test_an_inpainting_base_needs_the_inpainting_method(runs: Runs) -> None:
    factors = factors_of(runs(shape="small-sd-inpainting", method="inpainting", validate_every=2))
    ups = [value for name, value in factors.items() if name.endswith("up")]
    assert ups
    assert all(value.any() for value in ups)
    with pytest.raises(SettingsError, match="is an inpainting model"):
        runs("other", shape="small-sd-inpainting")
