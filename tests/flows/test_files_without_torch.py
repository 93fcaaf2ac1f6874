"""`inspect` and `validate` answer without torch, whose import takes two seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flows.cli.output import print_json
from lora_engine.adapters import Adapter, DoraDelta, LokrDelta, LoraDelta
from lora_engine.adapters.published import published_module_shapes
from lora_engine.formats import Card, Embedding, inspect, write_adapter, write_embeddings
from lora_engine.formats.safetensors_io import read_safetensors
from tests.flows.commands import PLAIN, loraline_process

ROOT = Path(__file__).parents[2]
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
RUN = """
import json, os, sys
from tests.flows.commands import loraline_here
for arguments in json.loads(sys.argv[1]):
    done = loraline_here(*arguments, home="home")
    heavy = [name for name in ("torch", "diffusers", "transformers") if name in sys.modules]
    print(json.dumps([done.returncode, done.stdout, done.stderr, heavy]))
"""


def of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet_adapter(dtype: torch.dtype = torch.float16) -> Adapter:
    """Returns an adapter for Stable Diffusion 1 of several kinds, with the published shapes."""
    lora = LoraDelta(of(2, 320), of(320, 2), 1.0)
    modules = {
        f"unet.{ATTENTION}.to_q": lora,
        f"unet.{ATTENTION}.to_k": DoraDelta(lora, of(320, 1)),
        f"unet.{ATTENTION}.to_v": LokrDelta(1.0, left=of(16, 16), right=of(20, 20)),
    }
    return Adapter(modules, "sd").to(dtype=dtype)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    adapter, card = unet_adapter(), Card(title="zorb", trigger="sks")
    plain = Adapter({name: delta for name, delta in adapter.modules.items() if name.endswith("to_q")}, "sd")
    for form in ("loraline", "kohya", "lycoris"):
        write_adapter(folder / f"{form}.safetensors", adapter, format=form, card=card)
    for form in ("diffusers", "peft", "cloneofsimo"):
        write_adapter(folder / form, plain, format=form, card=card, module_names=published_module_shapes("sd15"))
    write_adapter(folder / "bfloat16.safetensors", unet_adapter(torch.bfloat16))
    write_embeddings(folder / "token", [Embedding("sks", {"text_encoder": of(2, 768)})])
    flux, qkv = "lora_unet_double_blocks_0_img_attn_qkv", torch.zeros(9216, 3)
    for part in range(3):
        qkv[3072 * part : 3072 * (part + 1), part] = 1.0
    # Another program's files: a fused layer of FLUX.1 in three parts, and a flattened name in float8.
    save_file({f"{flux}.lora_down.weight": of(3, 3072), f"{flux}.lora_up.weight": qkv}, folder / "fused.safetensors")
    foreign = {"lora_down.weight": of(2, 320), "lora_up.weight": of(320, 2), "alpha": torch.tensor(2.0)}
    name = f"lora_unet_{ATTENTION.replace('.', '_')}_to_q"
    tensors = {f"{name}.{suffix}": tensor.to(torch.float8_e4m3fn) for suffix, tensor in foreign.items()}
    save_file(tensors, folder / "float8.safetensors")
    save_file(tensors | {f"{name}.alpha": torch.tensor(float("nan"))}, folder / "nan.safetensors")
    save_file({"x.weight": of(2, 2)}, folder / "unknown.safetensors")
    return {path.stem: path for path in sorted(folder.iterdir())}


def run_all(commands: list[list[object]]) -> list[tuple[int, str, str, list[str]]]:
    """Runs commands one after the other in a new process; returns code, output, errors, and the heavy modules."""
    environment = {**os.environ, **PLAIN, "PYTHONPATH": str(ROOT)}
    arguments = json.dumps([[str(part) for part in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", RUN, arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Returns what the decoder's tensors show of a file, as the verb prints it."""
    print_json(inspect(path, read=read_safetensors))
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_both_verbs_answer_for_every_form_without_torch(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    valid = [path for name, path in files.items() if name not in ("nan", "unknown")]
    verbs: list[list[object]] = [["inspect"], ["inspect", "--json"], ["validate"], ["validate", "--json"]]
    commands = [[verb, path, *options] for path in valid for verb, *options in verbs]
    commands += [["validate", files["kohya"], "--base", "sd15"], ["validate", files["loraline"], "--base", "sdxl"]]
    commands += [[verb, files[name]] for verb in ("inspect", "validate") for name in ("nan", "unknown")]
    commands += [["inspect", files["kohya"], "--norms"]]
    results = dict(zip(map(str, commands), run_all(commands), strict=True))
    *without, norms = results.items()
    assert [(command, heavy) for command, (*_, heavy) in without if heavy] == []
    assert norms[1][3] == ["torch"], "negative control: norms are computed by torch, which the check notices"
    for path in valid:
        assert json.loads(results[str(["inspect", path, "--json"])][1]) == shown(path, capsys)
        assert results[str(["validate", path])][0] == 0, results[str(["validate", path])]
    assert results[str(["validate", files["kohya"], "--base", "sd15"])][0] == 0
    assert "the base has no module" not in results[str(["validate", files["kohya"], "--base", "sd15"])][2]
    assert results[str(["validate", files["loraline"], "--base", "sdxl"])][0] == 1
    assert "1 of 1 values are NaN or infinite" in results[str(["validate", files["nan"]])][2]
    assert json.loads(results[str(["validate", files["fused"], "--json"])][1])["modules"] == 3
    assert "unknown adapter format" in results[str(["inspect", files["unknown"]])][2]


def test_the_command_itself_imports_no_torch(files: dict[str, Path]) -> None:
    environment = {**os.environ, **PLAIN, "PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"}
    for arguments, expected in ((["inspect", files["kohya"]], False), (["inspect", files["kohya"], "--norms"], True)):
        with loraline_process(environment, *arguments) as process:
            out, imported = process.communicate(timeout=300)
        assert process.returncode == 0
        assert "kohya" in out
        names = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
        assert "lora_engine.formats" in names
        # Not `torch` itself: Python times no import by `import_module`, which is the lazy one.
        assert ("torch._utils" in names) is expected
