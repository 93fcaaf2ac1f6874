"""The model card: what a version is, how to use it, what it was made from, how well it does, and under which terms.

In Markdown with the front matter of the Hugging Face hub, and as one self-contained page. What comes from files is text
to be escaped, never markup.
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

_MARKUP = re.compile(r"([\\`*_\[\]<>|#~])")
_PLACE = {"sd": "models/Lora", "sdxl": "models/Lora"}


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
    """The card in Markdown, front matter first; the same facts give the same text."""
    matter = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{matter}---\n\n{_environment().get_template('card.md').render(_words(facts, _plain)).strip()}\n"


def render_html(facts: Facts) -> str:
    """The card as one page that loads nothing from elsewhere; the same facts give the same page."""
    samples = [
        {
            "prompt": each.prompt,
            "seed": each.seed,
            "pictures": [(role, _data_uri(picture)) for role, picture in _images(each)],
        }
        for each in facts.samples
    ]
    return _environment().get_template("card.html").render(_words(facts, str) | {"samples": samples})


def render_short(facts: Facts, links: Mapping[str, str]) -> str:
    """A few lines of Markdown for a list or a page that shows many versions.

    Args:
        facts: What is known.
        links: Text of a link -> its address.
    """
    words = _words(facts, _plain) | {"links": links}
    return _environment().get_template("short.md").render(words).strip() + "\n"


def front_matter(facts: Facts) -> dict[str, Any]:
    """What the hub reads at the top of a card (https://huggingface.co/docs/hub/model-cards)."""
    found: dict[str, Any] = {"base_model": facts.base} if facts.base else {}
    if facts.base:
        found["base_model_relation"] = "adapter"
    found |= hub_license(facts.terms.name)
    found["library_name"] = "diffusers"
    found["pipeline_tag"] = "text-to-image"
    if facts.triggers:
        found["instance_prompt"] = _instance_prompt(facts)
    kind = [facts.kind] if facts.kind else []
    family = {"sd": "stable-diffusion", "sdxl": "stable-diffusion-xl"}.get(facts.family, facts.family)
    found["tags"] = list(
        dict.fromkeys(["text-to-image", "diffusers", *kind, *([family] if family else []), "loraline"])
    )
    return found


def metric_rows(metrics: Mapping[str, Any]) -> Iterator[MetricRow]:
    """The metrics with base, adapter, difference and interval; others are in the report alone."""
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


def _words(facts: Facts, text: Any) -> dict[str, Any]:
    """What the templates are filled with; `text` makes what comes from files fit for the place where it goes."""
    version = facts.version
    file = f"{version.name}-{version.version}"
    return {
        "ref": version.ref,
        "title": text(facts.title),
        "file": file,
        "place": _PLACE.get(facts.family, "models/Lora"),
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
        "consents": [(text(name), count) for each in facts.datasets for name, count in each.consents.items()],
        "metrics": [replace(row, name=text(row.name)) for row in metric_rows(version.metrics)],
        "gates": [_gate(gate, text) for gate in version.gates],
        "passed": version.passed,
        "measured_on": {"heldout": "kept from training", "train": "trained on"}.get(
            str(facts.report.get("measured_on")), ""
        ),
        "limits": [text(limit) for limit in limits(facts)],
        "terms": {
            "name": text(facts.terms.name or ""),
            "origin": text(facts.terms.origin),
            "unknown": [text(what) for what in facts.terms.unknown],
            "sources": [(text(where), text(what)) for where, what in facts.terms.sources],
            **{
                part: [text(word) for word in getattr(facts.terms, part)]
                for part in ("permissions", "obligations", "restrictions")
            },
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
    name = f"{gate.get('metric', '?')} ({gate['of']})" if gate.get("of") else str(gate.get("metric", "?"))
    return text(name), " and ".join(limits_of), shown, "passed" if gate.get("passed") is True else "FAILED"


def _instance_prompt(facts: Facts) -> str:
    return " ".join(filter(None, [facts.triggers[0], str(facts.version.card.get("class_word") or "")]))


def _prompt(facts: Facts) -> str:
    """A prompt that shows the concept: of the report's pictures, or made of the trigger."""
    shown = [sample.prompt for sample in facts.samples if any(word in sample.prompt for word in facts.triggers)]
    return (shown or [_instance_prompt(facts) if facts.triggers else "a picture"])[0]


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in sorted(recipe.items()):
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif value not in (None, [], {}, ""):
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"{prefix}{name}", shown if len(shown) <= 300 else f"{shown[:300]} ..."


def _plain(text: str) -> str:
    """The text as Markdown that shows exactly it: one line, nothing of it markup."""
    return _MARKUP.sub(r"\\\1", " ".join(str(text).split()))


def _code(text: str) -> str:
    """The text inside of backticks, of which it can hold none."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "/")


def _shell(*parts: str) -> str:
    """One argument of a command: whoever copies it runs what it says, and not what a caption says."""
    return shlex.quote(" ".join(" ".join(parts).split()))


def _images(sample: Sample) -> Iterator[tuple[str, bytes]]:
    yield "base", sample.base
    yield "adapter", sample.adapter


def _data_uri(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


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
