"""Tests the corpus of bad and odd files: each is read or refused with a reason, without running code or hanging."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bad_corpus import BASE, CORPUS, Canary

from lora_engine.errors import AdapterError
from lora_engine.formats import inspect, read_adapter

harmless = {name: case for name, case in CORPUS.items() if not case.dangerous}
dangerous = {name: case for name, case in CORPUS.items() if case.dangerous}
# Address space, not memory in use: torch alone maps several gigabytes.
_LIMIT, _SECONDS = 12 << 30, 300
_CHILD = """
import resource, sys
from pathlib import Path
from lora_engine.errors import AdapterError
from lora_engine.formats import read_adapter
from bad_corpus import BASE, CORPUS

resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),) * 2)
for line in sys.stdin:
    name, path = line.rstrip("\\n").split("\\t")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_adapter(Path(path), BASE if CORPUS[name].named else None)
        outcome = "read"
    except AdapterError as error:
        outcome = ascii(str(error))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(name, outcome, grown, sep="\\t", flush=True)
"""


def cases(test):
    """Parametrizes a test by every file that is not dangerous; forked processes read pickles."""
    return pytest.mark.usefixtures("forked_readers")(pytest.mark.parametrize("name", harmless)(test))


INSPECTABLE = {
    "OFT of parts of other sizes",
    "FLUX DoRA of inputs in a fused layer",
    "FLUX rows that are not three times the columns",
    "FLUX in no known module",
    "FLUX block of a huge number",
    "XLabs module that is none",
    "an unsupported family",
}
"""Files that cannot be read as adapters, but can be inspected."""


def path_of(case, folder):
    path = folder / case.file
    case.build(path)
    return path


def test_the_corpus_is_large_and_every_case_has_an_expectation():
    assert len(CORPUS) >= 100
    assert len(dangerous) >= 10
    assert sum(not case.refusal for case in CORPUS.values()) >= 20, "negative control: valid files are read"


@cases
def test_a_file_is_read_or_refused_with_the_reason(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = CORPUS[name]
    path = path_of(case, tmp_path)
    names = BASE if case.named else None
    if not case.refusal:
        adapter, _ = read_adapter(path, names)
        assert adapter.modules
        assert inspect(path)["kinds"]
        return
    with pytest.raises(AdapterError) as caught:
        read_adapter(path, names)
    message = str(caught.value)
    assert re.search(case.refusal, message), message
    assert str(path) in message, "the error names the file"
    assert caught.value.remedy
    assert len(message) < 4000
    assert message.replace("\n", "").isprintable(), "no control character of a file reaches the terminal"
    assert not (tmp_path / "canary").exists()


@cases
def test_inspect_raises_only_adapter_errors(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = CORPUS[name]
    path = path_of(case, tmp_path)
    if not case.refusal or name in INSPECTABLE:
        assert inspect(path)["modules"]
    elif not case.named:
        with pytest.raises(AdapterError, match=re.escape(str(path))):
            inspect(path)
    else:  # only the base refuses some of these
        try:
            assert inspect(path)["modules"]
        except AdapterError as error:
            refused = str(error)
            assert str(path) in refused
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("nightly", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_dangerous_files_are_refused_within_bounds_of_memory_and_time(nightly, tmp_path):
    selected = {name: case for name, case in dangerous.items() if case.nightly == nightly}
    paths = {}
    for number, (name, case) in enumerate(selected.items()):
        (tmp_path / str(number)).mkdir()
        paths[name] = path_of(case, tmp_path / str(number))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    work = "".join(f"{name}\t{path}\n" for name, path in paths.items())
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(_LIMIT)],
        input=work,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    outcomes = dict(line.split("\t", 1) for line in done.stdout.splitlines())
    assert set(outcomes) == set(selected), f"the child ended early: {done.stderr[-2000:]}"
    for name, outcome in outcomes.items():
        text, grown = outcome.rsplit("\t", 1)
        assert re.search(dangerous[name].refusal, text), (name, text)
        assert str(paths[name]) in text, name
        assert int(grown) < 1 << 20, f"{name} took {grown} KiB"
    assert not (tmp_path / "canary").exists()


def test_the_canary_fires_when_it_is_unpickled(tmp_path, monkeypatch):
    """Negative control of the tests above."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Canary(), protocol=2))
    assert (tmp_path / "canary").exists()
