"""Tests the Prefect file that `loraline deployments` writes, and the facts about schedules that the docs state."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import yaml
from prefect.server.schemas.schedules import CronSchedule

from tests.flows.commands import loraline_here, say

BERLIN = ZoneInfo("Europe/Berlin")
PROJECT = Path(__file__).resolve().parents[2]


def dates(cron: str, start: datetime, count: int) -> list[str]:
    """Returns local and UTC time of the next dates of a schedule."""
    schedule = CronSchedule(cron=cron, timezone="Europe/Berlin")
    found = asyncio.run(schedule.get_dates(count, start=start))
    return [f"{date.astimezone(BERLIN):%d %H:%M %z} = {date.astimezone(UTC):%H:%M}" for date in found]


@pytest.mark.parametrize(
    ("cron", "start", "expected"),
    [
        ("0 3 * * *", (3, 27, 4), ["28 03:00 +0200 = 01:00", "29 03:00 +0200 = 01:00"]),
        ("0 3 * * *", (10, 30, 4), ["31 03:00 +0100 = 02:00", "01 03:00 +0100 = 02:00"]),
        ("30 2 * * *", (3, 27, 4), ["28 01:30 +0100 = 00:30", "29 02:30 +0200 = 00:30"]),
        ("30 2 * * *", (10, 30, 4), ["31 02:30 +0200 = 00:30", "01 02:30 +0100 = 01:30"]),
        ("0 * * * *", (3, 28, 0), ["28 01:00 +0100 = 00:00", "28 03:00 +0200 = 01:00"]),
        ("0 * * * *", (10, 31, 1), ["31 02:00 +0200 = 00:00", "31 03:00 +0100 = 02:00"]),
    ],
)
def test_a_daily_run_happens_once_on_days_when_the_clocks_change(
    cron: str, start: tuple[int, int, int], expected: list[str]
) -> None:
    month, day, hour = start
    assert dates(cron, datetime(2027, month, day, hour, 1, tzinfo=BERLIN), 2) == expected


def test_each_pipeline_gets_a_deployment_and_others_stay(pipeline: Callable[..., Path], home: Path) -> None:
    spec = pipeline()
    output = spec.parent / "deploy" / "prefect.yaml"
    output.parent.mkdir()
    say("deployments", spec, "-o", output, "--cron", "0 3 * * *", "--timezone", "Europe/Berlin", home=home)
    first = yaml.safe_load(output.read_text())
    (deployment,) = first["deployments"]
    assert deployment["name"] == "try"
    assert deployment["parameters"] == {"spec": str(spec), "home": str(home), "pipeline": "try"}
    assert deployment["schedules"] == [{"cron": "0 3 * * *", "timezone": "Europe/Berlin", "active": True}]
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    shipped = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    assert first["pull"] == shipped["pull"]
    assert deployment["work_pool"] == shipped["deployments"][0]["work_pool"]

    first["deployments"].append({"name": "own", "entrypoint": "mine.py:flow"})
    output.write_text(yaml.safe_dump(first))
    say("deployments", spec, "-o", output, "--work-pool", "gpu", home=home)
    own, again = yaml.safe_load(output.read_text())["deployments"]
    assert own == {"name": "own", "entrypoint": "mine.py:flow"}
    assert again["work_pool"]["name"] == "gpu"
    assert again["schedules"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cron", "0 3 * *"], "'0 3 * *' is no cron expression"),
        (["--cron", "61 3 * * *"], "'61 3 * * *' is no cron expression"),
        (["--cron", "0 3 * * *", "--timezone", "Mars/Base"], "unknown time zone 'Mars/Base'"),
        (["--param", "novalue"], "'novalue' is no parameter with a value"),
    ],
)
def test_a_schedule_that_prefect_would_refuse_writes_nothing(
    options: list[str], message: str, pipeline: Callable[..., Path], home: Path
) -> None:
    spec = pipeline()
    output = spec.parent / "prefect.yaml"
    done = loraline_here("deployments", spec, "-o", output, *options, home=home)
    assert done.returncode == 2
    assert message in done.stderr
    assert not output.exists()


def test_a_deployment_of_the_same_name_from_elsewhere_is_not_overwritten(
    pipeline: Callable[..., Path], home: Path
) -> None:
    spec = pipeline()
    output = spec.parent / "prefect.yaml"
    output.write_text("deployments:\n- {name: try, entrypoint: mine.py:flow}\n")
    done = loraline_here("deployments", spec, "-o", output, home=home)
    assert done.returncode == 2
    assert "the deployment 'try' is in the file already" in done.stderr
    assert output.read_text() == "deployments:\n- {name: try, entrypoint: mine.py:flow}\n"


def test_the_documented_states_are_those_that_runs_end_in() -> None:
    from typing import get_args

    from flows.approval import AWAITING
    from tasks.operations.release import ReleaseState

    page = (PROJECT / "docs" / "scheduling.md").read_text()
    assert {AWAITING, *get_args(ReleaseState)} <= set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
