"""PEFT and ours agree: outputs, weights after merging, gradients, and the folder that PEFT loads."""

import pytest
import torch
from law_adapters import random_delta
from parity_models import make_pipeline, make_unet
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lora_engine.adapters import Adapter, DictTree, LoraDelta, attach, collapse, module_shapes, select_modules
from lora_engine.formats import read_adapter, write_adapter

LAYERS = {
    "linear": (lambda: nn.Linear(12, 9), (5, 12)),
    "conv 3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8)),
    "conv strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "conv 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 8, 8)),
}


def two_of(name):
    """The same model twice: under PEFT, and plain with our adapter of the same factors."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    plain = nn.Sequential(make())
    twin = nn.Sequential(make())
    twin.load_state_dict(plain.state_dict())
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
    theirs = get_peft_model(twin, config)
    lora = theirs.base_model.model[0]
    down, up = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    adapter = Adapter({"unet.0": LoraDelta(down.detach().clone(), up.detach().clone(), 5.0)})
    return theirs, lora, plain, adapter, torch.randn(shape)


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_gradients_agree_with_peft(name):
    theirs, lora, plain, adapter, x = two_of(name)
    expected = theirs(x)
    with attach({"unet": plain}, adapter, trainable=True) as attachment:
        found = plain(x)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        probe = torch.randn(expected.shape)
        (expected * probe).sum().backward()
        (found * probe).sum().backward()
        gradients = {key.split(".")[-1]: value.grad for key, value in attachment.named_parameters()}
    torch.testing.assert_close(gradients["down"], lora.lora_A["default"].weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients["up"], lora.lora_B["default"].weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_collapsed_weights_agree_with_peft(name):
    theirs, _, plain, adapter, _ = two_of(name)
    collapse({"unet": plain}, adapter)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(plain[0].weight, merged[0].weight, rtol=1e-6, atol=1e-6)


def mixed_adapter(tree, targets):
    shapes = module_shapes(tree)
    modules = {
        name: random_delta("lora", shapes[name], 1 + place % 3, [1.0, 2.0, 3.3][place % 3], place)
        for place, name in enumerate(select_modules(shapes, targets))
    }
    return Adapter(modules, "sd")


def test_peft_loads_our_folder_and_computes_the_same(tmp_path):
    torch.manual_seed(0)
    unet = make_unet().eval()
    tree = DictTree({"unet": unet}, "sd")
    adapter = mixed_adapter(tree, "all")
    write_adapter(tmp_path, adapter, format="peft")
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 16))
    with torch.no_grad():
        plain = unet(*inputs).sample
        with attach(tree, adapter):
            expected = unet(*inputs).sample
        theirs = PeftModel.from_pretrained(unet, tmp_path).eval()(*inputs).sample
    assert (plain - expected).abs().max() > 0.05
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
    assert read_adapter(tmp_path)[0] == adapter


# PEFT 0.21 asks transformers 5 in an old way.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_each_component_of_our_folder(tmp_path):
    pipeline = make_pipeline()
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    adapter = mixed_adapter(DictTree(parts, "sd"), ["attention", "text"])
    write_adapter(tmp_path, adapter, format="peft")
    ids = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        plain = pipeline.text_encoder(ids).last_hidden_state
        with attach(DictTree(parts), adapter):
            expected = pipeline.text_encoder(ids).last_hidden_state
        theirs = PeftModel.from_pretrained(pipeline.text_encoder, tmp_path / "text_encoder").eval()(ids)
    assert (plain - expected).abs().max() > 0.05
    torch.testing.assert_close(theirs.last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    assert read_adapter(tmp_path)[0] == adapter
    one, _ = read_adapter(tmp_path / "text_encoder")
    assert set(one.modules) == {name for name in adapter.modules if name.startswith("text_encoder.")}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_read_what_peft_writes(use_rslora, tmp_path):
    torch.manual_seed(0)
    unet, twin = make_unet().eval(), make_unet().eval()
    twin.load_state_dict(unet.state_dict())
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["to_q", "conv1"],
        rank_pattern={"to_q": 3},
        alpha_pattern={"conv1": 7},
        use_rslora=use_rslora,
        init_lora_weights=False,
    )
    theirs = get_peft_model(twin, config).eval()
    theirs.save_pretrained(tmp_path)
    adapter, _ = read_adapter(tmp_path, module_shapes({"unet": unet}))
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, 16))
    with torch.no_grad(), attach({"unet": unet}, adapter):
        torch.testing.assert_close(unet(*inputs).sample, theirs(*inputs).sample, rtol=1e-5, atol=1e-5)
