"""Layers of every type, deltas of every kind and random adapters for the law tests."""

import math

import torch
from diffusers.models.normalization import RMSNorm
from hypothesis import strategies as st
from torch import nn

from lora_engine.adapters import Adapter, DictTree, LayerOp, LoraDelta, create_adapter, kinds
from lora_engine.adapters.layer import bias_of
from lora_engine.errors import SettingsError

# Sizes that suit butterflies (outputs), PEFT's blocks (inputs) and LoKr's factors.
LAYERS = {
    "linear": lambda: nn.Linear(20, 8),
    "linear without bias": lambda: nn.Linear(12, 16, bias=False),
    "conv 3x3": lambda: nn.Conv2d(12, 16, 3, padding=1),
    "conv 1x1": lambda: nn.Conv2d(12, 16, 1),
    "conv strided": lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1),
    "conv dilated": lambda: nn.Conv2d(4, 8, 3, padding="same", dilation=2, bias=False),
    "conv circular": lambda: nn.Conv2d(12, 16, 3, stride=2, padding=1, padding_mode="circular"),
    "conv oblong": lambda: nn.Conv2d(4, 8, (1, 3), padding=(0, 1)),
    "conv grouped": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=2),
    "embedding": lambda: nn.Embedding(16, 12),
    "layer norm": lambda: nn.LayerNorm(8),
    "group norm": lambda: nn.GroupNorm(2, 8),
    "rms norm": lambda: nn.RMSNorm(8),
    "rms norm of diffusers": lambda: RMSNorm(8, eps=1e-6),
}
"""One small layer of every type that can carry an adapter, for the law, kind and parity tests."""
MATRICES = [name for name in LAYERS if "norm" not in name]
"""The layers whose weight has a rank."""


def layer_of(name, seed=0):
    """Returns a layer of the table; its weights follow from the seed."""
    torch.manual_seed(seed)
    return LAYERS[name]()


def tree_of(layer):
    """Returns a tree with the layer as its only module, `unet.0`."""
    return DictTree({"unet": nn.Sequential(layer)})


def fresh_delta(layer, kind, rank=2, alpha=None, seed=0, **options):
    """Returns the delta that `create_adapter` creates for a layer."""
    generator = torch.Generator().manual_seed(seed)
    adapter = create_adapter(tree_of(layer), "*", kind, rank, alpha, options=options, generator=generator)
    return adapter.modules["unet.0"]


def moved_delta(layer, kind, rank=2, alpha=None, seed=0, spread=0.3, **options):
    """Returns a delta as after training: a new one with every factor changed."""
    fresh, generator = fresh_delta(layer, kind, rank, alpha, seed, **options), torch.Generator().manual_seed(seed + 1)
    factors = fresh.factors().items()
    moved = {key: value + spread * torch.randn(value.shape, generator=generator) for key, value in factors}
    return fresh.with_factors(moved)


def input_of(layer, seed=0):
    """Returns a random input that the layer takes."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Embedding):
        return torch.randint(layer.num_embeddings, (3, 7), generator=generator)
    if isinstance(layer, nn.Conv2d):
        return torch.randn(2, layer.in_channels, 8, 8, generator=generator)
    if isinstance(layer, nn.GroupNorm):
        return torch.randn(3, layer.num_channels, 5, generator=generator)
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]
    return torch.randn(3, 7, width, generator=generator)


def forward_of(delta, layer, x, multiplier=1.0):
    """Returns the adapted output of the layer."""
    return delta.forward(x, layer(x), layer.weight, bias_of(layer), op_of(layer), multiplier)


def dense_output(delta, layer, x, multiplier=1.0):
    """Returns the layer's output with the changed weight and bias, which `forward` must equal."""
    bias, change = bias_of(layer), delta.delta_bias(bias_of(layer))
    if change is not None:
        bias = multiplier * change + (0 if bias is None else bias)
    return op_of(layer)(x, layer.weight + multiplier * delta.delta_weight(layer.weight), bias)


def gradients_of(delta, output):
    """Returns the output of a delta with copies of the factors, and each factor's gradient under a fixed probe."""
    factors = {key: factor.detach().clone().requires_grad_() for key, factor in delta.factors().items()}
    out = output(delta.with_factors(factors))
    (out * probe_for(out)).sum().backward()
    return out.detach(), {key: factor.grad for key, factor in factors.items()}


def probe_for(out):
    """Returns a fixed random direction in which an output is differentiated."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)


def applies_to(kind, layer):
    """Returns True if a kind supports a layer: a kind with a rank does not support norms."""
    return suits_shape(kind, layer.weight.shape)


def suits_shape(kind, shape):
    """Returns True if a kind supports a weight shape: not every number of channels splits into blocks."""
    try:
        random_delta(kind, shape)
    except SettingsError:
        return False
    return True


def random_delta(kind, shape, rank=2, alpha=3.0, seed=0, dtype=torch.float32, **options):
    """Returns a delta of the kind without zero factors."""
    generator = torch.Generator().manual_seed(seed)
    fresh = kinds[kind].create(torch.randn(shape, generator=generator), None, rank, alpha, generator, **options)
    factors = {key: torch.randn(value.shape, generator=generator) for key, value in fresh.factors().items()}
    return fresh.with_factors({key: (value * 0.5).to(dtype) for key, value in factors.items()})


def tucker_delta(shape, rank=2, alpha=3.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    out, inner, *kernel = shape
    down, up = torch.randn(rank, inner, 1, 1, generator=generator), torch.randn(out, rank, 1, 1, generator=generator)
    mid = torch.randn(rank, rank, *kernel, generator=generator)
    return LoraDelta(down.to(dtype), up.to(dtype), alpha, mid.to(dtype))


def op_of(layer):
    return LayerOp.of(layer)


NAMES = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (6, 5),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (5, 6),
    "unet.down_blocks.0.attentions.0.proj_in": (6, 6, 1, 1),
    "unet.down_blocks.0.resnets.0.conv1": (7, 5, 3, 3),
    "unet.time_embedding.linear_1": (8, 5),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (5, 5),
    "text_encoder.text_model.encoder.layers.1.mlp.fc1": (9, 5),
}
SDXL_NAMES = {
    **NAMES,
    "unet.add_embedding.linear_1": (8, 5),
    "unet.up_blocks.1.attentions.2.transformer_blocks.0.ff.net.0.proj": (8, 5),
    "unet.up_blocks.1.upsamplers.0.conv": (5, 5, 3, 3),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc2": (5, 7),
}
ALPHAS = st.one_of(
    st.integers(1, 512).map(float),
    st.floats(1e-3, 1e4, allow_nan=False),
    st.sampled_from([257.0, 0.1, 1 / 3]),
)


ONE_BLOCK_SIZE = {"peft-oft": 5, "peft-boft": 5}
"""Kinds with one block size for all modules in PEFT's format, and a size that divides many inputs."""


def names_for(kind, names):
    """Returns the modules that the kind supports."""
    size = ONE_BLOCK_SIZE.get(kind, 1)
    return sorted(
        name for name, shape in names.items() if suits_shape(kind, shape) and math.prod(shape[1:]) % size == 0
    )


@st.composite
def adapters(draw, kind, *, uniform=False, families=("sd", "sdxl"), options=None):
    """Draws an adapter of one kind over random modules; `uniform` uses one rank and alpha for all."""
    family = draw(st.sampled_from(families))
    names = NAMES if family == "sd" else SDXL_NAMES
    chosen = draw(st.lists(st.sampled_from(names_for(kind, names)), min_size=1, max_size=5, unique=True))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    rank, alpha, seed = draw(st.integers(1, 5)), draw(ALPHAS), draw(st.integers(0, 2**31))
    modules = {}
    for index, name in enumerate(chosen):
        module_rank, module_alpha = (rank, alpha) if uniform else (draw(st.integers(1, 5)), draw(ALPHAS))
        module_rank = ONE_BLOCK_SIZE.get(kind, module_rank)
        modules[name] = random_delta(
            kind, names[name], module_rank, module_alpha, seed + index, dtype, **(options or {})
        )
    return Adapter(modules, family, draw(st.sampled_from([None, "0" * 64])))
