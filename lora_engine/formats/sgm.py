"""SDXL's two names for one U-Net module: diffusers' and the original (SGM) ones that kohya's files use.

Only from diffusers' to the original; the way back goes through a table of the base's own modules.
"""

from __future__ import annotations

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCKS = {
    **{f"down_blocks.{i}.resnets.{j}": f"input_blocks.{3 * i + j + 1}.0" for i in range(3) for j in range(2)},
    **{f"down_blocks.{i}.attentions.{j}": f"input_blocks.{3 * i + j + 1}.1" for i in range(3) for j in range(2)},
    **{f"down_blocks.{i}.downsamplers.0.conv": f"input_blocks.{3 * (i + 1)}.0.op" for i in range(3)},
    **{f"up_blocks.{i}.resnets.{j}": f"output_blocks.{3 * i + j}.0" for i in range(3) for j in range(3)},
    **{f"up_blocks.{i}.attentions.{j}": f"output_blocks.{3 * i + j}.1" for i in range(3) for j in range(3)},
    **{f"up_blocks.{i}.upsamplers.0": f"output_blocks.{3 * i + 2}.2" for i in range(3)},
    **{f"mid_block.resnets.{j}": f"middle_block.{2 * j}" for j in range(2)},
    "mid_block.attentions.0": "middle_block.1",
}


def sgm_path(path: str) -> str | None:
    """The original path of a module of SDXL's U-Net, or None for one that SDXL has not."""
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    parts = path.split(".")
    for length in (5, 4, 3):
        block = _BLOCKS.get(".".join(parts[:length]))
        if block is None:
            continue
        rest = parts[length:]
        if rest and ".resnets." in path:
            rest = [_RESNET.get(rest[0], rest[0]), *rest[1:]]
        return ".".join([block, *rest])
    return None
