"""Finds the input channels that models have in common: inpainting models read a mask and a masked image, too.

The latents are the first channels in every such model, and as many as the model's output has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Size, Tensor

_Shapes = Mapping[str, tuple[int, ...]]
# The weight that reads the latents, and the one whose rows are their channels: canonical names, and names of original
# files, with those of their running averages.
_LATENTS = {
    "unet.conv_in.weight": "unet.conv_out.weight",
    "transformer.x_embedder.weight": "transformer.proj_out.weight",
    "model.diffusion_model.input_blocks.0.0.weight": "model.diffusion_model.out.2.weight",
    "model_ema.diffusion_modelinput_blocks00weight": "model_ema.diffusion_modelout2weight",
    "model.diffusion_model.img_in.weight": "model.diffusion_model.final_layer.linear.weight",
}


def common_channels(models: Sequence[_Shapes]) -> dict[str, int]:
    """Returns the tensors whose shapes differ only in the number of input channels, with the number in common.

    Args:
        models: Tensor name to shape, for each model.
    """
    common = {}
    for name, output in _LATENTS.items():
        if not all(name in shapes and output in shapes for shapes in models):
            continue
        inputs = [shapes[name] for shapes in models]
        others = {(shape[:1], shape[2:]) for shape in inputs}
        if len(set(inputs)) > 1 and len(others) == 1 and all(len(shape) > 1 for shape in inputs):
            common[name] = min(*(shape[1] for shape in inputs), *(shapes[output][0] for shapes in models))
    return common


def pad_channels(tensor: Tensor, shape: Size) -> Tensor:
    """Returns a tensor in the shape of a weight, with zeros in the input channels that it lacks."""
    if tensor.shape == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[:, : tensor.shape[1]] = tensor
    return padded
