"""Completes translated settings: what depends on several options, and options whose name another one switches off."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args

from pydantic import BaseModel

from flows.coming_from.carry_layers import drop_unsuited, set_layers
from flows.coming_from.carry_samples import set_intervals
from flows.coming_from.read import Setting
from flows.coming_from.translation import Translation
from lora_engine.training.spec import TrainSettings
from lora_engine.training.specs.objective import Objective
from lora_engine.training.specs.rates import AdamW, Optimizer, Rates
from lora_engine.training.specs.sample_prompts import PROMPT_OPTIONS

_PROMPT_OPTION = re.compile(r"(?:^|\s)--(\w+)(?=\s)")
_DECAYED = {"adamw", "adamw-8bit"}
_TORCH_DECAY = 0.01
_LOWEST, _HIGHEST = 0.01, 100.0
"""Factors on an estimated rate that `Rates.check` allows."""


def finish(translation: Translation, trainer: str, count: Callable[[], int | None]) -> None:
    """Completes a translation in place.

    Args:
        translation: The settings.
        trainer: A key of `TRAINERS`.
        count: Returns the images of an epoch, each counted by its repeats, or None; called if a length in steps has to
            fit epochs.
    """
    set_layers(translation, trainer)
    if trainer == "diffusers" and translation.origins.get("train.steps") == "max_train_steps":
        translation.counts.pop("epochs", None)  # the steps win there, and the epochs in sd-scripts
    _set_steps(translation, count)
    set_intervals(translation)
    _set_decay(translation)
    train = translation.steps["train"]
    for switch, group, key in (("ema", "rates", "ema"), ("mask", "method", "mask")):
        if switch not in translation.counts and isinstance(train.get(group), dict):
            train[group].pop(key, None)  # its options were set, but not itself
    for path, model, field in (
        ("train.rates.optimiser", Rates, "optimiser"),
        ("train.schedule", TrainSettings, "schedule"),
        ("train.objective.loss", Objective, "loss"),
        ("train.kind", TrainSettings, "kind"),
    ):
        _keep_options(translation, path, model, field)
    drop_unsuited(translation)
    _fit_optimizer(translation)
    if (processes := translation.get("train.running.processes") or 1) > 1:
        translation.set("train.batch", train["batch"] * processes, "train_batch_size, for all processes")
    _set_objective(translation, trainer)
    for group in [key for key, value in train.items() if value == {} and key != "prior"]:
        train.pop(group)
    samples = train.get("samples", {})
    is_drawn = trainer != "sd" or "every" in samples  # sd-scripts draws none without an interval
    if not samples.get("prompts") or not is_drawn:
        train.pop("samples", None)
    else:
        samples.setdefault("every", 250)
        prompts = [_known_options(translation, prompt) for prompt in samples["prompts"]]
        samples["prompts"] = [prompt + _prompt_options(translation, prompt) for prompt in prompts]


def _known_options(translation: Translation, prompt: str) -> str:
    """Returns a prompt without the options that have no counterpart, such as a control image."""
    parts = re.split(r"(?:^|\s)(?=--[a-zA-Z]\w*(?:\s|$))", prompt)
    unknown = [part for part in parts if part.startswith("--") and part[2:].split()[0] not in PROMPT_OPTIONS]
    for part in unknown:
        translation.drop(Setting("an option of a sample prompt", part, ""), "there is no counterpart")
    return " ".join(part for part in parts if part not in unknown)


def _prompt_options(translation: Translation, prompt: str) -> str:
    """Returns the options of every sample prompt that a prompt does not set, in the syntax of sd-scripts."""
    counts, texts = translation.counts, translation.texts
    options = {
        "w": counts.get("sample width"),
        "h": counts.get("sample height"),
        "ss": texts.get("sample sampler"),
        "n": texts.get("sample negative"),
    }
    own = set(_PROMPT_OPTION.findall(prompt))
    set_here = {key: value for key, value in options.items() if value and key not in own}
    return "".join(
        f" --{key} {value:g}" if isinstance(value, float | int) else f" --{key} {value}"
        for key, value in set_here.items()
    )


def _set_steps(translation: Translation, count: Callable[[], int | None]) -> None:
    counts, train = translation.counts, translation.steps["train"]
    if (epochs := counts.get("epochs")) is not None:
        text = f"{max(1, round(epochs))} epoch{'s' if epochs > 1 else ''}"
        translation.set("train.steps", text, translation.origins["epochs"])
    if "warmup" in counts:
        translation.set("train.warmup", f"{100 * counts['warmup']:.4g}%", translation.origins["train.warmup"])
    warmup, decay = train.get("warmup", 0), counts.get("decay", 0)
    if not (decay or (isinstance(warmup, int) and warmup)):
        return
    steps = _count_steps(train, epochs, count)
    if isinstance(warmup, int) and warmup and steps is not None and warmup >= steps:
        translation.drop(Setting("warmup", train.pop("warmup"), ""), f"the run has {steps} steps only")
    if 0 < decay < 1:
        translation.set("train.schedule.decay", decay, "lr_decay_steps")
    elif decay and steps is not None:
        after = steps - (warmup if isinstance(warmup, int) else round(counts["warmup"] * steps))
        translation.set("train.schedule.decay", min(1.0, round(decay / max(1, after), 6)), "lr_decay_steps")
    elif decay:
        translation.drop(Setting("lr_decay_steps", decay, ""), "images unknown; decay is a share of the steps")


def _count_steps(train: dict[str, Any], epochs: float | None, count: Callable[[], int | None]) -> int | None:
    """Returns the steps of the run; None if they are epochs of images that are not there."""
    if epochs is None:
        return int(train["steps"])
    images = count()
    size = max(1, train.get("batch", 4) * train.get("accumulate", 1))
    return None if images is None else max(1, round(epochs) * -(-images // size))


def _set_decay(translation: Translation) -> None:
    name = translation.name_of("train.rates.optimiser")
    if name in _DECAYED and "train.weight_decay" not in translation.origins:
        translation.set("train.weight_decay", _TORCH_DECAY, "default of torch's AdamW")


def _fit_optimizer(translation: Translation) -> None:
    """Changes the settings that the optimizer excludes, as other trainers do not check them."""
    train = translation.steps["train"]
    name = translation.name_of("train.rates.optimiser")
    member = next((m for m in _members(Rates, "optimiser") if m.model_fields["name"].default == name), AdamW)
    if not issubclass(member, Optimizer):
        return
    if member.finds_rate:
        for key in [key for key in ("text", "layers", "up_ratio") if key in train["rates"]]:
            translation.drop(Setting(key, train["rates"].pop(key), ""), f"{name} estimates one rate for all parts")
        if not _LOWEST <= train["learning_rate"] <= _HIGHEST:
            reason = f"a factor on the rate that {name} estimates; 1 was taken"
            translation.drop(Setting("learning_rate", train["learning_rate"], ""), reason)
            translation.set("train.learning_rate", 1.0, f"a factor on the estimate of {name}")
    if member.averages and train.get("schedule") != "constant":
        translation.drop(Setting("schedule", train.get("schedule"), ""), f"{name} averages instead; constant was taken")
        translation.set("train.schedule", "constant", f"of {name}")
    if member.averages and "ema" in train["rates"]:
        translation.drop(Setting("ema", train["rates"].pop("ema"), ""), f"{name} already averages")


def _keep_options(translation: Translation, path: str, model: type[BaseModel], field: str) -> None:
    """Removes the options that the chosen name does not have; a mapping without options becomes the name."""
    value = translation.get(path)
    if not isinstance(value, dict):
        return
    default = model.model_fields[field].default.name
    name = value.get("name", default)
    known = next(
        (member.model_fields for member in _members(model, field) if member.model_fields["name"].default == name), {}
    )
    for key in [key for key in value if key not in known]:
        unused = value.pop(key)
        if path in ("train.rates.optimiser", "train.kind"):  # the other trainers ignore those of schedules and losses
            translation.drop(Setting(f"{path.partition('.')[2]}.{key}", unused, ""), f"{name!r} has no such option")
    value.setdefault("name", name)
    if set(value) == {"name"}:
        _replace(translation, path, name)


def _replace(translation: Translation, path: str, value: Any) -> None:
    *parents, key = path.split(".")
    node = translation.steps
    for parent in parents:
        node = node[parent]
    node[key] = value


def _members(model: type[BaseModel], field: str) -> list[type[BaseModel]]:
    """Returns the classes of a union of settings."""
    found: list[type[BaseModel]] = []
    hints: list[Any] = [model.model_fields[field].annotation]
    while hints:
        hint = hints.pop()
        if isinstance(hint, type) and issubclass(hint, BaseModel):
            found.append(hint)
        hints += get_args(hint)
    return found


def _set_objective(translation: Translation, trainer: str) -> None:
    objective = translation.get("train.objective")
    if not isinstance(objective, dict):
        return
    weighting = objective.get("weighting")
    if isinstance(weighting, dict) and trainer == "ot" and "name" not in weighting:
        objective.pop("weighting")
    elif isinstance(weighting, dict):
        weighting.setdefault("name", "min_snr")
        if weighting["name"] != "min_snr":
            objective["weighting"] = weighting["name"]
    loss, name = objective.get("loss"), translation.name_of("train.objective.loss")
    if name in ("huber", "smooth_l1") and trainer in ("sd", "diffusers"):
        options = loss if isinstance(loss, dict) else {"name": name}
        usual = "constant" if "flow" in translation.counts else "snr"
        objective["loss"] = {**options, "schedule": options.get("schedule", usual)}
    if "levels" not in objective.get("pyramid", {"levels": 0}):
        objective.pop("pyramid")
    for switch, strength in (("random_offset", "noise_offset"), ("random_perturbation", "input_perturbation")):
        if strength not in objective:
            objective.pop(switch, None)
    distribution = objective.get("timesteps", {}).get("distribution")
    if isinstance(distribution, dict):
        known = {"logit_normal": ("mean", "std"), "mode": ("scale",)}.get(distribution.get("name", ""), ())
        kept = {key: value for key, value in distribution.items() if key == "name" or key in known}
        objective["timesteps"]["distribution"] = kept if len(kept) > 1 else kept.get("name", "uniform")
    if objective.get("timesteps", {}).get("distribution") == "uniform":
        objective["timesteps"].pop("distribution")
    for key in [key for key, value in objective.items() if value == {}]:
        objective.pop(key)
