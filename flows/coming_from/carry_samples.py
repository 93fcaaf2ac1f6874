"""Carries over the samples of other trainers, and the intervals of samples, validations and saved adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from flows.coming_from.read import Setting
from flows.coming_from.translation import Translation
from flows.coming_from.values import NoCounterpart, integer, is_off, number, plain, truth
from lora_engine.bases.samplers import find_sampler
from lora_engine.errors import SettingsError

_MAX_SEEDS = 64
_SAMPLE_OPTIONS: Mapping[str, str] = {
    "width": "w",
    "height": "h",
    "diffusion_steps": "s",
    "sample_steps": "s",
    "cfg_scale": "l",
    "guidance_scale": "l",
    "seed": "d",
    "negative_prompt": "n",
    "neg": "n",
}
"""Key of a sample in OneTrainer or ai-toolkit -> its option in a prompt of sd-scripts."""


def _every(path: str, translation: Translation, setting: Setting) -> None:
    """Carries an interval over: steps, or epochs. OneTrainer's number and its unit are joined in `set_intervals`."""
    if setting.name.endswith("_unit"):
        translation.texts[path] = plain(setting.value)
    elif setting.name == "validation":
        translation.counts["validation"] = float(truth(setting))
    elif is_off(setting.value):
        return
    elif setting.name in ("sample_after", "save_every", "validate_after"):
        translation.counts[path] = integer(setting)
        translation.origins[f"{path} of OneTrainer"] = setting.name
    elif number(setting):
        _set_interval(translation, path, integer(setting), setting.name, is_epochs="epochs" in setting.name)


def _set_interval(translation: Translation, path: str, count: int, origin: str, *, is_epochs: bool) -> None:
    translation.set(path, f"{count} epoch{'s' if count > 1 else ''}" if is_epochs else count, origin)


def set_intervals(translation: Translation) -> None:
    """Joins OneTrainer's intervals with their units; notes those in minutes, which are of the clock."""
    usual = {"train.samples.every": "minute", "train.save_every": "never", "train.validate_every": "epoch"}
    for path, default in usual.items():
        count, unit = int(translation.counts.get(path, 0)), translation.texts.get(path, default)
        if not count or (path == "train.validate_every" and not translation.counts.get("validation")):
            continue
        origin = translation.origins[f"{path} of OneTrainer"]
        if unit in ("epoch", "step"):
            _set_interval(translation, path, count, origin, is_epochs=unit == "epoch")
        elif unit != "never":
            reason = f"set {path.partition('.')[2]} in steps, or epochs such as '2 epochs'"
            translation.drop(Setting(origin, f"{count} {unit}", ""), reason)


def _prompts(translation: Translation, setting: Setting) -> None:
    value = setting.value
    if setting.name in ("sample_sampler", "sample.sampler"):
        if not is_off(value) and str(value) != "flowmatch":  # ai-toolkit's name of the only sampler of a flow
            _sampler(translation, setting)
        return
    if setting.name in ("sample.width", "sample.height", "sample.neg"):
        _sample_size(translation, setting)
        return
    prompts = [value] if setting.name.startswith("validation_prompt") and isinstance(value, str) else value
    if isinstance(prompts, list):
        set_prompts(translation, prompts, setting.name)
    elif not is_off(value):
        translation.texts["sample file"] = str(value)
        translation.origins["sample file"] = setting.name


def set_prompts(translation: Translation, prompts: Sequence[Any], origin: str) -> None:
    """Sets the prompts of the samples: texts, or samples of OneTrainer and ai-toolkit."""
    written = [_prompt_of(entry) if isinstance(entry, dict) else str(entry) for entry in prompts]
    translation.set("train.samples.prompts", [text for text in written if text], origin)


def _prompt_of(sample: Mapping[str, Any]) -> str:
    """Returns a sample of OneTrainer or ai-toolkit as a prompt with the options of sd-scripts; empty without a text."""
    prompt = sample.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip() or sample.get("enabled") is False:
        return ""
    options = {option: sample[key] for key, option in _SAMPLE_OPTIONS.items() if not is_off(sample.get(key))}
    if sample.get("random_seed") is True:
        options.pop("d", None)
    return prompt + "".join(f" --{option} {value}" for option, value in options.items())


def _sampler(translation: Translation, setting: Setting) -> None:
    """Notes the sampler of all samples, which becomes an option of each prompt."""
    try:
        find_sampler(str(setting.value))
    except SettingsError as error:
        raise NoCounterpart(f"samplers are {error.allowed}") from None
    translation.texts["sample sampler"] = str(setting.value)


def _sample_size(translation: Translation, setting: Setting) -> None:
    """Notes the size and the negative prompt of all samples, which become options of each prompt."""
    key = setting.name.rpartition(".")[2]
    if key in ("width", "height"):
        translation.counts[f"sample {key}"] = integer(setting)
    elif key == "neg" and setting.value:
        translation.texts["sample negative"] = str(setting.value)


def _seeds(translation: Translation, setting: Setting) -> None:
    if setting.name == "sample.seed":
        translation.set("train.samples.seeds", [integer(setting)], setting.name)
    elif setting.name == "num_validation_images" and 0 < number(setting) <= _MAX_SEEDS:
        translation.set("train.samples.seeds", list(range(integer(setting))), setting.name)


OF_SAMPLES: Mapping[str, Callable[[Translation, Setting], None]] = {
    "train.samples.every": partial(_every, "train.samples.every"),
    "train.save_every": partial(_every, "train.save_every"),
    "train.validate_every": partial(_every, "train.validate_every"),
    "train.samples.prompts": _prompts,
    "train.samples.seeds": _seeds,
}
"""`step.setting` -> the function that carries an option over to it."""
