"""Builds the documents written beside the adapter: its card and its training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lora_engine.bases.base import BaseModel
from lora_engine.data.manifest import Manifest
from lora_engine.files import canonical_json, sha256_bytes
from lora_engine.formats import Card
from lora_engine.settings import names_without_effect, without_later
from lora_engine.training.choosing import Check, Chooser
from lora_engine.training.examples import Example
from lora_engine.training.fit_options import History
from lora_engine.training.initial import InitialAdapter
from lora_engine.training.prior import prior_prompts
from lora_engine.training.spec import Prior, TrainSettings

_POINTS = 500


def card_of(
    settings: TrainSettings,
    base: BaseModel,
    manifest: Manifest,
    classes: Sequence[Example] = (),
    *,
    has_class_dataset: bool = False,
    initial: InitialAdapter | None = None,
) -> Card:
    """Returns the card for the adapter's header.

    Its recipe has the settings that change the adapter, and under `done` what the settings leave open.

    Args:
        settings: Settings of the run, with all lengths in steps.
        base: The base.
        manifest: The dataset.
        classes: Class images of prior preservation.
        has_class_dataset: True if they are from another dataset.
        initial: The adapter that the training started from.
    """
    dumped = settings.model_dump(mode="json", exclude=names_without_effect(TrainSettings))
    source = "class_dataset" if has_class_dataset else "dataset" if manifest.of_split("class") else "drawn"
    done: dict[str, Any] = {"class_images": _describe_classes(settings, manifest, classes, source)} if classes else {}
    done |= {"init": initial.parent} if initial else {}
    return Card(
        title=" ".join(word for word in (manifest.trigger, manifest.class_word) if word),
        base=base.name,
        base_fingerprint=base.fingerprint,
        trigger=manifest.trigger,
        class_word=manifest.class_word,
        recipe={
            **without_later(settings, dumped),
            **base.options.recipe(),
            **({"done": done} if done else {}),
            **({"parents": [initial.parent]} if initial else {}),
        },
        data=sorted({image.sha256 for image in manifest.of_split("train")} | set(initial.card.data if initial else ())),
        seed=settings.seed,
        license=initial.card.license if initial else None,
        resolution="{1}x{0}".format(*base.default_size),
        prediction=base.noise.parameterization,
        recommended=settings.recommended,
    )


def _describe_classes(
    settings: TrainSettings, manifest: Manifest, classes: Sequence[Example], source: str
) -> dict[str, Any]:
    """Returns the class images of a run: their number, source, digest and, if the base drew them, how."""
    prior = settings.class_images or Prior()
    drawn: dict[str, Any] = {"prompts": list(prior_prompts(prior, manifest.class_word))} if source == "drawn" else {}
    drawn |= {"steps": prior.steps, "guidance": prior.guidance} if drawn else {}
    return {
        "source": source,
        "count": len(classes),
        "sha256": sha256_bytes(canonical_json(sorted(example.digest for example in classes))),
        "weight": prior.weight,
        "batches": prior.batches,
        **drawn,
    }


def with_saved(card: Card, step: int, loss: float | None) -> Card:
    """Returns the card of an adapter that was saved during training, with its step and validation loss."""
    return with_recipe(card, saved={"step": step, "validation_loss": loss})


def with_recipe(card: Card, **values: Any) -> Card:
    """Returns the card with other values in its recipe."""
    return card.model_copy(update={"recipe": {**card.recipe, **values}})


def describe_choices(
    chooser: Chooser | None,
    checks: Sequence[Check],
    settings: TrainSettings,
    automatic: Sequence[str],
    evidence: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what a training chose, as `training.json` holds it.

    Args:
        chooser: The rules by which it chose its best step.
        checks: The scores of the candidates, after that before the first step.
        settings: The settings, with the chosen values.
        automatic: Names of the settings that it chose.
        evidence: Name to value, figures and reason.

    Returns:
        `chosen` and `candidates` with a chooser, and `automatic` with automatic settings.
    """
    described = chooser.describe(checks[0], checks[1:], settings.steps) if chooser is not None and checks else {}
    evidence = dict(evidence)
    if "steps" in automatic and described:
        steps = {"chosen": described["chosen"]["step"], "limit": settings.steps}
        evidence["steps"] = {**steps, "why": described["candidates"]["why"]}
    return {**described, **({"automatic": evidence} if automatic else {})}


def with_choices(card: Card, choices: Mapping[str, Any]) -> Card:
    """Returns the card with what the training chose, without long tables, under `done` in its recipe."""
    if not choices:
        return card
    done = dict(card.recipe.get("done", {}))
    if "chosen" in choices:
        chosen = {name: choices["chosen"][name] for name in ("step", "by", "score", "leave_one_out")}
        done["best_checkpoint"] = {
            **chosen,
            "among": len(choices["chosen"]["from"]),
            "why": choices["candidates"]["why"],
        }
    if "automatic" in choices:
        done["automatic"] = {
            name: {key: value for key, value in entry.items() if key in ("chosen", "best", "losses", "limit", "why")}
            for name, entry in choices["automatic"].items()
        }
    return with_recipe(card, done=done)


def curves_of(
    history: History,
    trained_on: Sequence[str],
    saved: Sequence[tuple[int, float | None]] = (),
    choices: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Returns the content of `training.json`.

    Args:
        history: Losses and rates.
        trained_on: Digests of the training images.
        saved: (step, validation loss) of each saved adapter.
        choices: What the training chose; see `describe_choices`.
    """
    entries = [{"step": step, "file": saved_name(step), "validation_loss": loss} for step, loss in saved]
    return {
        "loss": downsample(history.loss),
        "lr": downsample(history.rate),
        "validation_loss": [list(entry) for entry in history.validation],
        "trained_on": list(trained_on),
        **({"saved": entries} if entries else {}),
        **choices,
    }


def saved_name(step: int) -> str:
    """Returns the path of a saved adapter within the artifact."""
    return f"saved/step-{step:06d}.safetensors"


def downsample(values: Sequence[float]) -> list[list[float]]:
    """Returns (step, value): every step up to 500; beyond, 500 evenly spaced ones with the first and the last."""
    count = len(values)
    if count <= _POINTS:
        steps = list(range(count))
    else:
        steps = sorted({round(point * (count - 1) / (_POINTS - 1)) for point in range(_POINTS)})
    return [[step + 1, values[step]] for step in steps]
