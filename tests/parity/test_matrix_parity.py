"""The matrix of kinds, layers and peers: outputs, gradients of every factor, merged weights and files agree.

The tables in `peers.py` define the cells: every listed kind, type of layer and form of a peer is compared.
"""

from __future__ import annotations

import pytest
import torch
from law_adapters import LAYERS, input_of, layer_of, probe_for
from peers import EXCEPTIONS, FORMS, UNCOMPARED, compared, exception_of, model_of, pair_of, peft_side, slug
from peft import PeftModel

from lora_engine.adapters import AdaptedLayer, Adapter, kinds
from lora_engine.errors import AdapterError
from lora_engine.formats import codecs, read_adapter, write_adapter

pytestmark = [
    # PEFT searches for a CUDA compiler before it rotates on the CPU.
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    # PEFT mistakes the vector of a bias for a damaged factor.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
    # For a layer without a bias.
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

ALL = [(peer, form) for peer, forms in FORMS.items() for form in forms]
CELLS = [(peer, form, layer) for peer, form in ALL for layer in compared(peer, form)]
LACKING = [
    (peer, form, layer) for peer, form in ALL for layer in FORMS[peer][form].layers if layer not in compared(peer, form)
]


cells = pytest.mark.parametrize(("peer", "form", "layer"), CELLS)


def close(actual, expected, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("peer", FORMS)
def test_every_kind_is_compared_on_every_layer_or_listed_with_a_reason(peer):
    covered = {form.kind for form in FORMS[peer].values()}
    assert covered | set(UNCOMPARED[peer]) == set(kinds), "cover the kind in peers.py, or say why the peer lacks it"
    assert not covered & set(UNCOMPARED[peer])
    for kind in covered:
        forms = {name: form for name, form in FORMS[peer].items() if form.kind == kind}
        assert {layer for form in forms.values() for layer in form.layers} == set(LAYERS), kind
        assert any(compared(peer, name) for name in forms)


def test_every_exception_matches_a_cell():
    meant = [exception_of(peer, form, layer) for peer, form in ALL for layer in FORMS[peer][form].layers]
    assert [one for one in EXCEPTIONS if one not in meant] == []


@pytest.mark.parametrize(("peer", "form", "layer"), LACKING)
def test_every_listed_gap_of_a_peer_still_exists(peer, form, layer):
    one = exception_of(peer, form, layer)
    errors = AdapterError if one.kind == "unread" else (ValueError, TypeError, RuntimeError, NotImplementedError)
    with pytest.raises(errors, match=one.match):
        pair_of(peer, form, layer).weight()


@cells
def test_outputs_agree_at_full_strength_and_at_half(peer, form, layer):
    """Ours is a fraction of the full change for every kind; DoRA and some rotations of the peers scale the factors."""
    pair, entry, one = pair_of(peer, form, layer), FORMS[peer][form], exception_of(peer, form, layer)
    x = input_of(pair.layer)
    assert pair.delta.kind == entry.read_as
    adapted = AdaptedLayer(pair.layer, pair.delta)
    with torch.no_grad():
        actual = adapted(x)
        assert (actual - pair.layer(x)).abs().max() > 1e-4
        if one is not None and one.kind == "weight":
            if one.match:
                with pytest.raises(RuntimeError, match=one.match):
                    pair.call(x)
            else:
                assert (actual - pair.call(x)).abs().max() > 1e-3, "the peer's output now matches its own weight"
            return
        close(actual, pair.call(x))
        if entry.half:
            adapted.multiplier = 0.5
            actual, reference = adapted(x), pair.half(x)
            assert torch.allclose(actual, reference, rtol=1e-4, atol=1e-4) == (entry.half == "same")


@cells
def test_merged_weights_and_saved_tensors_agree(peer, form, layer):
    pair, one = pair_of(peer, form, layer), exception_of(peer, form, layer)
    with torch.no_grad():
        if one is not None and one.kind == "output":
            with pytest.raises(RuntimeError, match=one.match):
                pair.weight()
        else:
            weight, bias = pair.weight()
            close(pair.layer.weight + pair.delta.delta_weight(pair.layer.weight), weight)
            own = getattr(pair.layer, "bias", None)
            change = pair.delta.delta_bias(own)
            assert (bias is None) == (own is None)
            if own is not None:
                close((own if change is None else own + change).float(), bias)
    if peer == "lycoris":
        written, _ = codecs["loraline"].encode(Adapter({"unet.layer": pair.delta}))
        assert written.keys() == pair.tensors.keys()
        for key, tensor in pair.tensors.items():
            if not (FORMS[peer][form].alters_alpha and key.endswith("alpha")):
                assert written[key].shape == tensor.shape
                assert torch.equal(written[key].to(tensor.dtype), tensor)


WITH_OUTPUTS = [cell for cell in CELLS if (one := exception_of(*cell)) is None or one.kind != "weight"]


@pytest.mark.parametrize(("peer", "form", "layer"), WITH_OUTPUTS)
def test_gradients_of_every_factor_agree(peer, form, layer):
    pair, entry = pair_of(peer, form, layer), FORMS[peer][form]
    x = input_of(pair.layer)
    adapted = AdaptedLayer(pair.layer, pair.delta, trainable=True)
    out = adapted(x)
    (out * probe_for(out)).sum().backward()
    ours = {factor: parameter.grad for factor, parameter in adapted.factors.items()}
    reference = pair.parameters()
    assert reference.keys() == ours.keys()
    out = pair.call(x)
    reference_gradients = dict(
        zip(reference, torch.autograd.grad((out * probe_for(out)).sum(), reference.values()), strict=True)
    )
    agreed = {}
    for factor, gradient in ours.items():
        expected = reference_gradients[factor]
        if peer == "peft" and layer == "embedding":  # its factors are transposed, its angles have the opposite sign
            expected = -expected if factor == "angles" else expected.T
        scale = entry.gradients.get(factor, 1.0)
        if scale is not None:
            expected = scale * expected.reshape(gradient.shape)
            size = max(1.0, float(expected.abs().max()))
            agreed[factor] = torch.allclose(gradient.to(expected.dtype), expected, rtol=1e-3, atol=1e-4 * size)
    if peer == "lycoris" and entry.kind == "dora":
        assert agreed.pop("magnitude")
        assert not all(agreed.values()), "LyCORIS holds the norm now: compare these gradients too"
    else:
        assert agreed
        assert all(agreed.values()), agreed


@pytest.mark.parametrize("form", FORMS["peft"])
def test_peft_and_we_load_our_export_unchanged(form, tmp_path):
    layers, (_, adapter, factors) = compared("peft", form), peft_side(form)
    if form in ("lokr", "lokr both"):  # we only export those of square kernels
        with pytest.raises(AdapterError, match=r"no single PEFT configuration .* 'conv_oblong'"):
            write_adapter(tmp_path / "refused", adapter, format="peft")
        layers.remove("conv oblong")
        adapter = Adapter({name: delta for name, delta in adapter.modules.items() if "oblong" not in name})
    write_adapter(tmp_path / "ours", adapter, format="peft")
    again = PeftModel.from_pretrained(model_of(layers), tmp_path / "ours").eval()
    loaded = {key: value for key, value in again.state_dict().items() if "default" in key}
    state = {key: value for key, value in factors.items() if key.split(".")[2] in map(slug, layers)}
    assert state.keys() == loaded.keys()
    if form != "lokr whole":  # we fold its scale into a factor
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
    back = read_adapter(tmp_path / "ours")[0]
    assert back == adapter
    for layer in layers:
        x, reference = input_of(layer_of(layer)), again.base_model.model[slug(layer)]
        if exception_of("peft", form, layer) is None:
            with torch.no_grad():
                close(reference(x), pair_of("peft", form, layer).call(x))
    write_adapter(tmp_path / "again", back, format="peft")
    first, second = ((tmp_path / name / "adapter_config.json").read_bytes() for name in ("ours", "again"))
    assert first == second
    assert read_adapter(write_adapter(tmp_path / "stored.safetensors", adapter)[0])[0] == adapter
