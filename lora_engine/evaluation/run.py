"""Runs an evaluation: generates images by every model, measures them, checks the gates, writes the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.adapters import module_shapes
from lora_engine.bases.base import BaseModel, load_base
from lora_engine.bases.options import options_of_cards
from lora_engine.bases.source import BaseSource, resolve_base
from lora_engine.bases.vae import resolve_vae
from lora_engine.embedding.embedder import Embedder, load_embedder
from lora_engine.embedding.embedder_source import ChosenEmbedders, choose_embedders
from lora_engine.evaluation.chosen import read_training_record
from lora_engine.evaluation.details import write_details
from lora_engine.evaluation.drawing import draw_evaluation
from lora_engine.evaluation.evidence import BASE, CANDIDATE, COMBINED, Evidence, ImageSet, RequestSet
from lora_engine.evaluation.gates import check_compared_versions, check_gates, check_measurable
from lora_engine.evaluation.gathering import gather_details
from lora_engine.evaluation.judge import Judge, Judgement, count_answers, load_judge
from lora_engine.evaluation.limits import find_prompt_limits, warn_of_limits
from lora_engine.evaluation.measuring import measure
from lora_engine.evaluation.metrics import METRICS, Available
from lora_engine.evaluation.plan import EvaluationPlan, make_plan
from lora_engine.evaluation.recording import describe_plan, write_images, write_samples
from lora_engine.evaluation.spec import EvaluateSettings
from lora_engine.files import atomic_write, canonical_json, sha256_file
from lora_engine.formats import Bundle, read_bundle
from lora_engine.progress import Progress, no_progress

REPORT_FORMAT = 2
"""Version of the layout of `report.json`; 1 compared with the base alone, by percentile intervals."""


@dataclass(frozen=True)
class _Models:
    """The models of an evaluation: the base, and files and adapters by role."""

    base: BaseModel
    files: Mapping[str, Path]
    adapters: Mapping[str, Bundle]
    embedder: Embedder | None
    image_embedder: Embedder | None
    face_embedder: Embedder | None
    judge: Judge | None

    def describe(self) -> dict[str, Any]:
        """Returns names and digests for the report."""
        base, files = self.base, self.files
        return {
            "base": {"name": base.name, "family": base.family, "fingerprint": base.fingerprint},
            "adapter": {"sha256": sha256_file(files[CANDIDATE])},
            "against": {role: {"sha256": sha256_file(file)} for role, file in files.items() if role != CANDIDATE},
            "embedder": _describe(self.embedder),
            "image_embedder": _describe(self.image_embedder),
            "face_embedder": _describe(self.face_embedder),
        }


def evaluate(
    settings: EvaluateSettings,
    base: str | BaseSource,
    adapter: Path,
    dataset: Path,
    out: Path,
    *,
    heldout: Sequence[Path] = (),
    vae: str | None = None,
    prompts: Sequence[str] = (),
    against: Mapping[str, Path] | None = None,
    absent: Mapping[str, str] | None = None,
    combined: Path | None = None,
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
        vae: The autoencoder that the adapter was trained with, a name for `resolve_vae`; None is the base's own.
        heldout: Other datasets with held-out images; empty takes the held-out split of `dataset`.
        prompts: The prompts; empty takes the captions of the held-out images.
        against: Role -> another adapter for the same base, such as the one in production.
        absent: Role -> why there is no such adapter.
        combined: A second adapter; the candidate is also drawn together with it.
        progress: Counts images and losses of all models.

    Returns:
        The content of `report.json`.

    Raises:
        DataError: See `make_plan`.
        SettingsError: The embedder or the image size cannot be used, or a gate names a metric that cannot be measured.
        AdapterError: An adapter is incomplete, does not match the base, or produces NaN or Inf.
    """
    source = base if isinstance(base, BaseSource) else resolve_base(base)
    record = read_training_record(adapter)
    plan = make_plan(settings, dataset, heldout=heldout, prompts=prompts, training=record, base=source.name)
    embedders = choose_embedders(settings.embedder, settings.image_embedder, source)
    unmet = find_unmeasurable(settings, plan, embedders)
    names = [name for name in METRICS if settings.measures(name) and name not in unmet]
    check_measurable(settings.listed_gates(), names, unmet)
    both = {COMBINED: combined} if combined is not None else {}
    check_compared_versions(settings.listed_gates(), [*(against or {}), *(absent or {}), *both])
    models = _load_models(settings, plan, source, embedders, {CANDIDATE: adapter, **(against or {}), **both}, vae)
    adapters = models.adapters
    bundles = {BASE: (), **{role: (bundle,) for role, bundle in adapters.items()}}
    bundles |= {role: (adapters[CANDIDATE], adapters[role]) for role in both}
    stages = _Stages(progress, count_answers(plan, names, len(bundles)) if models.judge else 0)
    limits = find_prompt_limits(plan, models.embedder)
    warn_of_limits(plan, embedders, limits)
    drawn = draw_evaluation(settings, plan, model=models.base, bundles=bundles, progress=stages.of_drawing)
    judgement = _judge(models.judge, drawn.sets, names, stages.of_judge)
    evidence = Evidence(
        tuple(bundles),
        drawn.sets,
        drawn.heldout,
        drawn.training,
        trained_on=plan.trained_on,
        embedder=models.embedder,
        image_embedder=models.image_embedder,
        face_embedder=models.face_embedder,
        judgement=judgement,
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
        "samples": write_samples(evidence, out),
        "images": write_images(evidence, out, settings.keep),
        "settings": _portable(settings),
        **describe_plan(plan),
        **models.describe(),
        **({"judge": models.judge.describe(judgement)} if models.judge and judgement else {}),
        "absent": dict(absent or {}),
        "missing_embedders": dict(embedders.missing),
        **limits,
    }
    modules = adapters[CANDIDATE].adapter.modules
    write_details(out, gather_details(evidence, out, model=models.base, modules=modules, strengths=drawn.strengths))
    rounded: dict[str, Any] = _rounded(report)
    atomic_write(out / "report.json", canonical_json(rounded))
    return rounded


def find_unmeasurable(settings: EvaluateSettings, plan: EvaluationPlan, embedders: ChosenEmbedders) -> dict[str, str]:
    """Returns the metrics that are to be measured and cannot be, with the reasons."""
    available = Available(
        plan,
        embedders.text is not None,
        embedders.image is not None,
        settings.face_embedder is not None,
        settings.judge is not None,
    )
    wanted = [name for name in METRICS if settings.measures(name)]
    return {name: reason for name in wanted if (reason := METRICS[name].unmet(available))}


def _load_models(
    settings: EvaluateSettings,
    plan: EvaluationPlan,
    source: BaseSource,
    embedders: ChosenEmbedders,
    adapters: Mapping[str, Path],
    vae: str | None,
) -> _Models:
    """Loads the models, and sets the base up as the adapters were trained."""
    embedder = load_embedder(embedders.text) if embedders.text else None
    image_embedder = load_embedder(embedders.image) if embedders.image else None
    face_embedder = load_embedder(settings.face_embedder) if settings.face_embedder else None
    judge = load_judge(settings.judge) if settings.judge else None
    if judge is not None:
        judge.check(plan.reference[0])
    base = load_base(source)
    for size in plan.sizes:
        base.latent_shape(size)
    files = {role: _adapter_file(path) for role, path in adapters.items()}
    bundles = {role: _read(file, base) for role, file in files.items()}
    cards = [bundle.card for bundle in bundles.values()]
    base.configure(options_of_cards(cards, vae=resolve_vae(vae) if vae else None))
    return _Models(base, files, bundles, embedder, image_embedder, face_embedder, judge)


def _adapter_file(adapter: Path) -> Path:
    return adapter / "adapter.safetensors" if adapter.is_dir() else adapter


def _read(file: Path, model: BaseModel) -> Bundle:
    return read_bundle(file, module_names=module_shapes(model))


class _Stages:
    """The progress of the images, then of the answers of the judge, as one."""

    def __init__(self, progress: Progress, answers: int) -> None:
        self._progress, self._answers, self._drawn = progress, answers, 0

    def of_drawing(self, done: int, total: int, values: Mapping[str, float]) -> None:
        self._drawn = total
        self._progress(done, total + self._answers, values)

    def of_judge(self, done: int, total: int, values: Mapping[str, float]) -> None:
        self._progress(self._drawn + done, self._drawn + total, values)


def _portable(settings: EvaluateSettings) -> dict[str, Any]:
    """Returns the settings without names of models, which may be paths of this machine."""
    dumped = settings.model_dump(mode="json", exclude={"embedder", "image_embedder", "judge"})
    return {name: value for name, value in dumped.items() if name != "face_embedder" or value is None}


def _describe(embedder: Embedder | None) -> dict[str, str] | None:
    return {"name": embedder.name, "sha256": embedder.fingerprint} if embedder else None


def _judge(
    judge: Judge | None, sets: Mapping[RequestSet, Sequence[ImageSet]], names: Sequence[str], progress: Progress
) -> Judgement | None:
    if judge is None:
        return None
    judgement = judge.ask_all(sets, names, progress)
    judge.close()
    return judgement


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        # Six digits: further ones are rounding noise. Adding 0.0 turns -0.0 into 0.0.
        return round(value, 6) + 0.0
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
