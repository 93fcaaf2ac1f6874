"""The registry's tables on another database, of the other kind too: every row, none twice, and all goes on."""

from contextlib import closing

import pytest
from sqlalchemy import insert, select

from registry.audit.backup import backup
from registry.audit.fsck import fsck
from registry.audit.restore import restore
from registry.database import Database, sqlite_file
from registry.errors import HomeError, Refused
from registry.home import Home
from registry.promotion import history, promote
from registry.revocation import revoke
from registry.settings import Settings, read_file, write_file
from registry.tables import MetaRow, SubjectRow, Table
from registry.transfer import transfer
from registry.versions import Versions

pytestmark = [pytest.mark.needs("postgres"), pytest.mark.quick]


@pytest.fixture
def filled(versions, register):
    """A home with versions, aliases, a withdrawn picture, and names that no ASCII holds."""
    register(versions, b"first weights", alias_request="staging")
    register(versions, b"second weights", alias_request="staging", card={"title": "Zörb ✶", "big": 1 << 60})
    promote(versions, "zorb", 2, "production", actor="ada", reason="it is better")
    revoke(versions, "5" * 64, actor="ada", reason="the photographer asked")
    return versions


@pytest.fixture
def other_url(database, postgres_url, tmp_path):
    """An empty database of the kind that the home's own is not of."""
    return postgres_url if database == "sqlite" else f"sqlite:///{tmp_path / 'other' / 'lineage.db'}"


def rows_of(url):
    with closing(Database(url)) as opened, opened.read() as session:
        return {
            table.name: [tuple(row) for row in session.execute(select(table).order_by(*table.primary_key))]
            for table in Table.metadata.sorted_tables
            if table is not MetaRow.__table__
        }


def test_every_row_arrives_and_the_registry_goes_on_there(filled, other_url, register, tmp_path):
    before = rows_of(filled.home.lineage_url)
    counts = transfer(filled.home.lineage_url, other_url)
    assert rows_of(other_url) == before == rows_of(filled.home.lineage_url)
    assert counts == {name: len(rows) for name, rows in before.items()}
    assert counts["versions"] == 2
    assert counts["revocations"] == 1

    write_file(filled.home.path, Settings(database=other_url))
    with closing(Versions(filled.home)) as moved:
        assert moved.get("zorb", "production").version == 2
        assert history(moved, "zorb") == history(filled, "zorb")
        assert register(moved, b"third weights").version == 3
        with pytest.raises(Refused, match="was revoked"):
            promote(moved, "zorb", 1, "trial", actor="ada", reason="to compare")
        assert history(moved, "zorb")[-1].seq == len(before["events"]) + 1
    assert fsck(filled.home, mlflow=False) == []


def test_more_rows_than_one_block_arrive(filled, other_url):
    with closing(Database(filled.home.lineage_url)) as opened, opened.write() as session:
        (artifact,) = session.scalars(select(SubjectRow.artifact).limit(1))
        session.execute(
            insert(SubjectRow),
            [{"artifact": artifact, "subject": f"{i:064}", "label": str(i), "kind": "picture"} for i in range(2500)],
        )
    assert transfer(filled.home.lineage_url, other_url)["subjects"] > 2500
    assert rows_of(other_url) == rows_of(filled.home.lineage_url)


def test_a_database_that_holds_something_is_left_as_it_is(filled, other_url):
    transfer(filled.home.lineage_url, other_url)
    before = rows_of(other_url)
    with pytest.raises(HomeError, match="holds something already"):
        transfer(filled.home.lineage_url, other_url)
    with pytest.raises(HomeError, match="holds something already"):
        transfer(other_url, filled.home.lineage_url)
    assert rows_of(other_url) == before


def test_a_copy_that_is_cut_off_leaves_no_row(filled, other_url, monkeypatch):
    from registry import transfer as module

    copy, copied = module._copy, []

    def fail(source, target, table):
        if table.name == "versions":
            raise HomeError("the disk is full", where="here")
        copied.append(table.name)
        return copy(source, target, table)

    monkeypatch.setattr(module, "_copy", fail)
    with pytest.raises(HomeError, match="the disk is full"):
        transfer(filled.home.lineage_url, other_url)
    assert "artifacts" in copied
    assert not any(rows_of(other_url).values())


def test_a_backup_of_a_home_on_a_server_is_whole_without_the_server(filled, postgres_url, tmp_path):
    home = filled.home
    if sqlite_file(home.lineage_url):
        transfer(home.lineage_url, postgres_url)
        write_file(home.path, Settings(database=postgres_url))
    settings = Settings(database=home.lineage_url, mlflow=postgres_url)
    write_file(home.path, settings)
    done = backup(home, tmp_path / "backups")
    assert done.problems == ()
    assert ["MLflow" in each for each in done.left_out] == [True]

    told = restore(tmp_path / "backups", tmp_path / "new")
    assert sum("lineage.db" in each for each in told.left_out) == 1
    new = Home(tmp_path / "new")
    assert read_file(new.path) == Settings()
    assert read_file(home.path) == settings
    assert rows_of(new.lineage_url)["events"] == rows_of(home.lineage_url)["events"]
    assert fsck(new, mlflow=False) == []
    with closing(Versions(new)) as again:
        assert again.get("zorb", "production").version == 2
        assert again.damage(again.show("zorb", 2)) == ()
