"""Imports the fixtures of a Prefect server, which the tests of flows share."""

from tests.flows.shared import prefect_database, prefect_server

__all__ = ["prefect_database", "prefect_server"]
