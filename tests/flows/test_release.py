"""Tests the release of a staged version: promotion by policy, the check afterwards, rollback, and who decided."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from flows.result import FinalState, PipelineResult
from flows.registered import RegistrationState
from registry.entities import AdapterVersion
from registry.home import Home
from registry.versions.promotion import history, promote
from registry.versions.versions import Versions
from tasks.operations.changes_since import changes_since_production
from tasks.operations.release import ReleaseOutcome, find_obstacle, finish_checks, log_decision, promote_and_check
from tasks.operations.release_check import ReleaseCheck, find_release_problems
from tests.flows.shared import Trained

OPEN: dict[str, Any] = {"needs_evaluation": False, "needs_gate": False, "needs_licence": "none", "needs_consent": "none"}
QUICK = ReleaseCheck(sample=False)


def set_policy(home: Home, **changes: Any) -> None:
    (home.path / "policy.yaml").write_text(yaml.safe_dump({"aliases": {"production": OPEN | changes}}))


def release(home: Home, version: AdapterVersion, **options: Any) -> ReleaseOutcome:
    settings: dict[str, Any] = {"actor": "anna", "reason": "good images", "check": QUICK}
    return promote_and_check(home, version, "production", **settings | options)


def test_x(trained: Trained) -> None:
    set_policy(trained.home)
    v = trained.version()
    print(v.card)
    print(release(trained.home, v, check=ReleaseCheck()))
    print([ (e.action, e.after, e.actor, e.reason) for e in history(Versions(trained.home),"small")])
    print(changes_since_production(trained.home, "small"))
    assert 0
