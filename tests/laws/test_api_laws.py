"""Laws over all names that `lora_engine` and `registry` export: docstrings, paths as strings, short reprs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_engine as le
import registry
from lora_engine.registries import Loaded, Registry
from registry.lineage.graph import Node
from registry.lineage.walk import Edge, NodeId

EXPORTED = {name: getattr(module, name) for module in (le, registry) for name in module.__all__}
CLASSES = {name: value for name, value in EXPORTED.items() if inspect.isclass(value)}


def functions_of(name: str, value: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yields the exported function, or the public functions of an exported class, without those of other packages."""
    if inspect.isfunction(value):
        yield name, value
    for cls in inspect.getmro(value) if inspect.isclass(value) else ():
        if cls.__module__.partition(".")[0] not in ("lora_engine", "registry"):
            continue
        for attribute, member in vars(cls).items():
            if attribute.startswith("_") and (attribute != "__init__" or is_dataclass(cls)):
                continue
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(function):
                yield f"{name}.{attribute}", function


FUNCTIONS = dict(entry for name, value in EXPORTED.items() for entry in functions_of(name, value))


def test_the_laws_see_functions_methods_and_properties() -> None:
    assert {"load", "LoadedAdapter.save", "Store.__init__", "Store.checkout", "Registry.home"} < FUNCTIONS.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_every_exported_class_has_a_docstring_of_its_own(name: str) -> None:
    assert vars(CLASSES[name]).get("__doc__")
    assert not CLASSES[name].__doc__.startswith(f"{name}("), "the signature that `@dataclass` writes"


def test_every_public_function_has_a_docstring() -> None:
    assert [name for name, function in FUNCTIONS.items() if not function.__doc__ and "__init__" not in name] == []


def test_what_is_neither_class_nor_function_is_a_set_of_named_entries() -> None:
    """The reference describes these by their entries."""
    others = {name: value for name, value in EXPORTED.items() if name not in CLASSES and name not in FUNCTIONS}
    assert all(isinstance(value, Registry | Loaded) for value in others.values())
    assert others.keys() >= {"codecs", "kinds", "methods"}


def test_every_path_may_be_a_string() -> None:
    """mypy holds the bodies to the annotation: they convert before they use an attribute of `Path`."""
    annotations = {
        f"{name}({parameter.name})": str(parameter.annotation)
        for name, function in FUNCTIONS.items()
        for parameter in inspect.signature(function).parameters.values()
    }
    assert [where for where, text in annotations.items() if re.search(r"\b(Path|PathLike)\b", text)] == []
    assert len([text for text in annotations.values() if "FilePath" in text]) > 20


def test_a_store_takes_and_gives_files_by_strings(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"a")
    store = registry.Store(str(tmp_path / "store"))
    ref = store.put("report", str(tmp_path / "in"))
    assert store.put_files("report", {"a.txt": str(tmp_path / "in" / "a.txt")}) == ref
    store.checkout(ref, str(tmp_path / "out"))
    store.checkout_file(ref, "a.txt", str(tmp_path / "b.txt"))
    assert (tmp_path / "out" / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes() == b"a"


def instances(folder: Path) -> Iterator[Any]:
    """Yields an instance of every exported class, with more content than a repr should show."""
    module = torch.nn.Linear(64, 64)
    adapter = le.create_adapter({"unet": torch.nn.Sequential(module)}, "*", rank=4)
    numbers = {f"metric {number}": number for number in range(100)}
    yield adapter
    yield from (kind.create(module.weight.detach(), None, 4, None, None) for kind in le.kinds.values())
    yield le.LoadedAdapter(
        adapter, le.Card(), (embedding := le.Embedding("<zorb>", {"text_encoder": torch.ones(9, 768)}),)
    )
    yield embedding
    yield le.attach({"unet": torch.nn.Sequential(module)}, adapter)
    yield le.Card(
        title="zorb", base_fingerprint="0" * 64, recipe=numbers, data=["0" * 64] * 100, extra={"a": "b" * 900}
    )
    yield le.load_base("tiny")
    yield le.TrainSettings(rank=4, steps=400)
    ref, now = registry.ArtifactRef("adapter", "0" * 64, 9), datetime.now(UTC)
    version = registry.AdapterVersion(
        name="zorb",
        version=1,
        sha256="0" * 64,
        size=9,
        artifact=ref,
        adapter_path="zorb.safetensors",
        report=ref,
        aliases=("staging",),
        created_at=now,
        run_id="0" * 32,
        mlflow_run_id="0" * 32,
        card=numbers,
        metrics=numbers,
        gates=[numbers],
        passed=True,
        parents=("other@1",),
    )
    with registry.Registry.open(folder / "home") as reg:
        yield from (reg, reg.home, reg.lineage, reg.versions, reg.versions.store, ref, version)
        yield from (registry.RegisteredVersion(version, reg.versions), reg.lineage.start_run("zorb", numbers))
    yield registry.Execution("0" * 32, "0" * 32, "report", "evaluate", "1", "0" * 64, numbers, {"adapter": ref}, ref)
    yield registry.Event(1, "zorb", "staging", "promote", None, 1, "user@host", "better", [numbers], now, "", numbers)
    node = NodeId("version", "zorb@1")
    yield registry.Walk(node, "up", (Node(*node, 0, "zorb", numbers),) * 100, (Edge(node, node, "adapter"),) * 100)
    yield registry.Decision(allowed=False, reasons=("no license",))
    yield registry.AliasPolicy()
    yield registry.Refused("zorb@1", reasons=("no license", "no evaluation"))
    errors = [cls for cls in CLASSES.values() if issubclass(cls, Exception) and cls is not registry.Refused]
    yield from (cls("a problem", where="here") for cls in errors)


def test_reprs_are_short_and_print_no_tensors(tmp_path: Path) -> None:
    shown = [(value, repr(value)) for value in instances(tmp_path)]
    assert [text for _, text in shown if len(text) > 500 or "\n" in text or "tensor(" in text] == []
    missing = [name for name, cls in CLASSES.items() if not any(is_a(value, cls) for value, _ in shown)]
    assert missing == []


def is_a(value: object, cls: type) -> bool:
    """Returns True if a value is of a class, or has the attributes of the protocol that base models follow."""
    return cls in type(value).__mro__ or (cls is le.BaseModel and all(hasattr(value, a) for a in cls.__annotations__))
