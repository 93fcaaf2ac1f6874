"""Imports fixtures for tests that run pipelines."""

from __future__ import annotations

from tests.flows.shared import prefect_server, trained_here

__all__ = ["prefect_server", "trained_here"]
