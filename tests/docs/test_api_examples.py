"""Executes the Python code of the README and of the packages' docstrings as it is, with a pipeline of diffusers."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

import lora_engine as le
import registry
from lora_engine.adapters import DictTree
from tests.support.untrained import UnetShape

README = Path(__file__).resolve().parents[2] / "README.md"
# SDXL's widths and names with one layer: an adapter for its attention fits both.
SHORT = UnetShape(
    {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640),
        "layers_per_block": 1,
        "attention_head_dim": (5, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
    },
    (2, 3),
    (8, 8),
)
ATTENTION = r"re:unet\.down_blocks\.1\.attentions\.0\..*\.attn1\.(to_[qkv]|to_out\.0)"


class TwoSteps(StableDiffusionXLPipeline):
    """The pipeline with fewer steps."""

    def __call__(self, prompt: str) -> Any:
        return super().__call__(prompt, num_inference_steps=2)


@pytest.fixture(scope="module")
def pipe() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = SHORT.pipeline(16)
    pipeline = TwoSteps(**parts.components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def names(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Returns what the code takes as given: a pipeline, a prompt, adapters, and a file in the working folder."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(2):
        adapter = le.create_adapter(DictTree({"unet": pipe.unet}, "sdxl"), ATTENTION, rank=8)
        modules = {
            name: delta.with_factors({k: torch.randn(f.shape, generator=generator) for k, f in delta.factors().items()})
            for name, delta in adapter.modules.items()
        }
        made.append(le.LoadedAdapter(le.Adapter(modules, "sdxl", None), le.Card(title="zorb")))
    made[0].save("zorb.safetensors")
    return {"pipe": pipe, "prompt": "a zorb", "a": made[0], "b": made[1]}


def code_of(package: Any) -> str:
    """Returns the indented code of a package's docstring."""
    lines = re.findall(r"^(?:    .*)?\n", str(inspect.cleandoc(package.__doc__)), re.MULTILINE)
    return textwrap.dedent("".join(lines))


def pixels(image: Any) -> bytes:
    return bytes(image.tobytes())


def test_the_code_of_the_readme_runs(names: dict[str, Any]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(code, names)
    assert repr(names["adapter"]) == "<Adapter sdxl lora r=8, 4 modules>"
    assert names["version"].ref == "zorb@1"
    assert names["image"].size == (16, 16)


def test_the_code_of_the_engine_runs(names: dict[str, Any]) -> None:
    exec(code_of(le), names)
    assert le.inspect("zorb-kohya.safetensors")["format"] == "kohya"
    torch.manual_seed(0)
    before = names["pipe"]("a zorb").images[0]
    with names["adapter"].attached(names["pipe"].unet, scale=0.8):
        torch.manual_seed(0)
        assert pixels(names["pipe"]("a zorb").images[0]) != pixels(before)
    assert names["merged"].adapter.modules.keys() == names["a"].adapter.modules.keys()
    assert names["merged"].card.title == "0.7 zorb + 0.3 zorb"


def test_the_code_of_the_registry_runs_where_the_policy_allows_it(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with registry.Registry.open(".loraline"):
        pass
    with pytest.raises(registry.Refused, match="evaluat"):
        exec(code_of(registry), names)
    Path(".loraline/policy.yaml").write_text("aliases: {production: {needs_evaluation: false, needs_gate: false}}\n")
    exec(code_of(registry), names)
    assert names["version"].ref == "zorb@1"
    assert capsys.readouterr().out.startswith("flowchart LR\n")
