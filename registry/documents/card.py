"""Renders the model card of a version: usage, lineage, metrics and license terms.

Writes Markdown with the front matter of the Hugging Face hub, and one self-contained HTML page. Text from files is
always escaped.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jinja2
import yaml

from registry.documents.facts import Facts, Sample, packages_digest
from registry.documents.limits import limits
from registry.documents.spdx import hub_license
from registry.policy.license_terms import forbidden_uses

_MARKUP = re.compile(r"([\\`*_\[\]<>|#~])")
_FOLDERS = {"sd": "models/Lora", "sdxl": "models/Lora"}


@dataclass(frozen=True)
class MetricRow:
    """One metric as the card shows it."""

    name: str
    base: str
    adapter: str
    difference: str
    interval: str
    verdict: str


def render_markdown(facts: Facts) -> str:
    """Returns the card in Markdown, front matter first. Deterministic."""
    matter = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{matter}---\n\n{_environment().get_template('card.md').render(_values(facts, _plain)).strip()}\n"


def render_html(facts: Facts) -> str:
    """Returns the card as one HTML page that loads nothing else. Deterministic."""
    samples = [
        {
            "prompt": sample.prompt,
            "seed": sample.seed,
            "images": [(role, _data_uri(image)) for role, image in _images(sample)],
        }
        for sample in facts.samples
    ]
    return _environment().get_template("card.html").render(_values(facts, str) | {"samples": samples})


_NUMBER = re.compile(r"-?[0-9]{1,3}(?:\.[0-9]{1,6})?")


def render_short(facts: Facts, links: Mapping[str, str]) -> str:
    """Returns a few lines of Markdown for a list of versions.

    Args:
        facts: Facts about the version.
        links: Text of a link -> its URL.
    """
    values = _values(facts, _plain) | {"links": links}
    return _environment().get_template("short.md").render(values).strip() + "\n"


def front_matter(facts: Facts) -> dict[str, Any]:
    """Returns the metadata that the hub reads at the top of a card (https://huggingface.co/docs/hub/model-cards)."""
    matter: dict[str, Any] = {"base_model": facts.base} if facts.base else {}
    if facts.base:
        matter["base_model_relation"] = "adapter"
    matter |= hub_license(facts.license)
    matter["library_name"] = "diffusers"
    matter["pipeline_tag"] = "text-to-image"
    if facts.triggers:
        matter["instance_prompt"] = _instance_prompt(facts)
    kind = [facts.kind] if facts.kind else []
    family = {"sd": "stable-diffusion", "sdxl": "stable-diffusion-xl"}.get(facts.family, facts.family)
    matter["tags"] = list(
        dict.fromkeys(["text-to-image", "diffusers", *kind, *([family] if family else []), "loraline"])
    )
    return matter


def metric_rows(metrics: Mapping[str, Any]) -> Iterator[MetricRow]:
    """Yields the metrics that have base, adapter and difference; the report has all of them."""
    for name, metric in metrics.items():
        if isinstance(metric, Mapping) and {"base", "adapter", "difference"} <= set(metric):
            low, high = metric.get("interval") or (None, None)
            yield MetricRow(
                name,
                f"{metric['base']:.4f}",
                f"{metric['adapter']:.4f}",
                f"{metric['difference']:+.4f}",
                "" if low is None else f"{low:+.4f} to {high:+.4f}",
                str(metric.get("verdict") or ""),
            )


def _values(facts: Facts, text: Any) -> dict[str, Any]:
    """Returns the values of the templates; `text` prepares text from files for the output format."""
    version = facts.version
    file = f"{version.name}-{version.version}"
    recommended = str(version.card.get("recommended") or "1")
    return {
        "recommended": recommended,
        # Other programs read a number, and not all read schedules.
        "weight": recommended if _NUMBER.fullmatch(recommended) else "1",
        "ref": version.ref,
        "title": text(facts.title),
        "file": file,
        "folder": _FOLDERS.get(facts.family, "models/Lora"),
        "base": text(facts.base),
        "base_name": facts.base,
        "kind": text(facts.kind or "adapter"),
        "triggers": [text(word) for word in facts.triggers],
        "prompt": _prompt(facts),
        "class_word": text(str(version.card.get("class_word") or "")),
        "created": f"{version.created_at:%Y-%m-%d %H:%M} UTC",
        "size": f"{version.size / 1024:.0f} KiB",
        "recipe": [(text(name), text(value)) for name, value in _flat(facts.recipe)],
        "seed": version.card.get("seed"),
        "datasets": facts.datasets,
        "consents": [(text(name), count) for dataset in facts.datasets for name, count in dataset.consents.items()],
        "metrics": [replace(row, name=text(row.name)) for row in metric_rows(version.metrics)],
        "gates": [_gate(gate, text) for gate in version.gates],
        "passed": version.passed,
        "measured_on": {"heldout": "kept from training", "training": "trained on"}.get(
            str(facts.report.get("measured_on")), ""
        ),
        "limits": [text(limit) for limit in limits(facts)],
        "terms": {
            "name": text(facts.license or ""),
            "origin": text(facts.terms_origin),
            "unknown": [text(what) for what in sorted(facts.terms.unknown)],
            "sources": [(text(where), text(what)) for where, what in facts.terms_sources],
            **{
                part: [text(word) for word in sorted(getattr(facts.terms, part))]
                for part in ("permissions", "obligations")
            },
            "forbidden": [text(use) for use in forbidden_uses(facts.terms)],
        },
        "steps": [(text(step.step), step.uses, step.output.sha256 if step.output else "") for step in facts.steps],
        "parents": [(text(parent.name), parent.sha256 or "") for parent in facts.parents],
        "digests": list(_digests(facts)),
        "builder": facts.builder,
        "fingerprint": facts.base_fingerprint,
        "code": _code,
        "shell": _shell,
    }


def _digests(facts: Facts) -> Iterator[tuple[str, str]]:
    version = facts.version
    yield "adapter file", version.sha256
    yield "artifact", version.artifact.sha256
    if version.report:
        yield "report", version.report.sha256
    if facts.base_fingerprint:
        yield "base", facts.base_fingerprint
    for dataset in facts.datasets:
        yield dataset.role.replace("_", " "), dataset.artifact.sha256
    digest = packages_digest(facts.maker) if facts.maker else None
    if digest:
        yield "packages", digest


def _gate(gate: Mapping[str, Any], text: Any) -> tuple[str, str, str, str]:
    limits_of = [f"at least {gate['min']:g}"] if gate.get("min") is not None else []
    limits_of += [f"at most {gate['max']:g}"] if gate.get("max") is not None else []
    value = gate.get("value")
    shown = f"{value:.4f}" if isinstance(value, (int, float)) else text(str(value))
    details = [str(gate["of"])] if gate.get("of") else []
    details += [f"against {gate['against']}"] if gate.get("against", "base") != "base" else []
    details += [f"{gate['on']} bound"] if gate.get("on", "value") != "value" else []
    name = f"{gate.get('metric', '?')}" + (f" ({', '.join(details)})" if details else "")
    return text(name), " and ".join(limits_of), shown, "passed" if gate.get("passed") is True else "FAILED"


def _instance_prompt(facts: Facts) -> str:
    return " ".join(filter(None, [facts.triggers[0], str(facts.version.card.get("class_word") or "")]))


def _prompt(facts: Facts) -> str:
    """Returns a prompt with the trigger, from the report's samples if they have one."""
    prompts = [sample.prompt for sample in facts.samples if any(word in sample.prompt for word in facts.triggers)]
    return (prompts or [_instance_prompt(facts) if facts.triggers else "an image"])[0]


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in sorted(recipe.items()):
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif value not in (None, [], {}, ""):
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{name}", shown if len(shown) <= 300 else f"{shown[:300]} ..."


def _plain(text: str) -> str:
    """Returns the text as one line of Markdown with all markup escaped."""
    return _MARKUP.sub(r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    """Returns the text for use inside backticks, with its own backticks replaced."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "/")


def _shell(*parts: str) -> str:
    """Returns one quoted shell argument, because a user may paste the command and a caption may contain shell code."""
    return shlex.quote(" ".join(" ".join(parts).split()))


def _images(sample: Sample) -> Iterator[tuple[str, bytes]]:
    yield "base", sample.base
    yield "adapter", sample.adapter


def _data_uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("registry.documents", "templates"),
        autoescape=jinja2.select_autoescape(["html"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
