"""(IA)3: the kinds of LyCORIS and PEFT, in memory and in files."""

import re

import pytest
import torch
from law_adapters import MATRICES, dense_output, forward_of, input_of, layer_of, moved_delta
from safetensors.torch import load_file, save_file
from torch import nn

from lora_engine.adapters import Adapter, Ia3Delta, LoraDelta, PeftIa3Delta, create_adapter
from lora_engine.errors import AdapterError, SettingsError
from lora_engine.formats import read_adapter, write_adapter

KOHYA = "lora_unet_layer"


def test_the_two_conventions_differ_in_identity_and_bias():
    gains, weight, bias = torch.tensor([0.5, -1.0]), torch.ones(2, 3), torch.ones(2)
    lycoris, peft = Ia3Delta(gains), PeftIa3Delta(1 + gains[:, None])
    assert torch.equal(lycoris.delta_weight(weight), peft.delta_weight(weight))
    assert lycoris.delta_bias(bias) is None
    assert torch.equal(peft.delta_bias(bias), gains)
    assert PeftIa3Delta(torch.ones(1, 3), "input").delta_bias(bias) is None


@pytest.mark.parametrize("flag", [torch.tensor(1), torch.tensor(1.0).half(), torch.tensor(True)])
def test_lycoris_flag_of_the_axis_is_read_in_any_dtype(flag, tmp_path):
    save_file({f"{KOHYA}.weight": torch.ones(3), f"{KOHYA}.on_input": flag}, tmp_path / "a.safetensors")
    delta = read_adapter(tmp_path / "a.safetensors", {"unet.layer": (4, 3)})[0].modules["unet.layer"]
    assert delta.axis == "input"
    other = {f"{KOHYA}.weight": torch.ones(3), f"{KOHYA}.on_input": torch.zeros_like(flag)}
    save_file(other, tmp_path / "b.safetensors")
    with pytest.raises(AdapterError, match="4 values"):
        read_adapter(tmp_path / "b.safetensors", {"unet.layer": (4, 3)})


def test_a_weight_without_the_flag_is_not_ia3(tmp_path):
    """Every model file has `weight` keys; and a diffusers file is not read as ours."""
    save_file({f"{KOHYA}.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="no factor of a kind"):
        read_adapter(tmp_path / "a.safetensors", {"unet.layer": (4, 3)})
    lora = Adapter({"unet.mid_block.layer": LoraDelta(torch.ones(2, 3), torch.ones(4, 2), 2.0)}, "sd")
    file = write_adapter(tmp_path / "lora.safetensors", lora, format="diffusers")[0]
    assert read_adapter(file)[0] == lora


def test_a_flag_that_is_not_a_number_is_refused(tmp_path):
    tensors = {f"{KOHYA}.weight": torch.ones(3), f"{KOHYA}.on_input": torch.zeros(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"on_input.*\[3\]"):
        read_adapter(tmp_path / "a.safetensors", {"unet.layer": (4, 3)})


def test_a_format_with_another_convention_refuses_the_kind(tmp_path):
    lycoris = Adapter({"unet.layer": Ia3Delta(torch.ones(4))})
    peft = Adapter({"unet.layer": PeftIa3Delta(torch.ones(4, 1))})
    for adapter, form in ((lycoris, "peft"), (peft, "kohya"), (lycoris, "comfyui")):
        with pytest.raises(AdapterError, match="cannot hold"):
            write_adapter(tmp_path / form, adapter, format=form)
    assert "unet.layer.weight" in load_file(write_adapter(tmp_path / "a", lycoris)[0])


@pytest.mark.parametrize("kind", ["ia3", "peft-ia3"])
def test_a_gain_of_the_inputs_equals_its_dense_delta(kind):
    for name in MATRICES:  # the law tests cover a gain of the outputs
        layer = layer_of(name)
        delta, x = moved_delta(layer, kind, axis="input"), input_of(layer)
        assert delta.scale.numel() == layer.weight.shape[1]
        with torch.no_grad():
            output, expected = forward_of(delta, layer, x, 0.5), dense_output(delta, layer, x, 0.5)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_norms_are_refused():
    with pytest.raises(SettingsError, match="kind full"):
        create_adapter({"unet": nn.ModuleDict({"norm": nn.LayerNorm(4)})}, "*", "ia3")


INVALID = {
    "another base": (Ia3Delta(torch.ones(4)), (5, 4), r"5 values"),
    "the other axis": (Ia3Delta(torch.ones(4), "input"), (4, 5), r"5 values"),
    "a norm": (Ia3Delta(torch.ones(4)), (4,), "linear"),
    "two dimensions of channels": (Ia3Delta(torch.ones(4, 2)), None, "one dimension"),
    "nothing": (Ia3Delta(torch.ones(0)), None, "one dimension"),
    "a single number": (Ia3Delta(torch.tensor(1.0)), None, "one dimension"),
    "no axis": (Ia3Delta(torch.ones(4), "rows"), None, "output or input"),
}


@pytest.mark.parametrize("case", INVALID)
def test_structural_issues_of_gains_are_named(case):
    delta, shape, allowed = INVALID[case]
    issues = list(delta.issues(shape))
    assert len(issues) == 1
    assert re.search(allowed, issues[0].allowed)


def test_gains_are_reshaped_for_the_weight():
    assert Ia3Delta(torch.ones(1, 4, 1, 1)).reshaped_for((4, 3)).scale.shape == (4,)
    assert Ia3Delta(torch.ones(4)).reshaped_for((4, 3, 3, 3)).scale.shape == (1, 4, 1, 1)
    assert PeftIa3Delta(torch.ones(1, 4, 1, 1)).reshaped_for((4, 3)).scale.shape == (4, 1)
    assert PeftIa3Delta(torch.ones(1, 3, 1, 1), "input").reshaped_for((4, 3)).scale.shape == (1, 3)
