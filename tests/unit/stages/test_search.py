"""Which search it is: settled once for a search, however often it is gone on with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from icce_ray import config as configs
from icce_ray.core.neighbors import EXACT_SECONDS as HOUR
from icce_ray.rundir.directory import RunDirectory
from icce_ray.stages import search as neighbors


@pytest.fixture
def context(tmp_path: Path) -> SimpleNamespace:
    said: list[str] = []
    return SimpleNamespace(
        config=configs.load({"num_classes": 2, "data": {"embeddings": "x.npy"}}),
        run=RunDirectory(str(tmp_path)),
        reporter=SimpleNamespace(say=said.append),
        said=said,
    )


def test_a_search_that_goes_on_elsewhere_stays_what_it_was(context: SimpleNamespace) -> None:
    assert not neighbors._settle(context, HOUR - 1)
    assert not neighbors._settle(context, 100 * HOUR), "begun exactly, on a larger machine"
    assert not context.said
    context.run.delete(neighbors.TOP)
    assert neighbors._settle(context, 2 * HOUR)
    assert neighbors._settle(context, 1.0)
    assert len(context.said) == 1 and "neighbors.search=exact" in context.said[0]
