"""Carries over the options of other trainers whose values need more than a type: images, rates, lengths, devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flows.coming_from.carry_layers import OF_LAYERS
from flows.coming_from.carry_objective import OF_OBJECTIVE
from flows.coming_from.carry_samples import OF_SAMPLES
from flows.coming_from.read import Setting
from flows.coming_from.translation import Translation
from flows.coming_from.values import (
    DTYPES,
    OPTIMIZERS,
    PRECISIONS,
    QUANTIZED,
    NoCounterpart,
    choose,
    integer,
    is_off,
    number,
    plain,
    sizes,
    truth,
)


def _resolution(translation: Translation, setting: Setting) -> None:
    values = sizes(setting)
    side = max(8, round(max(values) / 8) * 8)
    translation.set("preprocess.resolution", side, setting.name)
    if len(set(values)) > 1:
        translation.drop(setting, f"one size for a run; {side} was taken")


def _crop(translation: Translation, setting: Setting) -> None:
    crops = {"enable_bucket": "bucket", "datasets.buckets": "bucket", "aspect_ratio_bucketing": "bucket"}
    if truth(setting):
        translation.set("preprocess.crop", crops.get(setting.name, "center"), setting.name)
    elif setting.name != "center_crop":
        translation.set("preprocess.crop", "center", setting.name)


def _no_upscale(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        translation.set("preprocess.buckets.enlarge", 1.0, setting.name)


def _step_of_sizes(translation: Translation, setting: Setting) -> None:
    step = integer(setting)
    rounded = max(8, -(-step // 8) * 8)
    translation.set("preprocess.buckets.step", rounded, setting.name)
    if rounded != step:
        translation.drop(setting, f"sizes are multiples of 8; {rounded} was taken")


def _wildcards(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        translation.set("train.captions.wildcards", True, setting.name)
        # sd-scripts draws one line of a caption file with it, and reads the first without.
        translation.set("ingest.several_captions", "draw", setting.name)


def _prompt_source(translation: Translation, setting: Setting) -> None:
    if plain(setting.value) in ("sample", "concept"):
        translation.set("ingest.several_captions", "draw", setting.name)


def _text_rate(translation: Translation, setting: Setting) -> None:
    values = setting.value if isinstance(setting.value, list) else [setting.value]
    rates = [number(setting, value) for value in values if value not in (None, "")]
    if not rates:
        return
    if rates[0] == 0:
        translation.counts["no_text"] = 1.0
        return
    translation.set("train.rates.text", rates[0], setting.name)
    if len(set(rates)) > 1 or setting.name in ("text_encoder_lr2", "text_encoder_2.learning_rate"):
        translation.drop(setting, "one rate for all text encoders; rates.layers has one for each")


def _network_rate(translation: Translation, setting: Setting) -> None:
    if setting.value not in (None, "") and number(setting):
        translation.set("train.learning_rate", number(setting), setting.name)


def _optimizer(translation: Translation, setting: Setting) -> None:
    if setting.name in ("use_8bit_adam", "use_lion_optimizer"):
        if truth(setting):
            translation.set("train.rates.optimiser", "lion" if "lion" in setting.name else "adamw-8bit", setting.name)
        return
    translation.set("train.rates.optimiser", choose(setting, OPTIMIZERS), setting.name)
    if plain(setting.value) == "pagedadamw8bit":
        translation.set("train.rates.optimiser.paged", True, setting.name)
    if plain(setting.value) in ("adam", "lion8bit", "pagedlion8bit", "ademamix8bit"):
        translation.drop(setting, f"{translation.get('train.rates.optimiser')!r} is the nearest")


def _betas(translation: Translation, setting: Setting) -> None:
    index = 1 if setting.name.endswith("2") else 0
    if setting.name == "prodigy_beta3":
        raise NoCounterpart("see the options of rates.optimiser")
    if setting.value in (None, ""):
        return
    betas = translation.get("train.rates.optimiser.betas") or [0.9, 0.999]
    translation.set(
        "train.rates.optimiser.betas",
        [number(setting) if n == index else beta for n, beta in enumerate(betas)],
        setting.name,
    )


def _weight_decay(translation: Translation, setting: Setting) -> None:
    if isinstance(setting.value, dict | list) or setting.name == "prodigy_decouple":
        raise NoCounterpart("see the options of rates.optimiser")
    if setting.value not in (None, ""):
        translation.set("train.weight_decay", number(setting), setting.name)


def _warmup(translation: Translation, setting: Setting) -> None:
    value = number(setting)
    translation.counts.pop("warmup", None)
    if 0 < value < 1:
        translation.counts["warmup"] = value
    translation.set("train.warmup", integer(setting) if value >= 1 or value == 0 else 0, setting.name)


def _decay(translation: Translation, setting: Setting) -> None:
    value = number(setting)
    if value:
        translation.counts["decay"] = value
        translation.origins["train.schedule.decay"] = setting.name


def _ema(translation: Translation, setting: Setting) -> None:
    if not is_off(setting.value) and plain(setting.value) != "off":
        translation.counts["ema"] = 1.0
        translation.set("train.rates.ema", translation.get("train.rates.ema") or {}, setting.name)


def _precision(translation: Translation, setting: Setting) -> None:
    if setting.name in ("full_fp16", "full_bf16"):
        if truth(setting):
            raise NoCounterpart("the adapter is always trained in fp32")
        return
    if setting.value in (None, ""):
        return
    translation.set("train.precision", choose(setting, {plain(k): v for k, v in PRECISIONS.items()}), setting.name)


def _dtype(translation: Translation, setting: Setting) -> None:
    if setting.value not in (None, ""):
        translation.set("convert.dtype", DTYPES[choose(setting, PRECISIONS)], setting.name)


def _attention(translation: Translation, setting: Setting) -> None:
    if plain(setting.value) in ("sdpa", "none"):  # of kohya's GUI
        return
    named = setting.name in ("xformers", "enable_xformers_memory_efficient_attention", "train.xformers")
    if named and (plain(setting.value) == "xformers" or truth(setting)):
        translation.set("train.running.attention", "xformers", setting.name)


def _compile(translation: Translation, setting: Setting) -> None:
    if truth(setting):
        translation.set("train.running.compile", "regional", setting.name)


def _quantise(translation: Translation, setting: Setting) -> None:
    if setting.name == "model.qtype":
        translation.texts["quantized as"] = QUANTIZED.get(plain(setting.value), "fp8")
        if translation.get("train.running.quantise") is not None:
            translation.set("train.running.quantise", translation.texts["quantized as"], setting.name)
    elif setting.name.endswith("weight_dtype"):
        if (form := QUANTIZED.get(plain(setting.value))) is not None:
            translation.set("train.running.quantise", form, setting.name)
    elif not is_off(setting.value):
        form = translation.texts.get("quantized as", "8bit" if "bnb" in setting.name else "fp8")
        translation.set("train.running.quantise", form, setting.name)


def _offload(translation: Translation, setting: Setting) -> None:
    """Carries a share over; a number of blocks is completed when the base is known."""
    if "blocks" not in setting.name:
        if number(setting):
            translation.set("train.running.offload", number(setting), setting.name)
    elif not is_off(setting.value):
        blocks = number(setting) / 2 if setting.name.startswith("single") else number(setting)
        before = 0.0 if setting.name == "blocks_to_swap" else translation.counts.get("blocks to swap", 0.0)
        translation.counts["blocks to swap"] = before + blocks
        translation.origins["blocks to swap"] = setting.name


def _checkpointing(translation: Translation, setting: Setting) -> None:
    if not is_off(setting.value) and plain(setting.value) != "off":
        translation.set("train.running.gradient_checkpointing", True, setting.name)


def carry_epochs(translation: Translation, setting: Setting) -> None:
    """Notes the epochs, which become steps when the images are counted."""
    if number(setting):
        translation.counts["epochs"] = number(setting)
        translation.origins["epochs"] = setting.name


def _device(translation: Translation, setting: Setting) -> None:
    """Leaves the device out: `auto` takes the GPU."""


SPECIAL: Mapping[str, Callable[[Translation, Setting], None]] = {
    "train.running.device": _device,
    "preprocess.resolution": _resolution,
    "preprocess.crop": _crop,
    "preprocess.buckets.enlarge": _no_upscale,
    "preprocess.buckets.step": _step_of_sizes,
    "train.captions.wildcards": _wildcards,
    "ingest.several_captions": _prompt_source,
    "train.rates.text": _text_rate,
    "train.learning_rate": _network_rate,
    "train.rates.optimiser": _optimizer,
    "train.rates.optimiser.betas": _betas,
    "train.weight_decay": _weight_decay,
    "train.warmup": _warmup,
    "train.schedule.decay": _decay,
    "train.rates.ema": _ema,
    "train.precision": _precision,
    "convert.dtype": _dtype,
    "train.running.attention": _attention,
    "train.running.compile": _compile,
    "train.running.quantise": _quantise,
    "train.running.offload": _offload,
    "train.running.gradient_checkpointing": _checkpointing,
    **OF_LAYERS,
    **OF_OBJECTIVE,
    **OF_SAMPLES,
}
"""`step.setting` -> the function that carries an option over to it."""
