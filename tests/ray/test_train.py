"""Training on a group of Ray Train workers, and its end: whatever comes, the group is gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from icce_ray import config
from icce_ray.distributed import train as training
from icce_ray.distributed.cluster import Cluster
from icce_ray.distributed.context import Context
from icce_ray.distributed.train import Group
from icce_ray.distributed.worker import Worker
from icce_ray.errors import DataError, StageError
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.progress import Reporter

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

PATIENCE = 600.0  # seconds; only a hang is that long


@pytest.fixture
def context(tmp_path: Path) -> Context:
    tree = {"num_classes": 2, "run_dir": str(tmp_path), "data": {"embeddings": "e.npy"}}
    settings = config.load(tree, ["ray.max_failures=3"])
    run = RunDirectory(settings.run_dir)
    return Context(settings, run, Reporter(run, quiet=True), Cluster(settings.ray))


def fit(context: Context, loop: Callable[..., None], group: Group, **more: Any) -> None:
    place = str(Path(context.run.root) / "began")
    training.fit(context, "x", loop, {"began": place}, group=group, title="test", total=1, **more)


def until_idle() -> None:
    """Wait until nothing reserves a core, nor waits for one. A group that retries never lets go."""
    import ray
    from ray.util import placement_group_table

    deadline, calm = time.monotonic() + PATIENCE, 0
    while calm < 20:  # for a few seconds: a retry takes one or two to ask again
        groups = [one["state"] for one in placement_group_table().values()]
        busy = ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]
        calm = 0 if busy or set(groups) - {"REMOVED"} else calm + 1
        assert time.monotonic() < deadline, f"never idle: {groups}"
        time.sleep(0.2)


def test_a_group_whose_worker_raises_an_error_of_ours_is_not_restarted(context: Context) -> None:
    """The other worker is at work meanwhile, and max_failures would allow three more attempts."""

    def loop(worker: Worker, settings: Mapping[str, Any]) -> None:
        with Path(settings["began"]).open("a") as file:
            file.write(f"{worker.rank}\n")
        worker.progress(0, force=True)
        if worker.rank == 1:
            raise DataError("the labels are gone")
        time.sleep(PATIENCE)

    with pytest.raises(DataError, match="the labels are gone"):
        fit(context, loop, Group(2, 2, 1.0, 0.0))
    until_idle()
    began = (Path(context.run.root) / "began").read_text().split()
    assert sorted(began) == ["0", "1"]  # a retry would have begun again


def test_ctrl_c_ends_a_group_that_is_at_work(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loop(worker: Worker, settings: Mapping[str, Any]) -> None:
        worker.progress(0, force=True)
        time.sleep(PATIENCE)

    see = training._Watch.see

    def interrupted(self: Any, state: Any) -> None:
        see(self, state)
        raise KeyboardInterrupt

    monkeypatch.setattr(training._Watch, "see", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(context, loop, Group(2, 2, 1.0, 0.0))
    until_idle()


def test_a_group_that_never_finds_a_place_leaves_no_request_behind(context: Context) -> None:
    context.cluster.settings = context.cluster.settings.model_copy(update={"worker_wait": 12})
    with pytest.raises(StageError, match="what was asked for is 2 times 3 CPU cores"):
        fit(context, lambda *_: None, Group(2, 2, 3.0, 0.0))
    until_idle()
