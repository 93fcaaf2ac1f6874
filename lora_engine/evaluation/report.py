"""Renders the report as one self-contained HTML page: embedded images, no scripts, no external resources.

All text from files (captions, names, settings) is escaped. Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_engine.data.images import open_image
from lora_engine.data.manifest import Manifest
from lora_engine.data.pages import embed_image, load_template
from lora_engine.errors import DataError
from lora_engine.evaluation.chart import draw_interval, draw_loss
from lora_engine.evaluation.choices import describe_training_choices
from lora_engine.evaluation.details import read_details
from lora_engine.evaluation.evidence import CANDIDATE, MIN_GROUPS
from lora_engine.evaluation.first_lines import states_coverage, write_headline, write_notices
from lora_engine.evaluation.metrics import METRICS
from lora_engine.evaluation.sections import default_recipe, detail_sections, fold_defaults

MAX_TRAINING_IMAGES = 24

_PAGE = Path(__file__).with_name("report.html")
_MAX_SIDE = 512
_QUALITY = 90
_STRIP_SIDE = 256
_MAX_COLUMNS = 12
_IMAGE_NAME = re.compile(r"(pictures|samples/step-[0-9]+)/[A-Za-z0-9._-]+\.png")
_KINDS = {
    "paired": ("Against real images", "Captions of real images; the third image is the real one."),
    "asked": ("Prompts", "The prompts of this evaluation."),
    "unasked": ("Without the trigger", "The same prompts without the trigger; the adapter should change little."),
    "class": ("The class", "Prompts of the class word; the adapter should change little."),
    "unrelated": ("Unrelated prompts", "A fixed list of prompts; the adapter should change little."),
}
_VERDICTS = {
    "better": "better",
    "worse": "worse",
    "unclear": "no clear difference",
    "distance": "set a gate",
    "too few": "too few groups",
}


def render_report(
    title: str,
    report: Mapping[str, Any],
    report_folder: Path,
    *,
    training: Mapping[str, Any] | None = None,
    adapter_folder: Path | None = None,
    dataset_folder: Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    lineage: Sequence[Mapping[str, Any]] = (),
    version: Mapping[str, Any] | None = None,
    rights: Mapping[str, Any] | None = None,
    votes: Mapping[str, str] | None = None,
) -> str:
    """Returns the page as an HTML string; the same arguments and files give the same string.

    Args:
        title: The heading, such as the adapter's name.
        report: The content of `report.json`.
        report_folder: The folder that contains its `pictures/`.
        training: The content of the adapter's `training.json`.
        adapter_folder: The adapter's artifact; the page shows its `samples/`, drawn during the training.
        dataset_folder: The training dataset; the page shows its images and quarantined files.
        recipe: Settings of the training; nested ones are shown as `outer.inner`, defaults are folded away.
        lineage: One mapping per step: `step`, `uses`, `output` (its digest), `inputs` (names or digests, listed or by
            role), `warnings`.
        version: Any of `name`, `version`, `sha256`, `size`, `created_at`.
        rights: Any of `license`, `consent` and `revoked`: texts, or lists of them.
        votes: What blind votes of users say, by a title.

    Raises:
        DataError: An image that the report names is missing or outside its folder, or `details.json` is broken.
    """
    context = {
        "title": title,
        "report": report,
        "verdict": _verdict(report),
        "headline": list(write_headline(report)),
        "notices": list(write_notices(report)),
        "states_coverage": states_coverage(report),
        "groups": _sample_groups(report, report_folder),
        "metrics": _metric_rows(report),
        "gates": [_gate_row(gate) for gate in report.get("gates", [])],
        "chart": draw_loss(training.get("loss", []), training.get("validation_loss", [])) if training else None,
        "has_validation": bool(training and training.get("validation_loss")),
        "choices": list(describe_training_choices(training or {})),
        "strips": _training_strips(adapter_folder) if adapter_folder is not None else [],
        "warnings": [(entry.get("step", ""), text) for entry in lineage for text in entry.get("warnings", ())],
        "dataset": _dataset(dataset_folder) if dataset_folder is not None else None,
        "recipe": fold_defaults(list(_flatten(recipe or {})), dict(_flatten(default_recipe()))),
        "rights": [(name, text) for name, text in _flatten(rights or {}) if text != "none"],
        "votes": list((votes or {}).items()),
        "lineage": _lineage_rows(lineage),
        "version": dict(version) if version else {},
        "file_name": re.sub(r"[^A-Za-z0-9._-]+", "-", str((version or {}).get("name") or title)).strip("-.")
        or "adapter",
        **detail_sections(read_details(report_folder), lambda name: _embed(report_folder, name, _STRIP_SIDE)),
    }
    return load_template(_PAGE).render(context)


def _verdict(report: Mapping[str, Any]) -> dict[str, str]:
    gates = report.get("gates", [])
    failed = sum(not gate["passed"] for gate in gates)
    if not gates:
        return {"class": "none", "text": "No gates set"}
    if failed:
        return {"class": "bad", "text": f"{failed} of {len(gates)} gates failed"}
    return {"class": "good", "text": "All gates passed" if len(gates) > 1 else "The gate passed"}


def _sample_groups(report: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    groups = []
    for kind, (name, meaning) in _KINDS.items():
        samples = [
            {
                "prompt": sample["prompt"],
                "seed": sample["seed"],
                "images": [(label, _embed(folder, file)) for label, file in _images_of(sample)],
            }
            for sample in report.get("samples", [])
            if sample.get("kind", "asked") == kind
        ]
        if samples:
            groups.append({"name": name, "meaning": meaning, "samples": samples})
    return groups


def _images_of(sample: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the label and file of each image of a sample: base, other versions, adapter, real image."""
    others = sample.get("others")
    labeled = [
        ("base", sample.get("base")),
        *(others.items() if isinstance(others, Mapping) else ()),
        ("with adapter", sample.get("adapter")),
        ("real image", sample.get("reference")),
    ]
    yield from ((label, file) for label, file in labeled if file)


def _training_strips(folder: Path) -> list[dict[str, Any]]:
    """Returns one strip per prompt and seed: the sample images by step, evenly thinned to a few."""
    about = folder / "samples" / "samples.json"
    if not about.is_file():
        return []
    samples = json.loads(about.read_bytes())
    steps = sorted((path.name for path in (folder / "samples").glob("step-*")), key=lambda name: int(name[5:]))
    if len(steps) > _MAX_COLUMNS:
        steps = [steps[round(index * (len(steps) - 1) / (_MAX_COLUMNS - 1))] for index in range(_MAX_COLUMNS)]
    return [
        {
            "prompt": prompt,
            "seed": seed,
            "images": [
                (int(step[5:]), _embed(folder, file, _STRIP_SIDE))
                for step in steps
                if (folder / (file := f"samples/{step}/{number:02d}-{seed}.png")).is_file()
            ],
        }
        for number, prompt in enumerate(samples["prompts"])
        for seed in samples["seeds"]
    ]


def _known(metrics: Mapping[str, Any]) -> list[str]:
    """Returns the metrics of a report that are registered here, in the order of the registry."""
    return [name for name in METRICS if name in metrics]


def _metric_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of the metrics against the base, then those against each other version."""
    rows = []
    for other, metrics in {"base": report.get("metrics", {}), **report.get("comparisons", {})}.items():
        known = _known(metrics)
        for name in [*known, *sorted(metrics.keys() - known)]:
            title, meaning = (METRICS[name].title, METRICS[name].meaning) if name in METRICS else (name, "")
            metric = metrics[name]
            differences = _differences(report, name, other)
            rows.append(
                {
                    **metric,
                    "other": other,
                    "before": metric["base"] if other == "base" else metric["other"],
                    "name": name,
                    "title": title,
                    "meaning": meaning if other == "base" else "",
                    "verdict": _VERDICTS.get(metric["verdict"], metric["verdict"]),
                    "class": {"better": "good", "worse": "bad"}.get(metric["verdict"], "none"),
                    "chart": draw_interval(metric["difference"], metric["interval"], metric["better"], differences),
                }
            )
    return rows


def _differences(report: Mapping[str, Any], name: str, other: str) -> list[float]:
    """Returns the difference of each group if there are too few for an interval."""
    values = report.get("units", {}).get(name, {}).get("values", {})
    before, after = values.get(other, []), values.get(CANDIDATE, [])
    return [new - old for old, new in zip(before, after, strict=True)] if 1 < len(after) < MIN_GROUPS else []


def _gate_row(gate: Mapping[str, Any]) -> dict[str, Any]:
    name, low, high = gate["metric"], gate["min"], gate["max"]
    bounds = [f"at least {low:g}"] if low is not None else []
    bounds += [f"at most {high:g}"] if high is not None else []
    title = METRICS[name].title if name in METRICS else name
    return {**gate, "name": name, "title": title, "bounds": " and ".join(bounds)}


def _dataset(folder: Path) -> dict[str, Any]:
    manifest = Manifest.load(folder)
    trained = manifest.of_split("train")
    shown = [
        {"image": _embed(folder, image.file), "caption": image.caption, "source": image.source}
        for image in trained[:MAX_TRAINING_IMAGES]
    ]
    return {
        "shown": shown,
        "trained": len(trained),
        "heldout": len(manifest.of_split("heldout")),
        "quarantined": manifest.quarantined,
    }


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{name}", ", ".join(map(str, value)) or "none"
        else:
            yield f"{prefix}{name}", "not set" if value is None or value == {} else str(value)


def _lineage_rows(lineage: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    digests = {_digest(entry): str(entry.get("step", "")) for entry in lineage}
    rows = []
    for entry in lineage:
        inputs = entry.get("inputs") or []
        values = inputs.values() if isinstance(inputs, Mapping) else inputs
        rows.append(
            {
                "step": str(entry.get("step", "")),
                "kind": str(entry.get("uses") or ""),
                "digest": _digest(entry),
                "inputs": [digests.get(str(value)) or _short(str(value)) for value in values],
            }
        )
    return rows


def _digest(entry: Mapping[str, Any]) -> str:
    return str(entry.get("output") or "")


def _short(value: str) -> str:
    return value[:12] if re.fullmatch(r"[0-9a-f]{40,64}", value) else value


def _embed(folder: Path, name: str, side: int = _MAX_SIDE) -> dict[str, Any]:
    # The name is untrusted: it comes from a file.
    if not isinstance(name, str) or not _IMAGE_NAME.fullmatch(name):
        raise DataError(f"invalid image name {name!r}", where=str(folder), allowed="names such as pictures/00-base.png")
    return embed_image(open_image(folder / name, root=folder), side, _QUALITY)
