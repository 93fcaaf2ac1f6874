"""Turns the values of other trainers into those of settings; a value that has no counterpart raises `NoCounterpart`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flows.coming_from.read import Setting
from tasks.errors import SpecError

OPTIMIZERS: Mapping[str, str] = {
    "adam": "adamw",
    "adamw": "adamw",
    "adamw8bit": "adamw-8bit",
    "pagedadamw8bit": "adamw-8bit",
    "lion": "lion",
    "lion8bit": "lion",
    "pagedlion8bit": "lion",
    "adafactor": "adafactor",
    "prodigy": "prodigy",
    "dadaptation": "d-adaptation",
    "dadaptadam": "d-adaptation",
    "dadapt": "d-adaptation",
    "adamwschedulefree": "schedule-free",
    "schedulefreeadamw": "schedule-free",
    "sgd": "sgd",
    "sgdnesterov": "sgd",
    "came": "came",
    "ademamix": "ademamix",
    "ademamix8bit": "ademamix",
    "muon": "muon",
}
SCHEDULES: Mapping[str, str] = {
    "constant": "constant",
    "constantwithwarmup": "constant",
    "adafactor": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosinewithminlr": "cosine",
    "cosinewithrestarts": "cosine-restarts",
    "cosinewithhardrestarts": "cosine-restarts",
    "polynomial": "polynomial",
    "warmupstabledecay": "wsd",
    "inversesqrt": "inverse-sqrt",
    "rex": "rex",
}
LOSSES: Mapping[str, str] = {
    "l2": "l2",
    "mse": "l2",
    "l1": "l1",
    "mae": "l1",
    "huber": "huber",
    "smoothl1": "smooth_l1",
}
WEIGHTINGS: Mapping[str, str] = {
    "constant": "none",
    "none": "none",
    "minsnrgamma": "min_snr",
    "debiasedestimation": "debiased",
}
KIND_NAMES: Mapping[str, str] = {
    "networks.lora": "lora",
    "networks.lora_flux": "lora",
    "networks.lora_sd3": "lora",
    "networks.lora_fa": "lora-fa",
    "networks.loha": "loha",
    "networks.lokr": "lokr",
    "networks.oft": "oft",
    "networks.oft_flux": "oft",
    "lora": "lora",
    "locon": "lora",
    "loha": "loha",
    "lokr": "lokr",
    "dora": "dora",
    "ia3": "ia3",
    "oft": "oft",
    "diag-oft": "oft",
    "boft": "boft",
    "glora": "glora",
    "full": "full",
}
PRECISIONS: Mapping[str, str] = {
    "no": "fp32",
    "float": "fp32",
    "fp32": "fp32",
    "float32": "fp32",
    "fp16": "fp16",
    "float16": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
}
DTYPES: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
QUANTIZED: Mapping[str, str] = {
    "float8": "fp8",
    "int8": "8bit",
    "nfloat4": "4bit",
    "qfloat8": "fp8",
    "qint8": "8bit",
    "uint4": "4bit",
    "uint8": "8bit",
}
"""Types of OneTrainer and ai-toolkit in which weights are stored only."""
DISTRIBUTIONS: Mapping[str, str] = {
    "uniform": "uniform",
    "none": "uniform",
    "logitnormal": "logit_normal",
    "mode": "mode",
}
ONE_TRAINER_DISTRIBUTIONS: Mapping[str, str] = {"uniform": "uniform", "logitnormal": "logit_normal"}


class NoCounterpart(Exception):
    """A value that Loraline has no setting for; its text is the reason."""


def plain(value: Any) -> str:
    """Returns a name in lower case without `-`, `_` and blanks, in which trainers differ."""
    return str(value).lower().replace("-", "").replace("_", "").replace(" ", "")


def choose(setting: Setting, names: Mapping[str, str], *, exact: bool = False) -> str:
    """Returns the counterpart of a name.

    Raises:
        NoCounterpart: It has none.
    """
    key = str(setting.value).strip().lower() if exact else plain(setting.value)
    if key not in names:
        raise NoCounterpart("there is no counterpart; known are " + ", ".join(dict.fromkeys(names.values())))
    return names[key]


def number(setting: Setting, value: Any = None) -> float:
    """Returns a number, also of text.

    Raises:
        SpecError: It is none, or not finite.
    """
    value = setting.value if value is None else value
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SpecError(f"{setting.name} is {setting.value!r}", where=setting.where, allowed="a number")
    return value


def integer(setting: Setting) -> int:
    """Returns an integer, also of text or of a float without a fraction.

    Raises:
        SpecError: It is none.
    """
    value = number(setting)
    if value != int(value):
        raise SpecError(f"{setting.name} is {setting.value!r}", where=setting.where, allowed="an integer")
    return int(value)


def truth(setting: Setting) -> bool:
    """Returns a switch, also of text.

    Raises:
        SpecError: It is none.
    """
    value = setting.value
    if isinstance(value, str) and value.strip().lower() in ("true", "1", "yes", "on"):
        return True
    if isinstance(value, str) and value.strip().lower() in ("false", "0", "no", "off", ""):
        return False
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise SpecError(f"{setting.name} is {setting.value!r}", where=setting.where, allowed="true or false")


def is_off(value: Any) -> bool:
    """Returns True for the values with which trainers switch an option off: false, 0, empty, `none`."""
    return value is None or value is False or value == 0 or value in ("", [], {}, "none", "None", "false", "False", "0")


def sizes(setting: Setting) -> list[int]:
    """Returns the numbers of a size such as 512, "512,768" or [512, 768].

    Raises:
        SpecError: They are no integers.
    """
    value = setting.value
    parts = value.replace("x", ",").split(",") if isinstance(value, str) else value
    parts = parts if isinstance(parts, list) else [parts]
    return [
        integer(Setting(setting.name, part.strip() if isinstance(part, str) else part, setting.where)) for part in parts
    ]


def pairs(setting: Setting) -> list[Setting]:
    """Returns the options of `network_args` and `optimizer_args`: a list, or a text with blanks, of `key=value`."""
    value = setting.value
    parts = value.split() if isinstance(value, str) else value
    found = []
    for part in parts if isinstance(parts, list) else ():
        key, equals, text = str(part).partition("=")
        if not equals:
            raise SpecError(f"{setting.name} has {part!r}", where=setting.where, allowed="key=value")
        found.append(Setting(key.strip(), text.strip().strip("\"'"), setting.where))
    return found
