"""What `import icce_ray` offers: light to import, each function a plain call."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import icce_ray
from icce_ray.core.classifier import model
from icce_ray.errors import ArtifactError, DataError


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, icce_ray\n"
        "heavy = {'torch', 'ray', 'pyarrow', 'numpy', 'sklearn', 'pydantic', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_function_shows_its_use() -> None:
    functions = [name for name in icce_ray.__all__ if name != "__version__"]
    assert functions == ["cluster", "load", "predict", "run", "sweep"]
    for name in functions:
        text = inspect.getdoc(getattr(icce_ray, name))
        assert text and f"icce_ray.{name}(" in text and "Raises:" in text, name


def test_the_version_is_that_of_the_package(repository: Path) -> None:
    text = (repository / "pyproject.toml").read_text()
    declared = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert declared and declared[1] == icce_ray.__version__


@pytest.fixture
def finished(make_run: Any) -> Any:
    """A run of 60 images, of which the first two could not be read."""
    made = make_run(60, 3, bad=2)
    head = model.Classifier("linear", 32, 3)
    head.out.weight.data.normal_(generator=None)
    weights, description = model.save(head)
    made.run.write_bytes(weights, "classifier", "classifier.safetensors")
    made.run.write_json(description, "classifier", "classifier.json")
    return made


def test_a_finished_run_is_read_back(finished: Any) -> None:
    found = icce_ray.load(Path(finished.run.uri))
    assert found.labels.dtype == np.int32 and found.labels.tolist() == finished.clusters.tolist()
    assert found.confidence.tolist() == finished.confidence.tolist()
    assert found.uris == finished.uris[2:]
    labels, confidence = found.predict(finished.features)
    expected = finished.features.astype(np.float32) @ found.classifier.out.weight.detach().numpy().T
    assert (labels == expected.argmax(1)).mean() > 0.95
    assert confidence.shape == labels.shape == (58,)
    with pytest.raises(DataError, match="takes 32"):
        found.predict(np.ones((2, 5)))


def test_what_is_not_there_is_named(finished: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished consensus/"):
        icce_ray.load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="no finished evaluation/"):
        _ = icce_ray.load(finished.run.uri).metrics
