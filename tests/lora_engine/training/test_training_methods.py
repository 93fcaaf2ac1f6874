"""Every method: what it writes, what it moves, and that a stopped run ends with the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.bases.base import load_base
from lora_engine.bases.untrained import write_untrained_base
from lora_engine.data.manifest import Manifest
from lora_engine.data.pixels import write_png
from lora_engine.errors import AdapterError, DataError, InterruptedRun, SettingsError
from lora_engine.files import sha256_file
from lora_engine.formats import read_adapter, read_bundle
from lora_engine.training import job as module
from lora_engine.training.methods import methods
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings

pytestmark = pytest.mark.slow

Make = Callable[..., TrainSettings]
WORD: dict[str, Any] = {"token": "sks", "vectors": 2, "word_rate": 0.02}
ALTERNATING = {"count": 3, "steps": 2, "batches": "alternating"}
VARIANTS: dict[str, dict[str, Any]] = {
    "finetune": {"method": "finetune"},
    "dreambooth": {"method": "dreambooth"},
    "alternating": {"method": "dreambooth", "prior": ALTERNATING},
    "preservation": {"method": {"name": "finetune", "preservation": {"weight": 2.0}}},
    "taught text": {"method": {"name": "finetune", "preservation": {}}, "targets": ["attention", "text"]},
    "textual-inversion": {"method": {"name": "textual-inversion", **WORD}},
    "pivotal": {"method": {"name": "pivotal", **WORD}},
    "pivotal with class pictures": {"method": {"name": "pivotal", **WORD}, "prior": ALTERNATING},
    "pivotal with means": {"method": {"name": "pivotal", **WORD}, "rates": {"ema": {"decay": 0.8}}},
    "inpainting": {"method": "inpainting"},
    "masked": {"method": {"name": "finetune", "mask": {"temperature": 2.0}}},
    "identity": {"method": {"name": "finetune", "identity": {"until": 1.0}}},
}
BUSY = {"steps": 3, "accumulate": 2, "dropout": 0.2, "caption_dropout": 0.2, "warmup": 1, "validate_every": 2}


class StopAt:
    def __init__(self, step: int) -> None:
        self.step, self.ready = step, False

    def __call__(self) -> bool:
        return self.ready

    def tell(self, done: int, total: int, values: Any) -> None:
        self.ready = "loss" in values and done >= self.step


def digests(out: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(out.iterdir())}


def loss_of(out: Path) -> list[float]:
    return [loss for _, loss in json.loads((out / "training.json").read_bytes())["loss"]]


@pytest.fixture
def masked(dataset: Path) -> Path:
    manifest = Manifest.load(dataset)
    pictures = []
    for picture in manifest.pictures:
        mask = torch.full((3, picture.height, picture.width), -1.0)
        mask[:, :, : picture.width // 2] = 1.0
        name = f"masks/{Path(picture.file).name}"
        write_png(dataset / name, mask)
        pictures.append(picture.model_copy(update={"mask": name}))
    manifest.model_copy(update={"pictures": tuple(pictures)}).save(dataset)
    return dataset


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stopped_run_of_any_method_gives_the_same_bytes(
    bases: dict[str, Path], masked: Path, tmp_path: Path, settings: Make, name: str
) -> None:
    chosen, base = settings(**{**BUSY, **VARIANTS[name]}), str(bases["small-sd"])
    train(chosen, base, masked, tmp_path / "straight", tmp_path / "fresh")
    for stop in map(StopAt, (1, 2)):
        with pytest.raises(InterruptedRun):
            train(chosen, base, masked, tmp_path / "resumed", tmp_path / "work", stop=stop, progress=stop.tell)
    train(chosen, base, masked, tmp_path / "resumed", tmp_path / "work")
    assert digests(tmp_path / "resumed") == digests(tmp_path / "straight")


def test_every_method_is_among_those_that_are_tried() -> None:
    tried = {TrainSettings.model_validate({"steps": 1, **change}).method.name for change in VARIANTS.values()}
    assert tried == set(methods)


def test_what_a_method_does_counts(bases: dict[str, Path], masked: Path, tmp_path: Path, settings: Make) -> None:
    losses = {}
    for name in ("finetune", "dreambooth", "alternating", "preservation", "inpainting", "masked", "identity"):
        train(settings(**VARIANTS[name], steps=2), str(bases["small-sd"]), masked, tmp_path / name, tmp_path / "work")
        losses[name] = tuple(loss_of(tmp_path / name))
    assert len(set(losses.values())) == len(losses)


@pytest.mark.parametrize("name", ["taught text", "textual-inversion", "pivotal", "identity"])
@pytest.mark.parametrize("shape", ["small-sdxl"])
def test_the_base_stands_still_whatever_moves(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, name: str, shape: str
) -> None:
    loaded: list[Any] = []

    def keep(*arguments: Any, **named: Any) -> Any:
        loaded.append(load_base(*arguments, **{**named, "device": "cpu"}))
        return loaded[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_base", keep)
        train(settings(**VARIANTS[name]), str(bases[shape]), dataset, tmp_path / "out", tmp_path / "work")
    untouched: Any = load_base(str(bases[shape]), device="cpu")
    for part, mine in loaded[0].modules.items():
        fresh = untouched.modules[part].state_dict()
        assert list(mine.state_dict()) == list(fresh)
        assert all(torch.equal(value, fresh[key]) for key, value in mine.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(loaded[0].vae.parameters(), untouched.vae.parameters(), strict=True))
    assert type(loaded[0].tokenizer) is type(untouched.tokenizer)


def test_an_inversion_writes_the_word_and_no_adapter(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make
) -> None:
    train(settings(**VARIANTS["textual-inversion"]), str(bases["small-sdxl"]), dataset, tmp_path / "o", tmp_path / "w")
    bundle = read_bundle(tmp_path / "o" / "adapter.safetensors")
    assert not bundle.adapter.modules
    base: Any = load_base(str(bases["small-sdxl"]), device="cpu")
    assert (bundle.adapter.base, bundle.adapter.fingerprint) == (base.family, base.fingerprint)
    (word,) = bundle.embeddings
    assert (word.token, word.count, list(word.vectors)) == ("sks", 2, ["text_encoder", "text_encoder_2"])
    rows = base.modules["text_encoder"].get_input_embeddings().weight
    star = rows[base.tokenizer("star", add_special_tokens=False)["input_ids"][:2]]
    assert 0 < (word.vectors["text_encoder"] - star).abs().max() < 1
    assert bundle.card.trigger == "sks"


def test_a_word_alone_is_refused_where_an_adapter_is_needed(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make
) -> None:
    train(settings(**VARIANTS["textual-inversion"]), str(bases["small-sd"]), dataset, tmp_path / "o", tmp_path / "w")
    with pytest.raises(AdapterError, match="'sks' alone"):
        read_adapter(tmp_path / "o" / "adapter.safetensors")


@pytest.mark.parametrize(("rate", "moves"), [(0.0, False), (1e-2, True)])
def test_pivotal_tuning_moves_the_adapter_last_and_the_word_as_told(
    bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make, rate: float, moves: bool
) -> None:
    words = []
    for steps, share in ((4, 0.5), (6, 1 / 3)):
        chosen = settings(
            method={"name": "pivotal", **WORD, "tuning_rate": rate, "inversion": share},
            steps=steps,
            schedule="constant",
        )
        train(chosen, str(bases["small-sd"]), dataset, tmp_path / f"{steps}", tmp_path / f"work {steps}")
        bundle = read_bundle(tmp_path / f"{steps}" / "adapter.safetensors")
        assert all(delta.factors()["up"].abs().max() > 0 for delta in bundle.adapter.modules.values())
        words.append(bundle.embeddings[0].vectors["text_encoder"])
    # Both inversions have two steps; what the tunings of two and of four steps do to the word is the rate's affair.
    assert torch.equal(*words) is not moves


def test_class_pictures_may_be_given(
    bases: dict[str, Path], make_dataset: Callable[..., Path], tmp_path: Path, settings: Make
) -> None:
    folder = make_dataset()
    classes = tmp_path / "classes"
    folder.rename(classes)
    persons, base = make_dataset(), str(bases["small-sd"])
    train(settings(method="dreambooth"), base, persons, tmp_path / "o", tmp_path / "w", class_dataset=classes)
    assert not (tmp_path / "w" / "class").exists()
    with pytest.raises(SettingsError, match="looks at no class pictures"):
        train(settings(), base, persons, tmp_path / "p", tmp_path / "w", class_dataset=classes)


def test_class_pictures_of_other_sizes_need_batches_of_their_own(
    bases: dict[str, Path], make_dataset: Callable[..., Path], tmp_path: Path, settings: Make
) -> None:
    classes = tmp_path / "classes"
    make_dataset([24] * 4).rename(classes)
    persons, base = make_dataset(), str(bases["small-sd"])
    with pytest.raises(DataError, match="16 x 16"):
        train(settings(method="dreambooth"), base, persons, tmp_path / "o", tmp_path / "w", class_dataset=classes)
    apart = settings(method="dreambooth", prior=ALTERNATING)
    train(apart, base, persons, tmp_path / "o", tmp_path / "w", class_dataset=classes)


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
    bases: dict[str, Path],
    make_dataset: Callable[..., Path],
    tmp_path: Path,
    settings: Make,
    change: dict[str, Any],
    about: dict[str, Any],
    problem: str,
) -> None:
    with pytest.raises(SettingsError, match=problem):
        train(settings(**change), str(bases["small-sd"]), make_dataset(**about), tmp_path / "out", tmp_path / "work")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"method": {"name": "dreambooth", "preservation": {}}},
        {"method": {"name": "textual-inversion", "preservation": {}}},
        {"method": {"name": "inpainting", "mask": {}}},
        {"method": {"name": "finetune", "inversion": 0.5}},
        {"method": "textual-inversion", "prior": {}},
        {"method": {"name": "pivotal", "inversion": 1.0}},
        {"method": {"name": "finetune", "mask": {"temperature": 0}}},
    ],
)
def test_options_that_do_not_belong_to_a_method_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"method|prior"):
        TrainSettings.model_validate({"steps": 1, **change})


def test_a_base_made_for_inpainting_needs_the_method(
    tmp_path: Path, dataset: Path, settings: Make, inpainting_base: Path
) -> None:
    train(
        settings(method="inpainting", validate_every=2), str(inpainting_base), dataset, tmp_path / "o", tmp_path / "w"
    )
    adapter, _ = read_adapter(tmp_path / "o" / "adapter.safetensors")
    assert all(delta.factors()["up"].abs().max() > 0 for delta in adapter.modules.values())
    with pytest.raises(SettingsError, match="made for inpainting"):
        train(settings(), str(inpainting_base), dataset, tmp_path / "p", tmp_path / "w")


@pytest.fixture(scope="session")
def inpainting_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained_base(tmp_path_factory.mktemp("bases") / "inpainting", "small-sd-inpainting")
