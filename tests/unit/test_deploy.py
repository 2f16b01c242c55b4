"""What can be said of deploy/ without Docker and Kubernetes: it loads, and names only what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from engine.cli import _parser
from engine.cluster_room import check_room, rooms_in_cluster
from engine.config import ServeConfig, load_config
from kvcache.errors import ResourceError
from scheduler.room import Node
from scheduler.types import WorkerRole

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
# Of KubeRay's v1 API as of 1.5, ray-operator/apis/ray/v1: what a spec may hold.
CLUSTER_FIELDS = {
    "headGroupSpec",
    "workerGroupSpecs",
    "rayVersion",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headServiceAnnotations",
    "suspend",
}
HEAD_FIELDS = {"serviceType", "headService", "enableIngress", "labels", "resources", "rayStartParams", "template"}
GROUP_FIELDS = {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "numOfHosts",
    "labels",
    "resources",
    "rayStartParams",
    "template",
    "scaleStrategy",
}
AUTOSCALER_FIELDS = {
    "version",
    "resources",
    "image",
    "imagePullPolicy",
    "securityContext",
    "idleTimeoutSeconds",
    "upscalingMode",
    "env",
    "envFrom",
    "volumeMounts",
}
JOB_FIELDS = {"entrypoint", "clusterSelector", "rayClusterSpec", "submissionMode", "shutdownAfterJobFinishes"}
# No labels: KubeRay refuses them there. No resources beside those of the group: it refuses both together.
RAY_START_PARAMS = {"num-cpus", "dashboard-host"}
POOLS = (WorkerRole.PREFILL, WorkerRole.DECODE)
WORKER_BYTES = 8 << 30  # a model in a prefill pod, with its cache


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "deploy" / "raycluster.yaml").read_text())
    return {document["kind"]: document for document in documents}


def groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return list(manifest["RayCluster"]["spec"]["workerGroupSpecs"])


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    head = manifest["RayCluster"]["spec"]["headGroupSpec"]
    return [each["template"]["spec"] for each in (head, *groups(manifest))]


def serve_options(manifest: dict[str, Any]) -> ServeConfig:
    program, *arguments = shlex.split(manifest["RayJob"]["spec"]["entrypoint"])
    assert program == "twinpool"
    options = vars(_parser().parse_args(arguments))
    return load_config({name: value for name, value in options.items() if name in ServeConfig.model_fields})


def groups_of(manifest: dict[str, Any], role: WorkerRole) -> list[dict[str, Any]]:
    return [each for each in groups(manifest) if labels(each)["twinpool-role"] == role.value]


def labels(group: dict[str, Any]) -> dict[str, str]:
    return dict(group["labels"])


def nodes(manifest: dict[str, Any], replicas: str) -> list[Node]:
    """Every pod as Ray's autoscaler reads its group, which is also what the pod says of itself to Ray."""
    cluster = manifest["RayCluster"]
    metadata = cluster["metadata"] | {"namespace": "default"}
    node_types = _derive_autoscaling_config_from_ray_cr(cluster | {"metadata": metadata})["available_node_types"]
    return [
        Node(f"{name}-{number}", f"{name}-{number}", node_types[name]["resources"], node_types[name]["labels"])
        for name, count in ((group["groupName"], group[replicas]) for group in groups(manifest))
        for number in range(count)
    ]


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
    assert all(isinstance(value, str) for group in groups(manifest) for value in group["resources"].values())


def test_ray_s_autoscaler_is_the_one_that_heeds_labels(manifest: dict[str, Any]) -> None:
    """The first one drops the labels of the workers that the server asks for, and would add pods of any group."""
    assert manifest["RayCluster"]["spec"]["autoscalerOptions"]["version"] == "v2"


def test_no_pod_has_a_command_of_its_own(manifest: dict[str, Any]) -> None:
    """KubeRay would run it before ``ray start``, not around it."""
    containers = [container for pod in pods(manifest) for container in pod["containers"]]
    assert not any({"command", "args"} & set(container) for container in containers)


def test_each_role_has_groups_for_several_devices(manifest: dict[str, Any]) -> None:
    """A group's pods go to nodes of its device and say so to Ray; each name is the role's and the device's."""
    for role in POOLS:
        devices = [labels(group)["twinpool-device"] for group in groups_of(manifest, role)]
        assert len(set(devices)) == len(devices) >= 2
        for group, device in zip(groups_of(manifest, role), devices, strict=True):
            assert group["groupName"] == f"{role.value}-{device}"
            assert group["template"]["spec"]["nodeSelector"] == {"twinpool-device": device}
    assert len(groups(manifest)) == sum(len(groups_of(manifest, role)) for role in POOLS)


@pytest.mark.parametrize("replicas", ["replicas", "maxReplicas"])
def test_the_groups_have_room_for_the_servers_workers_and_for_no_more(manifest: dict[str, Any], replicas: str) -> None:
    """At the start and fully grown: every worker finds a pod, and a pod that is missing would be missed."""
    options = serve_options(manifest)
    if replicas == "maxReplicas":
        grown = {f"{role.value}_workers": getattr(options, f"max_{role.value}_workers") for role in POOLS}
        options = options.model_copy(update=grown)
    assert all(options.num_workers_of(role) for role in POOLS)
    pods = nodes(manifest, replicas)
    rooms = rooms_in_cluster(options, "cpu", pods, dict.fromkeys(POOLS, WORKER_BYTES))
    check_room(options, pods, rooms)
    for pod in pods:
        with pytest.raises(ResourceError, match="The cluster cannot hold the workers"):
            check_room(options, [each for each in pods if each is not pod], rooms)


def test_ray_may_grow_the_groups_because_the_server_asks_for_more(manifest: dict[str, Any]) -> None:
    options = serve_options(manifest)
    assert manifest["RayCluster"]["spec"]["enableInTreeAutoscaling"] is True
    for role in POOLS:
        assert getattr(options, f"max_{role.value}_workers") > options.num_workers_of(role)
        assert sum(group["minReplicas"] for group in groups_of(manifest, role)) <= options.num_workers_of(role)


def test_the_job_runs_in_this_cluster_and_the_service_leads_to_it(manifest: dict[str, Any]) -> None:
    name = manifest["RayCluster"]["metadata"]["name"]
    selector = {"ray.io/cluster": name}
    assert manifest["RayJob"]["spec"]["clusterSelector"] == selector
    assert selector.items() <= manifest["Service"]["spec"]["selector"].items()
    assert manifest["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == selector
    (port,) = manifest["Service"]["spec"]["ports"]
    assert port["targetPort"] == serve_options(manifest).port
    assert serve_options(manifest).address == "auto"


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
