"""Tests cloneofsimo's format: numbers instead of names, in the order of the class tree of 2023."""

import json

import pytest
import torch
from law_adapters import random_delta
from safetensors.torch import save_file
from torch import nn

from lora_engine.adapters import Adapter
from lora_engine.errors import AdapterError
from lora_engine.formats import codecs, inspect, read_adapter, read_bundle, write_adapter
from lora_engine.formats.safetensors_io import read_safetensors


class CrossAttention(nn.Module):
    def __init__(self, width, context):
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])


class GEGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.proj = nn.Linear(width, 2 * width)


class FeedForward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width), nn.Dropout(0.0), nn.Linear(width, width)])


class BasicTransformerBlock(nn.Module):
    """As diffusers 0.10 builds it: the feed-forward net before the second attention."""

    def __init__(self, width):
        super().__init__()
        self.attn1 = CrossAttention(width, width)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, 3)
        self.norm1 = nn.LayerNorm(width)


class Transformer2DModel(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(width)])
        self.proj_out = nn.Conv2d(width, width, 1)


class ResnetBlock2D(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.norm1 = nn.GroupNorm(1, before)
        self.conv1 = nn.Conv2d(before, after, 3)
        self.time_emb_proj = nn.Linear(7, after)
        self.norm2 = nn.GroupNorm(1, after)
        self.conv2 = nn.Conv2d(after, after, 3)
        self.conv_shortcut = nn.Conv2d(before, after, 1)


class Block(nn.Module):
    def __init__(self, before, after, count):
        super().__init__()
        self.attentions = nn.ModuleList([Transformer2DModel(after) for _ in range(count)])
        self.resnets = nn.ModuleList([ResnetBlock2D(before, after) for _ in range(count)])


class UNet2DConditionModel(nn.Module):
    """As diffusers 0.10 builds it: the middle block is registered last."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3)
        self.down_blocks = nn.ModuleList([Block(8, 8, 2), Block(8, 10, 1)])
        self.up_blocks = nn.ModuleList([Block(10, 8, 2), Block(8, 6, 1)])
        self.mid_block = Block(10, 10, 1)


class CLIPAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(5, 5) for _ in range(4))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = CLIPAttention()


def text_encoder():
    root = nn.Module()
    root.text_model = nn.Module()
    root.text_model.encoder = nn.Module()
    root.text_model.encoder.layers = nn.ModuleList([Layer() for _ in range(11)])
    return root


def walk(model, targets, classes=(nn.Linear,)):
    """Returns names in the order in which the format's own code visits layers below modules of the classes."""
    for above, ancestor in model.named_modules():
        if type(ancestor).__name__ in targets:
            for path, layer in ancestor.named_modules():
                if isinstance(layer, classes):
                    yield f"{above}.{path}" if above else path


MODELS = {"unet": UNet2DConditionModel(), "text_encoder": text_encoder()}
NAMES = {
    f"{part}.{path}": tuple(layer.weight.shape)
    for part, model in MODELS.items()
    for path, layer in model.named_modules()
    if getattr(layer, "weight", None) is not None
}
TARGETS = {
    "default": ({"unet": ["CrossAttention", "Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]}, (nn.Linear,)),
    "extended": (
        {"unet": ["ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]},
        (nn.Linear, nn.Conv2d),
    ),
    "nested": ({"unet": ["BasicTransformerBlock", "CrossAttention"]}, (nn.Linear,)),
    "whole": ({"unet": ["UNet2DConditionModel"]}, (nn.Linear, nn.Conv2d)),
}


def delta_of(name, rank=2):
    return random_delta("lora", NAMES[name], rank, float(rank), seed=sum(map(ord, name)))


def file_of(targets, classes):
    """Returns the file that the format's own code would save, and its deltas."""
    tensors, metadata, deltas = {}, {}, {}
    for part, classes_of_part in targets.items():
        metadata[part] = json.dumps(classes_of_part)
        for number, path in enumerate(walk(MODELS[part], classes_of_part, classes)):
            delta = deltas[f"{part}.{path}"] = delta_of(f"{part}.{path}")
            tensors |= {f"{part}:{number}:up": delta.up, f"{part}:{number}:down": delta.down}
            metadata[f"{part}:{number}:rank"] = "2"
    return tensors, metadata, deltas


@pytest.mark.parametrize("case", TARGETS)
def test_modules_are_numbered_as_in_the_format(case, tmp_path):
    tensors, metadata, deltas = file_of(*TARGETS[case])
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(copies, tmp_path / "a.safetensors", metadata=metadata | {"<s1>": "<embed>"})
    adapter, card = read_adapter(tmp_path / "a.safetensors", NAMES)
    assert adapter == Adapter(deltas, adapter.base)
    assert card.extra == {}, "numbers and classes belong to the file"
    assert inspect(tmp_path / "a.safetensors")["format"] == "cloneofsimo"


@pytest.mark.parametrize("case", ["default", "extended"])
def test_a_whole_adapter_is_written_as_the_format_writes_it(case, tmp_path):
    tensors, metadata, deltas = file_of(*TARGETS[case])
    file = write_adapter(tmp_path, Adapter(deltas, "sd"), format="cloneofsimo", module_names=NAMES)[0]
    written, header = read_safetensors(file)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    for key, text in metadata.items():
        assert header[key] == text or sorted(json.loads(header[key])) == sorted(json.loads(text))


def test_missing_modules_are_padded_with_zeros_and_ignored_when_read(tmp_path):
    chosen = [
        "unet.up_blocks.0.resnets.1.conv2",
        "unet.mid_block.attentions.0.proj_in",
        "text_encoder.text_model.encoder.layers.10.self_attn.q_proj",
    ]
    adapter = Adapter({name: delta_of(name) for name in chosen}, "sd")
    write_adapter(tmp_path, adapter, format="cloneofsimo", module_names=NAMES)
    header = read_safetensors(tmp_path / "lora.safetensors")[1]
    assert json.loads(header["unet"]) == ["Transformer2DModel", "ResnetBlock2D"]
    assert read_adapter(tmp_path, NAMES)[0] == adapter == read_adapter(tmp_path)[0]
    assert len(inspect(tmp_path)["modules"]) == 3


def test_the_scale_goes_into_the_factor():
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    delta = random_delta("lora", NAMES[name], 2, 6.0)
    codec = codecs["cloneofsimo"]
    back = codec.decode(*codec.encode(Adapter({name: delta}, "sd"), names=NAMES), NAMES).modules[name]
    assert back.scale == 1.0
    weight = torch.zeros(NAMES[name])
    torch.testing.assert_close(back.delta_weight(weight), delta.delta_weight(weight))


@pytest.mark.usefixtures("forked_readers")
def test_pickled_lists_are_read_with_their_companions(tmp_path):
    tensors, _, deltas = file_of(*TARGETS["default"])
    for part, middle in (("unet", ""), ("text_encoder", ".text_encoder")):
        count = sum(key.startswith(f"{part}:") for key in tensors) // 2
        weights = [tensors[f"{part}:{number}:{side}"] for number in range(count) for side in ("up", "down")]
        torch.save(weights, tmp_path / f"zorb{middle}.pt")
    torch.save({"<s1>": torch.ones(5)}, tmp_path / "zorb.ti.pt")
    bundle = read_bundle(tmp_path / "zorb.pt", NAMES)
    assert bundle.adapter == Adapter(deltas, bundle.adapter.base)
    assert [embedding.token for embedding in bundle.embeddings] == ["<s1>"]
    alone = read_adapter(tmp_path / "zorb.text_encoder.pt", NAMES)[0]
    assert alone.modules.keys() == {name for name in deltas if name.startswith("text_encoder.")}


def test_an_adapter_that_cannot_be_numbered_is_refused():
    codec = codecs["cloneofsimo"]
    tensors, metadata, _ = file_of(*TARGETS["default"])
    with pytest.raises(AdapterError, match="a base is needed"):
        codec.decode(tensors, metadata)
    with pytest.raises(AdapterError, match="match a module of the base"):
        codec.decode(tensors, metadata, {name: shape for name, shape in NAMES.items() if "mid_block" not in name})
    with pytest.raises(AdapterError, match="number 3 is missing"):
        codec.decode({key: value for key, value in tensors.items() if ":3:" not in key}, metadata, NAMES)
    with pytest.raises(AdapterError, match=r'unknown classes .*"Strange"'):
        codec.decode(tensors, metadata | {"unet": '["Strange"]'}, NAMES)
    with pytest.raises(AdapterError, match="'unet':1:2: not JSON"):
        codec.decode(tensors, metadata | {"unet": "{"}, NAMES)
    with pytest.raises(AdapterError, match="'text_encoder_2'"):
        codec.encode(Adapter({"text_encoder_2.a": random_delta("lora", (4, 4))}, "sdxl"), names={})
    with pytest.raises(AdapterError, match="not in the base"):
        codec.encode(Adapter({"unet.x.attn1.to_q": random_delta("lora", (4, 4))}, "sd"), names=NAMES)
