"""Targets that read files which users bring: settings of other trainers, ballots, and signed exports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from flows.coming_from.write import convert_settings
from flows.spec import load_spec
from lora_engine.files import sha256_bytes
from registry.errors import SignatureError
from tasks.operations.ballots import VoteAnswer, read_answers
from tasks.operations.verify_files import verify_files
from tests.flows.commands import say
from tests.flows.made import register_zorb
from tests.flows.shared import draw_noise
from tests.flows.test_coming_from import DATASET, FILES
from tests.fuzz.files import Files, read_files, write_files
from tests.fuzz.target import Target

_BALLOT = b"pair,vote\n1,left\n2,\n3,tie\n6,right\n"
_KEY = "release.pub"


def _seed_trainers(folder: Path) -> list[Files]:
    return [*({name: text.encode()} for name, text in FILES.items()), {"dataset.toml": DATASET.encode()}]


def check_trainer(folder: Path, output: Path) -> None:
    """Reads the settings of another trainer beside its images; what it becomes is a pipeline that loads."""
    path = next(path for path in sorted(folder.iterdir()) if path.is_file())
    beside = write_files(output / "beside", {path.name: path.read_bytes()})
    for name in ("img/10_sks star", "reg/1_star"):
        (beside / name).mkdir(parents=True)
        draw_noise(beside / name / "0.png", 0)
    converted = convert_settings(output / "made", beside / path.name, base="tiny")
    assert load_spec(converted.path).steps


def check_ballot(folder: Path, output: Path) -> None:
    """Reads the votes of a table; each is about one of its pairs."""
    path = next(path for path in sorted(folder.iterdir()) if path.is_file())
    answers = read_answers(path, 6)
    assert answers
    assert all(0 <= position < 6 and answer in get_args(VoteAnswer) for position, answer in answers.items())


def _seed_signed(folder: Path) -> list[Files]:
    folder.mkdir(parents=True)
    home = register_zorb(folder)
    say("keys", "new", folder / "release", "--without-passphrase", "--trust", home=home)
    say("sign", "zorb@1", "--key", folder / "release", home=home)
    say("export", "zorb@1", "--to", "kohya", "-o", folder / "out", "--with-records", home=home)
    exported = {f"out/{name}": content for name, content in read_files(folder / "out").items()}
    SIGNED.update({Path(name).name: sha256_bytes(content) for name, content in exported.items()})
    return [exported | {_KEY: (folder / _KEY).read_bytes()}]


SIGNED: dict[str, str] = {}
"""Name of a file of the seed -> its digest. Whatever an input holds, what is verified is what was signed."""


def check_signed(folder: Path, output: Path) -> None:
    """Verifies an export by a public key; whatever holds has the bytes that were signed."""
    result = verify_files(folder / "out", [folder / _KEY])
    json.dumps({"signed": result.signed, "notes": result.notes, "exported": result.exported})
    if result.findings:
        raise SignatureError("; ".join(result.findings)[:3000])
    signed: Mapping[str, str] = result.signed
    assert signed
    for name, digest in signed.items():
        assert sha256_bytes((result.folder / name).read_bytes()) == digest == SIGNED[name], f"{name} was not signed"


RECEIVED = (
    Target("trainers", _seed_trainers, check_trainer),
    Target("ballots", lambda _: [{"ballot.csv": _BALLOT}], check_ballot, 0.5),
    Target("signed", _seed_signed, check_signed, 0.3),
)
"""Targets of received files."""
