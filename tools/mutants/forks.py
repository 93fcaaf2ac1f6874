"""Runs tests in forks of one process that has collected the tests and imported everything, but run nothing.

Python processes that a test starts itself see no mutant.
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
"""Modules that take seconds to import, which no single test shall be charged with."""


def in_fork(work: Callable[[], Any], seconds: float | None = None) -> Any:
    """Returns the result of work in a fork; None if it died or took too long.

    Args:
        work: A function without arguments; its result is pickled.
        seconds: Limit in processor seconds; six times that is the limit in wall time. None means no limit.

    Raises:
        Exception: What work raised. Of other exceptions, such as KeyboardInterrupt, `["<name>"]` is the result.
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
            # Ctrl-C, or whatever else pytest does not take for a failure of the test.
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
    """Runs tests and returns the ids of those that failed; with `stop`, of the first only."""
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
        """Notes a failure, in any phase of the test."""
        if report.failed:
            self.failed[report.nodeid] = None


def import_heavy(names: Iterable[str]) -> None:
    """Imports modules of large libraries once, before the forks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in [each for each in names if each.split(".")[0] in HEAVY and each not in sys.modules]:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def find_functions(file: str) -> list[FunctionType]:
    """Imports a file and returns its live functions."""
    importlib.import_module(".".join(Path(file).with_suffix("").parts).removesuffix(".__init__"))
    path = str(Path(file).resolve())
    functions = [each for each in gc.get_objects() if type(each) is FunctionType]
    return [each for each in functions if each.__code__.co_filename == path]


def replace_code(functions: Iterable[FunctionType], codes: Codes) -> None:
    """Gives functions the code of their name and first line.

    Raises:
        LookupError: None of the functions has code among these.
    """
    targets = [(each, codes.get((each.__code__.co_qualname, each.__code__.co_firstlineno))) for each in functions]
    if not any(code for _, code in targets):
        raise LookupError(f"no live function among {sorted(codes)}")
    for function, code in targets:
        function.__code__ = code or function.__code__
