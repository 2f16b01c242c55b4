"""What can be said of deploy/ without Docker and Kubernetes: it loads, and names only what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.cli import _parser

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
# Of KubeRay's v1 API, ray-operator/apis/ray/v1: what a spec may hold.
CLUSTER_FIELDS = {
    "headGroupSpec",
    "workerGroupSpecs",
    "rayVersion",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headServiceAnnotations",
    "suspend",
}
HEAD_FIELDS = {"serviceType", "headService", "enableIngress", "rayStartParams", "template"}
GROUP_FIELDS = {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "numOfHosts",
    "rayStartParams",
    "template",
    "scaleStrategy",
}
AUTOSCALER_FIELDS = {"resources", "image", "imagePullPolicy", "env", "envFrom", "idleTimeoutSeconds", "upscalingMode"}
JOB_FIELDS = {"entrypoint", "clusterSelector", "rayClusterSpec", "submissionMode", "shutdownAfterJobFinishes"}
RAY_START_PARAMS = {"num-cpus", "dashboard-host", "labels", "resources"}


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "deploy" / "raycluster.yaml").read_text())
    return {document["kind"]: document for document in documents}


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return list(manifest["RayCluster"]["spec"]["workerGroupSpecs"])


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    head = manifest["RayCluster"]["spec"]["headGroupSpec"]
    return [each["template"]["spec"] for each in (head, *groups(manifest))]


def serve_options(manifest: dict[str, Any]) -> dict[str, Any]:
    program, *arguments = shlex.split(manifest["RayJob"]["spec"]["entrypoint"])
    assert program == "twinpool"
    return vars(_parser().parse_args(arguments))


def test_every_field_is_one_of_kuberay_s(manifest: dict[str, Any]) -> None:
    spec = manifest["RayCluster"]["spec"]
    assert set(spec) <= CLUSTER_FIELDS
    assert set(spec["headGroupSpec"]) <= HEAD_FIELDS
    assert set(spec["autoscalerOptions"]) <= AUTOSCALER_FIELDS
    for group in groups(manifest):
        assert set(group) <= GROUP_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert set(manifest["RayJob"]["spec"]) <= JOB_FIELDS
    started = [spec["headGroupSpec"]["rayStartParams"], *(group["rayStartParams"] for group in groups(manifest))]
    assert all(set(each) <= RAY_START_PARAMS for each in started)
    assert all(isinstance(value, str) for each in started for value in each.values())


def test_the_server_asks_for_what_its_groups_offer(manifest: dict[str, Any]) -> None:
    """Every label and every resource of the command line is one that a group of that role has."""
    options = serve_options(manifest)
    for role in ("prefill", "decode"):
        (group,) = [each for each in groups(manifest) if each["groupName"].startswith(role)]
        offered = group["rayStartParams"]
        assert set(options[f"{role}_node_label"]) <= set(offered["labels"].split(","))
        for resource in options[f"{role}_resource"]:
            name, _, amount = resource.partition("=")
            assert f'\\"{name}\\": {amount}' in offered["resources"]
        assert int(options[f"{role}_workers"]) == group["replicas"]
        assert int(options["threads_per_worker"]) <= int(_container(group)["resources"]["requests"]["cpu"])


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return dict(container)


def test_the_job_runs_in_this_cluster_and_the_service_leads_to_it(manifest: dict[str, Any]) -> None:
    name = manifest["RayCluster"]["metadata"]["name"]
    selector = {"ray.io/cluster": name}
    assert manifest["RayJob"]["spec"]["clusterSelector"] == selector
    assert selector.items() <= manifest["Service"]["spec"]["selector"].items()
    assert manifest["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == selector
    (port,) = manifest["Service"]["spec"]["ports"]
    assert port["targetPort"] == int(serve_options(manifest)["port"])
    assert serve_options(manifest)["address"] == "auto"


def test_no_pod_runs_as_root_and_no_secret_is_written_down(manifest: dict[str, Any]) -> None:
    for pod in pods(manifest):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert not any("KEY" in each["name"] or "TOKEN" in each["name"] for each in container["env"])
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)[-1] not in ("root", "0")
    assert not re.search(r"(KEY|TOKEN|PASSWORD)\s*=", DOCKERFILE)


def test_the_image_copies_what_exists_and_runs_a_command_that_exists() -> None:
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    (entrypoint,) = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)
    (command,) = re.findall(r"^CMD (.+)$", DOCKERFILE, re.MULTILINE)
    assert yaml.safe_load(entrypoint) == ["twinpool"]
    assert _parser().parse_args(yaml.safe_load(command)).host == "0.0.0.0"


def test_versions_are_those_that_were_tested_together(manifest: dict[str, Any]) -> None:
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert manifest["RayCluster"]["spec"]["rayVersion"] == constraints["ray"]
    assert f"torch=={constraints['torch']}" in DOCKERFILE
