"""One run of `train`: its files, its errors, and what it leaves unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.adapters import attach
from lora_engine.bases.base import load_base
from lora_engine.data.manifest import Manifest
from lora_engine.errors import BaseModelError, DataError, NonFiniteError, SettingsError, TrainingError
from lora_engine.formats import read_adapter
from lora_engine.training import fitting as module
from lora_engine.training.device import choose_precision
from lora_engine.training.record import downsample
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings
from tests.lora_engine.training.runs import Ending, Runs, curves_of, digests, factors_of

Make = Callable[..., TrainSettings]


@pytest.mark.parametrize("shape", ["small-sd", "small-sd-v", "small-sdxl"])
@pytest.mark.parametrize("method", ["finetune", "dreambooth"])
def test_training_writes_an_adapter_with_its_card_and_curves(
    bases: dict[str, Path], dataset: Path, runs: Runs, tmp_path: Path, settings: Make, method: str, shape: str
) -> None:
    out = runs(shape=shape, method=method, validate_every=2)
    assert sorted(digests(out)) == ["adapter.safetensors", "training.json"]
    adapter, card = read_adapter(out / "adapter.safetensors")
    base = load_base(str(bases[shape]), device="cpu")
    assert (adapter.base, adapter.fingerprint) == (base.family, base.fingerprint)
    assert len(adapter.modules) > 0
    assert all(delta.factors()["up"].abs().max() > 0 for delta in adapter.modules.values())
    assert (card.title, card.trigger, card.class_word, card.base, card.seed) == ("sks star", "sks", "star", shape, 7)
    recipe = {name: value for name, value in card.recipe.items() if name != "done"}
    # Validations change no byte of the adapter.
    assert TrainSettings.model_validate(recipe) == settings(method=method)
    trained_on = sorted(image.sha256 for image in Manifest.load(dataset).of_split("train"))
    assert card.data == trained_on
    curves = curves_of(out)
    assert curves["trained_on"] == trained_on
    assert [step for step, _ in curves["loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in curves["validation_loss"]] == [0, 2, 4]
    assert curves["lr"][0] == [1, 1e-3]
    assert str(tmp_path) not in (out / "training.json").read_text() + card.model_dump_json()


@pytest.mark.parametrize("targets", ["text", ["attention", "text"]])
def test_text_encoders_are_trained_where_they_are_targets(runs: Runs, targets: Any) -> None:
    factors = factors_of(runs(shape="small-sdxl", targets=targets, steps=2))
    moved = {name.split(".")[0] for name, value in factors.items() if name.endswith("up") and value.any()}
    assert {"text_encoder", "text_encoder_2"} <= moved


def test_images_of_several_sizes_are_trained_with_class_images_of_their_sizes(
    runs: Runs, make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    runs(shape="small-sdxl", method="dreambooth", steps=6, dataset=make_dataset([16, 16, 16, 24]), work="work")
    assert len(list((tmp_path / "work" / "class").glob("*/*.png"))) == 2 + 1


def test_recipes_have_the_class_images_that_were_used(runs: Runs, dataset: Path) -> None:
    def done(out: Path) -> dict[str, Any]:
        _, card = read_adapter(out / "adapter.safetensors")
        used: dict[str, Any] = card.recipe["done"]["class_images"]
        return used

    prior = {"count": 3, "steps": 2, "guidance": 2.0, "prompt": "a star"}
    drawn = done(runs("drawn", method="dreambooth", prior=prior, steps=1))
    expected = {"count": 3, "source": "drawn", "prompts": ["a star"], "steps": 2, "guidance": 2.0}
    assert expected.items() <= drawn.items()
    assert (drawn["weight"], drawn["batches"], len(drawn["sha256"])) == (1.0, "joint", 64)
    given = done(runs("given", method="dreambooth", steps=1, arguments={"class_dataset": dataset}))
    assert (given["source"], given["count"]) == ("class_dataset", 5)
    assert "steps" not in given
    assert given["sha256"] != drawn["sha256"]


def test_class_images_and_caches_are_made_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs("first", method="dreambooth", work="work")
    monkeypatch.setattr("lora_engine.training.prior.generate", None)
    monkeypatch.setattr("lora_engine.training.examples.read_pixels", None)
    longer = runs("longer", method="dreambooth", steps=5, work="work")
    assert digests(first) != digests(longer)


def test_bfloat16_bases_carry_float32_adapters(bases: dict[str, Path], runs: Runs) -> None:
    out = runs(precision="bf16")
    assert {value.dtype for value in factors_of(out).values()} == {torch.float32}
    adapter, _ = read_adapter(out / "adapter.safetensors")
    base = load_base(str(bases["small-sd"]), device="cpu", dtype=torch.bfloat16)
    with attach(base, adapter), torch.no_grad():
        prediction = base.predict(torch.zeros(1, 4, 8, 8), torch.tensor([5]), base.encode_text(["a"]))
    assert torch.isfinite(prediction).all()


def test_precision_auto_trains_on_a_cpu_as_fp32_and_the_card_has_what_was_used(runs: Runs) -> None:
    assert digests(runs("auto", precision="auto")) == digests(runs("exact", precision="fp32"))


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_precision_auto_is_bf16_on_a_gpu_that_computes_in_it(
    has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert choose_precision("auto", "cuda") == expected
    assert choose_precision("auto", "cpu") == choose_precision("auto", "mps") == "fp32"
    assert choose_precision("fp16", "cuda") == "fp16"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rank": 4096}, "4096"),
        ({"targets": "unet.nowhere.*"}, "nowhere"),
        ({"rates": {"text": 1e-5}}, "no layer of a text encoder"),
        ({"rates": {"layers": {"unet.nowhere.*": 1e-5}}}, "nowhere"),
        ({"rates": {"up_ratio": 4.0}, "kind": "ia3"}, "no factor 'up'"),
        ({"objective": {"timesteps": {"shift": 3.0}}}, "shift 3.0"),
    ],
)
def test_settings_that_do_not_suit_the_base_are_refused_before_training(
    runs: Runs, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    ending = Ending()
    with pytest.raises(SettingsError, match=problem):
        runs(ending=ending, method="dreambooth", **change)
    assert ending.batches == 0
    assert not (tmp_path / "out").exists()


def test_an_unusable_dataset_is_refused(
    runs: Runs, make_dataset: Callable[..., Path], tmp_path: Path, settings: Make
) -> None:
    def attempt(folder: Path, **change: Any) -> None:
        runs(dataset=folder, **change)

    with pytest.raises(DataError, match="not a dataset"):
        attempt(tmp_path)
    with pytest.raises(SettingsError, match="validate_every is 1"):
        attempt(make_dataset(), validate_every=1)
    with pytest.raises(SettingsError, match="15 x 15"):
        attempt(make_dataset_of_odd_size(make_dataset()))
    with pytest.raises(SettingsError, match="class_word"):
        attempt(make_dataset(class_word=None), method="dreambooth")
    with pytest.raises(DataError, match="5 of 5 images have no caption"):
        attempt(make_dataset(caption=" "))
    with pytest.raises(BaseModelError, match="no-such-base"):
        train(settings(), "./no-such-base", make_dataset(), tmp_path / "out", tmp_path / "work")


def make_dataset_of_odd_size(folder: Path) -> Path:
    manifest = Manifest.load(folder)
    odd = [image.model_copy(update={"width": 15, "height": 15}) for image in manifest.pictures]
    manifest.model_copy(update={"pictures": tuple(odd)}).save(folder)
    return folder


def test_a_rate_that_explodes_stops_the_run_and_writes_nothing(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="learning_rate"):
        runs(learning_rate=1e30, steps=20, checkpoint_every=1)
    assert not (tmp_path / "out").exists()


def test_an_out_of_memory_error_names_the_settings_to_change(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(module, "fit", full)
    with pytest.raises(TrainingError, match="out of memory") as error:
        runs()
    assert [word for word in ("batch", "accumulate", "bf16", "resolution") if word not in error.value.remedy] == []


def test_long_curves_are_downsampled_and_keep_both_ends() -> None:
    points = downsample([float(step) for step in range(5000)])
    assert len(points) == 500
    assert points[0] == [1, 0.0]
    assert points[-1] == [5000, 4999.0]
    assert downsample([2.0, 3.0]) == [[1, 2.0], [2, 3.0]]
