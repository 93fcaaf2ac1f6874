"""Tests `Workers`: order, bounded work in flight, errors, context variables."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_engine.errors import EngineError
from lora_engine.files import atomic_write, write_within
from lora_engine.parallel import Workers, count_cores


def test_results_come_in_the_order_of_the_items_whichever_is_ready_first() -> None:
    second_is_ready = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_is_ready.wait(60)  # only another thread sets it
        else:
            second_is_ready.set()
        return item

    with Workers(2) as workers:
        assert list(workers.map(work, range(5))) == [0, 1, 2, 3, 4]


def test_items_are_taken_only_as_results_are_used() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    with Workers(2) as workers:
        results = workers.map(lambda item: item, items())
        assert next(results) == 0
        assert len(taken) == 3
        assert len(list(results)) == 99


def test_at_most_so_many_calls_wait() -> None:
    release, started = threading.Event(), threading.Event()
    threading.Timer(0.05, release.set).start()

    def work() -> None:
        started.set()
        release.wait(60)

    with Workers(1) as workers:
        workers.run(work)
        assert started.wait(60)
        assert not release.is_set()
        workers.run(time.sleep, 0)
        assert release.is_set(), "the second call waited for the first"


def test_an_error_of_a_call_is_raised_at_the_latest_at_the_end() -> None:
    def fail() -> None:
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"), Workers(2) as workers:
        workers.run(fail)
    with pytest.raises(EngineError, match="no"), Workers(2) as workers:
        list(workers.map(lambda _: fail(), range(3)))


def test_an_error_of_the_block_cancels_what_has_not_started() -> None:
    started, release = threading.Event(), threading.Event()
    ran: list[str] = []

    def work() -> None:
        started.set()
        release.wait(60)
        ran.append("first")

    def stop_early() -> None:
        with Workers(2) as workers:
            workers.run(work)
            workers.run(work)
            assert started.wait(60)
            workers._submit(ran.append, "late")
            threading.Timer(0.05, release.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        stop_early()
    assert ran == ["first", "first"]


def test_a_folder_that_confines_writes_confines_those_of_threads(tmp_path: Path) -> None:
    with write_within(tmp_path / "inside"), Workers(1) as workers:
        workers.run(atomic_write, tmp_path / "inside" / "a", b"a")
    with pytest.raises(EngineError, match="outside"), write_within(tmp_path / "inside"), Workers(1) as workers:
        workers.run(atomic_write, tmp_path / "b", b"b")
    assert [path.name for path in sorted(tmp_path.rglob("*")) if path.is_file()] == ["a"]


def test_the_default_is_one_thread_per_core_and_at_most_eight() -> None:
    with Workers() as workers:
        assert workers.count == min(8, count_cores())
