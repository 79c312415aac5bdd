"""The example notebook, in a kernel, on small data; its first cell is stopped once and resumes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

nbformat = pytest.importorskip("nbformat", reason="`uv sync` installs it")
nbclient = pytest.importorskip("nbclient", reason="`uv sync` installs it")

pytestmark = [pytest.mark.ray, pytest.mark.slow]

COLORS = ((200, 30, 30), (30, 200, 30), (30, 30, 200))
SETTINGS = {
    "backbone": [{"name": "test_resnet", "pretrained": False, "image_size": 32}],
    "run_dir": "run",
    "neighbors": {"k": 5},
    "heads": {"count": 2, "steps": 20, "num_workers": 0},
    "classifier": {"epochs": 2},
    "ray": {"num_cpus": 2},
}


@pytest.fixture
def notebook(repository: Path, tmp_path: Path) -> Any:
    """The notebook, with 36 images of three colors in place of the digits."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(36):
        pixels = np.array(COLORS[number % 3]) + rng.integers(-20, 20, (32, 32, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(tmp_path / "photos" / f"{number:02}.png")
    found = nbformat.read(repository / "jobs" / "example.ipynb", as_version=4)
    given = [one for one in found.cells if "parameters" in one.metadata.get("tags", [])]
    assert len(given) == 1
    given[0].source = f"images, k, settings = 'photos', 3, {SETTINGS!r}"
    return found


def interrupt_when(manager: Any, status: Path, stage: str, ended: threading.Event) -> None:
    """Stop the kernel's work once a stage of the run has begun, as its stop button does."""
    while not ended.wait(0.05):
        if status.exists() and json.loads(status.read_text())["stage"] == stage:
            manager.interrupt_kernel()
            return


def outputs(notebook: Any, source: str) -> dict[str, Any]:
    """What the cell that begins so displays, by its kind."""
    cell = next(one for one in notebook.cells if one.source.startswith(source))
    return next(one.data for one in cell.outputs if one.output_type == "execute_result")


def test_the_example_runs_and_a_stopped_cell_resumes(
    notebook: Any, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jupyter_client.manager import KernelManager

    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.chdir(tmp_path)
    status, ended = tmp_path / "run" / "status.json", threading.Event()
    client = nbclient.NotebookClient(notebook, km=KernelManager(), timeout=240)
    first = next(i for i, one in enumerate(notebook.cells) if "cluster_images" in one.source)
    with client.setup_kernel():
        watching = threading.Thread(
            target=interrupt_when, args=(client.km, status, "embed", ended), daemon=True
        )
        watching.start()
        with pytest.raises(nbclient.exceptions.CellExecutionError, match="KeyboardInterrupt"):
            for position, cell in enumerate(notebook.cells[: first + 1]):
                client.execute_cell(cell, position)
        ended.set()
        assert json.loads(status.read_text())["state"] == "stopped"
        for position, cell in enumerate(notebook.cells):
            client.execute_cell(cell, position)
    assert json.loads(status.read_text())["state"] == "done"
    assert "second_choice" in outputs(notebook, "found.labels.head")["text/html"]
    shown = outputs(notebook, "found.show(0)")
    assert shown["text/plain"].startswith("cluster 0: 12 images\n")
    assert shown["text/html"].count('<img src="data:image/') == 12
    assert "novelty" in outputs(notebook, "found.predict(")["text/html"]
    assert "<iframe srcdoc" in outputs(notebook, "found.report")["text/html"]


def test_the_example_is_stored_without_outputs(repository: Path) -> None:
    cells = json.loads((repository / "jobs" / "example.ipynb").read_text())["cells"]
    assert not [one for one in cells if one.get("outputs") or one.get("execution_count")]
