"""Runs an evaluation: generates images by every model, measures them, checks the gates, writes the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lora_engine.adapters import module_shapes
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.data.pixels import write_png
from lora_engine.evaluation.chosen import read_training_record
from lora_engine.evaluation.details import write_details
from lora_engine.evaluation.drawing import draw_images
from lora_engine.evaluation.embedder import load_embedder
from lora_engine.evaluation.evidence import BASE, CANDIDATE, Evidence, ImageSet, RequestSet
from lora_engine.evaluation.gates import check_gates, check_measurable
from lora_engine.evaluation.gathering import gather_details
from lora_engine.evaluation.measuring import measure
from lora_engine.evaluation.metrics import METRICS, Available
from lora_engine.evaluation.plan import EvaluationPlan, make_plan
from lora_engine.evaluation.spec import EvaluateSettings
from lora_engine.files import atomic_write, canonical_json, sha256_file
from lora_engine.formats import Bundle, read_bundle
from lora_engine.progress import Progress, no_progress

if TYPE_CHECKING:
    from lora_engine.bases.source import BaseSource

REPORT_FORMAT = 2
"""Version of the layout of `report.json`; 1 compared with the base alone, by percentile intervals."""

# Kind in `report.json` -> set of requests, largest number of samples.
_SAMPLES: dict[str, tuple[RequestSet, int]] = {
    "paired": ("reference", 8),
    "asked": ("with_trigger", 8),
    "unasked": ("without_trigger", 4),
}


def evaluate(
    settings: EvaluateSettings,
    base: str | BaseSource,
    adapter: Path,
    dataset: Path,
    out: Path,
    *,
    heldout: Sequence[Path] = (),
    prompts: Sequence[str] = (),
    against: Mapping[str, Path] | None = None,
    absent: Mapping[str, str] | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Compares an adapter with its base and other versions; writes `report.json` and images.

    The same inputs give the same bytes on a CPU.

    Args:
        settings: See `EvaluateSettings`.
        base: The base; see `load_base`.
        adapter: An adapter artifact (a folder with `adapter.safetensors`), or an adapter file.
        dataset: The training dataset of the adapter.
        out: The folder for the report.
        heldout: Other datasets with held-out images; empty takes the held-out split of `dataset`.
        prompts: The prompts; empty takes the captions of the held-out images.
        against: Role -> another adapter for the same base, such as the one in production.
        absent: Role -> why there is no such adapter.
        progress: Counts images and losses of all models.

    Returns:
        The content of `report.json`.

    Raises:
        DataError: See `make_plan`.
        SettingsError: The embedder or the image size cannot be used, or a gate names a metric that cannot be measured.
        AdapterError: An adapter is incomplete, does not match the base, or produces NaN or Inf.
    """
    plan = make_plan(
        settings,
        dataset,
        heldout=heldout,
        prompts=prompts,
        training=read_training_record(adapter),
        base=base if isinstance(base, str) else base.name,
    )
    embedder = load_embedder(settings.embedder)
    available = Available(plan, embedder is not None, image_embedder=False)
    wanted = [name for name in METRICS if settings.measures(name)]
    unmet = {name: reason for name in wanted if (reason := METRICS[name].unmet(available))}
    names = [name for name in wanted if name not in unmet]
    check_measurable(settings.listed_gates(), names, unmet)
    model = load_base(base)
    for size in plan.sizes:
        model.latent_shape(size)
    files = {role: _adapter_file(path) for role, path in {CANDIDATE: adapter, **(against or {})}.items()}
    adapters = {role: _read(file, model) for role, file in files.items()}
    bundles: dict[str, Bundle | None] = {BASE: None, **adapters}
    drawn = draw_images(settings, plan, model=model, bundles=bundles, progress=progress)
    evidence = Evidence(
        tuple(bundles),
        drawn.sets,
        drawn.heldout,
        drawn.training,
        trained_on=plan.trained_on,
        embedder=embedder,
        masked_likeness=settings.masked_likeness,
        seed=settings.seed,
    )
    measurements = measure(evidence, names, settings.seed)
    # Gates check the rounded values, which a reader of the report can verify.
    metrics, comparisons = _rounded(measurements.metrics), _rounded(measurements.comparisons)
    decision = check_gates(metrics, settings.listed_gates(), comparisons=comparisons, absent=absent)
    report = {
        "format": REPORT_FORMAT,
        "metrics": metrics,
        "comparisons": comparisons,
        "units": measurements.units,
        "unmeasured": unmet,
        "gates": [result.as_dict() for result in decision.results],
        "skipped_gates": list(decision.skipped),
        "passed": decision.passed,
        "reasons": decision.reasons,
        "samples": _write_samples(evidence, out),
        "settings": settings.model_dump(mode="json"),
        **_describe_plan(plan),
        "base": {"name": model.name, "family": model.family, "fingerprint": model.fingerprint},
        "adapter": {"sha256": sha256_file(files[CANDIDATE])},
        "against": {role: {"sha256": sha256_file(file)} for role, file in files.items() if role != CANDIDATE},
        "absent": dict(absent or {}),
        "embedder": {"name": embedder.name, "sha256": embedder.fingerprint},
    }
    modules = adapters[CANDIDATE].adapter.modules
    write_details(out, gather_details(evidence, out, model=model, modules=modules, strengths=drawn.strengths))
    rounded: dict[str, Any] = _rounded(report)
    atomic_write(out / "report.json", canonical_json(rounded))
    return rounded


def _adapter_file(adapter: Path) -> Path:
    return adapter / "adapter.safetensors" if adapter.is_dir() else adapter


def _read(file: Path, model: BaseModel) -> Bundle:
    return read_bundle(file, module_names=module_shapes(model))


def _describe_plan(plan: EvaluationPlan) -> dict[str, Any]:
    return {
        "measured_on": plan.measured_on,
        "sizes": [list(size) for size in plan.sizes],
        "left_out": [{"source": item.source, "sha256": item.sha256, "reason": item.reason} for item in plan.left_out],
        "chosen": plan.chosen.model_dump(mode="json", by_alias=True) if plan.chosen else None,
        "trigger": plan.trigger,
        "class_word": plan.class_word,
    }


def _write_samples(evidence: Evidence, out: Path) -> list[dict[str, Any]]:
    shown: set[str] = set()
    samples: list[dict[str, Any]] = []
    for kind, (name, limit) in _SAMPLES.items():
        for images in [item for item in evidence.sets[name] if item.request.prompt not in shown][:limit]:
            shown.add(images.request.prompt)
            samples.append(_write_sample(kind, len(samples), images, out))
    return samples


def _write_sample(kind: str, index: int, images: ImageSet, out: Path) -> dict[str, Any]:
    pixels: dict[str, Tensor | None] = {
        "base": images.images[BASE][0].float() / 127.5 - 1.0,
        "adapter": images.images[CANDIDATE][0].float() / 127.5 - 1.0,
        "reference": images.reference,
    }
    sample: dict[str, Any] = {"kind": kind, "prompt": images.request.prompt, "seed": images.request.seeds[0]}
    for role, values in pixels.items():
        sample[role] = f"pictures/{index:02d}-{role}.png" if values is not None else None
        if values is not None:
            write_png(out / sample[role], values)
    return sample


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        # Six digits: further ones are rounding noise. Adding 0.0 turns -0.0 into 0.0.
        return round(value, 6) + 0.0
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
