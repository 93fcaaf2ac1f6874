"""Targets that read files of settings: pipelines, the files of a home, consent, prompts, manifests, indices, keys."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from unittest.mock import patch

from flows.spec import load_pipelines
from flows.sweep_file import load_sweep
from lora_engine.data.consent import read_consent
from lora_engine.data.ingest import ingest
from lora_engine.data.manifest import Manifest
from lora_engine.data.spec import IngestSettings
from lora_engine.evaluation.prompts import read_prompts
from lora_engine.families.layout import read_layout
from lora_engine.files import canonical_json
from registry.documents.keys import make_key, read_public_key
from registry.home import Home
from registry.policy.licenses import read_licenses
from registry.policy.policy_file import read_policies
from registry.settings import Settings, read_file, write_file
from tasks.operations.delivery_file import read_delivery
from tests.flows.shared import draw_noise
from tests.fuzz.files import Files, read_files, write_files
from tests.fuzz.target import Target

ROOT = Path(__file__).resolve().parents[3]
_LINE = b"""name: small
base: tiny
seed: 7
concurrency: 2
steps:
  photos:   {uses: ingest, images: images/, consent: consent.csv, repeats: {"*.png": 2}}
  prepared: {uses: preprocess, dataset: photos, resolution: 32, crop: bucket, buckets: {step: 16, enlarge: 3.0}}
  captions: {uses: caption, dataset: prepared, captioner: template, trigger: zorb, template: "a {trigger}"}
  adapter:
    uses: train
    dataset: captions
    method: dreambooth
    kind: lora
    rank: 2
    steps: 12
    targets: ["unet.*.to_q", "re:.*to_k"]
    overrides: {"unet.*.to_q": {rank: 3}}
    rates: {optimiser: {name: adamw, betas: [0.9, 0.99]}}
    objective: {loss: huber, timesteps: {low: 0.1}}
    samples: {every: 5, prompts: [a zorb]}
    timeout: 60
  mix: {uses: merge, adapters: [adapter, "x@1"], weights: [1.0, {"unet.down": 0.5}], method: ties, rank: 3}
  report: {uses: evaluate, adapter: adapter, dataset: captions, prompts: prompts.txt, gates: {clip_t: {min: -0.1}}}
  release: {uses: register, adapter: mix, report: report, alias: staging}
  exports: {uses: convert, adapter: adapter, to: [kohya, peft]}
"""
_ALIASES = b"""name: small
description: &text a text
steps:
  photos: {uses: ingest, images: images/}
  adapter: &x {uses: train, dataset: photos, kind: {name: lokr, factor: 4}, rank: 2, steps: 3}
  second: {<<: *x, rank: 4}
"""
_PROMPTS = b"# a comment\na red zorb\n\n\xc3\xa9 zorb, on the left\n"
_CONSENT = b"file,consent,owner,license,expires,opt_out\n0.png,c-1,Zo,CC-BY-4.0,2027-12-31,ai.txt/2026-05-01/clear\n"
_POLICY = b"""policy: strict
recall: withdraw
aliases:
  staging: {needs_evaluation: true, movers: ["*@ci"]}
  production: {needs_gate: true, needs_licence: commercial, protected: true}
"""
_DELIVERY = b"""targets:
  - {name: web-ui, to: loras, layout: comfyui, adapters: [zorb, "s-*"], file: "{name}-{version}.safetensors", keep: 2}
  - {name: hub, to: s3://studio/loras, layout: huggingface, alias: staging, file: "a/{name}"}
on_revocation: retrain
"""
_STUDIO = ROOT / "examples" / "studio"
_BESIDE: Mapping[str, bytes] = {
    "prompts.txt": _PROMPTS,
    "consent.csv": _CONSENT,
    "base.yaml": (_STUDIO / "base.yaml").read_bytes().replace(b"../zorb/images", b"images"),
    "adapters.csv": (_STUDIO / "adapters.csv").read_bytes(),
}


def _seed_pipelines(folder: Path) -> list[Files]:
    seeds = [{"line.yaml": _LINE}, {"line.yaml": _ALIASES}]
    for path in sorted(ROOT.glob("examples/*/*.yaml")):
        text = path.read_text()
        if path.parent.name != "photographs":  # their bases are on the hub
            text = re.sub(r"images: \S+?/(?=[,}\s])", "images: images/", text).replace("../zorb/images", "images")
            text = re.sub(r"[\w./-]*(prompts\.txt|consent\.csv)", r"\1", text)
            seeds.append({"line.yaml": text.encode()})
    return seeds


def check_pipeline(folder: Path, output: Path) -> None:
    """Loads a pipeline file beside the files that it names, and computes what enters the keys of its steps."""
    path = next((path for path in sorted(folder.iterdir()) if path.is_file()), None)
    assert path is not None
    (output / "images").mkdir()
    write_files(output, {**_BESIDE, "line.yaml": path.read_bytes()})
    with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):  # a changed base is a name on the hub
        specs = load_pipelines(output / "line.yaml")
    for spec in specs[:3]:
        canonical_json(dict(spec.source))
        for step in spec.steps.values():
            canonical_json(step.key_settings())
            again = type(step).model_validate_json(step.model_dump_json())
            assert again == step, "the step differs when it is read again"


def check_sweep(folder: Path, output: Path) -> None:
    """Loads a pipeline file with a sweep, and checks the trials at the ends of its ranges."""
    path = next(_files(folder))
    (output / "images").mkdir()
    write_files(output, {**_BESIDE, "line.yaml": path.read_bytes()})
    with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        sweep = load_sweep(output / "line.yaml")
    assert sweep.registering()
    assert sweep.trial_steps <= sweep.spec.steps.keys()


def check_delivery(folder: Path, output: Path) -> None:
    """Reads the targets of a home; each path stays in its target."""
    for target in read_delivery(Home(folder)).targets:
        path = target.path_of("zorb", 1)
        assert ".." not in path.split("/")
        assert not path.startswith("/")
        target.matches("zorb")


def _texts(name: str, *contents: bytes) -> Callable[[Path], list[Files]]:
    return lambda _: [{name: content} for content in contents]


def _seed_licenses(folder: Path) -> list[Files]:
    shipped = (ROOT / "registry" / "policy" / "licenses.yaml").read_text()
    own = """date: 2026-11-01
licenses:
  - {id: LicenseRef-Own, aliases: [own], permissions: [commercial], obligations: [attribution]}
bases:
  - {license: LicenseRef-Own, hub: [a/b]}
"""
    return [{"licenses.yaml": own.encode()}, {"licenses.yaml": shipped.encode()[:6000].rpartition(b"\n  - ")[0]}]


def check_home_settings(folder: Path, output: Path) -> None:
    """Reads the locations of a home, writes them and reads them again."""
    settings = read_file(folder)
    if settings != Settings():
        write_file(output, settings)
        assert read_file(output) == settings, "the settings differ when they are read again"


def check_licenses(folder: Path, output: Path) -> None:
    """Reads a table of licenses and looks up terms in it."""
    table = read_licenses(folder)
    for license_id in [entry.id for entry in table.licenses[-3:]] + ["MIT OR Apache-2.0", "own"]:
        table.terms_of_license(license_id, "x")


def _seed_manifests(folder: Path) -> list[Files]:
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(2):
        draw_noise(images / f"{number}.png", number)
    (images / "0.txt").write_text("a zorb")
    consent = write_files(folder, {"consent.csv": _CONSENT}) / "consent.csv"
    ingest(images, folder / "dataset", IngestSettings(heldout=0.5), consent=consent)
    return [read_files(folder / "dataset")]


def check_manifest(folder: Path, output: Path) -> None:
    """Loads a manifest, writes it and loads an equal one."""
    manifest = Manifest.load(folder)
    manifest.save(output)
    for image in manifest.pictures:
        write_files(output, dict.fromkeys(image.files, b""))
    assert Manifest.load(output) == manifest, "the manifest differs when it is read again"


def _seed_indices(folder: Path) -> list[Files]:
    base = ROOT / "lora_engine" / "bases" / "tiny" / "weights"
    files = {
        path.relative_to(base).as_posix(): path.read_bytes() if path.suffix == ".json" else b""
        for path in sorted(base.rglob("*"))
        if path.is_file()
    }
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a.weight": shard}}).encode()
    sharded = {name: content for name, content in files.items() if name != "unet/diffusion_pytorch_model.safetensors"}
    sharded |= {"unet/diffusion_pytorch_model.safetensors.index.json": index, f"unet/{shard}": b""}
    return [files, sharded]


def _seed_keys(folder: Path) -> list[Files]:
    folder.mkdir(parents=True)
    make_key(folder / "key", None)
    return [{"key.pub.txt": path.read_bytes()} for path in folder.glob("*.pub")]


def _only(read: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    """Returns a check that reads the only file of an input."""
    return lambda folder, _: read(next(_files(folder)))


def _files(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.iterdir()) if path.is_file())


SETTINGS = (
    Target("pipelines", _seed_pipelines, check_pipeline, 2.0),
    Target("sweeps", lambda _: [{"line.yaml": (ROOT / "examples" / "zorb" / "sweep.yaml").read_bytes()}], check_sweep),
    Target("deliveries", _texts("delivery.yaml", _DELIVERY), check_delivery),
    Target(
        "home-settings",
        _texts(
            "loraline.yaml",
            b"store: s3://bucket/a\ndatabase: postgresql+psycopg://u:p@h/x\n",
            b"mlflow: sqlite:///a.db\n",
        ),
        check_home_settings,
    ),
    Target("policies", _texts("policy.yaml", _POLICY, b"recall: flag\n"), lambda folder, _: read_policies(folder)),
    Target("licenses", _seed_licenses, check_licenses, 0.5),
    Target("consent", _texts("consent.csv", _CONSENT, b"file,license\na.png,MIT\n"), _only(read_consent)),
    Target("prompt-files", _texts("prompts.txt", _PROMPTS, b"a\n"), _only(read_prompts)),
    Target("manifests", _seed_manifests, check_manifest),
    Target("indices", _seed_indices, lambda folder, _: read_layout(folder)),
    Target("keys", _seed_keys, _only(read_public_key), 0.5),
)
"""Targets of settings."""
