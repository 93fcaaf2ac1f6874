"""Creates versions without Prefect and MLflow, for tests of reproduce, diff and import."""

from __future__ import annotations

from pathlib import Path

import torch

from flows.plan import registered_adapter
from flows.spec import PipelineSpec, load_spec
from lora_engine.adapters import Adapter, LoraDelta
from lora_engine.bases.structure import base_module_shapes
from lora_engine.formats import Card, write_adapter
from registry.entities import AdapterVersion, ArtifactRef
from registry.home import Home
from registry.lineage.record import Lineage
from registry.policy.revocations import read_revoked
from registry.versions.versions import Versions
from tasks.execution import execute
from tasks.job import prepare_job
from tasks.operations.import_adapter import ImportResult, import_adapter
from tasks.operations.import_request import ImportRequest
from tests.flows.commands import say

MERGE = """\
name: both
base: tiny
seed: 7
steps:
  mix: {uses: merge, adapters: [one@1, two@1], weights: [1.0, 0.5], method: svd, rank: 3}
  release: {uses: register, adapter: mix}
"""


def random_adapter(seed: int, rank: int = 2, modules: int = 4, scale: float = 0.1) -> Adapter:
    """Returns a LoRA of the embedded base with random factors on its first attention layers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: shape for name, shape in sorted(base_module_shapes("tiny").items()) if ".attn" in name}

    def draw(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    return Adapter(
        {
            name: LoraDelta(draw(rank, shape[1]), draw(shape[0], rank), float(rank))
            for name, shape in list(shapes.items())[:modules]
        },
        "sd",
    )


def write_random(path: Path, seed: int, *, form: str = "kohya", card: Card | None = None, rank: int = 2) -> Path:
    """Writes a random adapter as a file or folder of a format."""
    write_adapter(path, random_adapter(seed, rank), format=form, card=card)
    return path


def bring_in(home: Home, file: Path, name: str, *, license_id: str = "MIT", **more: str) -> ImportResult:
    """Imports a file for the embedded base."""
    return import_adapter(home, file, ImportRequest(name, "tiny", license_id, **more))


def run_line(path: Path, home: Home) -> AdapterVersion:
    """Runs a pipeline file step by step in this process; returns the version that it registered."""
    return run_spec(load_spec(path), home)


def run_spec(spec: PipelineSpec, home: Home) -> AdapterVersion:
    """Runs a pipeline as `run_line` does."""
    run_steps(spec, home)
    return Versions(home).show(spec.name)


def run_steps(spec: PipelineSpec, home: Home) -> dict[str, ArtifactRef]:
    """Runs a pipeline as `run_line` does; returns the artifact of each step."""
    lineage = Lineage(home.lineage_url)
    run, revoked = lineage.start_run(spec.name, spec.source), read_revoked(lineage)
    outputs: dict[str, ArtifactRef] = {}
    for name, step in spec.steps.items():
        inputs: dict = {}
        for field, target, _ in step.references():
            ref = outputs[target] if target in outputs else registered_adapter(target, home)
            inputs[field] = (*inputs.get(field, ()), ref)
        outputs[name] = execute(prepare_job(name, step, spec.folder, revoked), inputs, home, run.id).ref
    lineage.finish_run(run.id, "COMPLETED")
    lineage.close()
    return outputs


def make_merge(folder: Path) -> tuple[Home, AdapterVersion]:
    """Creates a home with two imported adapters and a version that merges them."""
    home = Home.open(folder / "home")
    for seed, name in enumerate(("one", "two")):
        bring_in(home, write_random(folder / f"{name}.safetensors", seed), name)
    path = folder / "both.yaml"
    path.write_text(MERGE)
    version = run_line(path, home)
    path.unlink()
    return home, version


def sign_zorb(folder: Path) -> Path:
    """Registers an adapter as `register_zorb` does, and signs it with two new keys; returns the home's path."""
    home = register_zorb(folder)
    for name in ("release", "review"):
        say("keys", "new", folder / name, "--without-passphrase", "--trust", home=home)
        say("sign", "zorb@1", "--key", folder / name, home=home)
    return home


def register_zorb(folder: Path, name: str = "zorb") -> Path:
    """Registers an adapter of one module with a card in the home of a folder, and returns the home's path."""
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    delta = LoraDelta(down=torch.ones(2, 768), up=torch.ones(8, 2), alpha=2.0)
    card = Card(title="Zorb", base="tiny", trigger="zorb", license="CC-BY-4.0")
    write_adapter(folder / "adapter", Adapter({module: delta}, "sd"), card=card)
    home = Home.open(folder / "home")
    versions = Versions(home)
    ref = versions.store.put("adapter", folder / "adapter")
    versions.register(name, ref, card=card.model_dump(mode="json"))
    versions.close()
    return home.path
