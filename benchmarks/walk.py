"""Compares lineage walks in databases of 10,000 and 1,000,000 edges, on SQLite and on PostgreSQL.

    python -m benchmarks.walk [--small 10000] [--large 1000000] [--rounds 15] [--postgres URL]

Both repeat the same home under other digests: runs of seven steps over 24 images with their captions and a consent,
each registered. A walk returns the same number of nodes in both; only the size of the database differs. A walk includes
its session and reads everything that `loraline lineage` prints. Rounds alternate. Prints one JSON object per database.
`ratio` is the median of large over small, per start. `--postgres` is the URL of a server on which databases may be
created; without it, only SQLite is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import insert, text
from sqlalchemy.engine import make_url

from registry.entities import now
from registry.lineage.record import Lineage
from registry.store.tables import (
    AliasRow,
    ArtifactRow,
    ContentRow,
    EventRow,
    ExecutionRow,
    InputRow,
    NameRow,
    ParentRow,
    RunRow,
    SubjectRow,
    Table,
    VersionRow,
)

IMAGES = 24
STEPS = {
    "photos": ("ingest", "manifest", ()),
    "prepared": ("preprocess", "manifest", ("photos",)),
    "captions": ("caption", "manifest", ("prepared",)),
    "adapter": ("train", "adapter", ("captions",)),
    "report": ("evaluate", "report", ("adapter", "captions")),
    "release": ("register", "version", ("adapter", "report")),
    "exports": ("convert", "export", ("adapter",)),
}
EDGES_PER_RUN = 2 * len(STEPS) + sum(len(inputs) for *_, inputs in STEPS.values()) + 3 * (3 * IMAGES + 1) + 3


def digest(*parts: object) -> str:
    return sha256(" ".join(map(str, parts)).encode()).hexdigest()


def rows_of(number: int) -> Iterator[tuple[type[Table], dict[str, Any]]]:
    """Yields the rows of one run; no other run has its digests."""
    at, run = now(), f"run {number}"
    yield NameRow, {"name": f"name{number}", "created_at": at}
    process = {"pid": 1, "host": "h", "process": "", "status": "COMPLETED"}
    yield RunRow, {"id": run, "name": "p", "spec": {}, "started_at": at, "ended_at": at, **process}
    for step, (uses, kind, inputs) in STEPS.items():
        output, execution = digest(step, number), f"{run} {step}"
        yield ArtifactRow, {"sha256": output, "kind": kind, "size": 1}
        facts = {"run_id": run, "step": step, "uses": uses, "revision": "1", "key": digest("key", output)}
        facts |= {"settings": {}, "status": "COMPLETED", "environment": {}, "started_at": at}
        yield ExecutionRow, {"id": execution, "output": output, **facts}
        for position, role in enumerate(inputs):
            source = digest(role, number)
            yield InputRow, {"execution": execution, "role": role, "artifact": source, "position": position}
        if kind == "manifest":
            yield from _contents(number, step, output)
    yield from _version(number, run, at)


def _contents(number: int, step: str, artifact: str) -> Iterator[tuple[type[Table], dict[str, Any]]]:
    for image in range(IMAGES):
        path = f"pictures/{image}.png"
        yield ContentRow, {"artifact": artifact, "path": path, "sha256": digest(step, path, number), "size": 1}
        for kind in ("picture", "caption"):
            subject = digest(kind, image, number)
            yield SubjectRow, {"artifact": artifact, "subject": subject, "label": f"{kind} {image}", "kind": kind}
    yield SubjectRow, {"artifact": artifact, "subject": f"consent-{number}", "label": "consent", "kind": "consent"}


def _version(number: int, run: str, at: Any) -> Iterator[tuple[type[Table], dict[str, Any]]]:
    own = {"name": f"name{number}", "artifact": digest("adapter", number), "report": digest("report", number)}
    own |= {"record": digest("report", number), "identity": "i", "sha256": digest("file", number), "adapter_path": "a"}
    facts = {"created_at": at, "run_id": run, "mirrored": True, "passed": True, "size": 1, "version": 1}
    yield VersionRow, {"id": number, **own, **facts, "card": {}, "metrics": {}, "gates": [], "params": {}}
    yield ParentRow, {"child": number, "position": 0, "parent": None, "text": "base:tiny"}
    log = {"action": "stage", "actor": "a", "reason": "r", "gates": [], "at": at, "after": 1, "details": {}}
    yield EventRow, {"seq": number, "name": f"name{number}", "alias": "staging", **log}
    yield AliasRow, {"name": f"name{number}", "alias": "staging", "version": 1, "seq": number, "mirrored_seq": number}


def fill(url: str, edges: int) -> Lineage:
    """Fills a database with a number of edges and opens its lineage."""
    lineage = Lineage(url)
    numbers = iter(range(1, 1 + -(-edges // EDGES_PER_RUN)))
    while chunk := list(islice(numbers, 50)):
        rows: dict[type[Table], list[dict[str, Any]]] = {table.class_: [] for table in Table.registry.mappers}
        for number in chunk:
            for table, row in rows_of(number):
                rows[table].append(row)
        with lineage.database.write() as session:
            for table in sorted(rows, key=lambda table: list(Table.metadata.sorted_tables).index(table.__table__)):
                if rows[table]:
                    session.execute(insert(table), rows[table])
    with lineage.database.engine.connect() as connection:
        connection.execute(text("ANALYZE"))
        connection.commit()
    return lineage


def measure(small: Lineage, large: Lineage, rounds: int) -> dict[str, Any]:
    """Returns the figures of one kind of database."""
    number = 7
    starts = {
        "version, up": (f"name{number}@staging", "up"),
        "image, down": (digest("picture", 3, number), "down"),
        "caption, down": (digest("caption", 3, number), "down"),
        "consent, down": (f"consent-{number}", "down"),
        "artifact prefix, down": (digest("photos", number)[:16], "down"),
        "adapter, up": (digest("adapter", number), "up"),
    }
    figures: dict[str, Any] = {}
    for name, (start, direction) in starts.items():
        times: dict[Lineage, list[float]] = {small: [], large: []}
        nodes = set()
        for number in range(rounds + 2):
            for lineage in (small, large) if number % 2 else (large, small):
                start_time = time.perf_counter()
                nodes.add(len(lineage.walk(start, direction, subjects=True).nodes))  # type: ignore[arg-type]
                if number >= 2:
                    times[lineage].append(1000 * (time.perf_counter() - start_time))
        assert len(nodes) == 1, "both walks must return the same number of nodes"
        ratio = statistics.median(b / a for a, b in zip(times[small], times[large], strict=True))
        figures[name] = {
            "nodes": nodes.pop(),
            "small_ms": round(statistics.median(times[small]), 1),
            "large_ms": round(statistics.median(times[large]), 1),
            "ratio": round(ratio, 2),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--postgres")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        urls = {name: f"sqlite:///{Path(folder) / name}.db" for name in ("small", "large")}
        lineages = [fill(urls["small"], chosen.small), fill(urls["large"], chosen.large)]
        print(json.dumps({"database": "sqlite", **measure(*lineages, chosen.rounds)}, indent=1), flush=True)
        for lineage in lineages:
            lineage.close()
    if chosen.postgres:
        lineages = [fill(make_database(chosen.postgres, name), getattr(chosen, name)) for name in ("small", "large")]
        print(json.dumps({"database": "postgresql", **measure(*lineages, chosen.rounds)}, indent=1))
        for lineage in lineages:
            lineage.close()


def make_database(url: str, name: str) -> str:
    """Creates an empty database on the same server and returns its URL."""
    from sqlalchemy import create_engine

    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS loraline_walk_{name}"))
        connection.execute(text(f"CREATE DATABASE loraline_walk_{name}"))
    engine.dispose()
    return make_url(url).set(database=f"loraline_walk_{name}").render_as_string(hide_password=False)


if __name__ == "__main__":
    main()
