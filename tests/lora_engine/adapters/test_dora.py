"""DoRA with every inner kind, on both axes, and in every file format."""

import pytest
import torch
from law_adapters import (
    LAYERS,
    MATRICES,
    NAMES,
    dense_output,
    forward_of,
    gradients_of,
    input_of,
    moved_delta,
    op_of,
    random_delta,
    tree_of,
)
from torch import nn

from lora_engine.adapters import Adapter, DoraDelta, LoraDelta, attach, create_adapter
from lora_engine.adapters.dora import INNER
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.formats import codecs, inspect, read_adapter, write_adapter

# For a weight of one row or column, the shape of the magnitude does not determine its axis.
MAKE = {
    **{name: LAYERS[name] for name in MATRICES},
    "one output": lambda: nn.Linear(6, 1),
    "one input": lambda: nn.Linear(1, 6),
}
cases = pytest.mark.parametrize(
    ("layer_name", "inner", "axis"),
    [(name, inner, axis) for name in MAKE for inner in INNER for axis in ("output", "input")],
)


def dora(layer, inner="lora", axis="output", rank=1, seed=0):
    return moved_delta(layer, "dora", rank, 1.5, seed, inner=inner, axis=axis)


def by_hand(delta, weight, axis):
    """Equation 5 of the paper."""
    moved = weight + delta.inner.delta_weight(weight)
    dims = [dim for dim in range(weight.dim()) if dim != (0 if axis == "output" else 1)]
    norm = moved.square().sum(dims, keepdim=True).sqrt()
    return delta.magnitude * moved / norm.detach()


@cases
def test_it_is_the_magnitude_times_the_direction(layer_name, inner, axis):
    torch.manual_seed(0)
    layer = MAKE[layer_name]()
    delta, x = dora(layer, inner, axis), input_of(layer)
    assert delta.axis == (0 if axis == "output" else 1) or layer.weight.shape == (1, 1)
    with torch.no_grad():
        expected = by_hand(delta, layer.weight, axis)
        torch.testing.assert_close(layer.weight + delta.delta_weight(layer.weight), expected, rtol=1e-4, atol=1e-5)
        output, expected = forward_of(delta, layer, x, 0.5), dense_output(delta, layer, x, 0.5)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@cases
def test_gradients_are_those_of_the_paper_with_the_norm_held(layer_name, inner, axis):
    torch.manual_seed(0)
    layer = MAKE[layer_name]().requires_grad_(False)
    delta, x, bias = dora(layer, inner, axis), input_of(layer), getattr(layer, "bias", None)
    _, ours = gradients_of(delta, lambda copy: forward_of(copy, layer, x))
    _, expected = gradients_of(delta, lambda copy: op_of(layer)(x, by_hand(copy, layer.weight, axis), bias))
    for name, gradient in ours.items():
        size = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("axis", ["output", "input"])
def test_rows_of_zeros_give_no_nan(axis):
    layer = nn.Linear(6, 5)
    nn.init.zeros_(layer.weight)
    tree = tree_of(layer)
    adapter = create_adapter(tree, "*", "dora", 2, options={"axis": axis})
    x = torch.randn(3, 6)
    with attach(tree, adapter, trainable=True) as attachment:
        out = tree.get_module("unet.0")(x)
        assert torch.equal(out, layer(x))
        out.sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in attachment.parameters())


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("layer", [nn.Linear(64, 48), nn.Conv2d(32, 48, 3)])
def test_the_norm_without_the_product_is_the_norm(layer, axis):
    delta, weight = dora(layer, axis=axis, rank=4), layer.weight.detach()
    product = weight + delta.inner.delta_weight(weight)
    dims = [dim for dim in range(weight.dim()) if dim != delta.axis]
    torch.testing.assert_close(delta._squares(weight), product.square().sum(dims), rtol=1e-5, atol=0)


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(SettingsError, match="axis 'rows'"):
        dora(nn.Linear(6, 5), axis="rows")
    with pytest.raises(SettingsError, match="inner kind 'oft'"):
        dora(nn.Linear(6, 5), inner="oft")


SQUARE = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
CONV = "unet.down_blocks.0.resnets.0.conv1"


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    ("form", "axis"),
    [(form, axis) for form in ("loraline", "kohya") for axis in ("output", "input")] + [("comfyui", "input")],
)
def test_files_keep_the_axis_also_of_square_layers(form, inner, axis, tmp_path):
    layers = {SQUARE: nn.Linear(5, 5), CONV: nn.Conv2d(5, 7, 3)}
    adapter = Adapter({name: dora(layer, inner, axis) for name, layer in layers.items()}, "sd")
    path = write_adapter(tmp_path / "a.safetensors", adapter, format=form)[0]
    back = read_adapter(path, NAMES)[0]
    assert back == adapter
    assert read_adapter(path)[0] == adapter
    assert {delta.axis for delta in back.modules.values()} == {0 if axis == "output" else 1}
    assert inspect(path)["kinds"] == {"dora": 2}


def test_a_magnitude_of_one_dimension_is_that_of_the_outputs():
    tensors, metadata = codecs["kohya"].encode(Adapter({SQUARE: dora(nn.Linear(5, 5))}, "sd"))
    key = next(key for key in tensors if key.endswith("dora_scale"))
    flat = {**tensors, key: tensors[key].flatten()}
    assert codecs["kohya"].decode(flat, metadata, NAMES) == codecs["kohya"].decode(tensors, metadata, NAMES)


@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_every_key_of_pefts_magnitude_is_read(suffix):
    layers = {SQUARE: nn.Linear(5, 5), CONV: nn.Conv2d(5, 7, 3)}
    adapter = Adapter({name: dora(layer, seed=3) for name, layer in layers.items()}, "sd")
    tensors, metadata = codecs["diffusers"].encode(adapter)
    shapes = sorted(list(tensor.shape) for key, tensor in tensors.items() if "magnitude" in key)
    assert shapes == [[1, 7, 1, 1], [5]]
    renamed = {key.replace("magnitude_vector", f"magnitude_vector{suffix}"): value for key, value in tensors.items()}
    back = codecs["diffusers"].decode(renamed, metadata, NAMES)
    assert back == codecs["diffusers"].decode(tensors, metadata, NAMES) == codecs["diffusers"].to_supported(adapter)


@pytest.mark.parametrize("form", ["peft", "diffusers"])
def test_what_peft_cannot_represent_is_refused(form):
    with pytest.raises(AdapterError, match="the magnitude is per input"):
        codecs[form].encode(Adapter({SQUARE: dora(nn.Linear(5, 5), axis="input")}, "sd"))
    with pytest.raises(AdapterError, match="'lokr'"):
        codecs[form].encode(Adapter({SQUARE: dora(nn.Linear(5, 5), inner="lokr")}, "sd"))
    mixed = {SQUARE: dora(nn.Linear(5, 5)), SQUARE.replace("q_proj", "k_proj"): random_delta("lora", (5, 5))}
    with pytest.raises(AdapterError, match=r"several kinds: dora \(1\), lora \(1\)"):
        codecs[form].encode(Adapter(mixed, "sd"))
    assert codecs["kohya"].is_lossless(Adapter(mixed, "sd"))


BAD = {
    "another length": torch.ones(4, 1),
    "neither row nor column": torch.ones(5, 6),
    "no dimension": torch.ones(()),
    "three dimensions": torch.ones(5, 1, 1),
    "empty": torch.ones(0, 1),
}


@pytest.mark.parametrize("case", BAD)
def test_issues_are_found(case):
    good = random_delta("dora", (5, 6))
    assert list(good.issues((5, 6))) == []
    bad = good.with_factors({**good.factors(), "magnitude": BAD[case]})
    assert [issue.factor for issue in bad.issues((5, 6))] == ["magnitude"]


def test_an_issue_of_the_inner_delta_is_reported():
    inner = LoraDelta(torch.ones(2, 6), torch.ones(5, 3), 1.0)
    bad = DoraDelta.from_factors({**inner.factors(), "magnitude": torch.ones(5, 1)}, 1.0)
    assert [issue.factor for issue in bad.issues()] == ["up"]


def test_an_orphan_magnitude_is_refused_by_its_name():
    key = "lora_unet_time_embedding_linear_1.dora_scale"
    with pytest.raises(AdapterError, match="dora_scale"):
        codecs["kohya"].decode({key: torch.ones(8, 1)}, {}, NAMES)
