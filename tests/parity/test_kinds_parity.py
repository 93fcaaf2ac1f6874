"""LyCORIS, PEFT and diffusers beside ours for DoRA, LoHa, LoKr and PiSSA; where a peer errs, a test says how."""

import json

import pytest
import torch
from law_adapters import random_delta
from parity_models import make_pipeline, make_unet
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

pytest.importorskip("lycoris", reason="LyCORIS is not installed")

from lycoris.functional import factorization
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft.tuners.lokr.layer import factorization as peft_factorization

from lora_engine.adapters import (
    Adapter,
    DictTree,
    LayerOp,
    LayerSettings,
    attach,
    collapse,
    create_adapter,
    kinds,
    module_shapes,
    select_modules,
)
from lora_engine.adapters.lokr import factorise
from lora_engine.errors import AdapterError
from lora_engine.formats import codecs, read_adapter, write_adapter

LAYERS = {
    "linear": (lambda: nn.Linear(24, 36), (5, 24)),
    "conv 3x3": (lambda: nn.Conv2d(12, 16, 3, padding=1), (2, 12, 6, 6)),
    "conv 1x1": (lambda: nn.Conv2d(12, 16, 1), (2, 12, 6, 6)),
}
LYCORIS = {
    "lora": (LoConModule, {}),
    "loha": (LohaModule, {}),
    "loha tucker": (LohaModule, {"use_tucker": True}),
    "lokr": (LokrModule, {}),
    "lokr both": (LokrModule, {"decompose_both": True}),
    "lokr full": (LokrModule, {"full_matrix": True}),
    "lokr tucker factor": (LokrModule, {"use_tucker": True, "factor": 4}),
}
AXES = {"plain": {}, "output": {"weight_decompose": True}, "input": {"weight_decompose": True, "wd_on_out": False}}
everything = pytest.mark.parametrize(
    ("layer_name", "algorithm", "axis"), [(name, algo, axis) for name in LAYERS for algo in LYCORIS for axis in AXES]
)


def lycoris_and_ours(layer_name, algorithm, axis, rank=1, alpha=0.5):
    """LyCORIS' module on a layer, and the delta that we read from the tensors that it saves."""
    make, shape = LAYERS[layer_name]
    module, options = LYCORIS[algorithm]
    torch.manual_seed(0)
    layer = make()
    theirs = module("unet_layer", layer, 1.0, rank, alpha, **options, **AXES[axis])
    if axis != "plain":
        theirs.dora_scale = nn.Parameter(theirs.dora_scale.detach() * 1.3)  # a parameter also after the cast
    for name, parameter in theirs.named_parameters():
        if name != "dora_scale":
            nn.init.normal_(parameter, std=0.3)
    tensors = {f"unet.layer.{key}": value.detach() for key, value in theirs.state_dict().items()}
    tensors = {key: value for key, value in tensors.items() if not key.endswith("scalar")}
    delta = codecs["loraline"].decode(tensors, {}).modules["unet.layer"]
    return theirs, delta, layer, torch.randn(shape), tensors


@everything
def test_forward_agrees_with_lycoris(layer_name, algorithm, axis):
    theirs, delta, layer, x, tensors = lycoris_and_ours(layer_name, algorithm, axis)
    assert delta.kind == (algorithm.split()[0] if axis == "plain" else "dora")
    with torch.no_grad():
        found = delta.forward(x, layer(x), layer.weight, layer.bias, LayerOp.of(layer))
        torch.testing.assert_close(found, theirs.forward(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, layer(x), atol=1e-2)
    written = codecs["loraline"].encode(Adapter({"unet.layer": delta}))[0]
    told = {key: value for key, value in tensors.items() if not ("full" in algorithm and key.endswith("alpha"))}
    for key, value in told.items():
        torch.testing.assert_close(written[key], value, rtol=0, atol=0, check_dtype=False)


@everything
def test_gradients_agree_with_lycoris_but_for_the_norm_of_dora(layer_name, algorithm, axis):
    """LyCORIS lets gradients through DoRA's norm, which the paper holds (section 4.3), as PEFT does and we do."""
    theirs, delta, layer, x, _ = lycoris_and_ours(layer_name, algorithm, axis)
    layer.requires_grad_(False)
    probe = torch.randn(theirs.forward(x).shape)
    (theirs.forward(x) * probe).sum().backward()
    factors = {name: factor.clone().requires_grad_() for name, factor in delta.factors().items()}
    moving = delta.with_factors(factors)
    (moving.forward(x, layer(x), layer.weight, layer.bias, LayerOp.of(layer)) * probe).sum().backward()
    spelling = codecs["loraline"].style.spellings[algorithm.split()[0]]
    gradients = dict(theirs.named_parameters())
    for name, factor in factors.items():
        if name == "magnitude":
            torch.testing.assert_close(factor.grad, gradients["dora_scale"].grad, rtol=1e-4, atol=1e-4)
        elif axis == "plain":
            torch.testing.assert_close(factor.grad, gradients[spelling.names[name]].grad, rtol=1e-3, atol=1e-4)
    if axis != "plain":
        same = [
            torch.allclose(factors[name].grad, gradients[spelling.names[name]].grad, atol=1e-3)
            for name in delta.inner.factors()
        ]
        assert not all(same), "LyCORIS holds the norm now: compare these gradients too"


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("layer_name", LAYERS)
def test_fused_dora_agrees_with_lycoris(layer_name, axis):
    theirs, delta, layer, _, _ = lycoris_and_ours(layer_name, "lora", axis)
    with torch.no_grad():
        merged = theirs.get_merged_weight(1.0, layer.weight.shape)[0]
        torch.testing.assert_close(layer.weight + delta.delta_weight(layer.weight), merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["loha", "lokr", "lokr both"])
def test_lycoris_merges_loha_and_lokr_with_alpha_over_rank_twice_and_ours_is_what_it_trains(algorithm):
    theirs, delta, layer, x, _ = lycoris_and_ours("linear", algorithm, "plain", rank=2, alpha=1.0)
    with torch.no_grad():
        trained = theirs.forward(x) - layer(x)
        merged = theirs.get_merged_weight(1.0, layer.weight.shape)[0] - layer.weight
        torch.testing.assert_close(x @ merged.T, 0.5 * trained, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(x @ delta.delta_weight(layer.weight).T, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "module"), [("lora", LoConModule), ("loha", LohaModule), ("lokr", LokrModule)])
@pytest.mark.parametrize("layer_name", LAYERS)
def test_a_fresh_delta_has_the_shapes_of_lycoris(kind, module, layer_name):
    layer = LAYERS[layer_name][0]()
    for rank, options in ((1, {}), (2, {"tucker": True}), (50, {}) if kind == "lokr" else (3, {})):
        theirs = module("x", layer, 1.0, rank, 1.0, use_tucker=options.get("tucker", False))
        delta = kinds[kind].create(layer.weight.detach(), None, rank, 1.0, None, **options)
        spelling = codecs["loraline"].style.spellings[kind]
        expected = {key: value.shape for key, value in theirs.state_dict().items() if key not in ("alpha", "scalar")}
        assert {key: value.shape for key, value in spelling.write(delta).items()} == expected


def test_dimensions_are_split_as_lycoris_and_peft_split_them():
    for dimension in range(1, 400):
        for factor in (-1, *range(1, 20), 64, 1000):
            assert factorise(dimension, factor) == factorization(dimension, factor)
            assert factorise(dimension, factor) == tuple(sorted(peft_factorization(dimension, factor)))


@pytest.mark.parametrize("rank", [4, 9])
def test_rslora_in_our_file_is_lycoris_rs_lora(rank):
    layer = nn.Linear(24, 36)
    theirs = LoConModule("x", layer, 1.0, rank, 2.0, rs_lora=True)
    delta = kinds["rslora"].create(layer.weight.detach(), None, rank, 2.0, None)
    assert delta.alpha == pytest.approx(float(theirs.alpha))
    assert delta.scale == pytest.approx(theirs.scale)


PEFT = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False),
    "dora": LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False, use_dora=True),
    "loha": LoHaConfig(r=2, alpha=5, target_modules=["0"], init_weights=False),
    "loha cores": LoHaConfig(r=2, alpha=5, target_modules=["0"], init_weights=False, use_effective_conv2d=True),
    "lokr": LoKrConfig(r=1, alpha=5, target_modules=["0"], init_weights=False),
    "lokr whole": LoKrConfig(r=50, alpha=7, target_modules=["0"], init_weights=False),
    "lokr both": LoKrConfig(r=1, alpha=5, target_modules=["0"], init_weights=False, decompose_both=True),
    "lokr core": LoKrConfig(
        r=1, alpha=5, target_modules=["0"], init_weights=False, use_effective_conv2d=True, decompose_factor=4
    ),
}
on_peft = pytest.mark.parametrize(("layer_name", "case"), [(name, case) for name in LAYERS for case in PEFT])


def peft_and_ours(layer_name, case, folder):
    make, shape = LAYERS[layer_name]
    torch.manual_seed(0)
    plain, twin = nn.Sequential(make()), nn.Sequential(make())
    twin.load_state_dict(plain.state_dict())
    theirs = get_peft_model(twin, PEFT[case])
    if case == "dora":
        magnitude = theirs.base_model.model[0].lora_magnitude_vector["default"].weight
        magnitude.data = magnitude.data * torch.linspace(0.5, 2.0, magnitude.numel()).reshape(magnitude.shape)
    theirs.save_pretrained(folder / "unet")
    return theirs, plain, read_adapter(folder, {"unet.0": tuple(plain[0].weight.shape)})[0], torch.randn(shape)


@on_peft
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_forward_gradients_and_fused_weight_agree_with_peft(layer_name, case, tmp_path):
    theirs, plain, adapter, x = peft_and_ours(layer_name, case, tmp_path)
    assert {delta.kind for delta in adapter.modules.values()} == {case.split()[0]}
    expected = theirs(x)
    probe = torch.randn(expected.shape)
    (expected * probe).sum().backward()
    with attach({"unet": plain}, adapter, trainable=True) as attachment:
        found = plain(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        (found * probe).sum().backward()
        ours = sorted(float(value.grad.square().sum()) for _, value in attachment.named_parameters())
    # A scale that is folded into the left factor stands between the gradients; for LoHa with cores see below.
    if case not in ("lokr whole", "loha cores"):
        told = sorted(float(p.grad.square().sum()) for p in theirs.parameters() if p.grad is not None)
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(told), rtol=1e-3, atol=1e-4)
    collapse({"unet": plain}, adapter)
    torch.testing.assert_close(plain[0].weight, theirs.merge_and_unload()[0].weight, rtol=1e-4, atol=1e-5)


def test_pefts_gradient_of_loha_with_cores_is_wrong_and_ours_is_that_of_its_own_forward(tmp_path):
    """PEFT's hand-written backward takes the other half's product for `hada_w1_a` and `hada_w2_a`."""
    theirs, plain, adapter, x = peft_and_ours("conv 3x3", "loha cores", tmp_path)
    theirs(x).square().mean().backward()
    told = {name.split(".")[-2]: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    factors = {name: f.clone().requires_grad_() for name, f in adapter.modules["unet.0"].factors().items()}
    halves = [
        torch.einsum("mp,mnkl,nr->prkl", factors[f"up{half}"], factors[f"core{half}"], factors[f"down{half}"])
        for half in (1, 2)
    ]
    change = halves[0] * halves[1] * (5 / 2)
    nn.functional.conv2d(x, plain[0].weight + change, plain[0].bias, padding=1).square().mean().backward()
    with attach({"unet": plain}, adapter, trainable=True) as attachment:
        plain(x).square().mean().backward()
        for name, parameter in attachment.named_parameters():
            torch.testing.assert_close(parameter.grad, factors[name.split(".")[-1]].grad, rtol=1e-3, atol=1e-5)
    for name, right in (("hada_w1_b", True), ("hada_t2", True), ("hada_w1_a", False), ("hada_w2_a", False)):
        spelt = codecs["peft"].style.spellings["loha"].factor(name)
        agrees = torch.allclose(told[name], factors[spelt].grad, rtol=1e-3, atol=1e-5)
        assert agrees == right, f"{name}: PEFT's backward has changed; compare its gradients again"


TARGETS = ["attention", "unet.down_blocks.*.resnets.*.conv1", "unet.*.proj_in"]
KINDS = {
    "dora": {"dora": LayerSettings("dora", 2, 3.0)},
    "loha": {"loha": LayerSettings("loha", 2, 3.0)},
    "loha with cores": {"loha": LayerSettings("loha", 2, 3.0, {"tucker": True})},
    "lokr": {"lokr": LayerSettings("lokr", 1, 3.0)},
    "lokr of one factor": {"lokr": LayerSettings("lokr", 1, 3.0, {"factor": 2, "tucker": True})},
    "lokr of both": {"lokr": LayerSettings("lokr", 1, 3.0, {"both": True})},
    "lokr whole": {"lokr": LayerSettings("lokr", 1, 3.0, {"full": True})},
}


def moved(tree, settings, seed=0):
    """An adapter of these settings with no factor at zero, other ranks and alphas here and there."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for place, name in enumerate(select_modules(module_shapes(tree), TARGETS)):
        weight = tree.get_module(name).weight.detach()
        rank, alpha = settings.rank + (place % 2), [1.0, 2.0, 3.5][place % 3]
        delta = kinds[settings.kind].create(weight, None, rank, alpha, generator, **settings.options)
        factors = {key: f + 0.3 * torch.randn(f.shape, generator=generator) for key, f in delta.factors().items()}
        modules[name] = delta.with_factors(factors)
    return Adapter(modules, "sd")


@pytest.mark.parametrize("case", KINDS)
def test_peft_loads_our_folder_of_every_kind_and_computes_the_same(case, tmp_path):
    torch.manual_seed(0)
    unet = make_unet().eval()
    tree = DictTree({"unet": unet}, "sd")
    adapter = moved(tree, next(iter(KINDS[case].values())))
    write_adapter(tmp_path, adapter, format="peft")
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 16))
    with torch.no_grad():
        plain = unet(*inputs).sample
        with attach(tree, adapter):
            expected = unet(*inputs).sample
        theirs = PeftModel.from_pretrained(unet, tmp_path).eval()(*inputs).sample
    assert (plain - expected).abs().max() > 0.05
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    assert read_adapter(tmp_path)[0] == adapter


def test_peft_folders_of_several_kinds_or_factors_are_refused():
    tree = DictTree({"unet": make_unet()}, "sd")
    one, two = (moved(tree, LayerSettings("lokr", 1, options={"factor": factor})) for factor in (2, 4))
    names = list(one.modules)
    mixed = {name: (one if place % 2 else two).modules[name] for place, name in enumerate(names)}
    with pytest.raises(AdapterError, match="no one setting of PEFT"):
        codecs["peft"].encode(Adapter(mixed, "sd"))
    mixed = {**one.modules, names[0]: random_delta("lora", module_shapes(tree)[names[0]])}
    with pytest.raises(AdapterError, match="several kinds"):
        codecs["peft"].encode(Adapter(mixed, "sd"))
    assert codecs["kohya"].holds(Adapter(mixed, "sd"))


def test_a_configuration_that_contradicts_the_tensors_is_refused(tmp_path):
    tree = DictTree({"unet": make_unet()}, "sd")
    write_adapter(tmp_path, moved(tree, LayerSettings("dora", 2)), format="peft")
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"use_dora": False}, "use_dora is False"),
        ({"peft_type": "LOKR"}, "kind 'dora'"),
        ({"peft_type": "VERA"}, "type 'VERA' are not read"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(AdapterError, match=message):
            read_adapter(tmp_path)


def train(model, parameters, steps=4):
    """The same few steps for both: plain gradient descent on a fixed goal."""
    optimiser = torch.optim.SGD(parameters, 1.0)
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(7))
    goal = torch.randn(16, 36, generator=torch.Generator().manual_seed(8))
    for _ in range(steps):
        optimiser.zero_grad()
        (model(x) - goal).square().mean().backward()
        optimiser.step()


@pytest.mark.parametrize("alpha", [4, 2])
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights of the model:UserWarning")
def test_pissa_trains_as_pefts_does_after_its_own_conversion_to_lora(alpha, tmp_path):
    torch.manual_seed(0)
    plain, twin = nn.Sequential(nn.Linear(24, 36)), nn.Sequential(nn.Linear(24, 36))
    twin.load_state_dict(plain.state_dict())
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["0"], init_lora_weights="pissa")
    theirs = get_peft_model(twin, config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    train(theirs, [p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "unet", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = read_adapter(tmp_path / "unet", {"unet.0": (36, 24)})[0].modules["unet.0"]
    fresh = create_adapter({"unet": plain}, "*", "pissa", 4, float(alpha))
    with attach({"unet": plain}, fresh, trainable=True) as attachment:
        train(plain, attachment.parameters())
        ours = attachment.adapter().settled().modules["unet.0"]
    assert (ours.rank, ours.scale) == (converted.rank, converted.scale) == (8, alpha / 4)
    weight = plain[0].weight.detach()
    expected = converted.delta_weight(weight)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(ours.delta_weight(weight), expected, rtol=0, atol=1e-5)


def predict(pipeline):
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = pipeline.text_encoder(torch.tensor([[52, 3, 1, 53]])).last_hidden_state
        return pipeline.unet(noisy, torch.tensor([500]), states).sample


def dora_for(pipeline):
    return moved(DictTree({"unet": pipeline.unet}, "sd"), LayerSettings("dora", 2))


def ours_on(adapter):
    pipeline = make_pipeline()
    with attach({"unet": pipeline.unet}, adapter):
        return predict(pipeline)


def test_diffusers_computes_what_we_do_from_our_diffusers_file_of_dora(tmp_path):
    adapter = dora_for(make_pipeline())
    write_adapter(tmp_path, adapter, format="diffusers")
    pipeline = make_pipeline()
    plain = predict(pipeline)
    pipeline.load_lora_weights(tmp_path)
    expected = ours_on(adapter)
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(predict(pipeline), expected, rtol=1e-4, atol=1e-4)


def test_diffusers_drops_the_magnitude_of_kohyas_dora(tmp_path):
    modules = dora_for(make_pipeline()).modules
    alike = {name: kinds["dora"].from_factors(delta.factors(), 2.0) for name, delta in modules.items()}
    adapter = Adapter(alike, "sd")  # with one alpha, since diffusers misreads several
    write_adapter(tmp_path / "a.safetensors", adapter, format="kohya")
    pipeline = make_pipeline()
    pipeline.load_lora_weights(tmp_path / "a.safetensors")
    theirs = predict(pipeline)
    assert not any("magnitude" in name for name, _ in pipeline.unet.named_parameters()), "diffusers reads it now"
    assert not torch.allclose(theirs, ours_on(adapter), atol=1e-2)
    assert read_adapter(tmp_path / "a.safetensors")[0] == adapter


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_diffusers_raises_on_kohyas_loha_and_lokr_which_is_why_its_format_refuses_them(kind, tmp_path):
    adapter = moved(DictTree({"unet": make_unet()}, "sd"), LayerSettings(kind, 1))
    write_adapter(tmp_path / "a.safetensors", adapter, format="kohya")
    with pytest.raises(ValueError, match="renamed"):
        make_pipeline().load_lora_weights(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="because diffusers would not load it"):
        write_adapter(tmp_path, adapter, format="diffusers")


def test_kohyas_merge_overlooks_a_tucker_core_and_ours_does_not():
    """`merge_lora.py` of sd-scripts (February 2026) convolves `up` with `down`, whatever lies between."""
    layer = nn.Conv2d(4, 6, 1)
    theirs = LoConModule("x", nn.Conv2d(4, 6, 3), 1.0, 2, 2.0, use_tucker=True)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    tensors = {f"unet.layer.{key}": v.detach() for key, v in theirs.state_dict().items() if not key.endswith("scalar")}
    down, up = tensors["unet.layer.lora_down.weight"], tensors["unet.layer.lora_up.weight"]
    overlooked = nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    assert overlooked.shape == layer.weight.shape, "and so the kernel is lost as well"
    delta = codecs["loraline"].decode(tensors, {}).modules["unet.layer"]
    weight = torch.zeros(6, 4, 3, 3)
    torch.testing.assert_close(
        delta.delta_weight(weight), theirs.get_diff_weight(1.0)[0].detach(), rtol=1e-4, atol=1e-5
    )
