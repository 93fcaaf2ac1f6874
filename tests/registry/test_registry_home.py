import errno
import os
import subprocess
import sys
from contextlib import closing

import pytest

from registry.errors import HomeError
from registry.home import Home
from registry.lineage.record import Lineage


def test_home_has_its_folders(tmp_path):
    home = Home.open(tmp_path / "new" / "home")
    assert home.store.is_dir()
    assert home.work.is_dir()
    assert home.lineage_url.endswith("/new/home/lineage.db")
    assert list(home.locks.iterdir()) == []


def test_absent_home_is_not_created_with_create_false(tmp_path):
    with pytest.raises(HomeError, match="loraline run"):
        Home.open(tmp_path / "absent", create=False)
    assert not (tmp_path / "absent").exists()


def test_home_under_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(HomeError, match="not a folder") as caught:
        Home.open(tmp_path / "file" / "home")
    assert str(tmp_path / "file" / "home") in str(caught.value)
    assert "LORALINE_HOME" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_home_is_a_clear_error(tmp_path):
    home = Home.open(tmp_path / "home")
    for folder in (home.path, *home.path.iterdir()):
        folder.chmod(0o555)
    with pytest.raises(HomeError, match="writable"):
        Home.open(home.path)


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "make the folder writable")]
)
def test_disk_error_is_a_clear_error(tmp_path, monkeypatch, number, message):
    def refuse(_descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(HomeError, match=message):
        Home.open(tmp_path / "home")


COUNT_RUNS = "import sys; from registry.lineage.record import Lineage; print(len(Lineage(sys.argv[1]).runs()))"


def test_committed_rows_are_visible_to_other_processes_after_a_second_open_and_close(empty_home, spawn):
    url = empty_home.lineage_url

    def count_in_another_process():
        out, err = spawn(COUNT_RUNS, url).communicate(timeout=60)
        return int(out), err

    with closing(Lineage(url)) as lineage:
        lineage.start_run("one", {})
        # Closing a second connection in this process must not release the locks of the first one.
        Lineage(url).close()
        assert count_in_another_process() == (1, "")
        lineage.start_run("two", {})
        assert count_in_another_process() == (2, "")
        assert len(lineage.runs()) == 2


def test_reading_needs_neither_mlflow_nor_torch():
    script = """
import sys
import registry, registry.entities, registry.store.artifacts, registry.lineage.record
import registry.versions.versions, registry.versions.promotion, registry.maintenance.fsck
print(sorted({"mlflow", "torch", "prefect", "numpy"} & set(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)
