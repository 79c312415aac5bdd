"""jobs/rayjob.yaml, anyscale.yaml and Dockerfile: KubeRay's own schema, and that they agree with
cluster.yaml, whose nodes they describe again. Nothing is started or built.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import lzma
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from icce_ray import config as configs
from icce_ray.config.schema import RayConfig

CUDA_IMAGE = r"rayproject/ray:([\d.]+)-py3(\d+)-gpu"


@pytest.fixture(scope="module")
def cluster(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "cluster.yaml").read_text())


@pytest.fixture
def job(repository: Path) -> dict[str, Any]:
    return copy.deepcopy(yaml.safe_load((repository / "jobs" / "rayjob.yaml").read_text()))


@pytest.fixture
def anyscale(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "jobs" / "anyscale.yaml").read_text())


@pytest.fixture(scope="module")
def schema(repository: Path) -> dict[str, Any]:
    """KubeRay's schema of a RayJob, with keys it does not know refused, as `kubectl` does."""
    folder = repository / "tests" / "kuberay"
    text = lzma.decompress((folder / "ray.io_rayjobs.yaml.xz").read_bytes())
    assert hashlib.sha256(text).hexdigest() in (folder / "README.md").read_text()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 1.4 MB
    versions = yaml.load(text, loader)["spec"]["versions"]
    (found,) = (one["schema"]["openAPIV3Schema"] for one in versions if one["name"] == "v1")
    found["properties"]["metadata"] = {"type": "object"}  # which Kubernetes checks by itself
    return _strict(found)


def _strict(node: Any) -> Any:
    if isinstance(node, list):
        return [_strict(one) for one in node]
    if not isinstance(node, dict):
        return node
    strict = {key: _strict(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and node.get("type") == "object":
        strict.setdefault("additionalProperties", False)
    return strict


# --- KubeRay -------------------------------------------------------------------------------------


def test_passes_kuberays_schema(job: dict[str, Any], schema: dict[str, Any]) -> None:
    jsonschema.validate(job, schema)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.entrypont", "python x.py"),
        ("spec.rayClusterSpec.authOptions.mode", "password"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", "2"),
        ("spec.rayClusterSpec.workerGroupSpecs.1.priorty", 10),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.resources.limits.cpu", "3x"),
    ],
)
def test_the_schema_check_can_fail(
    job: dict[str, Any], schema: dict[str, Any], path: str, value: Any
) -> None:
    node: Any = job
    *parts, last = path.split(".")
    for part in parts:
        node = node[int(part)] if part.isdecimal() else node[part]
    node[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, schema)


def test_every_node_asks_for_the_token(job: dict[str, Any]) -> None:
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_the_groups_are_those_of_the_cluster(job: dict[str, Any], cluster: dict[str, Any]) -> None:
    spec, types = job["spec"]["rayClusterSpec"], cluster["available_node_types"]
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    idle = spec["autoscalerOptions"]["idleTimeoutSeconds"]
    assert idle == 60 * cluster["idle_timeout_minutes"]
    groups = {one["groupName"].replace("-", "_"): one for one in spec["workerGroupSpecs"]}
    assert set(groups) == set(types) - {cluster["head_node_type"]}
    for name, group in groups.items():
        assert group["replicas"] == group["minReplicas"] == types[name]["min_workers"] == 0
        assert group["maxReplicas"] == types[name]["max_workers"]
        assert group.get("priority", 0) == types[name].get("priority", 0)
        gpus = int(_container(group)["resources"]["limits"].get("nvidia.com/gpu", 0))
        assert gpus == types[name]["resources"].get("GPU", 0)


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return container


def test_pods_fit_the_machines_of_the_cluster(job: dict[str, Any], cluster: dict[str, Any]) -> None:
    """A node's own daemons take about a core and a tenth of the memory."""
    spec = job["spec"]["rayClusterSpec"]
    for group, cores, memory in [
        (spec["headGroupSpec"], 4, 32),
        *((one, 16, 64) for one in spec["workerGroupSpecs"]),
    ]:
        resources = _container(group)["resources"]
        assert resources["requests"] == resources["limits"]  # Ray counts what it may use
        assert cores / 2 <= int(resources["limits"]["cpu"]) < cores
        asked = int(resources["limits"]["memory"].removesuffix("Gi"))
        assert memory / 2 <= asked <= 0.9 * memory
        role = "head" if group is spec["headGroupSpec"] else "worker"
        store = group["rayStartParams"]["object-store-memory"]
        assert f"--object-store-memory={store}" in " ".join(cluster[f"{role}_start_ray_commands"])
        assert int(store) < asked * 2**30 / 2  # /dev/shm is a part of the pod's memory


def test_the_head_takes_no_work_and_waits_as_that_of_the_cluster(
    job: dict[str, Any], cluster: dict[str, Any]
) -> None:
    """For the last words of a job, and for a node that hangs."""
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    given = {f"--env {one['name']}={one['value']}" for one in _container(head)["env"]}
    options = {text for text in cluster["docker"]["run_options"] if "_ms=" in text or "_S=" in text}
    assert given == options


def test_pods_reach_the_bucket_by_a_role(job: dict[str, Any], repository: Path) -> None:
    spec = job["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        account = group["template"]["spec"]["serviceAccountName"]
        text = (repository / "jobs" / "rayjob.yaml").read_text()
        assert f"kubectl create serviceaccount {account} " in text
        assert not re.search(r"AKIA|aws_secret|auth_token:\s*\w{20}", text)


# --- Anyscale ------------------------------------------------------------------------------------


def test_anyscales_nodes_are_those_of_the_cluster(
    anyscale: dict[str, Any], cluster: dict[str, Any]
) -> None:
    types, nodes = cluster["available_node_types"], anyscale["compute_config"]
    head = types[cluster["head_node_type"]]
    assert nodes["head_node"]["instance_type"] == head["node_config"]["InstanceType"]
    assert nodes["head_node"]["resources"]["CPU"] == head["resources"]["CPU"] == 0
    kinds = {"cpu": types["cpu"], "gpu": types["gpu_spot"]}
    for one in nodes["worker_nodes"]:
        kind = kinds.pop(one["name"])
        assert one["instance_type"] == kind["node_config"]["InstanceType"]
        assert (one["min_nodes"], one["max_nodes"]) == (0, kind["max_workers"])
    assert not kinds
    assert set(anyscale["excludes"]) >= {"runs", "data", ".venv"}


def test_anyscales_own_models_take_it(anyscale: dict[str, Any]) -> None:
    if importlib.util.find_spec("anyscale") is None:
        pytest.skip("NOT CHECKED by Anyscale's models: uv run --with anyscale pytest ...")
    from anyscale.job.models import JobConfig

    JobConfig.from_dict(copy.deepcopy(anyscale))
    anyscale["compute_config"]["worker_nodes"][0]["max_node"] = 2
    with pytest.raises((TypeError, ValueError)):
        JobConfig.from_dict(anyscale)


# --- what they run -------------------------------------------------------------------------------


def test_their_commands_resolve(
    job: dict[str, Any], anyscale: dict[str, Any], repository: Path
) -> None:
    kubernetes, other = (shlex.split(one["entrypoint"]) for one in (job["spec"], anyscale))
    assert kubernetes[:2] == ["icce-ray", "run"]
    assert other[0] == "python" and (repository / other[1]).is_file()
    for name, *overrides in (kubernetes[2:], other[2:]):
        config = configs.load(name, overrides)
        assert config.run_dir.startswith("s3://") and config.ray == RayConfig(num_gpus=1)


# --- the image -----------------------------------------------------------------------------------


def test_the_image_is_that_of_the_cluster(
    repository: Path, cluster: dict[str, Any], job: dict[str, Any]
) -> None:
    text = (repository / "jobs" / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)
    assert base == cluster["docker"]["image"]
    version = re.fullmatch(CUDA_IMAGE, base)
    assert version and job["spec"]["rayClusterSpec"]["rayVersion"] == version[1]
    assert set(re.findall(r"anyscale/ray:([\d.]+)-py3(\d+)", text)) == {version.groups()}


def test_what_the_image_copies_is_there_and_is_sent(repository: Path) -> None:
    text = (repository / "jobs" / "Dockerfile").read_text()
    copied = {
        word
        for line in re.findall(r"^COPY --chown=ray (.+)$", text, re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert all((repository / name).exists() for name in copied - {"uv.lock"})
    sent = (repository / "jobs" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in sent if line.startswith("!")} == copied
    assert sent.index("*") < min(sent.index(f"!{name}") for name in copied)
