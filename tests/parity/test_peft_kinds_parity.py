"""PEFT's IA3, OFT, BOFT and LoRA on embeddings agree with ours, on folders that PEFT saves and on those that we write.

Where PEFT disagrees with itself, a test pins what it does and says which of the two we follow.
"""

import copy
import json

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="PEFT is not installed")

from peft import BOFTConfig, IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.boft.layer import BOFTLayer  # noqa: E402

from lora_engine.adapters import (  # noqa: E402
    Adapter,
    DictTree,
    LoraDelta,
    PeftBoftDelta,
    PeftIa3Delta,
    PeftOftDelta,
    attach,
    collapse,
    create_adapter,
    module_shapes,
)
from lora_engine.errors import AdapterError  # noqa: E402
from lora_engine.formats import read_adapter, write_adapter  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    # PEFT looks for a compiler of CUDA before it rotates on the CPU.
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    # PEFT takes the vector of a bias for a damaged factor.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor"),
]


class Small(nn.Module):
    """A model with each type of layer that PEFT adapts."""

    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(10, 8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 8, bias=False)
        self.point = nn.Conv2d(4, 8, 1)
        self.conv = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, tokens):
        hidden = self.second(torch.tanh(self.first(self.token_embedding(tokens))))
        return self.conv(torch.tanh(self.point(hidden.reshape(len(tokens), 4, -1, 8))))


def small():
    torch.manual_seed(0)
    return Small()


TOKENS = torch.arange(16).reshape(2, 8) % 10
LINEAR = ["first", "second", "point"]
CONFIGS = {
    "ia3": (IA3Config(target_modules=[*LINEAR, "conv"], feedforward_modules=[]), PeftIa3Delta),
    "ia3 on inputs": (
        IA3Config(target_modules=[*LINEAR, "conv"], feedforward_modules=["second", "point", "conv"]),
        PeftIa3Delta,
    ),
    "oft": (OFTConfig(target_modules=LINEAR, oft_block_size=4), PeftOftDelta),
    "oft exact": (OFTConfig(target_modules=LINEAR, oft_block_size=4, use_cayley_neumann=False), PeftOftDelta),
    "oft two terms": (OFTConfig(target_modules=LINEAR, oft_block_size=4, num_cayley_neumann_terms=2), PeftOftDelta),
    "oft three terms": (OFTConfig(target_modules=LINEAR, oft_block_size=2, num_cayley_neumann_terms=3), PeftOftDelta),
    "oft seven terms": (OFTConfig(target_modules=LINEAR, oft_block_size=4, num_cayley_neumann_terms=7), PeftOftDelta),
    "oft constrained": (OFTConfig(target_modules=LINEAR, oft_block_size=4, coft=True, eps=0.3), PeftOftDelta),
    "oft shared": (OFTConfig(target_modules=LINEAR, oft_block_size=2, block_share=True), PeftOftDelta),
    "oft on an embedding": (OFTConfig(target_modules=["token_embedding", "first"], oft_block_size=4), PeftOftDelta),
    "boft": (BOFTConfig(target_modules=[*LINEAR, "conv"], boft_block_size=4), PeftBoftDelta),
    "lora on an embedding": (LoraConfig(target_modules=["token_embedding", "first"], r=3, lora_alpha=5), LoraDelta),
    "lora with bias": (LoraConfig(target_modules=["first"], r=3, lora_alpha=5, lora_bias=True), LoraDelta),
}
configs = pytest.mark.parametrize("name", CONFIGS)


def theirs_of(name, folder):
    """PEFT's model with random factors, and the folder that it saved."""
    model = get_peft_model(small(), copy.deepcopy(CONFIGS[name][0]))
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                around = 1.0 if "ia3_l" in key or "boft_s" in key else 0.0
                parameter.copy_(around + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


def ours_of(folder):
    base = {"unet": small()}
    return base, read_adapter(folder, module_shapes(base))[0]


@configs
def test_forward_and_merged_weights_agree_with_peft(name, tmp_path):
    model = theirs_of(name, tmp_path)
    base, adapter = ours_of(tmp_path)
    assert all(type(delta) is CONFIGS[name][1] for delta in adapter.modules.values())
    with torch.no_grad():
        expected = model(TOKENS)
        with attach(base, adapter):
            torch.testing.assert_close(base["unet"](TOKENS), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base["unet"](TOKENS), expected, atol=1e-3)
        collapse(base, adapter)
        merged = model.merge_and_unload().state_dict()
    for key, value in base["unet"].state_dict().items():
        torch.testing.assert_close(value, merged[key], rtol=1e-4, atol=1e-5)


@configs
def test_gradients_agree_with_peft(name, tmp_path):
    model = theirs_of(name, tmp_path)
    base, adapter = ours_of(tmp_path)
    model(TOKENS).square().sum().backward()
    with attach(base, adapter, trainable=True) as attachment:
        base["unet"](TOKENS).square().sum().backward()
        found = attachment.named_parameters()
        gradients = {key: parameter.grad for key, parameter in found}
    expected = dict(model.named_parameters())
    names = {"scale": "ia3_l.default", "angles": "oft_R.default.weight", "blocks": "boft_R.default"}
    names |= {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
    for key, gradient in gradients.items():
        module, _, factor = key.removeprefix("unet.").rpartition(".")
        theirs, sign = names.get(factor), 1.0
        if factor == "scale" and name == "boft":
            theirs = "boft_s.default"
        if module == "token_embedding" and factor == "angles":
            theirs, sign = "oft_embedding_R.default.weight", -1.0
        if module == "token_embedding" and factor in ("down", "up"):
            theirs = {"down": "lora_embedding_B.default", "up": "lora_embedding_A.default"}[factor]
        if factor == "bias":
            theirs, sign = "lora_B.default.bias", 3 / 5
        wanted = expected[f"base_model.model.{module}.{theirs}"].grad
        wanted = wanted.T if "lora_embedding" in theirs else wanted
        size = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(gradient.float(), sign * wanted, rtol=1e-3, atol=1e-4 * size)


@configs
def test_peft_loads_what_we_write_as_it_was(name, tmp_path):
    model = theirs_of(name, tmp_path / "theirs")
    adapter = ours_of(tmp_path / "theirs")[1]
    write_adapter(tmp_path / "ours", adapter, format="peft")
    again = PeftModel.from_pretrained(small(), tmp_path / "ours").eval()
    state = {key: value for key, value in model.state_dict().items() if "base_layer" not in key}
    loaded = again.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items() if "default" in key)
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS), model(TOKENS), rtol=1e-5, atol=1e-6)
    assert ours_of(tmp_path / "ours")[1] == adapter
    first = (tmp_path / "ours" / "adapter_config.json").read_bytes()
    write_adapter(tmp_path / "second", ours_of(tmp_path / "ours")[1], format="peft")
    assert (tmp_path / "second" / "adapter_config.json").read_bytes() == first


@configs
def test_the_stored_format_keeps_what_a_peft_folder_says(name, tmp_path):
    theirs_of(name, tmp_path)
    _, adapter = ours_of(tmp_path)
    write_adapter(tmp_path / "kept.safetensors", adapter)
    assert read_adapter(tmp_path / "kept.safetensors")[0] == adapter


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("peft-ia3", {"axis": "output"}),
        ("peft-ia3", {"axis": "input"}),
        ("peft-oft", {}),
        ("peft-oft", {"terms": 0}),
        ("peft-oft", {"share": True}),
        ("peft-boft", {}),
        ("lora", {}),
    ],
)
def test_a_fresh_adapter_of_ours_is_one_of_pefts(kind, options, tmp_path):
    base = {"unet": small()}
    targets = ["unet.first", "unet.second", "unet.token_embedding"][: 3 if kind in ("lora", "peft-oft") else 2]
    adapter = create_adapter(base, targets, kind, rank=4, options=options, generator=torch.Generator().manual_seed(0))
    write_adapter(tmp_path, adapter, format="peft")
    model = PeftModel.from_pretrained(small(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), base["unet"](TOKENS), rtol=1e-6, atol=1e-7)
    shapes = {key: value.shape for key, value in model.state_dict().items() if "default" in key}
    assert len(shapes) == sum(len(delta.factors()) for delta in adapter.modules.values())


@pytest.mark.parametrize("butterflies", [2, 3])
def test_butterflies_agree_with_pefts_permutations_and_cayley_form(butterflies):
    """PEFT turns more than one butterfly on a GPU alone, so this puts its own pieces together."""
    inputs, size = 32, 4
    number = inputs // size
    torch.manual_seed(0)
    blocks, scale = torch.randn(butterflies, number, size, size), torch.randn(6, 1)
    layer = BOFTLayer(nn.Linear(inputs, 6))
    whole = torch.eye(inputs)
    for stage in range(butterflies):
        order = layer.block_butterfly_perm(inputs, number // 2**stage, size // 2, butterflies - 1)
        permutation = layer.perm2mat(order)
        whole = permutation @ torch.block_diag(*layer.cayley_batch(blocks[stage])) @ permutation.T @ whole
    weight = torch.randn(6, inputs)
    expected = (whole @ weight.T).T * scale
    found = weight + PeftBoftDelta(blocks, scale).delta_weight(weight)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_pefts_forward_of_oft_on_wide_kernels_is_not_its_merge_which_we_follow():
    """PEFT cuts the picture into patches and adds up overlaps, so even an untrained adapter changes the output."""
    layer = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    model = get_peft_model(copy.deepcopy(layer), OFTConfig(target_modules=["0"], oft_block_size=4))
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        plain = layer(x)
        assert not torch.allclose(model(x), plain, atol=1e-2)
        nn.init.normal_(model.base_model.model[0].oft_R["default"].weight, std=0.2)
        angles = model.base_model.model[0].oft_R["default"].weight.detach().clone()
        merged = model.merge_and_unload()
        tree = DictTree({"unet": layer})
        with attach(tree, Adapter({"unet.0": PeftOftDelta(angles)})):
            torch.testing.assert_close(layer(x), merged(x), rtol=1e-5, atol=1e-5)


def test_pefts_exact_oft_turns_the_other_way_than_its_series():
    angles = 0.01 * torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    series = PeftOftDelta(angles, terms=9).delta_weight(weight)
    torch.testing.assert_close(PeftOftDelta(-angles, terms=0).delta_weight(weight), series, rtol=1e-4, atol=1e-6)


BAD_CONFIGS = {
    "an older series": ("oft", {"peft_version": None}, "older PEFT"),
    "an older series by number": ("oft", {"peft_version": "0.17.1"}, "older PEFT"),
    "the first OFT": ("oft", {"oft_block_size": None}, "older PEFT"),
    "terms that are no number": ("oft", {"num_cayley_neumann_terms": "5"}, "numbers"),
    "transposed": ("boft", {"fan_in_fan_out": True}, "transposed"),
    "transposed gains": ("ia3", {"fan_in_fan_out": True}, "transposed"),
    "another type": ("ia3", {"peft_type": "OFT"}, "of kind 'peft-ia3'"),
    "an unknown type": ("ia3", {"peft_type": "VERA"}, "not read"),
    "an expression": ("ia3", {"feedforward_modules": "(a|a)*b"}, "expression"),
    "gains of the other axis": ("ia3", {"feedforward_modules": ["first"]}, r"\[12, 1\]"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configurations_that_mean_something_else_are_refused(case, tmp_path):
    name, changes, match = BAD_CONFIGS[case]
    theirs_of(name, tmp_path)
    ours_of(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(AdapterError, match=match):
        ours_of(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        (PeftOftDelta(torch.ones(2, 6)), PeftOftDelta(torch.ones(4, 1)), "one block size"),
        (PeftOftDelta(torch.ones(2, 6), 5), PeftOftDelta(torch.ones(2, 6), 0), "one number of terms"),
        (PeftOftDelta(torch.ones(2, 6), 5, 0.1), PeftOftDelta(torch.ones(2, 6)), "one constraint"),
        (PeftOftDelta(torch.ones(2, 6)), PeftIa3Delta(torch.ones(4, 1)), "several kinds"),
        (PeftIa3Delta(torch.ones(4, 1)), PeftIa3Delta(torch.ones(1, 4), "input"), "ends in that of another"),
    ],
)
def test_what_pefts_one_configuration_cannot_say_is_refused(first, second, match, tmp_path):
    adapter = Adapter({"unet.a.to_q": first, "unet.to_q": second})
    with pytest.raises(AdapterError, match=match):
        write_adapter(tmp_path, adapter, format="peft")
    assert list(tmp_path.iterdir()) == []
