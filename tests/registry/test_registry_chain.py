"""Tests that a log that was changed, shortened or written anew is found, at the first event that was changed."""

import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from lora_engine.files import sha256_bytes
from registry import event_log
from registry.errors import LineageError
from registry.maintenance.backup import backup
from registry.maintenance.backup_manifest import read_backup_heads
from registry.maintenance.check_chain import EVENTS, KnownHead, check_chain
from registry.maintenance.fsck import fsck
from registry.maintenance.repair import repair
from registry.store.chain import FIELDS, FIRST, Head, digest_of, find_breaks, read_head, read_links
from registry.store.database import Database
from registry.store.tables import EventRow


@pytest.fixture
def log(tmp_path):
    """Returns a database whose log has six events."""
    database = Database(f"sqlite:///{tmp_path / 'lineage.db'}")
    for number in range(1, 7):
        append(database, str(number))
    yield database
    database.close()


def append(database, subject, action="revoke"):
    with database.write() as session:
        return event_log.log_event(
            session, action, actor="ada@lab", reason="r", subject=subject, details={"é": [1, 0.5, None]}
        )


def tamper(database, *statements):
    """Changes the log as a user with write access to the database can."""
    with database.engine.connect() as connection:
        triggers = connection.execute(text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")).all()
        for name, _ in triggers:
            connection.execute(text(f"DROP TRIGGER {name}"))
        for statement in statements:
            connection.exec_driver_sql(statement)
        for _, sql in triggers:
            connection.execute(text(sql))
        connection.commit()


def problems(database, *heads):
    with database.read() as session:
        return [problem.what for problem in check_chain(session, [KnownHead(head, "outside") for head in heads])]


def head_of(database):
    with database.read() as session:
        return read_head(session, EVENTS)


def link_anew(database):
    """Computes the whole chain anew, as an attacker who knows this program can."""
    with database.read() as session:
        rows = session.execute(text(f"SELECT seq, {', '.join(FIELDS)} FROM events ORDER BY seq")).all()
    last, statements = FIRST, []
    for number, (seq, *values) in enumerate(rows, start=1):
        digest = digest_of(last, values)
        statements.append(
            f"UPDATE events SET seq = {number}, previous = '{last}', digest = '{digest}' WHERE seq = {seq}"
        )
        last = digest
    tamper(database, *statements, f"UPDATE sqlite_sequence SET seq = {len(rows)}")


def test_the_documented_form_gives_the_digests(log):
    """The form of docs/records.md, computed without the registry's code."""
    with closing(sqlite3.connect(log.where)) as connection:
        columns = "previous, name, alias, action, before, after, actor, reason, gates, at, subject, details"
        rows = connection.execute(f"SELECT digest, {columns} FROM events ORDER BY seq").fetchall()
    for digest, *values in rows:
        assert digest == sha256_bytes(json.dumps(values, separators=(",", ":")).encode())
    assert [row[1] for row in rows] == [FIRST, *(row[0] for row in rows[:-1])]
    assert head_of(log) == Head(6, rows[-1][0])
    assert problems(log, head_of(log)) == []


def test_an_event_has_the_digests_of_its_row(log):
    event = append(log, "7")
    assert Head(event.seq, event.digest) == head_of(log)
    with log.read() as session:
        assert event_log.read_events(session)[-1] == event


CHANGES = {
    "changed": (["UPDATE events SET actor = 'eve@lab' WHERE seq = 3"], "event 3: it was changed"),
    "changed time": (["UPDATE events SET at = replace(at, '.', ',') WHERE seq = 3"], "event 3: it was changed"),
    "JSON in another form": (["UPDATE events SET gates = '[ ]' WHERE seq = 3"], "event 3: it was changed"),
    "removed": (["DELETE FROM events WHERE seq = 3"], "event 4: event 3 is missing from the log"),
    "two removed": (["DELETE FROM events WHERE seq IN (3, 4)"], "event 5: events 3 to 4 are missing"),
    "removed and renumbered": (
        ["DELETE FROM events WHERE seq = 3", *(f"UPDATE events SET seq = {n - 1} WHERE seq = {n}" for n in (4, 5, 6))],
        "event 3: the event before it, 2, was replaced with its digest, or events between them were removed",
    ),
    "first removed": (["DELETE FROM events WHERE seq = 1"], "event 2: event 1 is missing from the log"),
    "moved": (
        [f"UPDATE events SET seq = {new} WHERE seq = {old}" for old, new in ((2, 99), (4, 2), (99, 4))],
        "event 2: it was moved: it was written directly after event 3",
    ),
    "digest changed": (
        ["UPDATE events SET digest = lower(hex(randomblob(32))) WHERE seq = 3"],
        "event 3: it was changed",
    ),
    "link changed": (
        ["UPDATE events SET previous = lower(hex(randomblob(32))) WHERE seq = 3"],
        "event 3: it was changed",
    ),
    "blob": (["UPDATE events SET reason = x'ff00' WHERE seq = 3"], "event 3: it was changed"),
    "end removed": (["DELETE FROM events WHERE seq > 4"], "it ends with event 4, but event 6 was written"),
    "all removed": (["DELETE FROM events"], "it ends with event 0, but event 6 was written"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_event_that_does_not_fit_is_named(log, change):
    statements, message = CHANGES[change]
    assert problems(log) == []
    tamper(log, *statements)
    found = problems(log)
    assert any(message in problem for problem in found), found


def test_an_inserted_event_with_a_valid_digest_is_named(log):
    with log.read() as session:
        second = read_links(session, EVENTS)[1]
        values = session.execute(text(f"SELECT {', '.join(FIELDS)} FROM events WHERE seq = 2")).one()
    columns = ", ".join(("seq", "previous", "digest", *FIELDS))
    digest = digest_of(second.digest, values)
    tamper(
        log,
        *(f"UPDATE events SET seq = {number + 1} WHERE seq = {number}" for number in (6, 5, 4, 3)),
        f"INSERT INTO events ({columns}) SELECT 3, '{second.digest}', '{digest}', {', '.join(FIELDS)} "
        "FROM events WHERE seq = 2",
    )
    (found, *_) = problems(log)
    assert "at event 4: event 3 was inserted: this event was written directly after event 2" in found


def test_only_a_head_from_outside_shows_a_shortened_log_that_was_linked_anew(log):
    """What the documentation promises, and what it does not."""
    head = head_of(log)
    tamper(log, "DELETE FROM events WHERE seq > 4")
    link_anew(log)
    assert problems(log) == []
    assert problems(log, head) == [f"the log was shortened or written anew: it does not have event {head}"]
    for subject in "78":
        append(log, subject)
    assert head_of(log).seq == head.seq
    assert problems(log, head), "the same number, but another event"


def test_a_later_log_has_every_earlier_head(log):
    heads = [head_of(log)]
    for subject in "789":
        append(log, subject)
        heads.append(head_of(log))
    assert problems(log, *heads) == []


def test_a_damaged_digest_stops_no_later_event(log):
    tamper(log, "UPDATE events SET digest = x'ff00' WHERE seq = 6")
    assert append(log, "7").seq == 7
    assert "at event 6: it was changed" in problems(log)[0]


@pytest.mark.parametrize(
    "head", ["", "5", "5:", ":" + "a" * 64, "5:" + "A" * 64, "-5:" + "a" * 64, "5" * 20 + ":" + "a" * 64]
)
def test_a_malformed_head_is_refused(head):
    with pytest.raises(LineageError, match="is no head of a log"):
        Head.parse(head)
    assert str(Head.parse("17:" + "a" * 64)) == "17:" + "a" * 64


def test_a_clock_that_goes_back_is_reported_and_changes_no_order(log, monkeypatch):
    monkeypatch.setattr(event_log, "now", lambda: datetime.now(UTC) - timedelta(days=400))
    append(log, "7")
    monkeypatch.undo()
    append(log, "8")
    (found,) = problems(log)
    assert found.startswith("the clock went back: event 7 is of")
    with log.read() as session:
        assert [event.subject for event in event_log.read_events(session)] == list("12345678")


def test_repair_restores_nothing_from_a_changed_log_and_does_not_link_it_anew(versions, register):
    register(versions, b"weights")
    database = versions.lineage.database
    for subject in "ab":
        append(database, subject)
    tamper(database, "UPDATE events SET subject = 'eve' WHERE subject = 'a'")
    before = head_of(database)
    done = repair(versions.home, mlflow=False)
    assert [(entry.what, entry.done) for entry in done] == [
        ("the log was changed, so nothing is restored from it", False)
    ]
    assert head_of(database) == before
    assert any("the log was changed at event" in problem.what for problem in fsck(versions.home, mlflow=False))


def test_a_backup_has_the_head_and_the_next_one_reports_a_log_without_it(versions, register, tmp_path):
    register(versions, b"weights")
    database, target = versions.lineage.database, tmp_path / "backups"
    append(database, "a")
    assert backup(versions.home, target).problems == ()
    (known,) = read_backup_heads(target)
    assert known.head == head_of(database)
    append(database, "b")
    assert backup(versions.home, target).problems == ()
    tamper(database, "DELETE FROM revocations", "DELETE FROM events WHERE subject = 'b'")
    link_anew(database)
    (problem,) = backup(versions.home, target).problems
    assert "the log was shortened or written anew" in problem.what
    assert problem.where.startswith("backup of 20")
    heads = read_backup_heads(target)
    assert len(heads) == 3
    assert sum("written anew" in problem.what for problem in fsck(versions.home, mlflow=False, heads=heads)) == 1


def test_a_row_without_links_is_found(log):
    """The columns have a default, so another program can add rows without links."""
    with log.write() as session:
        session.add(
            EventRow(action="lift", actor="eve", reason="r", gates=[], at=datetime.now(UTC), subject="1", details={})
        )
    with log.read() as session:
        assert [entry.seq for entry in find_breaks(read_links(session, EVENTS))] == [7]
