"""`RegistryContext`: a home with its store and its lineage database open."""

from __future__ import annotations

from registry.entities import AdapterVersion
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import Store, open_store


class RegistryContext:
    """An opened home.

    Args:
        home: The home.
        store: Its store, if one is open already.
        lineage: Its lineage, if it is open already.

    Raises:
        HomeError: The database cannot be used, or a newer release wrote it.
    """

    def __init__(self, home: Home, *, store: Store | None = None, lineage: Lineage | None = None) -> None:
        self.home = home
        self.store = store or open_store(home)
        self.lineage = lineage or Lineage(home.lineage_url)

    def close(self) -> None:
        """Closes the database."""
        self.lineage.close()

    def damage(self, version: AdapterVersion) -> tuple[str, ...]:
        """Reads every byte of a version's adapter and report, and returns the problems; empty if all are intact."""
        refs = [version.artifact, *([version.report] if version.report else [])]
        problems = [problem for ref in refs for problem in self.store.verify(ref)]
        return tuple(f"{problem.where}: {problem.what}" for problem in problems)
