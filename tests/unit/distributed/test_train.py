"""What a group of workers asks for, and what is said when it changes."""

from __future__ import annotations

from icce_ray.config.schema import RayConfig
from icce_ray.distributed import train as training
from icce_ray.distributed.cluster import Cluster, Resources
from icce_ray.distributed.train import Group


class Fixed(Cluster):
    """Nodes of equally many cores."""

    def __init__(self, nodes: int, cpus: int, least: int | None = None) -> None:
        super().__init__(RayConfig(min_workers=least))
        self.have = Resources(nodes * cpus, 0, nodes, 0.0, ((cpus, 0.0),) * nodes)

    def resources(self) -> Resources:
        return self.have


def test_a_group_asks_for_what_the_settings_say() -> None:
    two = Fixed(2, 4)
    assert Group.plan(two, 2, 0) == Group(2, 2, 4, 0)
    assert Group.plan(two, 2, 1, fed=True) == Group(2, 2, 1, 1)
    assert Group.plan(Fixed(2, 4, least=3), 8, 1) == Group(8, 3, 1, 1)  # more than there is now
    assert Group.plan(Fixed(2, 4, least=9), 2, 0).least == 2
    assert Group.plan(two, 0, 0) == Group(0, 0, 0, 0)


def test_a_fed_group_leaves_cores_also_where_its_lost_workers_fit_on_one_node() -> None:
    for nodes, cpus, workers in ((2, 1, 2), (2, 2, 2), (2, 3, 2), (2, 4, 2), (1, 4, 2), (1, 8, 2)):
        group = Group.plan(Fixed(nodes, cpus, least=1), workers, 0, fed=True)
        most = min(workers, int(cpus // group.cpus))  # workers that Ray puts on one node
        decode = group.decode_cpus(Resources(nodes * cpus, 0, nodes, 0.0))
        assert cpus - most * group.cpus >= decode > 0, (nodes, cpus, workers)


def test_only_a_group_that_may_shrink_is_elastic_for_ray() -> None:
    whole = Group(3, 3, 2, 0).scaling()
    assert (whole.num_workers, whole.placement_strategy) == (3, "SPREAD")
    assert whole.resources_per_worker == {"CPU": 2} and not whole.use_gpu
    elastic = Group(3, 1, 1, 0.5).scaling()
    assert (elastic.num_workers, elastic.placement_strategy) == ((1, 3), "PACK")
    assert elastic.resources_per_worker == {"CPU": 1, "GPU": 0.5} and elastic.use_gpu
    assert Group(0, 0, 0, 0).scaling().num_workers == 0


class Heard:
    def __init__(self) -> None:
        self.lines: list[str] = []

    say = event = lambda self, text: self.lines.append(text)


def test_changes_of_a_group_are_told_in_words() -> None:
    class Fake:
        reporter = Heard()

    told = training._Attempts(Fake(), 0, Group(3, 1, 1, 0))  # type: ignore[arg-type]
    for attempt, workers, done in ((1, 2, 0), (1, 2, 40), (2, 1, 20), (3, 3, 30), (4, 3, 1500)):
        told.see({"attempt": attempt, "workers": workers, "done": done})
    assert Fake.reporter.lines == [
        "begins with 2 of 3 workers",
        "workers were lost; 1 worker resumes from 20, before 2",
        "the cluster has room again: 3 workers resume from 30, before 1",
        "workers were lost; a new group of 3 resumes from 1,500",
    ]
