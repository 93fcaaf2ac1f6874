"""Children that decode: a file that takes too much, crashes or hangs its child costs itself alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_engine.data.decoder_process import DecodeLimits
from lora_engine.data.decoders import Decoders, shared_decoders
from lora_engine.data.duplicates import Print, take_print
from lora_engine.data.images import encode_png, open_with_digest
from lora_engine.data.ingest import ingest
from lora_engine.data.spec import IngestSettings
from lora_engine.errors import DataError, EngineError
from tests.lora_engine.data.conftest import make_image

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux")
PIXELS = 63_000_000


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that takes a child about two seconds, and hundreds of megabytes."""
    path = tmp_path_factory.mktemp("large") / "large.png"
    make_image(3_000, 3_000, 3).save(path, compress_level=0)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.png"
    make_image(40, 30).save(path)
    return path


@pytest.fixture
def decoders() -> Iterator[Decoders]:
    pool = Decoders()
    yield pool
    pool.close()


def limited(**limits: float) -> Decoders:
    return Decoders(DecodeLimits(**limits))  # type: ignore[arg-type]


def children() -> set[int]:
    """The children of this process that decode."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread or child that ended meanwhile
            for child in (task / "children").read_text().split():
                if b"decoder_child" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.add(int(child))
    return found


def test_a_child_gives_what_this_process_would(decoders: Decoders, small: Path) -> None:
    decoded = decoders.image(small, small.parent, PIXELS)
    sha256, image = open_with_digest(small)
    own = take_print(image)
    assert (decoded.sha256, decoded.size, decoded.png) == (sha256, (40, 30), encode_png(image))
    for name in ("fine", "coarse", "color"):
        assert np.array_equal(getattr(decoded.print, name), getattr(own, name))
    assert decoded.print.is_small is own.is_small is True
    assert isinstance(Print.from_json(own.to_json()), Print)


def test_a_child_is_reused(decoders: Decoders, small: Path) -> None:
    before = children()
    decoders.image(small, small.parent, PIXELS)
    (first,) = children() - before
    for _ in range(5):
        decoders.image(small, small.parent, PIXELS)
        with pytest.raises(DataError, match=r"gone\.png: cannot be read"):
            decoders.image(small.with_name("gone.png"), small.parent, PIXELS)
    assert children() - before == {first}
    decoders.close()
    assert children() == before


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"memory": 64 << 20}, "needs more than 67,108,864 bytes of memory"),
        ({"seconds": 0}, "takes more than 0 seconds of processor time"),
        ({"wall_seconds": 0.3}, "is not decoded within 0.3 seconds"),
    ],
)
def test_a_file_that_takes_too_much_is_refused_by_name(
    large: Path, small: Path, limits: dict[str, float], reason: str
) -> None:
    pool = limited(**limits)
    try:
        with pytest.raises(DataError, match=f"large.png: {reason}"):
            pool.image(large, large.parent, PIXELS)
        if "wall_seconds" not in limits:
            assert pool.image(small, small.parent, PIXELS).size == (40, 30)
    finally:
        pool.close()


def test_the_same_file_is_decoded_within_the_usual_limits(decoders: Decoders, large: Path) -> None:
    assert decoders.image(large, large.parent, PIXELS).size == (3_000, 3_000)


@pytest.mark.parametrize("kills", [1, 2])
def test_a_crash_is_tried_once_more(decoders: Decoders, large: Path, small: Path, kills: int) -> None:
    before = children()
    killed: set[int] = set()

    def kill() -> None:
        deadline = time.monotonic() + 120
        while len(killed) < kills and time.monotonic() < deadline:
            for child in children() - before - killed:
                # It has limits, so it has started to answer.
                if b"4294967296" in Path(f"/proc/{child}/cmdline").read_bytes() and _is_working(child):
                    os.kill(child, signal.SIGSEGV)
                    killed.add(child)
            time.sleep(0.005)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        if kills == 1:
            assert decoders.image(large, large.parent, PIXELS).size == (3_000, 3_000)
        else:
            with pytest.raises(DataError, match=r"large\.png: ends the process that decodes it \(SIGSEGV\)"):
                decoders.image(large, large.parent, PIXELS)
    finally:
        killer.join()
    assert len(killed) == kills
    assert decoders.image(small, small.parent, PIXELS).size == (40, 30)


def _is_working(child: int) -> bool:
    """True if a child has mapped the large image's pixels."""
    try:
        return int(Path(f"/proc/{child}/statm").read_text().split()[1]) * 4096 > 75 << 20
    except OSError:
        return False


def test_a_file_that_takes_too_much_does_not_end_a_run(
    large: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        make_image(40, 30, number).save(images / f"{number}.png")
    (images / "2 large.png").write_bytes(large.read_bytes())
    pool = limited(memory=64 << 20)
    monkeypatch.setattr("lora_engine.data.opening.shared_decoders", lambda: pool)
    try:
        manifest = ingest(images, tmp_path / "out", IngestSettings())
    finally:
        pool.close()
    assert [image.source for image in manifest.pictures] == ["0.png", "1.png", "2.png", "3.png"]
    assert [(item.source, item.reason) for item in manifest.quarantined] == [
        ("2 large.png", "needs more than 67,108,864 bytes of memory")
    ]


def test_warnings_of_a_child_are_logged_here(
    decoders: Decoders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", icc_profile=b"no profile")
    decoders.image(tmp_path / "a.png", tmp_path, PIXELS)
    assert "a.png has a color profile that cannot be used" in caplog.text


def test_a_child_that_does_not_start_is_no_fault_of_the_file(
    small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "lora_engine.data.decoder_process._environment", lambda: {"PYTHONPATH": "/gone", "PYTHONHOME": "/gone"}
    )
    with pytest.raises(EngineError, match="the process that decodes images does not start") as caught:
        Decoders().image(small, small.parent, PIXELS)
    assert not isinstance(caught.value, DataError)
    assert "encodings" in capfd.readouterr().err


def test_a_child_ends_with_this_process_and_writes_nothing(small: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lora_engine.data.decoders import shared_decoders as s\n"
        "path = Path(sys.argv[1]); s().image(path, path.parent, 10**6); print(s()._idle[0]._process.pid, flush=True)\n"
        "import os; os._exit(0)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(small)], capture_output=True, text=True, check=True)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{run.stdout.strip()}/cmdline").exists() and time.monotonic() < deadline:
        if not Path(f"/proc/{run.stdout.strip()}/cmdline").read_bytes():
            break  # a zombie
        time.sleep(0.02)
    assert time.monotonic() < deadline
    assert [path.name for path in small.parent.iterdir()] == ["small.png"]


def test_a_forked_process_gets_children_of_its_own(small: Path) -> None:
    shared_decoders().image(small, small.parent, PIXELS)
    mine = children()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        sizes = shared_decoders().image(small, small.parent, PIXELS).size
        own = children()
        os.write(writing, f"{sizes} {bool(own) and not own & mine}".encode())
        shared_decoders().close()
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    assert os.read(reading, 100) == b"(40, 30) True"
    os.close(reading)
    assert mine <= children()
    assert shared_decoders().image(small, small.parent, PIXELS).size == (40, 30)
