"""A training that starts from an existing adapter: the same effect at step 0, or a refusal that says what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.adapters import Adapter
from lora_engine.adapters.adapted import innermost
from lora_engine.adapters.layer import bias_of
from lora_engine.adapters.tree import as_tree
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.catalog.kinds import KINDS
from lora_engine.errors import AdapterError, EngineError, SettingsError
from lora_engine.files import sha256_file
from lora_engine.formats import Card, read_bundle, write_adapter
from lora_engine.seeds import generator
from lora_engine.training import states
from lora_engine.training.init import init_adapter
from lora_engine.training.initial import read_initial
from lora_engine.training.spec import TrainSettings
from tests.lora_engine.training.runs import Ending, Runs, digests, factors_of

TARGETS = ["attention", "unet.down_blocks.*.resnets.*.conv1"]
SAME = {kind: {"kind": kind, "rank": 4} for kind, entry in KINDS.items() if entry.spec and kind != "pissa"}
LARGER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora to a larger lora": ({"kind": "lora", "rank": 2}, {"kind": "lora", "rank": 5}),
    "lora to another alpha": ({"kind": "lora", "rank": 2, "alpha": 1.0}, {"kind": "lora", "rank": 4, "alpha": 2.0}),
    "lora to rslora": ({"kind": "lora", "rank": 2}, {"kind": "rslora", "rank": 4}),
    "lora to lora-fa": ({"kind": "lora", "rank": 2}, {"kind": "lora-fa", "rank": 4}),
    "pissa to lora": ({"kind": "pissa", "rank": 2}, {"kind": "lora", "rank": 4}),
    "tucker to a larger tucker": (
        {"kind": {"name": "lora", "tucker": True}, "rank": 2},
        {"kind": {"name": "lora", "tucker": True}, "rank": 4},
    ),
    "tucker to lora": ({"kind": {"name": "lora", "tucker": True}, "rank": 2}, {"kind": "lora", "rank": 4}),
    "dora to a larger dora": ({"kind": "dora", "rank": 2}, {"kind": "dora", "rank": 4}),
    "lokr to full": ({"kind": "lokr", "rank": 2}, {"kind": "full"}),
    "ia3 to full": ({"kind": "ia3"}, {"kind": "full"}),
}


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> BaseModel:
    return load_base(str(bases["small-sd"]), device="cpu")


def settings(**change: Any) -> TrainSettings:
    return TrainSettings.model_validate({"method": "finetune", "steps": 1, "targets": TARGETS, **change})


def moved(base: BaseModel, **change: Any) -> Adapter:
    """Returns an adapter whose factors all moved, as training moves them."""
    adapter = init_adapter(base, settings(**change))
    modules = {}
    for name, delta in adapter.modules.items():
        draw = generator(3, name)
        modules[name] = delta.with_factors(
            {
                key: value if key in delta.frozen else value + 0.02 * torch.randn(value.shape, generator=draw)
                for key, value in delta.factors().items()
            }
        )
    return replace(adapter, modules=modules).to_export()


def effect(base: BaseModel, adapter: Adapter) -> dict[str, torch.Tensor]:
    effects = {}
    for name, delta in adapter.modules.items():
        layer = innermost(as_tree(base).get_module(name))
        effects[name] = delta.delta_weight(layer.weight.detach())  # type: ignore[operator]
        bias = delta.delta_bias(bias_of(layer))
        effects |= {} if bias is None else {f"{name}.bias": bias}
    return effects


def start(base: BaseModel, file: Path, **change: Any) -> Adapter:
    return init_adapter(base, settings(**change), read_initial(file, base))


def write(folder: Path, adapter: Adapter, **card: Any) -> Path:
    file = folder / "parent.safetensors"
    write_adapter(file, adapter, card=Card(title="parent", **card))
    return file


@pytest.mark.parametrize(
    ("before", "after"), [*((one, one) for one in SAME.values()), *LARGER.values()], ids=[*SAME, *LARGER]
)
def test_the_effect_at_step_0_is_that_of_the_initial_adapter(
    base: BaseModel, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    parent = moved(base, **before)
    started = start(base, write(tmp_path, parent), **after)
    expected, actual = effect(base, parent), effect(base, started)
    assert any(value.any() for value in expected.values())
    assert started.modules.keys() == parent.modules.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-6, atol=1e-7)
    kind = after["kind"] if isinstance(after["kind"], str) else after["kind"]["name"]
    plain = {delta.kind for delta in init_adapter(base, settings(**after)).modules.values()}
    assert {delta.kind for delta in started.modules.values()} == plain, kind
    # Nothing but the rank says what the new adapter can learn, so padding must leave something to learn.
    for delta, created in zip(
        started.modules.values(), init_adapter(base, settings(**after)).modules.values(), strict=True
    ):
        assert delta.rank == created.rank
        assert {name: value.shape for name, value in delta.factors().items()} == {
            name: value.shape for name, value in created.factors().items()
        }


def test_the_factors_of_a_lora_are_padded_and_otherwise_bit_for_bit_the_same(base: BaseModel, tmp_path: Path) -> None:
    parent = moved(base, kind="lora", rank=2, alpha=1.0)
    started = start(base, write(tmp_path, parent), rank=4)
    for name, delta in started.modules.items():
        old, new = parent.modules[name].factors(), delta.factors()
        assert torch.equal(new["down"][:2], old["down"])
        assert torch.equal(new["up"][:, :2], old["up"])
        assert new["down"][2:].any()
        assert not new["up"][:, 2:].any()
        assert delta.alpha == 2.0


def test_layers_that_only_the_settings_select_start_with_no_difference(base: BaseModel, tmp_path: Path) -> None:
    parent = moved(base, rank=2, targets="unet.mid_block.*.to_q")
    started = start(base, write(tmp_path, parent), rank=2)
    others = started.modules.keys() - parent.modules.keys()
    assert others
    effects = effect(base, started)
    assert not any(effects[name].any() for name in others)
    assert all(effects[name].any() for name in parent.modules)


@pytest.mark.parametrize(
    ("before", "after", "error", "message"),
    [
        ({"rank": 4}, {"rank": 2}, SettingsError, "rank 2 is less than the 4 of init.*set rank: 4 or more.*resize"),
        ({}, {"targets": "unet.mid_block.*.to_q"}, SettingsError, "add them to targets"),
        ({"kind": "lokr"}, {"kind": "lora"}, SettingsError, "kind 'lokr'.*loraline resize FILE --others lora"),
        ({"kind": "lora"}, {"kind": "pissa"}, SettingsError, "kind 'pissa'.*loraline resize"),
        ({"kind": "loha", "rank": 2}, {"kind": "loha", "rank": 4}, SettingsError, "cannot start from"),
        ({}, {"kind": {"name": "lora", "tucker": True}}, SettingsError, "leave tucker out"),
        ({}, {"method": "textual-inversion"}, SettingsError, "trains no adapter"),
    ],
    ids=str,
)
def test_an_initial_adapter_that_the_settings_cannot_hold_is_refused(
    base: BaseModel, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], error: type[Exception], message: str
) -> None:
    file = write(tmp_path, moved(base, **before))
    with pytest.raises(error, match=message):
        start(base, file, **after)


def foreign(base: BaseModel, folder: Path, name: str) -> Path:
    adapter = moved(base, rank=2)
    if name == "another family":
        return write(folder, replace(adapter, base="sdxl"))
    if name == "another base":
        return write(folder, replace(adapter, fingerprint="f" * 64))
    if name == "unknown names":
        return write(
            folder, replace(adapter, modules={f"{key}.nowhere": delta for key, delta in adapter.modules.items()})
        )
    file = write(folder, adapter)
    content = bytearray(file.read_bytes())
    content[-4:] = b"\x00\x00\xc0\x7f"  # NaN
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("another family", "family 'sdxl'|for family"),
        ("another base", "base model 'ffff"),
        ("unknown names", "nowhere"),
        ("NaN", "NaN|hash|digest"),
        ("missing", "no such file"),
        ("text", "safetensors|not"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused_before_any_work(
    runs: Runs, base: BaseModel, tmp_path: Path, name: str, message: str
) -> None:
    if name == "missing":
        file = tmp_path / "parent.safetensors"
    elif name == "text":
        file = tmp_path / "parent.safetensors"
        file.write_text("not an adapter")
    else:
        file = foreign(base, tmp_path, name)
    ending = Ending()
    with pytest.raises(EngineError, match=message) as caught:
        runs(ending=ending, method="dreambooth", arguments={"init": file})
    assert isinstance(caught.value, AdapterError)
    assert ending.batches == 0
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "work of out").rglob("*.png"))


def test_a_training_continues_the_weights_of_its_parent_and_names_it(runs: Runs) -> None:
    parent = runs("parent", rank=2)
    file = parent / "adapter.safetensors"
    child = runs("child", rank=3, steps=1, learning_rate=1e-5, arguments={"init": file})
    before, after = factors_of(parent), factors_of(child)
    for name, value in before.items():
        shared = after[name][: value.shape[0], : value.shape[1]]
        torch.testing.assert_close(shared, value, rtol=0.0, atol=1.1e-5)
        assert not torch.equal(shared, value) or not value.any()
    recipe = read_bundle(child / "adapter.safetensors").card.recipe
    assert recipe["parents"] == [f"sks star sha256:{sha256_file(file)}"] == [recipe["done"]["init"]]


def test_another_parent_is_another_training(runs: Runs) -> None:
    first, second = runs("first", seed=1), runs("second", seed=2)
    one = runs("one", work="work", arguments={"init": first / "adapter.safetensors"})
    other = runs("other", work="work", arguments={"init": second / "adapter.safetensors"})
    assert factors_of(one).keys() == factors_of(other).keys()
    assert digests(one)["adapter.safetensors"] != digests(other)["adapter.safetensors"]


def test_a_learned_token_is_continued_and_other_tokens_are_refused(runs: Runs) -> None:
    parent = runs("parent", method="pivotal", steps=4) / "adapter.safetensors"
    child = runs("child", method={"name": "pivotal", "word_rate": 1e-7, "tuning_rate": 0.0}, arguments={"init": parent})
    rows = [read_bundle(file).embeddings[0].vectors["text_encoder"] for file in (parent, child / "adapter.safetensors")]
    torch.testing.assert_close(*rows, rtol=0.0, atol=1e-5)
    for name, method, message in (
        ("none", "finetune", "learned tokens 'sks', but the method trains no token"),
        ("wide", {"name": "pivotal", "vectors": 2}, "set the method's `vectors`"),
    ):
        with pytest.raises(SettingsError, match=message):
            runs(name, method=method, arguments={"init": parent})


def test_an_optimizer_state_is_continued_where_it_is_at_hand(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str, folder: str = "states", **change: Any) -> Path:
        arguments = {"state": tmp_path / folder / name, **change.pop("arguments", {})}
        return runs(name, arguments=arguments, **change)

    file = train("parent") / "adapter.safetensors"
    init = {"arguments": {"init": file}}
    cold, warm = train("cold", **init), train("warm", optimizer_state=True, **init)
    assert digests(cold)["adapter.safetensors"] != digests(warm)["adapter.safetensors"]
    moved_by = [
        sum(float((value - factors_of(file.parent)[name]).norm()) for name, value in factors_of(out).items())
        for out in (cold, warm)
    ]
    # Adam's first steps without a state are sign steps of the full rate.
    assert moved_by[1] != moved_by[0]
    for name, change, message in (
        ("elsewhere", {"folder": "others"}, "is not in"),
        ("lion", {"rates": {"optimiser": "adafactor"}}, "trained by optimizer 'adamw'"),
        ("wider", {"rank": 3}, "for other factors"),
    ):
        with pytest.raises(SettingsError, match=message):
            train(name, optimizer_state=True, **change, **init)
    with monkeypatch.context() as patch:
        patch.setattr(states, "import_state", lambda *_: None)
        # Otherwise it would continue the run `warm`.
        cold_again = train("ignored", optimizer_state=True, arguments={"init": file, "fresh": True})
    assert all(value.equal(factors_of(cold)[name]) for name, value in factors_of(cold_again).items())


def test_an_interrupted_run_with_an_initial_adapter_resumes_to_the_same_bytes(runs: Runs, tmp_path: Path) -> None:
    file = runs("parent", rank=2) / "adapter.safetensors"
    settings = {"rank": 3, "checkpoint_every": 2, "arguments": {"init": file}}
    expected = runs("straight", **settings)
    out, steps = runs.resume("resumed", [Ending(batch=3, crashes=True)], **settings)
    assert steps == [3, 4]
    assert digests(out) == digests(expected)
