"""Lists the layers of diffusers' U-Net and transformers' CLIP: names and weight shapes by the settings. Torch-free.

The order is that of the modules in these classes. A test compares both with the networks themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lora_engine.families.family import ComponentConfig

Layers = Iterator[tuple[str, tuple[int, ...]]]
"""Path in the network, and shape of the weight."""


def unet_layers(config: Mapping[str, Any]) -> Layers:
    """Yields the layers of a `UNet2DConditionModel`, for the types of blocks of Stable Diffusion 1, 2 and SDXL."""
    widths: list[int] = config["block_out_channels"]
    depths = config.get("transformer_layers_per_block", [1] * len(widths))
    first, last, time = widths[0], widths[-1], 4 * widths[0]
    yield "conv_in", (first, config["in_channels"], 3, 3)
    yield from _pair("time_embedding", first, time)
    if config.get("addition_embed_type") == "text_time":
        yield from _pair("add_embedding", config["projection_class_embeddings_input_dim"], time)
    inner = [first]  # channels of the outputs that the up blocks read, the last one first
    before = first
    for number, (kind, width) in enumerate(zip(config["down_block_types"], widths, strict=True)):
        inputs = [before] + [width] * (config["layers_per_block"] - 1)
        path = f"down_blocks.{number}"
        yield from _block(path, config, inputs, width, depths[number] if "CrossAttn" in kind else 0)
        inner += [width] * len(inputs)
        if number < len(widths) - 1:
            yield f"{path}.downsamplers.0.conv", (width, width, 3, 3)
            inner.append(width)
        before = width
    for number, kind in enumerate(config["up_block_types"]):
        width, path = widths[-1 - number], f"up_blocks.{number}"
        inputs = [(width if layer else before) + inner.pop() for layer in range(config["layers_per_block"] + 1)]
        yield from _block(path, config, inputs, width, depths[-1 - number] if "CrossAttn" in kind else 0)
        if number < len(widths) - 1:
            yield f"{path}.upsamplers.0.conv", (width, width, 3, 3)
        before = width
    yield from _attention("mid_block.attentions.0", config, last, depths[-1])
    for number in range(2):
        yield from _resnet(f"mid_block.resnets.{number}", last, last, time)
    yield "conv_norm_out", (first,)
    yield "conv_out", (config["out_channels"], first, 3, 3)


def clip_layers(config: Mapping[str, Any]) -> Layers:
    """Yields the layers of a `CLIPTextModel`."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    yield "text_model.embeddings.token_embedding", (config["vocab_size"], width)
    yield "text_model.embeddings.position_embedding", (config["max_position_embeddings"], width)
    for number in range(config["num_hidden_layers"]):
        path = f"text_model.encoder.layers.{number}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield f"{path}.self_attn.{part}", (width, width)
        yield f"{path}.layer_norm1", (width,)
        yield f"{path}.mlp.fc1", (inner, width)
        yield f"{path}.mlp.fc2", (width, inner)
        yield f"{path}.layer_norm2", (width,)
    yield "text_model.final_layer_norm", (width,)


def clip_with_projection_layers(config: Mapping[str, Any]) -> Layers:
    """Yields the layers of a `CLIPTextModelWithProjection`."""
    yield from clip_layers(config)
    yield "text_projection", (config["projection_dim"], config["hidden_size"])


_CLASSES = {
    "UNet2DConditionModel": unet_layers,
    "CLIPTextModel": clip_layers,
    "CLIPTextModelWithProjection": clip_with_projection_layers,
}
_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
# Settings that `unet_layers` reads, and settings that change no layer. Any other setting may.
_UNET_SETTINGS = {
    *("in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types", "layers_per_block"),
    *("transformer_layers_per_block", "cross_attention_dim", "use_linear_projection", "addition_embed_type"),
    *("projection_class_embeddings_input_dim", "addition_time_embed_dim", "attention_head_dim", "sample_size"),
    *("center_input_sample", "flip_sin_to_cos", "freq_shift", "act_fn", "norm_num_groups", "norm_eps"),
    "upcast_attention",
}


def layers_of(component: ComponentConfig) -> Mapping[str, tuple[int, ...]] | None:
    """Returns the weight shape by path of every layer; None for another class, or a setting that is not known here."""
    config = component.config
    if component.class_name not in _CLASSES:
        return None
    blocks = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    if component.class_name == "UNet2DConditionModel" and not (blocks <= _BLOCKS and config.keys() <= _UNET_SETTINGS):
        return None
    return dict(_CLASSES[component.class_name](config))


def _pair(path: str, inputs: int, outputs: int) -> Layers:
    yield f"{path}.linear_1", (outputs, inputs)
    yield f"{path}.linear_2", (outputs, outputs)


def _block(path: str, config: Mapping[str, Any], inputs: list[int], width: int, depth: int) -> Layers:
    """Yields the layers of a block; `inputs` are the channels that each ResNet reads, `depth` 0 has no attention."""
    for number in range(len(inputs) if depth else 0):
        yield from _attention(f"{path}.attentions.{number}", config, width, depth)
    for number, channels in enumerate(inputs):
        yield from _resnet(f"{path}.resnets.{number}", channels, width, 4 * config["block_out_channels"][0])


def _attention(path: str, config: Mapping[str, Any], width: int, depth: int) -> Layers:
    context, kernel = config["cross_attention_dim"], () if config.get("use_linear_projection") else (1, 1)
    yield f"{path}.norm", (width,)
    yield f"{path}.proj_in", (width, width, *kernel)
    for number in range(depth):
        inner = f"{path}.transformer_blocks.{number}"
        for attention, norm, read in (("attn1", "norm1", width), ("attn2", "norm2", context)):
            yield f"{inner}.{norm}", (width,)
            yield f"{inner}.{attention}.to_q", (width, width)
            yield f"{inner}.{attention}.to_k", (width, read)
            yield f"{inner}.{attention}.to_v", (width, read)
            yield f"{inner}.{attention}.to_out.0", (width, width)
        yield f"{inner}.norm3", (width,)
        yield f"{inner}.ff.net.0.proj", (8 * width, width)
        yield f"{inner}.ff.net.2", (width, 4 * width)
    yield f"{path}.proj_out", (width, width, *kernel)


def _resnet(path: str, inputs: int, width: int, time: int) -> Layers:
    yield f"{path}.norm1", (inputs,)
    yield f"{path}.conv1", (width, inputs, 3, 3)
    yield f"{path}.time_emb_proj", (width, time)
    yield f"{path}.norm2", (width,)
    yield f"{path}.conv2", (width, width, 3, 3)
    if inputs != width:
        yield f"{path}.conv_shortcut", (width, inputs, 1, 1)
