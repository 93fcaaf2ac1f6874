"""Runs an evaluation: generates images with base and adapter, measures them, checks the gates, writes the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lora_engine.adapters import module_shapes
from lora_engine.bases.base import load_base
from lora_engine.bases.options import options_of_cards
from lora_engine.bases.vae import resolve_vae
from lora_engine.data.pixels import write_png
from lora_engine.evaluation.embedder import load_embedder
from lora_engine.evaluation.evidence import gather_evidence
from lora_engine.evaluation.gates import check_gates
from lora_engine.evaluation.metrics import METRICS, Evidence, ImagePair, Metric
from lora_engine.evaluation.plan import derive_evaluation_seed, make_plan, read_trained_on
from lora_engine.evaluation.spec import EvaluateSettings
from lora_engine.evaluation.statistics import compare
from lora_engine.files import atomic_write, canonical_json, sha256_file
from lora_engine.formats import read_bundle
from lora_engine.progress import Progress, no_progress

if TYPE_CHECKING:
    from lora_engine.bases.source import BaseSource

# Kind in `report.json` -> attribute of `Evidence`, largest number of samples.
_SAMPLES = {"paired": ("reference", 8), "asked": ("with_trigger", 8), "unasked": ("without_trigger", 4)}


def evaluate(
    settings: EvaluateSettings,
    base: str | BaseSource,
    adapter: Path,
    dataset: Path,
    out: Path,
    *,
    heldout: Path | None = None,
    vae: str | None = None,
    prompts: Sequence[str] = (),
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Compares an adapter with its base and writes `report.json` and `pictures/`; same inputs, same bytes on a CPU.

    Args:
        settings: See `EvaluateSettings`.
        base: The base; see `load_base`.
        adapter: An adapter artifact (a folder with `adapter.safetensors`), or an adapter file.
        dataset: The training dataset of the adapter.
        out: The folder for the report.
        vae: The autoencoder that the adapter was trained with, a name for `resolve_vae`; None is the base's own.
        heldout: Another dataset with held-out images; None takes the held-out split of `dataset`.
        prompts: The prompts; empty takes the captions of the held-out images.
        progress: Counts images and losses of both models.

    Returns:
        The content of `report.json`.

    Raises:
        DataError: See `make_plan`.
        SettingsError: The embedder or the image size cannot be used.
        AdapterError: The adapter is incomplete, does not match the base, or produces NaN or Inf.
    """
    plan = make_plan(settings, dataset, heldout=heldout, prompts=prompts, trained_on=read_trained_on(adapter))
    embedder = load_embedder(settings.embedder)
    model = load_base(base)
    model.latent_shape(plan.size)
    file = adapter / "adapter.safetensors" if adapter.is_dir() else adapter
    bundle = read_bundle(file, module_names=module_shapes(model))
    model.configure(options_of_cards([bundle.card], vae=resolve_vae(vae) if vae else None))
    evidence = gather_evidence(settings, plan, model=model, bundle=bundle, embedder=embedder, progress=progress)
    # Gates check the rounded values, which a reader of the report can verify.
    metrics = _rounded(measure(evidence, settings.seed))
    gates = [result.as_dict() for result in check_gates(metrics, settings.gates)]
    report = {
        "format": 1,
        "metrics": metrics,
        "gates": gates,
        "passed": all(gate["passed"] for gate in gates),
        "samples": _write_samples(evidence, out),
        "settings": settings.model_dump(mode="json"),
        "measured_on": plan.measured_on,
        "size": list(plan.size),
        "trigger": plan.trigger,
        "class_word": plan.class_word,
        "base": {"name": model.name, "family": model.family, "fingerprint": model.fingerprint},
        "adapter": {"sha256": sha256_file(file)},
        "embedder": {"name": embedder.name, "sha256": embedder.fingerprint},
    }
    rounded: dict[str, Any] = _rounded(report)
    atomic_write(out / "report.json", canonical_json(rounded))
    return rounded


def measure(evidence: Evidence, seed: int) -> dict[str, dict[str, Any]]:
    """Returns every metric of `METRICS` as stored in `report.json`."""
    metrics: dict[str, dict[str, Any]] = {}
    for name, metric in METRICS.items():
        comparison = compare(*metric.measure(evidence), seed=derive_evaluation_seed(seed, "bootstrap", name))
        metrics[name] = {
            "base": comparison.base,
            "adapter": comparison.adapter,
            "difference": comparison.difference,
            "interval": list(comparison.interval) if comparison.interval else None,
            "n": comparison.n,
            "better": metric.better,
            "verdict": _verdict(comparison.interval, metric),
        }
    return metrics


def _verdict(interval: tuple[float, float] | None, metric: Metric) -> str:
    if metric.is_distance:
        return "distance"
    if interval is None or interval[0] <= 0.0 <= interval[1]:
        return "unclear"
    return "better" if (interval[0] > 0.0) == (metric.better == "higher") else "worse"


def _write_samples(evidence: Evidence, out: Path) -> list[dict[str, Any]]:
    shown: set[str] = set()
    samples: list[dict[str, Any]] = []
    for kind, (attribute, limit) in _SAMPLES.items():
        pairs = [pair for pair in getattr(evidence, attribute) if pair.request.prompt not in shown][:limit]
        for pair in pairs:
            shown.add(pair.request.prompt)
            samples.append(_write_sample(kind, len(samples), pair, out))
    return samples


def _write_sample(kind: str, index: int, pair: ImagePair, out: Path) -> dict[str, Any]:
    images: dict[str, Tensor | None] = {
        "base": pair.base[0].float() / 127.5 - 1.0,
        "adapter": pair.adapter[0].float() / 127.5 - 1.0,
        "reference": pair.reference,
    }
    sample: dict[str, Any] = {"kind": kind, "prompt": pair.request.prompt, "seed": pair.request.seeds[0]}
    for role, pixels in images.items():
        sample[role] = f"pictures/{index:02d}-{role}.png" if pixels is not None else None
        if pixels is not None:
            write_png(out / sample[role], pixels)
    return sample


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        # Six digits: further ones are rounding noise. Adding 0.0 turns -0.0 into 0.0.
        return round(value, 6) + 0.0
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
