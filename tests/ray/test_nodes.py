"""The chain on several nodes whose processes are killed, one fault in every stage, or hang.

One story, played once by a fixture: a cluster that begins with only a head node, and a driver that
loses an actor and nodes in `embed`, `search` and `heads`. Fine-tuning, which resumes by the same
code as heads, then runs on two nodes. The tests look at what came of it. Gates hold the work at a
known place until a fault is done. Killed drivers have tests of their own, and `jobs/benchmark.py
soak` kills them on a cluster. The story takes minutes: it starts a cluster, six nodes, and four
groups of Ray Train, each of whose processes imports torch.

Everything is waited for by what it is, never by how long it takes: on a busy machine the story
takes ten times as long, and ends in the same way. PATIENCE only ends a hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.nodes import Nodes, alive
from benchmarks.soak import CLUSTERS, COUNT, write_images
from PIL import Image

from icce_ray import config as configs
from icce_ray.core import backbone as backbones
from icce_ray.core import neighbors as nearest
from icce_ray.rundir.directory import RunDirectory

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(7200)]

PATIENCE = 1200.0  # seconds
SETTINGS = f"""
num_classes: {CLUSTERS}
data: {{labels: none}}
backbone: {{name: test_resnet, pretrained: false, image_size: 32}}
embed: {{precision: float32, shard_size: 24, batch_size: 8, max_actors: 2}}
neighbors: {{max_neighbors: 20, pca: null}}
heads: {{count: 5, steps: 60, batch_size: 256, checkpoint_every: 20, num_workers: 2}}
classifier: {{kind: finetune, epochs: 2, batch_size: 24, num_workers: 2}}
ray: {{min_workers: 1}}
evaluate: {{kmeans: false}}
report: {{images_per_cluster: 2}}
"""

# The command line, with gates: work says that it has come to one, and waits while it is closed.
DRIVER = """
import json, os, sys, time
from pathlib import Path
from icce_ray import cli
from icce_ray.core.heads import trainer as head_trainer
from icce_ray.distributed import cluster, stream, train as training
from icce_ray.stages import heads, search as neighbors

gates = Path(sys.argv[1])

def pass_gate(name, **more):
    import ray
    node = ray.get_runtime_context().get_node_id()
    said = {"node": node, "pid": os.getpid(), **more}
    place = gates / f"{name}-{os.getpid()}"
    if not place.exists():
        place.write_text(json.dumps(said))
    while (gates / f"{name}.closed").exists():
        time.sleep(0.05)

class GatedActor(stream.Actor):
    def __call__(self, batch):
        if batch["image_id"].max() >= 200 and stream._restart() is None:
            pass_gate("actor")
        return super().__call__(batch)

decode, search = stream.decode_rows, neighbors._search_task

def gated_decode(table, **options):
    if table["image_id"][0].as_py() >= 200:
        pass_gate("embed")
    yield from decode(table, **options)

neighbors.QUERY_ROWS = 120

def gated_search(run, start, *others):
    if start >= 120:
        pass_gate("neighbors")
    return search(run, start, *others)

train = heads._train

def gated_train(worker, config):
    step = head_trainer.HeadTrainer.step
    def stop(self, **options):
        if self.step_number == 30:
            pass_gate(f"heads{worker.world}", world=worker.world)
        return step(self, **options)
    head_trainer.HeadTrainer.step = stop
    train(worker, config)

stream.Actor = GatedActor
stream.decode_rows, neighbors._search_task = gated_decode, gated_search
heads._train = gated_train
cluster.LOOK_EVERY, stream.LOOK_EVERY, training.GROW_EVERY = 0.5, 0.5, 2.0
cli.main(sys.argv[2:])
"""


def until(ready: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Wait for something that is true in the end. Returns it."""
    deadline = time.monotonic() + seconds
    while not (value := ready()):
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.05)
    return value


class Story:
    """What happened, for the tests to look at."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.gates = folder / "gates"
        self.nodes = Nodes(folder)
        self.driver: subprocess.Popen[bytes] | None = None
        self.facts: dict[str, Any] = {}

    def start(self) -> None:
        """Start the driver on the cluster; what it prints goes to a file."""
        arguments = ["run", str(self.folder / "config.yaml"), f"data.path={self.folder}/images"]
        arguments += [f"ray.address={self.nodes.head['address']}", f"run_dir={self.run}"]
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
            "OMP_NUM_THREADS": "1",
        }
        with (self.folder / "printed.txt").open("wb") as printed:
            self.driver = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(self.gates), *arguments],
                env=environment,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def printed(self) -> str:
        return (self.folder / "printed.txt").read_text()

    def shut(self, gate: str) -> None:
        (self.gates / f"{gate}.closed").touch()

    def open(self, gate: str) -> None:
        (self.gates / f"{gate}.closed").unlink()

    def at(self, gate: str) -> list[dict[str, Any]]:
        """Who has come to a gate and is still there."""
        found = []
        for place in self.gates.glob(f"{gate}-*"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(place.read_text()))
        return [one for one in found if alive(one["pid"])]

    def comes(self, gate: str, count: int = 1) -> list[dict[str, Any]]:
        until(lambda: len(self.at(gate)) >= count or self._ended(), f"{count} at {gate}")
        assert not self._ended(), self.printed()
        return self.at(gate)

    def says(self, text: str) -> None:
        def said() -> bool:
            log = self.run / "log"
            return log.exists() and text in log.read_text()

        until(lambda: said() or self._ended(), text)
        assert said(), self.printed()

    def status(self) -> dict[str, Any]:
        return json.loads((self.run / "status.json").read_text())

    def _ended(self) -> bool:
        assert self.driver is not None
        return self.driver.poll() is not None

    def events(self, folder: str) -> list[str]:
        return json.loads((self.run / folder / "_manifest.json").read_text())["events"]

    def close(self) -> None:
        if self.driver is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.driver.pid, signal.SIGKILL)
            self.driver.wait()
        self.nodes.close()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("nodes")
    (folder / "gates").mkdir()
    (folder / "config.yaml").write_text(SETTINGS)
    write_images(folder / "images")
    played = Story(folder)
    try:
        play(played)
        yield played
    finally:
        played.close()


def play(story: Story) -> None:
    embedding(story)
    searching(story)
    training_heads(story)
    assert story.driver is not None
    assert story.driver.wait(PATIENCE) == 0, story.printed()


def embedding(story: Story) -> None:
    """Only a head node at first; then an actor is lost, and a node."""
    nodes = story.nodes
    for gate in ("embed", "actor", "neighbors", "heads2", "heads1"):
        story.shut(gate)
    story.start()
    story.says("waiting for the cluster to provide 1 CPU core;")
    until(lambda: "waiting" in story.status(), "a status that says so")
    story.facts["status"] = story.status()
    nodes.add("a")
    nodes.add("b")
    story.facts["decoding"] = story.comes("embed", 2)
    until(lambda: list(story.run.glob("embeddings/part-*.parquet")), "a shard")
    story.open("embed")
    actor = story.comes("actor")[0]  # it has a batch, which it is given again once restarted
    os.kill(actor["pid"], signal.SIGKILL)
    nodes.kill("b" if nodes.name_of(actor["node"]) == "a" else "a")
    story.says("a node was lost")
    story.open("actor")


def searching(story: Story) -> None:
    """A node is lost that has work, and another one comes."""
    nodes = story.nodes
    nodes.add("c")
    story.facts["searching"] = story.comes("neighbors")
    busy = nodes.name_of(story.facts["searching"][0]["node"])
    nodes.kill(busy)
    nodes.add("d")  # before heads begin, which count on the nodes that are there
    story.open("neighbors")


def training_heads(story: Story) -> None:
    """A worker is lost on one node and the other node as a whole: the training resumes with one
    worker, then with two."""
    nodes = story.nodes
    story.facts["before"] = story.comes("heads2", 2)
    last = "d"  # it came last
    other = next(one for one in story.facts["before"] if nodes.name_of(one["node"]) != last)
    os.kill(other["pid"], signal.SIGKILL)
    nodes.kill(last)
    story.facts["single"] = story.comes("heads1")
    nodes.add("e")
    story.says("the cluster has room again: 2 workers resume from 20")
    story.facts["grown"] = story.comes("heads2", 2)
    story.open("heads2")


# --- what came of it -----------------------------------------------------------------------------


def test_a_cluster_without_nodes_is_waited_for(story: Story) -> None:
    assert "waiting for the cluster to provide 1 CPU core" in story.facts["status"]["waiting"]
    log = (story.run / "log").read_text()
    assert "the cluster now has 1 node, 2 CPU cores, 0 GPUs: resuming" in log


def test_the_head_without_cores_does_no_work(story: Story) -> None:
    head = story.nodes.head["id"]
    for stage in ("decoding", "searching", "before", "single", "grown"):
        assert all(one["node"] != head for one in story.facts[stage]), stage


def test_work_is_spread_over_the_nodes(story: Story) -> None:
    for stage in ("before", "grown"):
        assert len({one["node"] for one in story.facts[stage]}) == 2, stage


def test_every_image_is_embedded_once_and_as_without_faults(story: Story) -> None:
    run = RunDirectory(str(story.run))
    assert run.matrix("embeddings", "image_id").tolist() == list(range(COUNT))
    one = configs.load(story.folder / "config.yaml", ["data.path=x"]).backbone[0]
    model = backbones.load(one)
    paths = sorted((story.folder / "images").iterdir())
    arrays = [model.transform(Image.open(path).convert("RGB")) for path in paths]
    expected = model.embed(torch.from_numpy(np.stack(arrays)))
    expected = torch.nn.functional.normalize(expected, dim=-1).numpy()
    np.testing.assert_allclose(run.matrix("embeddings", "embedding"), expected, atol=1e-3)
    events = story.events("embeddings")
    assert [text for text in events if re.match(r"a node was lost \(\S+\): others do", text)]
    assert [text for text in events if re.match(r"(1 actor was|2 actors were) lost", text)]


def test_neighbors_are_those_of_an_undisturbed_search(story: Story) -> None:
    run = RunDirectory(str(story.run))
    matrix = run.matrix("embeddings", "embedding")
    _, similarity = nearest.search(matrix, 0, COUNT, 20, "cpu")
    np.testing.assert_allclose(run.matrix("neighbors", "similarity"), similarity, atol=2e-3)
    assert any("a node was lost" in text for text in story.events("neighbors"))


def test_heads_are_exactly_those_of_an_undisturbed_training(story: Story, train_heads: Any) -> None:
    run = RunDirectory(str(story.run))
    config = configs.load(story.folder / "config.yaml", ["data.path=x"])
    assert (np.array(run.matrix("heads", "assignments")) == train_heads(run, config)).all()
    events = story.events("heads")
    assert "workers were lost; 1 worker resumes from 20, before 2" in events
    assert "the cluster has room again: 2 workers resume from 20, before 1" in events


def test_fine_tuning_on_two_nodes_learns_the_consensus(story: Story) -> None:
    history = json.loads((story.run / "classifier" / "_history.json").read_text())
    assert [entry["epoch"] for entry in history] == [1, 2]
    run = RunDirectory(str(story.run))
    assert run.matrix("classifier", "image_id").tolist() == list(range(COUNT))
    agreement = np.mean(run.matrix("classifier", "cluster") == run.matrix("consensus", "cluster"))
    assert agreement > 0.9


def test_the_terminal_and_the_report_tell_it_in_words(story: Story) -> None:
    text = story.printed()
    for noise in ("Traceback", "raylet", "Error", "WARNING", "marked dead"):
        assert noise not in text, text
    assert text.count("a node was lost") == 3
    page = (story.run / "report" / "index.html").read_text()
    assert "a node was lost" in page and "workers were lost" in page


# --- a node that hangs ---------------------------------------------------------------------------

TRAINING = """
import sys, time
from pathlib import Path
from icce_ray import config
from icce_ray.distributed import train
from icce_ray.distributed.cluster import Cluster
from icce_ray.distributed.context import Context
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.progress import Reporter

folder, address = Path(sys.argv[1]), sys.argv[2]
tree = {"num_classes": 2, "run_dir": str(folder / "run"), "ray": {"address": address},
        "data": {"embeddings": "e.npy"}}
settings = config.load(tree)
run = RunDirectory(settings.run_dir)
context = Context(settings, run, Reporter(run), Cluster(settings.ray))

def loop(worker, _):
    worker.progress(1, force=True)

context.cluster.start()
(folder / "ready").touch()
while not (folder / "go").exists():
    time.sleep(0.05)
train.fit(context, "x", loop, {}, group=train.Group(2, 1, 2.0, 0.0), title="test", total=1)
"""


def test_a_node_that_hangs_as_a_group_starts_costs_its_worker(tmp_path: Path) -> None:
    """It has been asked for a place and does not answer; the other node has reserved one."""
    nodes = Nodes(tmp_path, silence=60)
    driver = None
    try:
        nodes.add("a")
        nodes.add("b")
        with (tmp_path / "printed.txt").open("wb") as printed:
            driver = subprocess.Popen(
                [sys.executable, "-c", TRAINING, str(tmp_path), nodes.head["address"]],
                env={**os.environ, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"},
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
        until(lambda: (tmp_path / "ready").exists() or driver.poll() is not None, "Ray")
        nodes.freeze("b")
        (tmp_path / "go").touch()
        said = tmp_path / "printed.txt"
        assert driver.wait(PATIENCE) == 0, said.read_text()
        assert "begins with 1 of 2 workers" in said.read_text()
        assert alive(nodes.nodes["b"]["raylet"])  # nobody ended it
    finally:
        if driver is not None:
            driver.kill()
            driver.wait()
        nodes.close()
