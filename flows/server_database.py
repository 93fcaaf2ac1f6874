"""Makes the writers of Prefect's SQLite database wait for each other. Imports Prefect's server.

Prefect begins most transactions deferred. If another connection has written since the first read of such a transaction,
SQLite refuses its first write at once: "database is locked". The server answers 503, and its clients try again after
2, 4, 8, 16 and 32 seconds, so runs on a busy machine stood still for up to a minute.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager

from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration
from prefect.server.database.dependencies import temporary_database_config
from prefect.server.utilities.database import get_dialect
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction


class WaitingSqlite(AioSqliteConfiguration):
    """A SQLite database whose transactions take the write lock when they begin, and wait for it."""

    @asynccontextmanager
    async def begin_transaction(
        self, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        """Begins a transaction of a session in the `async with` block; commits at its end."""
        async with session.begin() as transaction:
            token = SQLITE_BEGIN_MODE.set("IMMEDIATE")
            try:
                await session.connection()
            finally:
                # Sessions that the block opens to read would inherit the mode, and wait for this transaction.
                SQLITE_BEGIN_MODE.reset(token)
            yield transaction


@contextmanager
def waiting_writers() -> Iterator[None]:
    """Uses `WaitingSqlite` in the `with` block if the settings name a SQLite database."""
    url = PREFECT_API_DATABASE_CONNECTION_URL.value()
    if url is None or get_dialect(url).name != "sqlite":
        yield
        return
    with temporary_database_config(WaitingSqlite(connection_url=url)):
        yield
