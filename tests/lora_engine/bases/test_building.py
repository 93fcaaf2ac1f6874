from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lora_engine.adapters import module_shapes
from lora_engine.bases.base import load_base
from lora_engine.bases.structure import base_module_shapes


def test_concurrent_loads_return_complete_bases(untrained: dict[str, Path]) -> None:
    name = str(untrained["small-sd"])
    alone = load_base(name, device="cpu")
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load_base, name, device="cpu") for _ in range(4)]
        names = [pool.submit(base_module_shapes, name) for _ in range(4)]
        loaded = [load.result() for load in loads]
        shapes = [future.result() for future in names]
    assert all(names_and_shapes == module_shapes(alone) for names_and_shapes in shapes)
    for base in loaded:
        for part, module in base.modules.items():
            expected = dict(alone.modules[part].named_parameters())
            assert all(torch.equal(value, expected[key]) for key, value in module.named_parameters())
