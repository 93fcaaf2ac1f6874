"""Tests that no verb writes outside of its output, its home and temporary folders, whatever its inputs are called.

An audit hook lists every path that this process creates, changes or deletes. The verbs come from the parser, so a new
verb is tested by being added; a new kind of argument needs values in `_values` of test_access_cli.py.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine.bases.tiny import WEIGHTS
from lora_engine.files import sha256_bytes, sha256_file
from lora_engine.formats.family import FAMILY
from lora_engine.formats.safetensors_io import read_safetensors, write_safetensors
from registry.entities import Execution
from registry.home import Home
from registry.lineage.record import Lineage
from registry.maintenance.archive import pack_archive
from registry.maintenance.backup import backup
from registry.store.artifacts import open_store
from tests.flows.commands import loraline_here as loraline
from tests.flows.made import write_random
from tests.flows.shared import copy_trained
from tests.flows.test_access_cli import SPEC, VERBS, _values, arguments
from tests.support.listener import Listener, shared_listener


@pytest.fixture(scope="module")
def listener() -> Listener:
    return shared_listener()


@dataclass
class Place:
    """A folder with a home, inputs with hostile names, outputs, and a folder that belongs to someone else."""

    folder: Path
    victim: Path
    home: Path
    names: tuple[str, ...]
    outputs: int = 0

    def outside(self, paths: Sequence[Path], output: Path) -> set[Path]:
        inside = (output, self.home, self.folder / "temporary", Path("/dev"))
        return {path for path in paths if not any(path.is_relative_to(folder) for folder in inside)}

    def new_output(self) -> Path:
        """Returns a new folder, with links to the victim in its subfolder `links`."""
        self.outputs += 1
        output = self.folder / "outputs" / str(self.outputs)
        (output / "links").mkdir(parents=True)
        for name in ("unet", "text_encoder", "adapter", "masks", "samples"):
            (output / "links" / name).symlink_to(self.victim)
        for name in ("adapter_config.json", "adapter_model.safetensors", "model-card.md", "provenance.json", "0.png"):
            (output / "links" / name).symlink_to(self.victim / "mine")
        return output


@pytest.fixture(scope="module")
def place(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("places")
    victim = folder / "victim"
    victim.mkdir()
    for name in ("mine", "mine.safetensors", "mine.png", "mine.yaml"):
        (victim / name).write_bytes(b"precious")
    (folder / "temporary").mkdir()
    home = copy_trained(trained_home, folder / "trained").home.path
    return Place(folder, victim, home, (str(victim / "mine"), "/../../../../victim/mine", ".."))


def _write_adapters(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Writes adapters and embeddings whose headers have these names."""
    tensors, header = read_safetensors(write_random(folder / "good.safetensors", 0, form="loraline"))
    weights, config = read_safetensors(write_random(folder / "peft", 0, form="peft") / "adapter_model.safetensors")
    for number, name in enumerate(names):
        component, token, headed = (folder / f"{kind}{number}.safetensors" for kind in ("component", "token", "header"))
        write_safetensors(component, {"zorb": torch.ones(8)}, {FAMILY: "sd", "loraline.component": name})
        write_safetensors(token, {"emb_params": torch.ones(1, 8)}, {FAMILY: "sd", "loraline.token": name})
        claims = dict.fromkeys((f"{name}/adapter_config.json", "modelspec.title", "ss_output_name", name), name)
        write_safetensors(headed, tensors, header | claims)
        both = folder / f"both{number}"
        both.mkdir()
        shutil.copy(folder / "good.safetensors", both / "adapter.safetensors")
        shutil.copy(component, both / "zorb.safetensors")
        peft = folder / f"peft{number}"
        shutil.copytree(folder / "peft", peft)
        write_safetensors(peft / "adapter_model.safetensors", weights, config | {"loraline.component": name})
        yield from (component, token, headed, both, peft)


def _write_models(folder: Path, victim: Path) -> Iterator[Path]:
    """Writes models with components that are paths."""
    for number, name in enumerate((str(victim), "../../../victim")):
        model = folder / f"model{number}"
        shutil.copytree(WEIGHTS, model)
        index = json.loads((model / "model_index.json").read_bytes())
        (model / "model_index.json").write_text(json.dumps(index | {name: ["diffusers", "Harmless"]}))
        yield model


def _write_pipelines(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    for number, name in enumerate(names):
        (folder / f"name{number}.yaml").write_text(SPEC.replace("name: joined", f"name: {json.dumps(name)}"))
        (folder / f"step{number}.yaml").write_text(SPEC.replace("  joined:", f"  {json.dumps(name)}:"))
        register = f"{{uses: register, adapter: joined, name: {json.dumps(name)}, alias: {json.dumps(name)}}}"
        (folder / f"version{number}.yaml").write_text(f"{SPEC}  release: {register}\n")
        yield from (folder / f"{kind}{number}.yaml" for kind in ("name", "step", "version"))


def _write_backups(folder: Path, victim: Path, names: Sequence[str]) -> Iterator[Path]:
    """Writes backups with settings, rows, files and members that name other places."""
    home = Home.open(folder / "backed up")
    with closing(Lineage(home.lineage_url)) as lineage:
        artifact = open_store(home).put_files("manifest", {"a": b"a"})
        lineage.log_execution(Execution("e", lineage.start_run("x", {}).id, "s", "s", "1", "k", output=artifact))
    backup(home, folder / "backup")

    def changed(label: str, change: Callable[[Path, dict[str, Any]], None]) -> Path:
        target = folder / f"backup {label}"
        shutil.copytree(folder / "backup", target)
        (snapshot,) = (target / "snapshots").iterdir()
        manifest = json.loads((snapshot / "manifest.json").read_bytes())
        change(snapshot, manifest)
        (snapshot / "manifest.json").write_text(json.dumps(manifest))
        return target

    def set_places(snapshot: Path, manifest: dict[str, Any]) -> None:
        text = f"store: file://{victim}/s\ndatabase: sqlite:///{victim}/x.db\nmlflow: sqlite:///{victim}/m.db\n"
        (snapshot / "loraline.yaml").write_text(text)
        manifest["files"]["loraline.yaml"] = sha256_bytes(text.encode())

    def add_row(snapshot: Path, manifest: dict[str, Any]) -> None:
        with sqlite3.connect(snapshot / "lineage.db") as connection:
            connection.execute("INSERT INTO names VALUES (?, 1)", (names[1],))
        connection.close()
        manifest["files"]["lineage.db"] = sha256_file(snapshot / "lineage.db")

    yield changed("settings", set_places)
    yield changed("row", add_row)
    for number, name in enumerate(names):
        yield changed(f"file {number}", lambda _, it, name=name: it["files"].update({f"{name}.yaml": "0" * 64}))
        yield changed(f"blob {number}", lambda _, it, name=name: it["blobs"].update({name: 1}))
        archive = folder / f"backup {number}.tar"
        pack_archive(folder / "backup", archive)
        with tarfile.open(archive, "a") as members:
            members.add(victim / "mine", name)
        yield archive


@pytest.fixture(scope="module")
def hostile(place: Place) -> Mapping[str, Sequence[str]]:
    """Returns hostile values of each kind of argument, by its metavar or name."""
    folder, names = place.folder / "inputs" / "deep", place.names
    folder.mkdir(parents=True)
    files = [str(path) for path in _write_adapters(folder, names)]
    models = [str(path) for path in _write_models(folder, place.victim)]
    specs = [str(path) for path in _write_pipelines(folder, names)]
    refs = [f"{names[0]}@1", f"small@{names[1]}"]
    return {
        "FILE": files,
        "FILE|NAME@REF": [*files, *refs],
        "A[:w] ...": files[:4],
        "A[:w] B[:w] ...": [*files[:5], *models],
        "REF|FILE": [*files[:5], *refs],
        "BASE": models,
        "base": models,
        "TUNED": models,
        "SPEC": specs,
        "trigger": names,
        "name": names,
        "NAME@REF": refs,
        "NAME@ALIAS": refs,
        "ALIAS": names,
        "FORMAT": names,
        "REF|DIGEST|FILE": refs,
        "SUBJECT": names,
        "PROMPT": [f"a <lora:{names[0]}@1:1>", f"a <lora:{files[0]}:1>"],
        "FOLDER|FILE.tar": [str(path) for path in _write_backups(folder, place.victim, names)],
    }


OUTPUTS = {"OUT", "FOLDER", "DIR", "FILE.html", "URL"}
NO_INPUT = {"keys new": "FILE", "backup": "FOLDER|FILE.tar", "sign": "FILE"}
"""Verb -> an argument that for other verbs is an adapter or a backup to read."""
OPTIONS = {"train": {"--name": "name"}, "import": {"--alias": "name", "--trigger": "name"}}
"""Verb -> options that take hostile values too, each with their kind."""
THOROUGH = {"convert", "import", "restore-backup"}
"""Verbs that run with every hostile value; the others run with the first ones, which are of every kind."""
EXPENSIVE = {"train", "generate", "reproduce"}
"""Verbs that only run with hostile values, which they refuse early."""


def _lines(verb: str, place: Place, hostile: Mapping[str, Sequence[str]]) -> Iterator[tuple[list[str], Path]]:
    """Yields commands of a verb, one for each hostile value of each required argument, with their output."""
    no_input = NO_INPUT.get(verb)
    inputs = place.folder / "inputs" / "deep"
    good = {"SPEC": place.folder / "trained" / "line.yaml", "FILE": inputs / "peft"}
    good["A[:w] ..."] = inputs / "good.safetensors"
    good["FILE|NAME@REF"] = good["FILE"]

    def values(output: Path) -> dict[str, str]:
        defaults = {key: value.replace("none@1", "small@1") for key, value in _values(output).items()}
        return defaults | {metavar: str(path) for metavar, path in good.items() if metavar != no_input}

    if verb not in EXPENSIVE | {"run"}:
        output = place.new_output()
        yield arguments(verb, values(output) | dict.fromkeys(("OUT", "FOLDER", "DIR"), str(output / "links"))), output
    for option, metavar in OPTIONS.get(verb, {}).items():
        for value in hostile[metavar]:
            output = place.new_output()
            yield [*arguments(verb, values(output) | {"IMAGES": str(output)}), option, value], output
    required = {parameter.metavar or str(parameter.name) for parameter in VERBS[verb].params if parameter.required}
    for metavar in sorted(required - OUTPUTS - {no_input}):
        for value in hostile.get(metavar, ())[: None if verb in THOROUGH else 5]:
            output = place.new_output()
            yield arguments(verb, values(output) | {metavar: value}), output


# `up` runs until it is stopped, and takes no path.
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in {"up", "serve", "studio"}])
def test_a_verb_writes_only_to_its_output_and_its_home(
    verb: str,
    place: Place,
    hostile: Mapping[str, Sequence[str]],
    listener: Listener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place.folder / "temporary"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(place.folder / "outputs" if (place.folder / "outputs").is_dir() else place.folder)
    before = {path: path.read_bytes() for path in place.victim.iterdir()}
    ran = 0
    for line, output in _lines(verb, place, hostile):
        home = output / "home" if verb == "restore-backup" else place.home
        with listener.listen() as paths:
            done = loraline(*line, home=home)
        assert "Traceback" not in done.stderr
        assert place.outside(paths, output) == set(), line
        ran += 1
    assert ran
    assert {path: path.read_bytes() for path in place.victim.iterdir()} == before
