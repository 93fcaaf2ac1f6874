"""The report as one self-contained HTML page: pictures inside, no scripts, nothing loaded from elsewhere.

Everything that comes from files (captions, names, settings) is text to be escaped, never markup. Torch-free.
"""

from __future__ import annotations

import base64
import functools
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from lora_engine.data.images import encode_png, open_image
from lora_engine.data.manifest import Manifest
from lora_engine.errors import DataError
from lora_engine.evaluation.catalogue import CATALOGUE, MetricInfo
from lora_engine.evaluation.chart import draw_interval, draw_loss

MAX_TRAINING_PICTURES = 24

_SHOWN_SIDE = 512
_PIXEL_ART_SIDE = 128
_PICTURE_NAME = re.compile(r"pictures/[A-Za-z0-9._-]+\.png")
_KINDS = {
    "paired": ("Against real pictures", "Captions of real pictures; the third picture is the real one."),
    "asked": ("Prompts", "What was asked for in the prompts."),
    "unasked": ("Without the trigger", "The same prompts without the trigger: here the adapter should change little."),
}
_VERDICTS = {"better": "better", "worse": "worse", "unclear": "no clear difference", "distance": "for a gate"}


def render_report(
    title: str,
    report: Mapping[str, Any],
    report_folder: Path,
    *,
    training: Mapping[str, Any] | None = None,
    dataset_folder: Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    lineage: Sequence[Mapping[str, Any]] = (),
    version: Mapping[str, Any] | None = None,
) -> str:
    """The page as a string of HTML; the same arguments and files give the same string.

    Args:
        title: The heading, such as the adapter's name.
        report: The content of `report.json`.
        report_folder: Where its `pictures/` are.
        training: The content of the adapter's `training.json`.
        dataset_folder: The dataset that was trained on; its pictures and quarantined files are shown.
        recipe: Settings; nested ones are shown as `outer.inner`.
        lineage: One mapping a step: `step`, `uses`, `output` (its digest), `inputs` (names or digests, listed or by
            role).
        version: `name`, `version`, `sha256`, `size`, `created_at`; any of them.

    Raises:
        DataError: A picture that the report names is missing or not inside its folder.
    """
    context = {
        "title": title,
        "report": report,
        "verdict": _verdict(report),
        "headline": list(_headline(report)),
        "groups": _sample_groups(report, report_folder),
        "metrics": _metric_rows(report),
        "gates": [_gate_row(gate) for gate in report.get("gates", [])],
        "chart": draw_loss(training.get("loss", []), training.get("validation_loss", [])) if training else None,
        "has_validation": bool(training and training.get("validation_loss")),
        "dataset": _dataset(dataset_folder) if dataset_folder is not None else None,
        "recipe": list(_flatten(recipe or {})),
        "lineage": _lineage_rows(lineage),
        "version": dict(version) if version else {},
        "file_name": re.sub(r"[^A-Za-z0-9._-]+", "-", str((version or {}).get("name") or title)).strip("-.")
        or "adapter",
    }
    return _template().render(context)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def _verdict(report: Mapping[str, Any]) -> dict[str, str]:
    gates = report.get("gates", [])
    failed = sum(not gate["passed"] for gate in gates)
    if not gates:
        return {"class": "none", "text": "No gates set"}
    if failed:
        return {"class": "bad", "text": f"{failed} of {len(gates)} gates failed"}
    return {"class": "good", "text": "All gates passed" if len(gates) > 1 else "The gate passed"}


def _headline(report: Mapping[str, Any]) -> Iterator[str]:
    metrics = report.get("metrics", {})
    if likeness := metrics.get("clip_i_paired"):
        verdict = {"better": "closer to", "worse": "further from", "unclear": "not clearly closer to"}[
            likeness["verdict"]
        ]
        yield (
            f"With the adapter, pictures are {verdict} the real ones than the base's: likeness "
            f"{likeness['base']:.2f} became {likeness['adapter']:.2f}."
        )
    if drift := metrics.get("drift"):
        yield f"Without the trigger it moves the base's pictures by {drift['adapter']:.2f} (0 is untouched)."


def _sample_groups(report: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    groups = []
    for kind, (name, meaning) in _KINDS.items():
        samples = [
            {
                "prompt": sample["prompt"],
                "seed": sample["seed"],
                "pictures": [
                    (label, _embed(folder, sample[role]))
                    for role, label in (("base", "base"), ("adapter", "with adapter"), ("reference", "real picture"))
                    if sample.get(role)
                ],
            }
            for sample in report.get("samples", [])
            if sample.get("kind", "asked") == kind
        ]
        if samples:
            groups.append({"name": name, "meaning": meaning, "samples": samples})
    return groups


def _metric_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    metrics = report.get("metrics", {})
    order = [name for name in CATALOGUE if name in metrics] + sorted(set(metrics) - set(CATALOGUE))
    rows = []
    for name in order:
        found = metrics[name]
        info = CATALOGUE[name] if name in CATALOGUE else MetricInfo(name, found["better"], "")
        rows.append(
            {
                **found,
                "name": name,
                "info": info,
                "verdict": _VERDICTS[found["verdict"]],
                "class": {"better": "good", "worse": "bad"}.get(found["verdict"], "none"),
                "drawing": draw_interval(found["difference"], found["interval"], found["better"]),
            }
        )
    return rows


def _gate_row(gate: Mapping[str, Any]) -> dict[str, Any]:
    name, low, high = gate["metric"], gate["min"], gate["max"]
    bounds = [f"at least {low:g}"] if low is not None else []
    bounds += [f"at most {high:g}"] if high is not None else []
    title = CATALOGUE[name].title if name in CATALOGUE else name
    return {**gate, "name": name, "title": title, "wanted": " and ".join(bounds)}


def _dataset(folder: Path) -> dict[str, Any]:
    manifest = Manifest.load(folder)
    trained = manifest.of_split("train")
    shown = [
        {"picture": _embed(folder, picture.file), "caption": picture.caption, "source": picture.source}
        for picture in trained[:MAX_TRAINING_PICTURES]
    ]
    return {
        "shown": shown,
        "trained": len(trained),
        "heldout": len(manifest.pictures) - len(trained),
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


def _embed(folder: Path, name: str) -> dict[str, Any]:
    # The name comes out of a file that others may have written.
    if not isinstance(name, str) or not _PICTURE_NAME.fullmatch(name):
        raise DataError(f"names the picture {name!r}", where=str(folder), allowed="names like pictures/00-base.png")
    picture = open_image(folder / name, root=folder)
    pixel_art = max(picture.size) <= _PIXEL_ART_SIDE
    if pixel_art:
        kind, content = "png", encode_png(picture)
    else:
        picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=90)
        kind, content = "jpeg", buffer.getvalue()
    return {
        "uri": f"data:image/{kind};base64,{base64.b64encode(content).decode()}",
        "width": picture.width,
        "height": picture.height,
        "pixel_art": pixel_art,
    }
