"""Writes log records as JSON lines for log collectors, if `LORALINE_LOG` asks for it."""

from __future__ import annotations

import logging
import os
import sys

from lora_engine.errors import did_you_mean
from registry.store.redaction import redact
from tasks.errors import SpecError
from tasks.warnings import LOGGED_PACKAGES, current_step

_FORMATS = ("json",)
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def configure_logs() -> None:
    """Sends our log records to standard error as JSON lines if `LORALINE_LOG` is `json`.

    `LORALINE_LOG_LEVEL` is the lowest level: DEBUG, INFO (the default), WARNING or ERROR. Each line has `timestamp`,
    `level`, `logger`, `message`, `process` and the pipeline's `step`, empty outside of steps. Secrets are hidden.

    Raises:
        SpecError: A variable has another value.
    """
    form = os.environ.get("LORALINE_LOG", "")
    if not form:
        return
    level = os.environ.get("LORALINE_LOG_LEVEL", "INFO").upper()
    _check("LORALINE_LOG", form, _FORMATS)
    _check("LORALINE_LOG_LEVEL", level, _LEVELS)
    from pythonjsonlogger.json import JsonFormatter

    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_complete)
    names = {"levelname": "level", "name": "logger"}
    pattern = "%(levelname)s %(name)s %(message)s %(process)d %(step)s"
    handler.setFormatter(JsonFormatter(pattern, rename_fields=names, timestamp=True))
    for package in LOGGED_PACKAGES:
        logger = logging.getLogger(package)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


def _complete(record: logging.LogRecord) -> bool:
    record.msg, record.args, record.step = redact(record.getMessage()), (), current_step()
    return True


def _check(variable: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SpecError(
            f"{variable} is {value!r}",
            where="environment",
            allowed=", ".join(allowed),
            remedy=did_you_mean(value, allowed),
        )
