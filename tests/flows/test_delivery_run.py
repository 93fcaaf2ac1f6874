"""Tests the way of a promotion: event, automation, notification, flow run of a worker, file in the target."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.flows.commands import loraline_process
from tests.flows.shared import Trained
from tests.flows.test_schedule import PREFECT, PROJECT, environment, post, read, receiver, server, started, wait_for

__all__ = ["environment", "receiver", "server"]


def documented(number: int) -> dict[str, Any]:
    """Returns a YAML block of the page: the targets, or the automation."""
    blocks = re.findall(r"```yaml\n(.*?)```", (PROJECT / "docs" / "delivery.md").read_text(), flags=re.DOTALL)
    return dict(yaml.safe_load(blocks[number]))


@pytest.mark.nightly
def test_a_promotion_by_the_command_line_notifies_and_is_delivered_by_a_worker(
    trained: Trained,
    server: str,
    environment: dict[str, str],
    receiver: tuple[str, list[dict[str, str]]],
    tmp_path: Path,
) -> None:
    folder, home = tmp_path / "loras", trained.home.path
    folder.mkdir()
    targets = documented(0)["targets"][:1]
    (home / "delivery.yaml").write_text(yaml.safe_dump({"targets": [targets[0] | {"to": str(folder)}]}))
    config = yaml.safe_load((PROJECT / "prefect.yaml").read_text())
    (deployment,) = (entry for entry in config["deployments"] if entry["name"] == "on-events")
    config["deployments"] = [deployment | {"parameters": {"home": str(home)}}]
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(config))
    notify(server, receiver[0])
    worker = [PREFECT, "worker", "start", "--pool", "local", "--type", "process"]
    with started(worker, environment, tmp_path / "worker.log"):
        wait_for(lambda: read(server, "work_pools/local"), 300, "the work pool is there")
        deploy = [PREFECT, "--no-prompt", "deploy", "--all", "--prefect-file", str(tmp_path / "prefect.yaml")]
        done = subprocess.run(deploy, env=environment, cwd=PROJECT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        variables = os.environ | environment | {"LORALINE_HOME": str(home), "LORALINE_ACTOR": "ada"}
        words = ("promote", "small@1", "--to", "production", "--reason", "looks right")
        with loraline_process(variables, *words) as process:
            output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, output + errors
        wait_for((folder / "small.loraline.json").exists, 300, "the version is delivered")
        query = {"flows": {"name": {"any_": ["deliver"]}}, "flow_runs": {"state": {"name": {"any_": ["Delivered"]}}}}
        (run,) = wait_for(lambda: post(server, "flow_runs/filter", query), 120, "the run has ended")
        assert run["state"]["message"] == "deliver small@1 at web-ui"
        assert run["created_by"]["type"] == "AUTOMATION"
        assert (folder / "small.safetensors").is_file()
        (notification,) = wait_for(lambda: receiver[1], 120, "the notification")
        assert notification["subject"] == "loraline.adapter.promoted: small"
        assert notification["body"] == "version 1 by ada: looks right"


def notify(api: str, url: str) -> None:
    """Creates the automation of the page, with a webhook block."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.settings import PREFECT_API_URL, temporary_settings

    text = {"subject": "{{subject}}", "body": "{{body}}"}
    with temporary_settings({PREFECT_API_URL: api}):
        block = CustomWebhookNotificationBlock(name="adapters", url=url, json_data=text).save("adapters", _sync=True)
    automation = documented(1)
    automation["actions"][0]["block_document_id"] = str(block)
    post(api, "automations/", automation)


def test_the_automation_of_the_page_is_valid_and_names_events_that_are_sent() -> None:
    from prefect.events.schemas.automations import AutomationCore

    from flows.events import EVENT_NAMES, RUN_FAILED

    automation = AutomationCore.model_validate(documented(1))
    assert set(automation.trigger.expect) <= {*EVENT_NAMES, RUN_FAILED}
    page = (PROJECT / "docs" / "delivery.md").read_text()
    assert [name for name in (*EVENT_NAMES, RUN_FAILED) if f"`{name}`" not in page] == []
    triggers = yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
    (deliver,) = (entry for entry in triggers if entry["name"] == "on-events")
    assert set(deliver["triggers"][0]["expect"]) == {*EVENT_NAMES} - {"loraline.adapter.refused"}


def test_the_targets_of_the_page_are_valid(home: Path) -> None:
    from registry.home import Home
    from tasks.operations.delivery_file import DeliveryTarget, read_delivery

    opened = Home.open(home)
    (home / "delivery.yaml").write_text(yaml.safe_dump(documented(0)))
    assert [target.name for target in read_delivery(opened).targets] == ["web-ui", "style-archive"]
    page = (PROJECT / "docs" / "delivery.md").read_text()
    assert [name for name in DeliveryTarget.model_fields if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize("entry", yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"])
def test_every_deployment_names_a_flow_and_parameters_that_it_has(entry: dict[str, Any]) -> None:
    import inspect
    from importlib import import_module

    path, name = entry["entrypoint"].split(":")
    flow = getattr(import_module(path.removesuffix(".py").replace("/", ".")), name)
    assert set(entry["parameters"]) <= set(inspect.signature(flow.fn).parameters)
