"""PEFT's folders and ours: PEFT loads our exports, inexpressible adapters are refused, and PEFT's errors are pinned.

The kinds themselves are compared in the matrix.
"""

import copy
import json

import pytest
import torch
from law_adapters import fresh_delta, input_of, layer_of, moved_delta, random_delta, tree_of
from parity_models import make_pipeline
from peers import model_of, peft_folder, peft_pair, slug
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from peft.tuners.boft.layer import BOFTLayer
from torch import nn

from lora_engine.adapters import (
    Adapter,
    DictTree,
    PeftBoftDelta,
    PeftIa3Delta,
    PeftOftDelta,
    attach,
    create_adapter,
    module_shapes,
    select_modules,
)
from lora_engine.errors import AdapterError
from lora_engine.formats import codecs, read_adapter, write_adapter

pytestmark = [
    # PEFT searches for a CUDA compiler before it rotates on the CPU.
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    # PEFT 0.21 calls a deprecated API of transformers 5.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
LINEAR = ("linear", "linear without bias")
LAYERS = (*LINEAR, "conv 3x3", "conv 1x1")


@pytest.mark.parametrize(
    ("kind", "options", "layers"),
    [
        ("lora", {}, (*LAYERS, "embedding")),
        ("dora", {}, LAYERS),
        ("loha", {}, LAYERS),
        ("loha", {"tucker": True}, LAYERS),
        ("lokr", {}, LAYERS),
        ("lokr", {"factor": 2, "tucker": True}, LAYERS),
        ("lokr", {"both": True}, LAYERS),
        ("lokr", {"full": True}, LAYERS),
        ("peft-ia3", {"axis": "output"}, LINEAR),
        ("peft-ia3", {"axis": "input"}, LINEAR),
        ("peft-oft", {}, (*LINEAR, "embedding")),
        ("peft-oft", {"terms": 0}, (*LINEAR, "embedding")),
        ("peft-oft", {"share": True}, (*LINEAR, "embedding")),
        ("peft-boft", {}, LINEAR),
    ],
)
def test_peft_computes_what_we_do_from_the_folder_of_our_fresh_and_trained_adapters(kind, options, layers, tmp_path):
    """Includes mixed ranks and alphas for kinds that have them."""
    has_rank = kind in ("lora", "dora", "loha", "lokr")
    for make in (fresh_delta, moved_delta):
        modules = {}
        for place, layer in enumerate(layers):
            rank, alpha = (1 + place % 2, (1.0, 2.0, 3.5)[place % 3]) if has_rank else (4, None)
            modules[f"unet.{slug(layer)}"] = make(layer_of(layer), kind, rank, alpha, place, **options)
        adapter = Adapter(modules)
        folder = tmp_path / make.__name__
        write_adapter(folder, adapter, format="peft")
        assert read_adapter(folder)[0] == adapter
        peft, ours = PeftModel.from_pretrained(model_of(layers), folder).eval(), model_of(layers)
        factors = sum(len(delta.factors()) for delta in modules.values())
        assert sum("default" in key for key in peft.state_dict()) == factors
        for layer in layers:
            x, plain = input_of(layer_of(layer)), layer_of(layer)
            with torch.no_grad(), attach({"unet": ours}, adapter):
                actual, expected = ours[slug(layer)](x), peft.base_model.model[slug(layer)](x)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
                assert torch.allclose(plain(x), expected, rtol=1e-5, atol=1e-6) == (make is fresh_delta)


def test_peft_loads_each_component_of_our_folder_and_computes_the_same(tmp_path):
    pipeline = make_pipeline()
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    tree = DictTree(parts, "sd")
    shapes = module_shapes(tree)
    modules = {
        name: random_delta("lora", shapes[name], 1 + place % 3, [1.0, 2.0, 3.3][place % 3], place)
        for place, name in enumerate(select_modules(shapes, ["all", "text"]))
    }
    adapter = Adapter(modules, "sd")
    write_adapter(tmp_path, adapter, format="peft")
    assert read_adapter(tmp_path)[0] == adapter
    one, _ = read_adapter(tmp_path / "text_encoder")
    assert set(one.modules) == {name for name in modules if name.startswith("text_encoder.")}
    calls = {
        "unet": lambda unet: unet(torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 3, 16)).sample,
        "text_encoder": lambda text: text(torch.arange(14).reshape(2, 7)).last_hidden_state,
    }
    with torch.no_grad():
        plain = {part: call(parts[part]) for part, call in calls.items()}
        with attach(tree, adapter):
            expected = {part: call(parts[part]) for part, call in calls.items()}
        for part, call in calls.items():
            peft = call(PeftModel.from_pretrained(parts[part], tmp_path / part).eval())
            assert (plain[part] - expected[part]).abs().max() > 0.05
            torch.testing.assert_close(peft, expected[part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_read_the_patterns_of_ranks_and_alphas_that_peft_writes(use_rslora, tmp_path):
    model = nn.ModuleDict({"down": model_of(LAYERS), "up": model_of(LAYERS)})
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=[slug(layer) for layer in LAYERS],
        rank_pattern={"linear": 3, "up.conv_1x1": 1},
        alpha_pattern={"conv_3x3": 7},
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    peft = get_peft_model(copy.deepcopy(model), config).eval()
    peft.save_pretrained(tmp_path)
    adapter, _ = read_adapter(tmp_path, module_shapes({"unet": model}))
    assert {delta.rank for delta in adapter.modules.values()} == {1, 2, 3}
    with torch.no_grad(), attach({"unet": model}, adapter):
        for part in model:
            for layer in LAYERS:
                actual, expected = (one[part][slug(layer)] for one in (model, peft.base_model.model))
                x = input_of(layer_of(layer))
                torch.testing.assert_close(actual(x), expected(x), rtol=1e-5, atol=1e-5)


def test_pefts_gradient_of_loha_with_cores_is_wrong_and_ours_is_that_of_its_own_forward():
    """PEFT's hand-written backward uses the product of the other half for `hada_w1_a` and `hada_w2_a`."""
    pair = peft_pair("loha cores", "conv 3x3")
    x, layer = input_of(pair.layer), pair.layer
    peft = pair.parameters()
    gradients = dict(zip(peft, torch.autograd.grad(pair.call(x).square().mean(), peft.values()), strict=True))
    factors = {name: f.clone().requires_grad_() for name, f in pair.delta.factors().items()}
    halves = [
        torch.einsum("mp,mnkl,nr->prkl", factors[f"up{half}"], factors[f"core{half}"], factors[f"down{half}"])
        for half in (1, 2)
    ]
    change = halves[0] * halves[1] * (5 / 2)
    out = nn.functional.conv2d(x, layer.weight + change, layer.bias, padding=1)
    right = dict(zip(factors, torch.autograd.grad(out.square().mean(), factors.values()), strict=True))
    with attach(tree_of(layer), Adapter({"unet.0": pair.delta}), trainable=True) as attachment:
        attachment._layers["unet.0"](x).square().mean().backward()
        ours = {name.split(".")[-1]: parameter.grad for name, parameter in attachment.named_parameters()}
    assert ours.keys() == right.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-3, atol=1e-5)
        agrees = torch.allclose(gradients[name], right[name], rtol=1e-3, atol=1e-5)
        assert agrees == (name not in ("up1", "up2")), (
            f"{name}: PEFT's backward has changed; compare its gradients again"
        )


@pytest.mark.parametrize("butterflies", [2, 3])
def test_butterflies_agree_with_pefts_permutations_and_cayley_form(butterflies):
    """PEFT supports several butterflies only on a GPU, so this test combines its parts."""
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
    actual = weight + PeftBoftDelta(blocks, scale).delta_weight(weight)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_pefts_untrained_oft_on_wide_kernels_changes_the_output():
    """It splits the image into patches and adds up overlaps; we follow its merged weight."""
    layer = layer_of("conv 3x3")
    model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), OFTConfig(target_modules=["0"], oft_block_size=4))
    with torch.no_grad():
        assert not torch.allclose(model(input_of(layer)), layer(input_of(layer)), atol=1e-2)
        assert torch.equal(model.merge_and_unload()[0].weight, layer.weight)


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
    "an unknown type": ("ia3", {"peft_type": "VERA"}, "type 'VERA' are not supported"),
    "an expression": ("ia3", {"feedforward_modules": "(a|a)*b"}, "expression"),
    "gains of the other axis": ("ia3", {"feedforward_modules": ["linear"]}, r"\[8, 1\]"),
    "an unexpected magnitude": ("dora", {"use_dora": False}, "use_dora is False"),
    "a magnitude beside another type": ("dora", {"peft_type": "LOKR"}, "kind 'dora'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_configurations_with_another_meaning_are_refused(case, tmp_path):
    form, changes, match = BAD_CONFIGS[case]
    path = peft_folder(form, LINEAR, tmp_path) / "adapter_config.json"
    shapes = module_shapes({"unet": model_of(LINEAR)})
    assert len(read_adapter(tmp_path, shapes)[0].modules) == 2
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(AdapterError, match=match):
        read_adapter(tmp_path, shapes)


def _lokr(factor):
    return fresh_delta(layer_of("linear"), "lokr", 1, factor=factor)


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        (PeftOftDelta(torch.ones(2, 6)), PeftOftDelta(torch.ones(4, 1)), "one block size"),
        (PeftOftDelta(torch.ones(2, 6), 5), PeftOftDelta(torch.ones(2, 6), 0), "one number of terms"),
        (PeftOftDelta(torch.ones(2, 6), 5, 0.1), PeftOftDelta(torch.ones(2, 6)), "one constraint"),
        (PeftOftDelta(torch.ones(2, 6)), PeftIa3Delta(torch.ones(4, 1)), "several kinds"),
        (PeftIa3Delta(torch.ones(4, 1)), PeftIa3Delta(torch.ones(1, 4), "input"), "ends in the name of another"),
        (_lokr(2), _lokr(4), "no single PEFT configuration"),
        (_lokr(2), random_delta("lora", (8, 20)), "several kinds"),
    ],
)
def test_adapters_that_one_configuration_cannot_express_are_refused(first, second, match, tmp_path):
    adapter = Adapter({"unet.a.to_q": first, "unet.to_q": second})
    with pytest.raises(AdapterError, match=match):
        write_adapter(tmp_path, adapter, format="peft")
    assert list(tmp_path.iterdir()) == []


def test_kohyas_format_holds_several_kinds():
    assert codecs["kohya"].is_lossless(Adapter({"unet.a": _lokr(2), "unet.b": random_delta("lora", (8, 20))}, "sd"))


def train(model, parameters, steps=4):
    """Trains a few steps of plain gradient descent to a fixed target."""
    optimiser = torch.optim.SGD(parameters, 1.0)
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(7))
    goal = torch.randn(16, 36, generator=torch.Generator().manual_seed(8))
    for _ in range(steps):
        optimiser.zero_grad()
        (model(x) - goal).square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("alpha", [4, 2])
@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights of the model:UserWarning")
def test_pissa_trains_like_pefts_after_its_conversion_to_lora(alpha, tmp_path):
    torch.manual_seed(0)
    plain, twin = nn.Sequential(nn.Linear(24, 36)), nn.Sequential(nn.Linear(24, 36))
    twin.load_state_dict(plain.state_dict())
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights="pissa")
    peft = get_peft_model(twin, config)
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(tmp_path / "start")
    peft.peft_config["default"].init_lora_weights = "pissa"
    train(peft, [p for p in peft.parameters() if p.requires_grad])
    peft.save_pretrained(tmp_path / "unet", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = read_adapter(tmp_path / "unet", {"unet.0": (36, 24)})[0].modules["unet.0"]
    fresh = create_adapter({"unet": plain}, "*", "pissa", 4, float(alpha))
    with attach({"unet": plain}, fresh, trainable=True) as attachment:
        train(plain, attachment.parameters())
        ours = attachment.adapter().to_export().modules["unet.0"]
    assert (ours.rank, ours.scale) == (converted.rank, converted.scale) == (8, alpha / 4)
    weight = plain[0].weight.detach()
    expected = converted.delta_weight(weight)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(ours.delta_weight(weight), expected, rtol=0, atol=1e-5)
