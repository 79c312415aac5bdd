"""cluster.yaml: Ray's own schema, what that schema does not catch, and what would be started.

Nothing is launched and no Ray is started: the schema check and the autoscaler's scheduler are plain
functions.
"""

from __future__ import annotations

import copy
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from icce_ray import config as configs

GIB = 2**30
# Memory of the instance types named, GiB (the vendor's data sheets).
INSTANCE_MEMORY = {"r7i.xlarge": 32, "m7i.4xlarge": 64, "g6.4xlarge": 64}
INSTANCE_CORES = {"r7i.xlarge": 4, "m7i.4xlarge": 16, "g6.4xlarge": 16}
INSTANCE_GPUS = {"g6.4xlarge": 1}
# Keys of EC2's RunInstances that are in use; Ray passes node_config on unchecked.
NODE_KEYS = {
    *("InstanceType", "ImageId", "IamInstanceProfile", "BlockDeviceMappings"),
    *("InstanceMarketOptions", "SecurityGroupIds", "SubnetIds", "KeyName", "TagSpecifications"),
}


@pytest.fixture(scope="module")
def cluster(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "cluster.yaml").read_text())


@pytest.fixture
def types(cluster: dict[str, Any]) -> dict[str, Any]:
    return cluster["available_node_types"]


@pytest.fixture
def workers(cluster: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    return {name: kind for name, kind in types.items() if name != cluster["head_node_type"]}


@pytest.fixture
def prepared(cluster: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(copy.deepcopy(cluster))


def test_passes_rays_schema(prepared: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared)


def test_the_schema_check_can_fail(prepared: dict[str, Any]) -> None:
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    prepared["max_wokers"] = 3
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepared)


# --- what the schema does not catch --------------------------------------------------------------


def test_workers_start_from_zero_and_are_bounded(
    cluster: dict[str, Any], workers: dict[str, Any]
) -> None:
    for name, kind in workers.items():
        assert kind["min_workers"] == 0, name
        assert 0 < kind["max_workers"] <= cluster["max_workers"], name


def test_the_head_is_cheap_and_takes_no_work(
    cluster: dict[str, Any], types: dict[str, Any]
) -> None:
    head = types[cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert head["node_config"]["InstanceType"] not in INSTANCE_GPUS
    assert "InstanceMarketOptions" not in head["node_config"], "a spot head would take all with it"


def test_node_configs_name_what_ec2_knows(types: dict[str, Any]) -> None:
    for name, kind in types.items():
        node = kind["node_config"]
        assert set(node) <= NODE_KEYS, name
        assert node["InstanceType"] in INSTANCE_MEMORY, name
        assert node["ImageId"].startswith("ami-"), name
        market = node.get("InstanceMarketOptions", {"MarketType": "spot"})
        assert market == {"MarketType": "spot"}, name
        for disk in node["BlockDeviceMappings"]:
            assert disk["Ebs"]["VolumeSize"] >= 100, f"{name}: the image alone takes tens of GB"


def test_declared_resources_are_those_of_the_instances(workers: dict[str, Any]) -> None:
    for name, kind in workers.items():
        instance = kind["node_config"]["InstanceType"]
        assert kind["resources"]["CPU"] == INSTANCE_CORES[instance], name
        assert kind["resources"].get("GPU", 0) == INSTANCE_GPUS.get(instance, 0), name


def test_object_store_fits_shared_memory_and_the_machine(
    cluster: dict[str, Any], types: dict[str, Any]
) -> None:
    for role in ("head", "worker"):
        store = int(_option(cluster[f"{role}_start_ray_commands"], "--object-store-memory"))
        options = cluster["docker"][f"{role}_run_options"]
        shared = int(re.search(r"--shm-size=(\d+)g", " ".join(options))[1]) * GIB
        assert store < shared, f"{role}: a store larger than /dev/shm falls back to the disk"
        for name, kind in types.items():
            if (name == cluster["head_node_type"]) == (role == "head"):
                assert shared < INSTANCE_MEMORY[kind["node_config"]["InstanceType"]] * GIB / 2, name


def _option(commands: list[str], name: str) -> str:
    found = re.search(rf"{name}=(\S+)", " ".join(commands))
    assert found, f"{name} is missing"
    return found[1]


def test_nothing_is_open_to_the_world(cluster: dict[str, Any]) -> None:
    assert _option(cluster["head_start_ray_commands"], "--dashboard-host") == "127.0.0.1"
    assert "0.0.0.0" not in yaml.safe_dump(cluster)


def test_every_node_asks_for_the_token(cluster: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]  # head and workers
    assert cluster["file_mounts"]["/home/ray/.ray"] == "~/.ray"
    assert "chmod 600 /home/ray/.ray/auth_token" in cluster["setup_commands"]


def test_no_secret_and_no_account_is_written_down(repository: Path) -> None:
    text = (repository / "cluster.yaml").read_text()
    assert not re.search(r"AKIA|aws_secret|auth_token:\s*\w{20}", text)
    assert set(re.findall(r"\b\d{12}\b", text)) == {"0" * 12}
    for placeholder in ("ami-CHANGE", "instance-profile/CHANGE"):
        before = text[: text.index(placeholder)].splitlines()[-5:]
        assert any("# CHANGE" in line for line in before), placeholder


def test_one_ray_version_everywhere_and_one_the_package_takes(repository: Path) -> None:
    text = (repository / "cluster.yaml").read_text()
    versions = set(re.findall(r"rayproject/ray:([\d.]+)|ray\[[^]]*\]==([\d.]+)", text))
    named = {a or b for a, b in versions}
    assert len(named) == 1
    needed = [Requirement(r) for r in metadata.requires("icce-ray") or []]
    assert next(r for r in needed if r.name == "ray").specifier.contains(named.pop())


def test_the_image_has_the_python_and_the_gpu_libraries_needed(cluster: dict[str, Any]) -> None:
    tag = re.fullmatch(r"rayproject/ray:[\d.]+-py(3)(\d+)-gpu", cluster["docker"]["image"])
    assert tag, "rayproject/ray:VERSION-pyXY-gpu"
    allowed = SpecifierSet(metadata.metadata("icce-ray")["Requires-Python"])
    assert allowed.contains(f"{tag[1]}.{tag[2]}")


def test_a_stopped_job_has_time_for_its_last_words(cluster: dict[str, Any]) -> None:
    """Ray's own 3 s are too few for a run that writes to object storage."""
    from ray.dashboard.modules.job.job_supervisor import JobSupervisor

    options = " ".join(cluster["docker"]["run_options"])
    given = int(re.search(r"--env RAY_JOB_STOP_WAIT_TIME_S=(\d+)", options)[1])
    assert given >= 30 > JobSupervisor.DEFAULT_RAY_JOB_STOP_WAIT_TIME_S


def test_a_node_that_hangs_is_given_up_soon(cluster: dict[str, Any]) -> None:
    """tests/ray/test_nodes.py has such a node. Ray's servers refuse pings that come more often."""
    options = " ".join(cluster["docker"]["run_options"])
    time, timeout = (
        int(re.search(rf"--env RAY_grpc_client_keepalive_{name}_ms=(\d+)", options)[1])
        for name in ("time", "timeout")
    )
    assert time >= 60_000 and time + timeout <= 120_000


def test_mounted_files_exist(cluster: dict[str, Any], repository: Path) -> None:
    for local in cluster["file_mounts"].values():
        assert local.startswith("~/") or (repository / local).exists(), local


# --- what travels with a job ---------------------------------------------------------------------


def test_jobs_take_the_code_and_leave_the_data(repository: Path, tmp_path: Path) -> None:
    """Folders that may hold millions of files are not even walked through."""
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    for name in (".gitignore", ".rayignore"):
        shutil.copy(repository / name, tmp_path / name)
    big = ("runs", "data", "dist", "tests", ".venv", ".git")
    needed = ("icce_ray", "jobs", "pyproject.toml", "README.md", "LICENSE", "mine.yaml")
    for name in (*big, *needed):
        (tmp_path / name).mkdir()
    for with_git in (True, False):  # `uv run` jobs switch .gitignore off, to send uv.lock
        rules = get_excludes_from_ignore_files(tmp_path, include_gitignore=with_git)
        kept = {p.name for p in tmp_path.iterdir() if not any(rule(p) for rule in rules)}
        assert kept >= set(needed)
        assert not kept & set(big)


def test_uv_jobs_keep_their_options_on_workers(repository: Path) -> None:
    """As jobs/README.md writes them: Ray must see where uv's own options end."""
    from ray._private.runtime_env import uv_runtime_env_hook as hook

    text = (repository / "jobs" / "README.md").read_text()
    (command,) = set(re.findall(r"-- (uv run [^`]*?) \.\.\.`", text))
    words = command.split()
    options, rest = hook._parse_args(hook._create_uv_run_parser(), words[2:])
    assert options.frozen and options.no_dev
    assert rest == ["jobs/pipeline.py"]


# --- jobs/README.md ------------------------------------------------------------------------------


def test_commands_of_the_page_resolve(repository: Path) -> None:
    text = (repository / "jobs" / "README.md").read_text().replace("\\\n", " ")
    for script in set(re.findall(r"jobs/\w+\.py", text)):
        assert (repository / script).is_file(), script
    commands = re.findall(r"jobs/(?:pipeline|sweep)\.py (\w+) (.*=.*)", text)
    assert len(commands) >= 3
    for name, overrides in commands:
        settings = [word for word in overrides.split() if "=" in word]
        assert configs.load(name, settings).run_dir.startswith("s3://")


def test_the_page_and_the_file_agree(repository: Path, cluster: dict[str, Any]) -> None:
    text = (repository / "jobs" / "README.md").read_text()
    version = re.search(r"rayproject/ray:([\d.]+)-", cluster["docker"]["image"])
    assert version and f"({version[1]})" in text
    assert f"Values={cluster['cluster_name']}" in text
    assert f"AWS_DEFAULT_REGION={cluster['provider']['region']}" in text
    assert f"{cluster['idle_timeout_minutes']} idle minutes" in " ".join(text.split())
    for kind in cluster["available_node_types"].values():
        assert f"`{kind['node_config']['InstanceType']}`" in text


# --- what the autoscaler would start -------------------------------------------------------------


def _started(
    prepared: dict[str, Any],
    bundles: list[dict[str, float]],
    availability: dict[str, float] | None = None,
) -> tuple[dict[str, int], int]:
    """Nodes that Ray's autoscaler starts for these requests on an empty cluster, and how many
    requests it finds impossible. availability: 0 for a type whose last start timed out."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = AutoscalingConfig(prepared, skip_content_hash=True)
    requests = [ResourceRequestUtil.make(bundle) for bundle in bundles]
    reply = ResourceDemandScheduler(mock.Mock()).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count(requests),
            recoverable_resource_availabilities=availability or {},
        )
    )
    nodes = {launch.instance_type: launch.count for launch in reply.to_launch}
    return nodes, len(reply.infeasible_resource_requests)


GPU_WORKER = {"CPU": 1.0, "GPU": 1.0}


def test_nothing_is_started_for_nothing(prepared: dict[str, Any]) -> None:
    assert _started(prepared, []) == ({}, 0)


def test_cpu_work_starts_no_gpu(prepared: dict[str, Any]) -> None:
    assert _started(prepared, [{"CPU": 1.0}]) == ({"cpu": 1}, 0)


def test_gpu_work_starts_spot_nodes(prepared: dict[str, Any]) -> None:
    assert _started(prepared, [GPU_WORKER] * 4) == ({"gpu_spot": 4}, 0)


def test_on_demand_steps_in_for_spot(prepared: dict[str, Any], workers: dict[str, Any]) -> None:
    spot, on_demand = workers["gpu_spot"], workers["gpu_on_demand"]
    assert "InstanceMarketOptions" in spot["node_config"]
    assert "InstanceMarketOptions" not in on_demand["node_config"]
    assert spot["resources"] == on_demand["resources"]
    assert _started(prepared, [GPU_WORKER] * 2, {"gpu_spot": 0.0}) == ({"gpu_on_demand": 2}, 0)
    more, _ = _started(prepared, [GPU_WORKER] * (spot["max_workers"] + 1))
    assert more == {"gpu_spot": spot["max_workers"], "gpu_on_demand": 1}


def test_switching_spot_off_by_hand_works(prepared: dict[str, Any]) -> None:
    prepared["available_node_types"]["gpu_spot"]["max_workers"] = 0
    assert _started(prepared, [GPU_WORKER]) == ({"gpu_on_demand": 1}, 0)


def test_the_imagenet_config_fits_this_cluster(prepared: dict[str, Any]) -> None:
    config = configs.load("imagenet")
    each = config.ray.num_gpus
    for count in (config.embed.max_actors, config.heads.num_workers, 1):
        assert count and each
        nodes, impossible = _started(prepared, [{"CPU": 1.0, "GPU": each}] * count)
        assert sum(nodes.values()) == count
        assert not impossible


def test_a_request_that_no_node_can_carry_is_seen(prepared: dict[str, Any]) -> None:
    assert _started(prepared, [{"GPU": 2.0}]) == ({}, 1)
