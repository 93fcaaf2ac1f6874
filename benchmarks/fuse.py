"""Compares fusing an adapter into a checkpoint of the size of Stable Diffusion 1.5 with copying the file.

    python -m benchmarks.fuse [--rounds 5] [--layout original|folder] [--folder DIR] [--at-most 1.5]

Random float16 weights (2.13 GB, written in blocks and removed afterwards), a rank-16 adapter on the 264 modules that
kohya's trainer targets by default. Rounds alternate. CPU time of this process includes the kernel and excludes imports.
Each copy is `sendfile` into a new file. It takes up to three times as long if the kernel needs new memory for the page
cache, so each round copies twice, and the ratio is the fastest fuse over the fastest copy. Peak memory is that of a
child process that fuses, minus that of one that only imports and multiplies.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.adapters.published import published_module_shapes
from lora_engine.checkpoints.names import checkpoint_names, tensor_shapes
from lora_engine.families import published
from lora_engine.files import canonical_json
from lora_engine.formats import write_adapter
from lora_engine.streaming import fuse

ROOT = Path(__file__).resolve().parents[1]
_KOHYA = (".transformer_blocks.", ".proj_in", ".proj_out", ".self_attn.", ".mlp.")


def write_random(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes a float16 file of random weights that repeats 64 MiB of noise."""
    noise = (torch.randn(32 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).half()
    view = memoryview(noise.view(torch.uint8).numpy())
    header, offset = {}, 0
    for name, shape in sorted(shapes.items()):
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = canonical_json({"__metadata__": {"format": "pt"}, **header})
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while offset > 0:
            file.write(view[: min(offset, len(view))])
            offset -= len(view)
        file.flush()
        os.fsync(file.fileno())


def make_base(folder: Path, layout: str) -> Path:
    """Writes an original single file, or a diffusers folder with U-Net, text encoder and autoencoder."""
    components = published["sd15"].components
    if layout == "original":
        shapes = {(entry.component, entry.name): entry for entry in checkpoint_names("sd15")}
        stored: dict[str, tuple[int, ...]] = {}
        for part in {entry.component for entry in shapes.values()}:
            for name, shape in tensor_shapes(part, components[part]).items():
                entry = shapes[part, name]
                stored[entry.stored] = entry.stored_shape(shape)
        write_random(folder / "base.safetensors", stored)
        return folder / "base.safetensors"
    base = folder / "base"
    for part in ("unet", "vae", "text_encoder"):
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        write_random(base / part / f"{stem}.safetensors", tensor_shapes(part, components[part]))
        (base / part / "config.json").write_text("{}")
    for name in ("scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        (base / name).parent.mkdir()
        (base / name).write_text("{}")
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return base


def make_adapter(path: Path, rank: int) -> Path:
    """Writes a float16 adapter on kohya's default modules, in kohya's format."""
    generator = torch.Generator().manual_seed(1)
    modules = {}
    for name, shape in published_module_shapes("sd15").items():
        is_norm = len(shape) == 1 or name.startswith("vae.")
        if not is_norm and any(part in name for part in _KOHYA):
            down = torch.randn(rank, *shape[1:], generator=generator) * 0.05
            up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator) * 0.05
            modules[name] = LoraDelta(down.half(), up.half(), rank / 2)
    write_adapter(path, Adapter(modules, "sd"), format="kohya")
    return path


def copy(source: Path, target: Path) -> None:
    """Copies the weights by `sendfile`."""
    files = [source] if source.is_file() else sorted(source.rglob("*.safetensors"))
    for index, path in enumerate(files):
        with path.open("rb") as read, target.with_name(f"{target.name}.{index}").open("wb") as write:
            done, size = 0, path.stat().st_size
            while done < size:
                done += os.sendfile(write.fileno(), read.fileno(), done, size - done)


def timed(work: Callable[[], object]) -> float:
    """Returns CPU seconds, kernel included."""
    before = os.times()
    work()
    after = os.times()
    return after.user - before.user + after.system - before.system


def child(base: Path, adapter: Path, output: Path, *, fuses: bool) -> int:
    """Returns the peak memory in bytes of a child that fuses, or that only imports the libraries."""
    command = [sys.executable, "-m", "benchmarks.fuse", "--child", "fuse" if fuses else "libraries"]
    paths = [str(base), str(adapter), str(output)]
    result = subprocess.run([*command, *paths], check=True, capture_output=True, cwd=ROOT)
    return int(result.stdout)


def run_child(role: str, base: Path, adapter: Path, output: Path) -> None:
    torch.randn(64, 64) @ torch.randn(64, 64)
    if base.is_file():
        checkpoint_names("sd15")  # imports diffusers, whose networks define the names
    if role == "fuse":
        fuse(base, [(adapter, 0.8)], output)
    # The peak that `getrusage` returns includes the parent's; this one does not.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(1024 * int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def measure(folder: Path, layout: str, rounds: int) -> dict[str, object]:
    base, adapter = make_base(folder, layout), make_adapter(folder / "adapter.safetensors", 16)
    output = folder / ("out" if base.is_dir() else "out.safetensors")
    copies, fuses = [], []
    for _ in range(rounds + 1):
        for _ in range(2):
            copies.append(timed(lambda: copy(base, folder / "copy")))
            for path in folder.glob("copy.*"):
                path.unlink()
        fuses.append(timed(lambda: fuse(base, [(adapter, 0.8)], output)))
        remove(output)
    fuses = fuses[1:]  # the first round warms up
    memory = child(base, adapter, output, fuses=True)
    remove(output)
    above = memory - child(base, adapter, output, fuses=False)
    files = [base] if base.is_file() else list(base.rglob("*.safetensors"))
    return {
        "layout": layout,
        "gigabytes": round(sum(path.stat().st_size for path in files) / 1e9, 2),
        "copies_s": [round(seconds, 2) for seconds in copies],
        "fuses_s": [round(seconds, 2) for seconds in fuses],
        "ratio": round(min(fuses) / min(copies), 3),
        "megabytes_above_libraries": round(above / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layout", choices=("original", "folder"), default="original")
    parser.add_argument("--folder", type=Path, help="Folder for the temporary files; needs 10 GiB.")
    parser.add_argument("--at-most", type=float, help="Fail if the ratio is larger.")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.child:
        role, *paths = chosen.child
        run_child(role, *(Path(path) for path in paths))
        return
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        if shutil.disk_usage(name).free < 10 << 30:
            raise SystemExit(f"less than 10 GiB are free in {name!r}. Fix: set another folder with --folder")
        figures = measure(Path(name), chosen.layout, chosen.rounds)
    print(json.dumps(figures))
    if chosen.at_most is not None and float(str(figures["ratio"])) > chosen.at_most:
        raise SystemExit(f"the ratio {figures['ratio']} is larger than {chosen.at_most}")


if __name__ == "__main__":
    main()
