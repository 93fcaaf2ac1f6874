"""Tries fixed inputs on every target, past findings, and the guards themselves.

`make test` takes a fixed number of inputs of each target, about fifteen seconds of processor time in all;
`make nightly` takes 100,000, and `make fuzz SECONDS=...` new ones for a time.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_engine.errors import SettingsError
from tests.fuzz.files import Files, as_text, text_of
from tests.fuzz.findings import FINDINGS
from tests.fuzz.guards import bounded_memory, bounded_time
from tests.fuzz.guided import files_of, run_guided
from tests.fuzz.runs import minimize, run
from tests.fuzz.target import Finding, Target, input_of, seeds_of, try_input
from tests.fuzz.targets import TARGETS

_INPUTS = 600
"""Inputs of all targets together in `make test`; each target has its share."""
_NIGHTLY = 100_000
NEVER_REFUSED = {"rows"}
"""Targets that name damage and refuse nothing."""
_SHARES = sum(target.share for target in TARGETS.values())
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_of_a_target_are_accepted(name: str, work: Path) -> None:
    """Without this, a target whose seeds are all refused would test nothing but the refusal."""
    seeds = seeds_of(TARGETS[name], work)
    for files in random.Random(name).sample(seeds, min(3, len(seeds))):
        assert try_input(TARGETS[name], files, work) == ""


@pytest.mark.parametrize("name", TARGETS)
def test_a_changed_input_is_read_or_refused_in_words(name: str, work: Path) -> None:
    count = max(3, round(_INPUTS * TARGETS[name].share / _SHARES))
    result = run(TARGETS[name], 1, range(count), work)
    assert result.findings == {}
    assert result.inputs == count


@pytest.mark.nightly
@pytest.mark.parametrize("name", TARGETS)
def test_a_hundred_thousand_changed_inputs_are_read_or_refused_in_words(name: str, work: Path) -> None:
    count = round(_NIGHTLY * TARGETS[name].share / _SHARES) + 1
    result = run(TARGETS[name], 2, range(count), work)
    assert result.findings == {}
    assert result.accepted > 0, "not all inputs are refused"
    assert result.accepted < count or name in NEVER_REFUSED, "not all inputs are accepted"


@pytest.mark.parametrize("name", FINDINGS)
def test_a_past_finding_stays_fixed(name: str, work: Path) -> None:
    case = FINDINGS[name]
    refusal = try_input(TARGETS[case.target], case.build(), work)
    assert bool(refusal) == bool(case.refusal), refusal
    assert re.search(case.refusal, refusal), refusal


def test_an_input_follows_from_target_seed_and_number(tmp_path: Path) -> None:
    target = TARGETS["prompts"]
    inputs = [input_of(target, 1, number, tmp_path) for number in range(50)]
    assert inputs == [input_of(target, 1, number, tmp_path) for number in range(50)]
    assert inputs != [input_of(target, 2, number, tmp_path) for number in range(50)]
    assert len({files["text"] for files in inputs}) > 40


def _spin(text: str, output: Path) -> None:
    while True:
        pass


def _write_outside(text: str, output: Path) -> None:
    (output.parent / "elsewhere").write_bytes(b"x")


def _lose(text: str, output: Path) -> None:
    raise AssertionError("lost")


def _say_control(text: str, output: Path) -> None:
    error = SettingsError("x")
    error.args = ("\x1b[2J",)
    raise error


def _say_much(text: str, output: Path) -> None:
    error = SettingsError("x")
    error.args = ("x" * 6000,)
    raise error


FAULTS: dict[str, tuple[Callable[[str, Path], object], str]] = {
    "another exception": (lambda text, output: {}["x"], "KeyError"),
    "a lost promise": (_lose, "lost"),
    "a write elsewhere": (_write_outside, "wrote outside of its output: .*elsewhere"),
    "too much memory": (lambda text, output: bytearray(1 << 33), "MemoryError"),
    "a control character in an error": (_say_control, "control characters"),
    "a long error": (_say_much, "the error has 6000 characters"),
    "a warning": (lambda text, output: __import__("warnings").warn("old", stacklevel=1), "UserWarning"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_finds(fault: str, tmp_path: Path) -> None:
    """Negative control of the tests above."""
    check, words = FAULTS[fault]
    target = Target("faulty", lambda _: [as_text("a")], lambda folder, output: check("a", output))
    with pytest.raises(Finding, match=words):
        try_input(target, as_text("a"), tmp_path)


def test_the_oracle_stops_what_does_not_end(tmp_path: Path) -> None:
    from tests.fuzz.guards import TooSlow

    with pytest.raises(TooSlow), bounded_time(0.2):
        _spin("", tmp_path)
    before = time.process_time()
    with bounded_time(60.0):
        assert time.process_time() >= before, "after the block, and within the bound, nothing is raised"


def test_the_bound_on_memory_ends_with_its_block() -> None:
    with bounded_memory(1 << 24), pytest.raises(MemoryError):
        bytearray(1 << 28)
    assert len(bytearray(1 << 28)) == 1 << 28


def test_a_finding_is_made_smaller(tmp_path: Path) -> None:
    def check(folder: Path, output: Path) -> None:
        if b"zorb" in (folder / "text").read_bytes():
            raise KeyError("zorb")

    target = Target("faulty", lambda _: [as_text("a")], check)
    files: Files = {"text": b"a" * 40 + b"zorb" + b"b" * 27, "other": b"x"}
    assert minimize(target, files, tmp_path) == {"text": b"zorb"}


def test_bytes_of_a_guided_run_choose_seed_and_mutations(tmp_path: Path) -> None:
    seeds = seeds_of(TARGETS["refs"], tmp_path)
    chosen = {text_of(files_of(bytes([number, 0, 0, 0]), seeds)) for number in range(30)}
    assert len(chosen) > 20
    assert files_of(b"abcd", seeds) == files_of(b"abcd", seeds)
    assert files_of(b"", seeds)


COMMAND = [sys.executable, "-m", "tests.fuzz"]


def test_a_guided_run_names_the_absent_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "atheris", None)
    with pytest.raises(SystemExit, match="Fix: pip install atheris"):
        run_guided(TARGETS["refs"], tmp_path, 1, tmp_path)


@pytest.mark.nightly
def test_a_guided_run_ends_in_time_without_findings(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed; it is no dependency")
    done = subprocess.run([*COMMAND, "refs", "--guided", "--seconds", "5", "--keep", str(tmp_path)], timeout=300)
    assert done.returncode == 0
    assert not list(tmp_path.iterdir())


def test_the_peak_of_memory_is_that_of_the_run(tmp_path: Path) -> None:
    def check(folder: Path, output: Path) -> None:
        bytearray(1 << 27)

    large = run(Target("large", lambda _: [as_text("a")], check), 1, range(1), tmp_path).peak
    small = run(Target("small", lambda _: [as_text("a")], lambda *_: None), 1, range(1), tmp_path).peak
    assert large - small > 1 << 26


@pytest.mark.nightly
def test_the_command_reports_findings_and_dead_processes(tmp_path: Path) -> None:
    command = [*COMMAND, "refs", "file-names", "--count", "40", "--seed", "3"]
    done = subprocess.run(
        [*command, "--keep", str(tmp_path)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"refs: 20 inputs .* 0 findings\nfile-names: 20 inputs", done.stdout), done.stdout
