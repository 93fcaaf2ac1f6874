"""Compares rights, recalls and promotions on random graphs of pipelines and verbs with an independent model."""

from __future__ import annotations

from contextlib import closing
from functools import lru_cache
from pathlib import Path

import pytest

import lora_engine.bases.structure as structure
from lora_engine.catalog.formats import written_formats
from registry.policy.evaluate import evaluate_policy
from registry.policy.rights import resolve_rights
from registry.versions.revocation import revoke
from registry.versions.versions import Versions
from tests.flows.lineage_world import World


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves MLflow out, and builds the modules of the base once."""
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
    monkeypatch.setattr(structure, "base_module_shapes", lru_cache(structure.base_module_shapes))


def compare(world: World) -> None:
    """Asserts that terms, recalls and decisions are those of the model."""
    with closing(Versions(world.home)) as versions:
        for node in world.versions():
            version = versions.show(*node.name.split("@"))
            with versions.lineage.database.read() as session:
                terms = resolve_rights(session, versions, version).terms
            assert terms == world.terms_of({node.name}), node
            assert evaluate_policy(versions, version, "shop").allowed is world.may_be_sold(node.name), node
        for text, subjects in recalls(world):
            affected = revoke(versions, text, reason="r", dry_run=True).versions
            assert set(affected) == world.affected_by(subjects), text


def recalls(world: World) -> list[tuple[str, set[str]]]:
    """Returns texts to revoke, each with the nodes that it names."""
    nodes = world.random.sample(list(world.nodes.values()), min(8, len(world.nodes)))
    found = [(node.name if not node.is_file else node.digest, {node.name}) for node in nodes]
    found = [(text, {n.name for n in world.nodes.values() if n.digest == text} or names) for text, names in found]
    consents = {node.consent for node in world.nodes.values() if node.consent}
    return found + [(c, {n.name for n in world.nodes.values() if n.consent == c}) for c in sorted(consents)]


def run(folder: Path, seed: int, count: int) -> World:
    folder.mkdir()
    world = World(folder, seed)
    world.grow(count)
    compare(world)
    text, subjects = world.random.choice(recalls(world))
    with closing(Versions(world.home)) as versions:
        revoke(versions, text, reason="r", policy="flag")
    world.revoked |= subjects
    for _ in range(count // 4):
        world.import_a_file()
    compare(world)
    return world


def test_rights_recalls_and_promotions_of_a_random_graph_are_those_of_the_model(tmp_path: Path) -> None:
    world = run(tmp_path / "0", 3, 9)
    assert world.refused
    assert any(node.parents for node in world.versions())


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(200))
def test_rights_recalls_and_promotions_of_large_random_graphs_are_those_of_the_model(tmp_path: Path, seed: int) -> None:
    world = run(tmp_path / "graph", seed, 100)
    assert len(world.versions()) >= 100
    assert world.forms == set(written_formats())
