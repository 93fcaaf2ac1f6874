"""LoKr: dense and low-rank factors, outputs and gradients of each, and refusals."""

import pytest
import torch
from law_adapters import NAMES, dense_output, forward_of, gradients_of, input_of, layer_of, moved_delta, random_delta
from torch import nn

from lora_engine.adapters import Adapter, LokrDelta
from lora_engine.adapters.lokr import factorize
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.formats import codecs, inspect, write_adapter

OPTIONS = {
    "right of low rank": ({}, 1, {"left", "right_up", "right_down"}),
    "rank too large to save anything": ({}, 100, {"left", "right"}),
    "full": ({"full": True}, 1, {"left", "right"}),
    "both": ({"both": True}, 1, {"left_up", "left_down", "right_up", "right_down"}),
    "tucker": ({"tucker": True}, 1, {"left", "right_up", "right_down", "right_core"}),
    "both tucker": (
        {"both": True, "tucker": True},
        1,
        {"left_up", "left_down", "right_up", "right_down", "right_core"},
    ),
    "factor": ({"factor": 4}, 1, {"left", "right_up", "right_down"}),
}


def lokr(layer, rank, alpha=3.0, **options):
    return moved_delta(layer, "lokr", rank, alpha, spread=1.0, **options)


def by_hand(delta, shape):
    left = delta.left if delta.left is not None else delta.left_up @ delta.left_down
    if delta.right is not None:
        right = delta.right
    elif delta.right_core is not None:
        right = torch.einsum("mp,mn...,nr->pr...", delta.right_up, delta.right_core, delta.right_down)
    else:
        right = (delta.right_up @ delta.right_down).reshape(shape[0] // left.shape[0], -1, *shape[2:])
    return torch.kron(left.reshape(*left.shape, *(1 for _ in shape[2:])), right) * delta.scale


@pytest.mark.parametrize("layer_name", ["linear", "conv 3x3", "conv circular", "conv 1x1", "conv grouped", "embedding"])
@pytest.mark.parametrize("case", OPTIONS)
def test_every_form_equals_its_dense_delta(case, layer_name):
    layer = layer_of(layer_name)
    options, rank, names = OPTIONS[case]
    delta, x = lokr(layer, rank, **options), input_of(layer)
    has_kernel = layer.weight.dim() == 4 and layer.weight.shape[-1] > 1
    assert set(delta.factors()) == (names if has_kernel else names - {"right_core"})
    assert delta.scale == (1.0 if {"left", "right"} <= names else 3.0)
    with torch.no_grad():
        torch.testing.assert_close(delta.delta_weight(layer.weight), by_hand(delta, layer.weight.shape))
        output, expected = forward_of(delta, layer, x, 0.5), dense_output(delta, layer, x, 0.5)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("layer_name", ["linear", "conv 3x3"])
def test_gradients_are_those_of_the_dense_delta(case, layer_name):
    layer = layer_of(layer_name)
    options, rank, _ = OPTIONS[case]
    delta, x = lokr(layer, rank, **options), input_of(layer)
    _, ours = gradients_of(delta, lambda copy: forward_of(copy, layer, x))
    _, dense = gradients_of(delta, lambda copy: dense_output(copy, layer, x))
    for name, gradient in ours.items():
        size = max(1.0, float(dense[name].abs().max()))
        torch.testing.assert_close(gradient, dense[name], rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize(
    ("dimension", "factor", "split"),
    [
        (128, -1, (8, 16)),
        (250, -1, (10, 25)),
        (127, -1, (1, 127)),
        (250, 4, (2, 125)),
        (360, 16, (15, 24)),
        (512, 64, (8, 64)),
        (1, -1, (1, 1)),
        (6, 0, (1, 6)),
    ],
)
def test_dimensions_are_split_near_the_factor(dimension, factor, split):
    assert factorize(dimension, factor) == split


@pytest.mark.parametrize("alpha", [9999999999.0, 1.0, 0.25, None])
def test_alpha_is_ignored_with_two_dense_factors(alpha, tmp_path):
    """ai-toolkit stores 9999999999."""
    shape = NAMES["unet.time_embedding.linear_1"]
    delta = lokr(nn.Linear(shape[1], shape[0]), 1, full=True)
    key = "lora_unet_time_embedding_linear_1"
    tensors = {f"{key}.lokr_w1": delta.left, f"{key}.lokr_w2": delta.right}
    if alpha is not None:
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    read = codecs["kohya"].decode(tensors, {}, NAMES)
    decoded = read.modules["unet.time_embedding.linear_1"]
    assert (decoded.scale, decoded.alpha, decoded.rank) == (1.0, 1.0, None)
    weight = torch.zeros(shape)
    torch.testing.assert_close(decoded.delta_weight(weight), torch.kron(delta.left, delta.right))
    path = write_adapter(tmp_path / "a.safetensors", Adapter(read.modules, "sd"))[0]
    assert inspect(path)["kinds"] == {"lokr": 1}


GOOD = {"left": (2, 3), "right_up": (3, 2), "right_down": (2, 4)}
BAD = {
    "no right": ({"right_up": None, "right_down": None}, "right"),
    "half a right": ({"right_down": None}, "right_up"),
    "two lefts": ({"left_up": (2, 2), "left_down": (2, 3)}, "left"),
    "a core with a dense factor": (
        {"right_up": None, "right_down": None, "right": (3, 4), "right_core": (2, 2, 3, 3)},
        "right_core",
    ),
    "a core of another rank": ({"right_core": (3, 2, 3, 3), "right_up": (2, 3)}, "right_core"),
    "ranks that disagree": ({"right_up": (3, 1)}, "right_up"),
    "three dimensions": ({"left": (2, 3, 1)}, "left"),
    "an empty factor": ({"left": (0, 3)}, "left"),
}


@pytest.mark.parametrize("case", BAD)
def test_issues_are_found(case):
    good = LokrDelta.from_factors({name: torch.ones(shape) for name, shape in GOOD.items()}, 1.0)
    assert list(good.issues((6, 12))) == []
    changes, expected_factor = BAD[case]
    shapes = {name: shape for name, shape in {**GOOD, **changes}.items() if shape is not None}
    bad = LokrDelta.from_factors({name: torch.ones(shape) for name, shape in shapes.items()}, 1.0)
    assert expected_factor in [issue.factor for issue in bad.issues((6, 12))]


@pytest.mark.parametrize("shape", [(5, 12), (6, 11), (6, 12, 3, 3), (12, 6)])
def test_a_shape_that_does_not_fit_is_found(shape):
    delta = LokrDelta.from_factors({name: torch.ones(size) for name, size in GOOD.items()}, 1.0)
    assert {issue.factor for issue in delta.issues(shape)} == {"left"}
    conv = LokrDelta.from_factors({"left": torch.ones(2, 3), "right": torch.ones(3, 4, 3, 3)}, 1.0)
    assert [issue.factor for issue in conv.issues((6, 12, 5, 5))][-1] == "right"
    assert list(conv.issues((6, 12, 3, 3))) == []


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_invalid_alpha_is_found_where_it_matters(alpha):
    factors = {name: torch.ones(shape) for name, shape in GOOD.items()}
    assert [issue.factor for issue in LokrDelta.from_factors(factors, alpha).issues()] == ["alpha"]
    dense = {"left": torch.ones(2, 3), "right": torch.ones(3, 4)}
    assert list(LokrDelta.from_factors(dense, alpha).issues()) == []


@pytest.mark.parametrize("layer_name", ["layer norm", "group norm"])
def test_a_norm_is_refused(layer_name):
    with pytest.raises(SettingsError, match="has no rank"):
        lokr(layer_of(layer_name), 1)
    with pytest.raises(SettingsError, match="rank 0"):
        lokr(layer_of("linear"), 0)


@pytest.mark.parametrize("missing", ["lokr_w1", "lokr_w2_a", "lokr_w2_b"])
def test_a_file_that_lacks_a_factor_is_refused_by_its_name(missing):
    name = "unet.time_embedding.linear_1"
    tensors, metadata = codecs["kohya"].encode(Adapter({name: random_delta("lokr", NAMES[name], 1)}, "sd"))
    del tensors[next(key for key in tensors if key.endswith(missing))]
    with pytest.raises(AdapterError, match=missing):
        codecs["kohya"].decode(tensors, metadata, NAMES)


def test_a_right_factor_with_the_kernel_in_its_columns_fits_the_convolution():
    """ComfyUI's trainer saves this form; the columns have the element order of the weight."""
    weight = torch.zeros(6, 4, 3, 3)
    shape, draw = tuple(weight.shape), torch.Generator().manual_seed(0)
    left = torch.randn(2, 2, generator=draw)
    flat = LokrDelta(1.0, left=left, right=torch.randn(3, 18, generator=draw))
    assert list(flat.issues(shape)) == []
    reshaped = flat.reshaped_for(shape)
    assert reshaped.right.shape == (3, 2, 3, 3)
    assert torch.equal(reshaped.delta_weight(weight), flat.delta_weight(weight))
    # Columns that split a kernel do not fit a convolution.
    cut = LokrDelta(1.0, left=torch.randn(2, 9, generator=draw), right=torch.randn(3, 4, generator=draw))
    assert [issue.factor for issue in cut.issues(shape)] == ["right"]
