"""Runs tests in forks of a process that collected the tests and imported their libraries.

Python processes that a test starts run without the mutant.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import Pipe
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from tools.mutants.mutating import Codes

HEAVY = ("torch", "diffusers", "transformers", "mlflow", "sqlalchemy", "prefect", "PIL", "numpy", "pydantic")
LAZY = (
    "diffusers.models.unets.unet_2d_condition",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
    "prefect.flows",
    "transformers.models.clip.modeling_clip",
)
"""Modules that take seconds to import. They are imported before any test is measured."""


def in_fork(work: Callable[[], Any], seconds: float | None = None) -> Any:
    """Returns the result of a function that runs in a fork; None if the fork was killed or took too long.

    Args:
        work: A function without arguments; its result is pickled.
        seconds: Limit in CPU seconds; the limit in wall time is six times as long. None means no limit.

    Raises:
        Exception: The exception of the function. Any other `BaseException`, such as KeyboardInterrupt, gives the result
            `["<name>"]` instead.
    """
    reading, writing = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        if seconds is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 5))
        errors, nothing = os.dup(2), os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        try:
            writing.send(work())
        except Exception as error:
            writing.send(error)
            os.write(errors, traceback.format_exc().encode())
        except BaseException as error:
            # Ctrl-C, and other exceptions that pytest does not count as a failure of the test.
            writing.send([f"<{type(error).__name__}>"])
        os._exit(0)
    writing.close()
    result = None
    try:
        if reading.poll(None if seconds is None else 6 * seconds):
            result = reading.recv()
    except EOFError:
        pass
    finally:
        reading.close()
        # The group includes servers that the tests started.
        for kill, target in ((os.killpg, child), (os.kill, child)):
            with contextlib.suppress(ProcessLookupError):
                kill(target, signal.SIGKILL)
        os.waitpid(child, 0)
    if isinstance(result, Exception):
        raise result
    return result


def run_tests(items: Sequence[pytest.Item], *, stop: bool = True) -> list[str]:
    """Runs tests and returns the ids of the failed ones; with `stop`, ends at the first failure."""
    recorder = _Recorder()
    for item, following in zip(items, [*items[1:], None], strict=False):
        if item is items[0]:
            item.config.pluginmanager.register(recorder)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if recorder.failed and stop:
            item.session._setupstate.teardown_exact(None)
            break
    return list(recorder.failed)


class _Recorder:
    def __init__(self) -> None:
        self.failed: dict[str, None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Records a failure, in any phase of the test."""
        if report.failed:
            self.failed[report.nodeid] = None


def import_heavy(names: Iterable[str]) -> None:
    """Imports modules of large libraries once, before the forks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in [name for name in names if name.split(".")[0] in HEAVY and name not in sys.modules]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def find_functions(file: str) -> list[FunctionType]:
    """Imports a file and returns its live functions."""
    importlib.import_module(".".join(Path(file).with_suffix("").parts).removesuffix(".__init__"))
    path = str(Path(file).resolve())
    functions = [value for value in gc.get_objects() if type(value) is FunctionType]
    return [function for function in functions if function.__code__.co_filename == path]


def replace_code(functions: Iterable[FunctionType], codes: Codes) -> None:
    """Replaces the code of functions, matched by qualified name and first line.

    Raises:
        LookupError: No function matches.
    """
    targets = [(f, codes.get((f.__code__.co_qualname, f.__code__.co_firstlineno))) for f in functions]
    if not any(code for _, code in targets):
        raise LookupError(f"no live function among {sorted(codes)}")
    for function, code in targets:
        function.__code__ = code or function.__code__
