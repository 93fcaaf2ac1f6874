"""Tests the slots of devices between real processes of one home, without timed assertions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from lora_engine.compute import fitting_trainings
from lora_engine.errors import InterruptedRun
from lora_engine.training.device import used_devices
from lora_engine.training.specs.running import Running
from registry.errors import HomeError
from registry.home import Home
from tasks.device_locks import count_holders
from tasks.devices import device_slot, device_slots, gpu_slot
from tasks.errors import SpecError
from tasks.progress import StepEvent, clear_stop, listening, request_stop
from tasks.resources import Resources
from tests.faults.points import Trial, forked

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

TURNS = 20
GIB = 2**30


@pytest.fixture
def opened(home: Path) -> Home:
    return Home.open(home)


@pytest.fixture
def stopping() -> Iterator[Callable[[], None]]:
    yield request_stop
    clear_stop()


def wait_for(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds; pytest's timeout ends the test otherwise."""
    while not condition():
        time.sleep(0.01)


def hold(home: Home, device: str, limit: int, keep: Callable[[tuple[int, ...]], None]) -> Trial:
    """Starts a process that takes a slot, creates a file `held`, and calls `keep` with the descriptor."""

    def work(tell: Callable[[str], None]) -> None:
        with device_slot(home, device, limit) as descriptors:
            (home.path / "held").touch()
            keep(descriptors)
            tell("released")

    return forked(work)


def sleep_long(_: tuple[int, ...]) -> None:
    time.sleep(600)


def test_two_processes_of_one_home_never_hold_the_only_slot_at_the_same_time(opened):
    marker = opened.path / "inside"

    def take_turns(tell: Callable[[str], None]) -> None:
        for _ in range(TURNS):
            with device_slot(opened, "cpu", 1):
                # Fails with a second holder inside.
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                marker.unlink()
            tell("turn")

    trials = [forked(take_turns) for _ in range(2)]
    assert [trial.finish() for trial in trials] == [(0, ["turn"] * TURNS)] * 2


def test_with_two_slots_two_processes_hold_one_each_and_a_third_waits(opened):
    trials = []
    for name in ("first", "second"):

        def combine(tell: Callable[[str], None], name: str = name) -> None:
            with device_slot(opened, "cpu", 2):
                (opened.path / name).touch()
                # Returns only if both hold slots at once.
                wait_for(lambda: all((opened.path / other).exists() for other in ("first", "second", "third waited")))
            tell(name)

        trials.append(forked(combine))
    wait_for(lambda: (opened.path / "first").exists() and (opened.path / "second").exists())
    assert count_holders(opened, "cpu") == 2
    with device_slot(opened, "cpu", 2, on_wait=(opened.path / "third waited").touch):
        assert (opened.path / "third waited").exists()
    assert [trial.finish() for trial in trials] == [(0, ["first"]), (0, ["second"])]


def test_holders_with_other_limits_count(opened):
    waits = []
    with device_slot(opened, "cpu", 1), device_slot(opened, "cpu", 2), device_slot(opened, "cpu", 3):
        assert count_holders(opened, "cpu") == 3
        for limit in (1, 2, 3):
            request_stop()
            try:
                with (
                    pytest.raises(InterruptedRun),
                    device_slot(opened, "cpu", limit, on_wait=lambda limit=limit: waits.append(limit)),
                ):
                    pass
            finally:
                clear_stop()
    assert waits == [1, 2, 3]
    assert count_holders(opened, "cpu") == 0


def test_devices_have_separate_slots_and_homes_of_one_machine_share_them(opened, tmp_path, stopping):
    other = Home.open(tmp_path / "other")
    with device_slot(opened, "cuda-0", 1), device_slot(other, "cuda-1", 1):
        assert [count_holders(opened, device) for device in ("cuda-0", "cuda-1", "cpu")] == [1, 0, 0]
        stopping()
        with pytest.raises(InterruptedRun, match="cuda-0"), device_slot(other, "cuda-0", 1):
            pytest.fail("it did not wait")
    with device_slot(other, "cuda-0", 1):
        assert count_holders(other, "cuda-0") == 1


@pytest.mark.parametrize("exclusive", [0, 1])
def test_an_exclusive_holder_is_alone_whatever_the_limits_are(opened, stopping, exclusive):
    with device_slot(opened, "cpu", 1024, exclusive=exclusive == 0):
        stopping()
        waiting = device_slot(opened, "cpu", 1024, exclusive=exclusive == 1)
        with pytest.raises(InterruptedRun), waiting:
            pytest.fail("it did not wait")
        assert count_holders(opened, "cpu") == 1


def test_homes_of_two_processes_never_hold_the_only_slot_at_the_same_time(tmp_path):
    marker = tmp_path / "inside"

    def take_turns(home: Home, tell: Callable[[str], None]) -> None:
        for _ in range(TURNS):
            with device_slot(home, "cpu", 1):
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                marker.unlink()
        tell("done")

    homes = [Home.open(tmp_path / name) for name in ("one", "two")]
    trials = [forked(partial(take_turns, home)) for home in homes]
    assert [trial.finish() for trial in trials] == [(0, ["done"])] * 2


@pytest.mark.parametrize("kind", ["link", "writable by others"])
def test_a_folder_of_locks_that_others_can_change_is_refused(opened, tmp_path, monkeypatch, kind):
    folder = tmp_path / "locks"
    if kind == "link":
        folder.symlink_to(tmp_path)
    else:
        folder.mkdir()
        folder.chmod(0o777)
    monkeypatch.setenv("LORALINE_DEVICE_LOCKS", str(folder))
    with pytest.raises(HomeError, match="only this user can write"), device_slot(opened, "cpu", 1):
        pytest.fail("it took a slot")
    folder.unlink() if kind == "link" else folder.chmod(0o700)
    if kind != "link":
        with device_slot(opened, "cpu", 1):
            assert list(folder.iterdir())


def test_memory_that_the_device_never_has_is_refused_with_the_figure(opened):
    with (
        pytest.raises(SpecError, match=r"resources.memory is 65536 GiB, but cpu has \d"),
        gpu_slot(opened, "cpu", None, "report", Resources(memory=65536.0)),
    ):
        pytest.fail("it has that much")
    with gpu_slot(opened, "cpu", None, "report", Resources(memory=0.001)):
        assert count_holders(opened, "cpu") == 1


def test_a_killed_holder_frees_its_slot(opened):
    holder = hold(opened, "cpu", 1, sleep_long)
    wait_for((opened.path / "held").exists)
    assert count_holders(opened, "cpu") == 1
    holder.kill()
    assert holder.finish() == (-signal.SIGKILL, [])
    with device_slot(opened, "cpu", 1):
        assert count_holders(opened, "cpu") == 1


def test_a_slot_is_held_until_the_process_that_inherited_it_ends(opened):
    number = opened.path / "number"

    def start_and_sleep(descriptors: tuple[int, ...]) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=descriptors)
        number.write_text(f"{child.pid}\n")
        sleep_long(descriptors)

    holder = hold(opened, "cpu", 1, start_and_sleep)
    wait_for(lambda: number.exists() and number.read_text().endswith("\n"))
    holder.kill()
    assert holder.finish()[0] == -signal.SIGKILL
    child = int(number.read_text())
    try:
        assert count_holders(opened, "cpu") == 1
    finally:
        os.kill(child, signal.SIGKILL)
    wait_for(lambda: count_holders(opened, "cpu") == 0)


def test_a_stop_ends_a_step_that_waits_and_leaves_the_slot_alone(opened, stopping):
    events: list[StepEvent] = []
    with device_slot(opened, "cpu", 1):

        def stop_when_it_waits(event: StepEvent) -> None:
            events.append(event)
            stopping()

        with (
            listening(stop_when_it_waits),
            pytest.raises(InterruptedRun, match=r"step 'adapter': stopped while waiting for device 'cpu'"),
            device_slots(opened, {"cpu": 1}, "adapter"),
        ):
            pytest.fail("it did not wait")
        assert count_holders(opened, "cpu") == 1
    assert events == [StepEvent("adapter", "waiting", text="waiting for device cpu")]


def test_a_model_in_a_step_waits_for_its_gpu_and_not_for_a_cpu(opened, stopping, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with gpu_slot(opened, "cuda", None, "report"):
        assert count_holders(opened, "cuda-0") == 1
        with gpu_slot(opened, "cpu", None, "captions"), gpu_slot(opened, "cuda", 2, "captions"):
            assert (count_holders(opened, "cuda-0"), count_holders(opened, "cpu")) == (2, 0)
        stopping()
        with pytest.raises(InterruptedRun, match="cuda-0"), gpu_slot(opened, "cuda", None, "captions"):
            pytest.fail("it did not wait")


def test_a_step_of_several_devices_gives_back_the_first_when_it_stops_waiting_for_the_second(opened, stopping):
    with device_slot(opened, "cuda-1", 1):
        stopping()
        with pytest.raises(InterruptedRun, match="cuda-1"), device_slots(opened, {"cuda-1": 1, "cuda-0": 1}, "adapter"):
            pytest.fail("it did not wait")
        assert [count_holders(opened, device) for device in ("cuda-0", "cuda-1")] == [0, 1]


@pytest.mark.parametrize(
    ("device", "cores", "threads", "processes", "memory", "base", "expected"),
    [
        ("cuda-0", 64, 1, 1, 512 * GIB, 0, 1),
        ("mps", 8, 1, 1, 64 * GIB, 0, 1),
        ("cpu", 1, 1, 1, 8 * GIB, 0, 1),
        ("cpu", 2, 1, 1, 8 * GIB, 0, 1),  # the run itself needs the other core
        ("cpu", 16, 1, 1, 64 * GIB, 0, 8),
        ("cpu", 16, 16, 1, 64 * GIB, 0, 1),
        ("cpu", 16, 4, 1, 64 * GIB, 0, 4),
        ("cpu", 16, 4, 2, 64 * GIB, 0, 2),
        ("cpu", 16, 16, 4, 64 * GIB, 0, 1),
        ("cpu", 16, 1, 1, 3 * GIB, 0, 3),
        ("cpu", 16, 1, 1, 64 * GIB, 4 * GIB, 3),  # 17 GiB each
        ("cpu", 16, 1, 1, GIB // 2, 0, 1),
    ],
)
def test_the_default_number_of_trainings_follows_from_cores_and_memory(
    device, cores, threads, processes, memory, base, expected
):
    count = fitting_trainings(device, cores=cores, memory=memory, threads=threads, processes=processes, base=base)
    assert count == expected


def test_gpus_are_numbered_by_the_environment(monkeypatch):
    running = Running(device="cuda", processes=2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert used_devices(running) == ("cuda-0", "cuda-1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 1")
    assert used_devices(running) == ("cuda-3", "cuda-1")
    assert used_devices(Running(device="cpu", processes=2)) == ("cpu",)
