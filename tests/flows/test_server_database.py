"""Tests that transactions of Prefect's SQLite database wait for each other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prefect.server.database.configurations import AioSqliteConfiguration
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from flows.server_database import WaitingSqlite

COUNT = text("SELECT count(*) FROM entries")


async def write_at_once(database: AioSqliteConfiguration) -> tuple[list[BaseException | None], int]:
    """Runs two transactions that read, pause and write; returns their errors, and the entries seen by a session inside.

    The third session only reads, while the transaction that opened it holds the lock.
    """
    engine = await database.engine()
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE entries (name TEXT)"))
    seen: list[int] = []

    async def write(name: str) -> None:
        async with await database.session(engine) as session, database.begin_transaction(session):
            await session.execute(COUNT)
            await asyncio.sleep(0.1)
            await session.execute(text("INSERT INTO entries VALUES (:name)"), {"name": name})
            async with await database.session(engine) as reading:
                seen.append((await reading.execute(COUNT)).scalar_one())

    try:
        errors = await asyncio.gather(write("a"), write("b"), return_exceptions=True)
    finally:
        await engine.dispose()
    return list(errors), max(seen)


def test_a_transaction_that_reads_first_waits_for_another_writer(tmp_path: Path) -> None:
    database = WaitingSqlite(connection_url=f"sqlite+aiosqlite:///{tmp_path}/prefect.db")
    assert asyncio.run(write_at_once(database)) == ([None, None], 1)


def test_prefects_own_transaction_fails_there(tmp_path: Path) -> None:
    database = AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{tmp_path}/prefect.db")
    errors, _ = asyncio.run(write_at_once(database))
    (error,) = filter(None, errors)
    with pytest.raises(OperationalError, match="database is locked"):
        raise error
