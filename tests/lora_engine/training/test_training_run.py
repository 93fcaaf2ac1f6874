from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.adapters import attach
from lora_engine.bases.base import load_base
from lora_engine.data.manifest import Manifest
from lora_engine.errors import (
    BaseModelError,
    DataError,
    EngineError,
    InterruptedRun,
    NonFiniteError,
    SettingsError,
    TrainingError,
)
from lora_engine.files import sha256_file
from lora_engine.formats import read_adapter
from lora_engine.training import job as module
from lora_engine.training.record import thin
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings

Make = Callable[..., TrainSettings]
EVERYTHING = {
    "steps": 5,
    "accumulate": 2,
    "caption_dropout": 0.3,
    "dropout": 0.2,
    "warmup": 1,
    "weight_decay": 0.01,
    "checkpoint_every": 2,
    "validate_every": 2,
}


def digests(out: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(out.iterdir())}


class StopAfter:
    """Says stop from the n-th time on that it is asked."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0

    def tell(self, done: int, total: int, values: Any) -> None:
        pass


class StopAtStep:
    """Says stop when so many steps are done, or at once where they are done already."""

    def __init__(self, step: int) -> None:
        self.step, self.ready = step, False

    def __call__(self) -> bool:
        return self.ready

    def tell(self, done: int, total: int, values: Any) -> None:
        self.ready = "loss" in values and done >= self.step


@pytest.mark.parametrize("shape", ["small-sd", "small-sd-v", "small-sdxl"])
@pytest.mark.parametrize("method", ["finetune", "dreambooth"])
def test_training_writes_an_adapter_with_its_card_and_curves(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, method: str, shape: str
) -> None:
    wanted = settings(method=method, validate_every=2)
    train(wanted, str(bases[shape]), dataset, tmp_path / "out", tmp_path / "work")
    assert sorted(digests(tmp_path / "out")) == ["adapter.safetensors", "training.json"]
    adapter, card = read_adapter(tmp_path / "out" / "adapter.safetensors")
    base = load_base(str(bases[shape]), device="cpu")
    assert (adapter.base, adapter.fingerprint) == (base.family, base.fingerprint)
    assert all(delta.factors()["up"].abs().max() > 0 for delta in adapter.modules.values())
    assert (card.title, card.trigger, card.class_word, card.base, card.seed) == ("sks star", "sks", "star", shape, 7)
    assert TrainSettings.model_validate(card.recipe) == wanted
    trained_on = sorted(picture.sha256 for picture in Manifest.load(dataset).of_split("train"))
    assert card.data == trained_on
    curves = json.loads((tmp_path / "out" / "training.json").read_bytes())
    assert curves["trained_on"] == trained_on
    assert [step for step, _ in curves["loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in curves["validation_loss"]] == [0, 2, 4]
    assert curves["lr"][0] == [1, 1e-3]
    assert str(tmp_path) not in (tmp_path / "out" / "training.json").read_text() + card.model_dump_json()


@pytest.mark.parametrize("targets", ["text", ["attention", "text"]])
def test_text_encoders_are_trained_where_they_are_meant(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, targets: Any
) -> None:
    train(settings(targets=targets), str(bases["small-sdxl"]), dataset, tmp_path / "out", tmp_path / "work")
    adapter, _ = read_adapter(tmp_path / "out" / "adapter.safetensors")
    moved = {name.split(".")[0] for name, delta in adapter.modules.items() if delta.factors()["up"].abs().max() > 0}
    assert {"text_encoder", "text_encoder_2"} <= moved


def test_the_base_is_as_it_was(bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make) -> None:
    loaded: list[Any] = []

    def keep(*arguments: Any, **named: Any) -> Any:
        loaded.append(load_base(*arguments, **{**named, "device": "cpu"}))
        return loaded[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_base", keep)
        chosen = settings(targets=["all", "text"])
        train(chosen, str(bases["small-sd"]), dataset, tmp_path / "out", tmp_path / "work")
    untouched = load_base(str(bases["small-sd"]), device="cpu")
    for name, part in loaded[0].modules.items():
        mine, fresh = part.state_dict(), untouched.modules[name].state_dict()
        assert list(mine) == list(fresh)
        assert all(torch.equal(mine[key], fresh[key]) for key in mine)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"learning_rate": 2e-3},
        {"rank": 3},
        {"caption_dropout": 1.0},
        {"dropout": 0.5},
        {"overrides": {"unet.*.to_q": {"rank": 1}}},
    ],
)
def test_what_is_set_counts(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, change: dict[str, Any]
) -> None:
    for name, chosen in (("plain", settings()), ("changed", settings(**change))):
        train(chosen, str(bases["small-sd"]), dataset, tmp_path / name, tmp_path / "work")
    assert digests(tmp_path / "plain") != digests(tmp_path / "changed")


@pytest.mark.parametrize(("method", "shape"), [("finetune", "small-sdxl"), ("dreambooth", "small-sd")])
@pytest.mark.slow
def test_a_run_stopped_anywhere_gives_the_same_bytes(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, method: str, shape: str
) -> None:
    chosen = settings(method=method, **EVERYTHING)
    base = str(bases[shape])
    train(chosen, base, dataset, tmp_path / "straight", tmp_path / "fresh")
    for stop in [StopAfter(1), StopAfter(4), *map(StopAtStep, (1, 1, 2, 4))]:
        with pytest.raises(InterruptedRun):
            train(chosen, base, dataset, tmp_path / "resumed", tmp_path / "work", stop=stop, progress=stop.tell)
        assert not (tmp_path / "resumed").exists()
    train(chosen, base, dataset, tmp_path / "resumed", tmp_path / "work")
    assert digests(tmp_path / "resumed") == digests(tmp_path / "straight")


@pytest.mark.slow
def test_text_training_resumes_to_the_same_bytes(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make
) -> None:
    chosen = settings(targets=["attention", "text"], **EVERYTHING)
    base = str(bases["small-sd"])
    train(chosen, base, dataset, tmp_path / "straight", tmp_path / "fresh")
    stop = StopAtStep(3)
    with pytest.raises(InterruptedRun, match="stopped after 3 of 5"):
        train(chosen, base, dataset, tmp_path / "resumed", tmp_path / "work", stop=stop, progress=stop.tell)
    train(chosen, base, dataset, tmp_path / "resumed", tmp_path / "work")
    assert digests(tmp_path / "resumed") == digests(tmp_path / "straight")


@pytest.mark.slow
def test_pictures_of_several_sizes_are_trained_together_with_class_pictures_of_their_sizes(
    bases: dict[str, Path], make_dataset: Callable[..., Path], tmp_path: Path, settings: Make
) -> None:
    chosen = settings(method="dreambooth", steps=6)
    sizes = [16, 16, 16, 24]
    train(chosen, str(bases["small-sdxl"]), make_dataset(sizes), tmp_path / "out", tmp_path / "work")
    assert len(list((tmp_path / "work" / "class").glob("*/*.png"))) == 2 + 1


@pytest.mark.slow
def test_class_pictures_and_caches_are_made_once(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(bases["small-sd"])
    train(settings(method="dreambooth"), base, dataset, tmp_path / "out", tmp_path / "work")
    monkeypatch.setattr("lora_engine.training.prior.generate", None)
    monkeypatch.setattr("lora_engine.training.examples.read_pixels", None)
    longer = settings(method="dreambooth", steps=5)
    train(longer, base, dataset, tmp_path / "longer", tmp_path / "work")
    assert digests(tmp_path / "out") != digests(tmp_path / "longer")


def test_bfloat16_bases_carry_float32_adapters(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make
) -> None:
    train(settings(precision="bf16"), str(bases["small-sd"]), dataset, tmp_path / "out", tmp_path / "work")
    adapter, _ = read_adapter(tmp_path / "out" / "adapter.safetensors")
    factors = [value for delta in adapter.modules.values() for value in delta.factors().values()]
    assert {value.dtype for value in factors} == {torch.float32}
    base = load_base(str(bases["small-sd"]), device="cpu", dtype=torch.bfloat16)
    with attach(base, adapter), torch.no_grad():
        found = base.predict(torch.zeros(1, 4, 8, 8), torch.tensor([5]), base.encode_text(["a"]))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"rank": 4096}, SettingsError, "4096"),
        ({"targets": "unet.nowhere.*"}, SettingsError, "nowhere"),
    ],
)
def test_settings_that_do_not_suit_the_base_are_refused_before_training(
    bases: dict[str, Path],
    dataset: Path,
    tmp_path: Path,
    settings: Make,
    change: dict[str, Any],
    error: type[EngineError],
    problem: str,
) -> None:
    told: list[int] = []
    with pytest.raises(error, match=problem):
        train(
            settings(method="dreambooth", **change),
            str(bases["small-sd"]),
            dataset,
            tmp_path / "out",
            tmp_path / "work",
            progress=lambda done, total, values: told.append(done),
        )
    assert told == []
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_cannot_be_used_is_refused(
    bases: dict[str, Path], make_dataset: Callable[..., Path], tmp_path: Path, settings: Make
) -> None:
    def attempt(chosen: TrainSettings, folder: Path) -> None:
        train(chosen, str(bases["small-sd"]), folder, tmp_path / "out", tmp_path / "work")

    with pytest.raises(DataError, match="not a dataset"):
        attempt(settings(), tmp_path)
    with pytest.raises(SettingsError, match="validate_every is 1"):
        attempt(settings(validate_every=1), make_dataset())
    with pytest.raises(SettingsError, match="15 x 15"):
        attempt(settings(), make_dataset_of_odd_size(make_dataset()))
    with pytest.raises(SettingsError, match="class_word"):
        attempt(settings(method="dreambooth"), make_dataset(class_word=None))
    with pytest.raises(DataError, match="5 of 5 pictures have no caption"):
        attempt(settings(), make_dataset(caption=" "))
    with pytest.raises(BaseModelError, match="no-such-base"):
        train(settings(), "./no-such-base", make_dataset(), tmp_path / "out", tmp_path / "work")


def make_dataset_of_odd_size(folder: Path) -> Path:
    manifest = Manifest.load(folder)
    odd = [picture.model_copy(update={"width": 15, "height": 15}) for picture in manifest.pictures]
    manifest.model_copy(update={"pictures": tuple(odd)}).save(folder)
    return folder


def test_a_rate_that_explodes_stops_the_run_and_writes_nothing(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make
) -> None:
    chosen = settings(learning_rate=1e30, steps=20, checkpoint_every=1)
    with pytest.raises(NonFiniteError, match="learning_rate"):
        train(chosen, str(bases["small-sd"]), dataset, tmp_path / "out", tmp_path / "work")
    assert not (tmp_path / "out").exists()


def test_running_out_of_memory_says_what_to_turn_on(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(module, "fit", full)
    with pytest.raises(TrainingError, match="memory ran out") as error:
        train(settings(), str(bases["small-sd"]), dataset, tmp_path / "out", tmp_path / "work")
    assert all(word in error.value.remedy for word in ("batch", "accumulate", "bf16", "resolution"))


def test_long_curves_are_thinned_and_keep_both_ends() -> None:
    points = thin([float(step) for step in range(5000)])
    assert len(points) == 500
    assert points[0] == [1, 0.0]
    assert points[-1] == [5000, 4999.0]
    assert thin([2.0, 3.0]) == [[1, 2.0], [2, 3.0]]
