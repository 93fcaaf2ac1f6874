"""Translates the options of another trainer into the settings of a pipeline, and lists what has no counterpart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flows.coming_from.carry import SPECIAL, carry_epochs
from flows.coming_from.options import TRAINERS, options_of
from flows.coming_from.read import Setting, SettingsSource
from flows.coming_from.translation import Translation
from flows.coming_from.values import (
    SCHEDULES,
    NoCounterpart,
    choose,
    integer,
    is_off,
    number,
    pairs,
    truth,
)

_OF_IMAGES = {"ingest.images", "ingest.repeats", "train.class_dataset", "train.prior"}
"""Read by `images.py`."""
_OTHER_PARTS = (
    "cloud.", "secrets.", "optimizer_defaults.", "quantization.", "embedding.", "decoder", "prior.", "effnet_encoder.",
    "text_encoder_3", "text_encoder_4", "unconditional_transformer.", "concepts.image.", "concepts.text.",
)  # fmt: skip
"""Parts of a OneTrainer file that a LoRA does not need, or that are full of defaults."""
_EXTENSIONS = ("caption_extension", "caption_extention", "datasets.caption_ext")
_DONE = ("automatic", "not needed")
"""First words of notes on options that need no setting."""
EPOCHS = ("max_train_epochs", "epoch", "num_train_epochs", "epochs")
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "sd": {
        "network_dim": 4,
        "network_alpha": 1,
        "learning_rate": 2e-6,
        "max_train_steps": 1600,
        "train_batch_size": 1,
        "lr_scheduler": "constant",
        "optimizer_type": "AdamW",
        "mixed_precision": "no",
    },
    "diffusers": {
        "rank": 4,
        "learning_rate": 1e-4,
        "train_batch_size": 4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 500,
        "adam_weight_decay": 1e-2,
        "mixed_precision": "no",
        "resolution": 512,
    },
    "aitk": {
        "network.linear": 4,
        "network.linear_alpha": 1.0,
        "train.lr": 1e-6,
        "train.batch_size": 1,
        "train.steps": 1000,
        "datasets.buckets": True,
        "train.lr_scheduler": "constant",
        "train.optimizer": "adamw",
    },
    "ot": {
        "lora_rank": 16,
        "lora_alpha": 1.0,
        "learning_rate": 3e-6,
        "learning_rate_warmup_steps": 200,
        "learning_rate_scheduler": "CONSTANT",
        "batch_size": 1,
        "train_dtype": "FLOAT_16",
        "resolution": "512",
        "aspect_ratio_bucketing": True,
        "epochs": 100,
        "gradient_checkpointing": True,
        "optimizer.optimizer": "ADAMW",
    },
}
"""Defaults of the trainers that differ from ours."""
_INTEGERS = {
    "file.seed", "train.rank", "train.steps", "train.batch", "train.accumulate", "train.captions.keep_tokens",
    "train.captions.tag_warmup", "train.captions.first_tags", "train.captions.dropout_every", "train.checkpoint_every",
    "train.samples.steps", "train.prior.count", "train.schedule.cycles",
    "train.schedule.timescale", "train.objective.pyramid.levels", "train.running.processes",
    "preprocess.buckets.min_side", "preprocess.buckets.max_side",
}  # fmt: skip
_NUMBERS = {
    "train.alpha", "train.learning_rate", "train.caption_dropout", "train.captions.tag_dropout", "train.dropout",
    "train.rank_dropout", "train.module_dropout", "train.norm_limit", "train.rates.up_ratio", "train.weight_decay",
    "train.clip", "train.schedule.power", "train.schedule.floor", "train.rates.ema.decay", "train.prior.weight",
    "train.objective.weighting.gamma", "train.objective.loss.delta", "train.objective.noise_offset",
    "train.objective.pyramid.discount", "train.objective.input_perturbation",
    "train.method.mask.floor", "train.samples.guidance", "train.rates.optimiser.eps", "ingest.heldout",
    "combine.parts.weight",
}  # fmt: skip
_SWITCHES = {
    "train.captions.flip", "train.captions.shuffle", "train.captions.weights",
    "train.running.gradient_checkpointing", "train.method.mask.normalise", "train.objective.random_offset",
    "train.objective.random_perturbation", "train.zero_terminal_snr",
}  # fmt: skip
_TEXTS = {
    "file.base", "file.name", "file.vae", "train.init", "train.captions.prefix", "train.captions.suffix",
    "train.captions.separator",
    "train.captions.keep_separator", "train.captions.secondary_separator", "train.prior.prompt", "caption.trigger",
    "caption.template",
}  # fmt: skip
_TYPES: tuple[tuple[set[str], Callable[[Setting], Any]], ...] = (
    (_INTEGERS, integer),
    (_NUMBERS, number),
    (_SWITCHES, truth),
    (_TEXTS, lambda setting: str(setting.value)),
)


def translate(source: SettingsSource) -> Translation:
    """Returns the settings of a source, with the trainer's own defaults where they differ from ours.

    Raises:
        SpecError: A value is not of the type that its trainer takes.
    """
    translation = Translation()
    trainer = source.trainer
    defaults = [Setting(name, value, "") for name, value in {**_DEFAULTS[trainer], **_of_script(source)}.items()]
    apply(translation, trainer, defaults)
    origin = f"default of {TRAINERS[trainer]}"
    translation.origins = dict.fromkeys(translation.origins, origin)
    apply(translation, trainer, source.settings)
    return translation


def _of_script(source: SettingsSource) -> dict[str, Any]:
    """Returns the defaults in which the scripts of diffusers differ."""
    if source.trainer != "diffusers":
        return {}
    is_text_to_image = "text_to_image" in source.script
    if is_text_to_image:
        return {"num_train_epochs": 100, "train_batch_size": 16, "validation_epochs": 1}
    return {"num_train_epochs": 1, "validation_epochs": 50}


def apply(translation: Translation, trainer: str, settings: Iterable[Setting]) -> None:
    """Carries options over, in their order."""
    known = options_of(trainer)
    for setting in settings:
        if setting.name in ("network_args", "optimizer_args", "lr_scheduler_args"):
            apply(translation, trainer, _arguments(translation, setting))
            continue
        option = known.get(setting.name)
        if option is None:
            if not is_off(setting.value) and not setting.name.startswith(_OTHER_PARTS):
                translation.drop(setting, "unknown option")
            continue
        try:
            _carry(translation, setting, option.ours, option.note)
        except NoCounterpart as problem:
            translation.drop(setting, str(problem))


def _carry(translation: Translation, setting: Setting, ours: str, note: str) -> None:
    is_read = setting.name in _EXTENSIONS and str(setting.value).strip(".") in ("txt", "caption")
    if is_read or ours in _OF_IMAGES or (not ours and note.startswith(_DONE)):
        return
    special = carry_epochs if setting.name in EPOCHS else SPECIAL.get(ours)
    if special is not None:
        special(translation, setting)
    elif setting.value is None or setting.value == "":
        return
    elif (read := _reader_of(ours)) is None:
        if not is_off(setting.value):
            reason = f"set `{ours.partition('.')[2]}` yourself; {note}".rstrip("; ") if ours else note
            translation.drop(setting, reason)
    elif not is_off(setting.value) or ours in translation.origins or ours == "file.seed":
        translation.set(ours, read(setting), setting.name)


def _reader_of(ours: str) -> Callable[[Setting], Any] | None:
    """Returns the function that reads a value of the setting's type; None for others."""
    if ours == "train.schedule":
        return lambda setting: choose(setting, SCHEDULES)
    return next((read for names, read in _TYPES if ours in names), None)


def _arguments(translation: Translation, setting: Setting) -> list[Setting]:
    """Carries over the arguments of the optimizer; returns those that are options of their own."""
    if setting.name != "optimizer_args":
        return pairs(setting)
    for argument in pairs(setting):
        if argument.name == "weight_decay":
            translation.set("train.weight_decay", number(argument), argument.name)
        elif argument.name == "betas":
            betas = argument.value.strip("()[]").split(",")
            translation.set("train.rates.optimiser.betas", [number(argument, part) for part in betas], argument.name)
        elif argument.name in ("eps", "d_coef", "d0", "momentum"):
            translation.set(f"train.rates.optimiser.{argument.name}", number(argument), argument.name)
        elif argument.name == "safeguard_warmup" and truth(argument):
            translation.set("train.rates.optimiser.safeguard_warmup", True, argument.name)
        elif argument.name == "use_bias_correction" and truth(argument):
            translation.set("train.rates.optimiser.bias_correction", True, argument.name)
        elif argument.name != "decouple" and not is_off(argument.value):
            translation.drop(argument, "see the options of rates.optimiser")
    return []
