"""Checks the files in deploy/ by their own tools, where those are installed, and by what the documentation promises."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import yaml

from flows.cli import app
from tests.flows.shared import prefect_server

__all__ = ["prefect_server"]

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
POOLS = sorted((DEPLOY / "work-pools").glob("*.json"))
LAST_GRACE = 15
"""Seconds in which trainings write a checkpoint after the grace period (flows/guard.py)."""


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))


@pytest.fixture(scope="module")
def manifests() -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes")]
    built = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return list(yaml.safe_load_all(built))


def test_docker_accepts_the_compose_file(tmp_path: Path) -> None:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker's plug-in compose is not installed")
    folder = shutil.copytree(DEPLOY, tmp_path / "deploy")
    shutil.copy(folder / "secrets.env.example", folder / "secrets.env")
    command = ["docker", "compose", "--profile", "gpu", "-f", str(folder / "compose.yaml"), "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ports_are_published_on_loopback_alone(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert sorted(ports) == ["127.0.0.1:4200:4200", "127.0.0.1:5000:5000"]


def test_images_are_pinned(compose: dict[str, Any], manifests: list[dict[str, Any]]) -> None:
    images = {service["image"] for service in compose["services"].values()}
    images |= {container["image"] for _, _, container in pods(manifests)}
    tags = {image.partition(":")[0]: image.partition(":")[2] for image in images}
    assert set(tags) == {"postgres", "chrislusf/seaweedfs", "loraline", "prefecthq/prefect"}
    assert [name for name, tag in tags.items() if tag in ("", "latest")] == []
    pinned = re.search(r'"prefect==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned is not None
    assert tags["prefecthq/prefect"].startswith(f"{pinned[1]}-"), "the job worker has the version of the server"


def test_secrets_are_in_a_file_of_the_user_only(compose: dict[str, Any], manifests: list[dict[str, Any]]) -> None:
    lines = [line for line in (DEPLOY / "secrets.env.example").read_text().splitlines() if not line.startswith("#")]
    secrets = {line.partition("=")[0] for line in lines}
    assert {line.partition("=")[2] for line in lines} == {""}
    assert "/deploy/secrets.env" in (ROOT / ".gitignore").read_text().splitlines()
    assert all("secrets.env" in service["env_file"] for service in compose["services"].values())
    written = {name for service in compose["services"].values() for name in service.get("environment", {})}
    assert written & secrets == set()
    assert [manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "Secret"] == []
    (settings,) = (manifest["data"] for manifest in manifests if manifest["kind"] == "ConfigMap")
    assert settings.keys() & secrets == set()


def test_each_service_reports_its_health(compose: dict[str, Any]) -> None:
    without = {name for name, service in compose["services"].items() if "healthcheck" not in service}
    assert without == {"worker", "gpu-worker"}, "loraline up starts workers again that end"


def options_of_up(words: list[str]) -> dict[str, Any]:
    """Parses a command line of `loraline` as the command does."""
    command: Any = typer.main.get_command(app)
    assert words[0] == "up"
    return dict(command.commands["up"].make_context("up", words[1:]).params)


def test_workers_have_time_to_stop(compose: dict[str, Any], manifests: list[dict[str, Any]]) -> None:
    for name in ("worker", "gpu-worker"):
        service = compose["services"][name]
        seconds = int(service["stop_grace_period"].removesuffix("s"))
        assert seconds > options_of_up(service["command"])["grace"] + LAST_GRACE
    ((_, spec, container),) = (pod for pod in pods(manifests) if pod[0] == "worker")
    assert spec["terminationGracePeriodSeconds"] > options_of_up(container["args"])["grace"] + LAST_GRACE


def pods(manifests: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Returns name, pod and container of each deployment."""
    deployments = [manifest for manifest in manifests if manifest["kind"] == "Deployment"]
    specs = [(entry["metadata"]["name"], entry["spec"]["template"]["spec"]) for entry in deployments]
    return [(name, spec, container) for name, spec in specs for container in spec["containers"]]


def test_pods_have_no_rights_that_they_do_not_need(manifests: list[dict[str, Any]]) -> None:
    assert len(pods(manifests)) == 4
    for name, spec, container in pods(manifests):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is (name == "job-worker")
        assert spec["enableServiceLinks"] is False, "MLFLOW_PORT of a link is no number"
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("path", POOLS, ids=lambda path: path.stem)
def test_prefect_accepts_the_template_of_a_work_pool(path: Path, prefect_server: str) -> None:
    template = json.loads(path.read_text())
    kind = {"gpu-process": "process", "kubernetes": "kubernetes"}[path.stem]
    body = {"name": f"test-{path.stem}", "type": kind, "base_job_template": template}
    created = httpx.post(f"{prefect_server}/work_pools/", json=body, timeout=60)
    assert created.status_code == 201, created.text
    # The server checks that each placeholder has a variable.
    body = {**body, "name": "broken", "base_job_template": template | {"variables": {"properties": {}}}}
    assert httpx.post(f"{prefect_server}/work_pools/", json=body, timeout=60).status_code == 422


def test_a_run_of_the_gpu_pool_sees_one_gpu_and_the_workers_python() -> None:
    defaults = variables("gpu-process")
    assert defaults["env"] == {"CUDA_VISIBLE_DEVICES": "0"}
    assert defaults["command"] == "python -m prefect.engine"


def test_a_job_of_the_kubernetes_pool_requests_gpus_and_takes_secrets_by_reference() -> None:
    from prefect.utilities.templating import apply_values

    template = json.loads((DEPLOY / "work-pools" / "kubernetes.json").read_text())
    values = variables("kubernetes") | {"gpus": 2, "command": ["python", "-m", "prefect.engine"]}
    manifest: Any = apply_values(template["job_configuration"]["job_manifest"], values)
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert [*container["command"], *container["args"]] == ["/usr/bin/env", "python", "-m", "prefect.engine"]
    assert container["envFrom"] == [{"configMapRef": {"name": "loraline"}}, {"secretRef": {"name": "loraline"}}]
    assert pod["securityContext"]["runAsNonRoot"] is True
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "emptyDir" not in volume}
    assert claims == {"loraline-home", "loraline-project"}


def variables(pool: str) -> dict[str, Any]:
    properties = json.loads((DEPLOY / "work-pools" / f"{pool}.json").read_text())["variables"]["properties"]
    return {name: field["default"] for name, field in properties.items() if "default" in field}


def test_the_objects_that_the_kubernetes_pool_names_exist(manifests: list[dict[str, Any]]) -> None:
    names = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    values = variables("kubernetes")
    assert ("Namespace", values["namespace"]) in names
    assert ("ServiceAccount", values["service_account_name"]) in names
    assert ("ConfigMap", values["settings"]) in names
    assert {("PersistentVolumeClaim", values[claim]) for claim in ("home_claim", "project_claim")} <= names


def test_the_image_has_the_locked_packages_and_no_root() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for package in ("torch", "uv"):
        pin = re.search(rf"\b{package}==[\d.]+", makefile)
        assert pin is not None
        assert pin[0] in text
    assert "--constraint requirements.lock" in text
    assert re.findall(r"^USER (\w+)", text, re.MULTILINE)[-1] == "10001"
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.\d+\.\d+-", text, re.MULTILINE)


def test_the_build_context_has_the_packages_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE))
    assert {name for words in copied for name in words.split()} == allowed
    assert "*" in lines
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks", "tools"} <= allowed


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(["hadolint", str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.nightly
@pytest.mark.parametrize("path", POOLS, ids=lambda path: path.stem)
def test_the_documented_command_creates_the_pool(path: Path, prefect_server: str, tmp_path: Path) -> None:
    kind = "kubernetes" if path.stem == "kubernetes" else "process"
    command = [
        "-m",
        "prefect",
        "work-pool",
        "create",
        f"cli-{path.stem}",
        "--type",
        kind,
        "--base-job-template",
        str(path),
    ]
    environment = {"PREFECT_API_URL": prefect_server, "PREFECT_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
