"""The classifier behind HTTP: real requests to a server of this machine.

S image side.
"""

from __future__ import annotations

import importlib.util
import io
import re
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import serve as service
import torch
from PIL import Image
from safetensors.torch import save

from icce_ray.config.schema import BackboneConfig
from icce_ray.core import backbone
from icce_ray.core.classifier import model as C
from icce_ray.core.outliers import make_reference
from icce_ray.core.unit_rows import unit_rows
from icce_ray.distributed.inference import CLASSIFIER, DESCRIPTION, NOVELTY, WEIGHTS
from icce_ray.errors import ArtifactError, ConfigError
from icce_ray.rundir.directory import Manifest, RunDirectory

CONFIG = BackboneConfig(name="test_efficientnet", pretrained=False, image_size=32)
CLUSTERS = 5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with a classifier of random weights on a small backbone."""
    run = RunDirectory(str(tmp_path_factory.mktemp("served") / "run"))
    network = backbone.load(CONFIG)
    head = C.Classifier("linear", network.features, CLUSTERS)
    with torch.no_grad():
        head.out.weight.normal_(std=20, generator=torch.Generator().manual_seed(0))
    described = network.describe()
    extra = {"backbone": [described], "transform": [described["transform"]]}
    weights, description = C.save(head, extra)
    run.write_bytes(weights, CLASSIFIER, WEIGHTS)
    run.write_json(description, CLASSIFIER, DESCRIPTION)
    rows = np.random.default_rng(0).normal(size=(20, network.features))
    known = unit_rows(rows.astype(np.float32))
    reference = make_reference(known, 0, torch.device("cpu"))
    run.write_bytes(save(reference.tensors()), CLASSIFIER, NOVELTY)
    run.finish(CLASSIFIER, Manifest(CLASSIFIER, "f", {}, {}, 9, 1.0))
    return run


def pictures(count: int) -> list[bytes]:
    """PNG files of noise, of several sizes."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        pixels = rng.integers(0, 256, (40 + number, 50, 3), np.uint8)
        Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG")
        files.append(stream.getvalue())
    return files


def expected(run: RunDirectory, files: list[bytes]) -> list[tuple[int, float]]:
    """Cluster and confidence of each image by the core alone."""
    network = backbone.load(CONFIG)
    weights = run.read_bytes(CLASSIFIER, WEIGHTS)
    head = C.load(weights, run.read_json(CLASSIFIER, DESCRIPTION))
    found = []
    for data in files:
        pixels = network.transform(Image.open(io.BytesIO(data)).convert("RGB"))
        features = network.embed(torch.from_numpy(pixels)[None])
        with torch.inference_mode():
            sure, cluster = head(backbone.normalize(features)).softmax(1).max(1)
        found.append((int(cluster), float(sure)))
    return found


# --- over HTTP -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(run: RunDirectory, repository: Path, tmp_path_factory: Any) -> Iterator[str]:
    """The address of the script at work, as a user starts it."""
    if importlib.util.find_spec("fastapi") is None:
        warnings.warn("Ray Serve is not tested: uv sync --extra serve", stacklevel=1)
        pytest.skip("NOT TESTED: Ray Serve is not installed (uv sync --extra serve)")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, str(repository / "jobs" / "serve.py"), run.uri, f"port={port}"]
    log = tmp_path_factory.mktemp("serve") / "log"
    with (
        log.open("w") as stream,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True) as process,
    ):
        assert process.stdout is not None
        address = f"http://127.0.0.1:{port}/"
        lines = next((line for line in process.stdout if address in line), "")
        try:
            assert lines, log.read_text()[-3000:]
            yield address
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=120) == 0


@pytest.mark.ray
@pytest.mark.slow
def test_images_get_the_cluster_and_confidence_of_the_classifier(
    url: str, run: RunDirectory
) -> None:
    files = pictures(40)
    with ThreadPoolExecutor(8) as pool:  # so that requests are classified together
        answers = list(pool.map(lambda data: requests.post(url, data=data, timeout=60), files))
    assert {answer.status_code for answer in answers} == {200}
    found = [(one["cluster"], one["confidence"]) for one in (a.json() for a in answers)]
    wanted = expected(run, files)
    assert len({cluster for cluster, _ in wanted}) > 1
    for (cluster, sure), (right, probability) in zip(found, wanted, strict=True):
        assert sure == pytest.approx(probability, abs=0.05)  # it may compute in bfloat16
        assert cluster == right or probability < 0.55
    sizes = {frozenset(answer.json()) for answer in answers}
    assert sizes == {frozenset({"cluster", "confidence"})}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty file"),
        (b"hello\nworld", "not an image"),
        (pictures(1)[0][:200], "truncated|damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(url: str, data: bytes, says: str) -> None:

    answer = requests.post(url, data=data, timeout=60)
    assert answer.status_code == 400
    assert re.search(says, answer.text)
    assert answer.text.count("\n") == 1 and answer.text.endswith("\n")
    assert "Traceback" not in answer.text
    assert requests.post(url, data=pictures(1)[0], timeout=60).ok  # and it goes on serving


@pytest.mark.ray
@pytest.mark.slow
def test_other_requests_say_what_to_send(url: str) -> None:
    answer = requests.get(url, timeout=60)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert "curl --data-binary" in answer.text
    large = bytes(service.MOST_BYTES + 1)
    assert requests.post(url, data=large, timeout=60).status_code == 413


# --- without a server ----------------------------------------------------------------------------


def test_a_replica_answers_as_the_classifier(run: RunDirectory) -> None:
    files = pictures(3)
    replica = service.Classifier(run.uri)
    answers = replica.classify([replica.prepare(data) for data in files])
    for answer, (_, probability) in zip(answers, expected(run, files), strict=True):
        assert answer["confidence"] == pytest.approx(probability, abs=0.05)


def test_other_weights_than_the_runs_are_refused(run: RunDirectory, tmp_path: Path) -> None:
    other = RunDirectory(str(tmp_path / "run"))
    description = run.read_json(CLASSIFIER, DESCRIPTION)
    description["backbone"][0]["sha256"] = "0" * 64
    other.write_bytes(run.read_bytes(CLASSIFIER, WEIGHTS), CLASSIFIER, WEIGHTS)
    other.write_json(description, CLASSIFIER, DESCRIPTION)
    other.write_bytes(run.read_bytes(CLASSIFIER, NOVELTY), CLASSIFIER, NOVELTY)
    with pytest.raises(service.IcceError, match="the weights of test_efficientnet differ"):
        service.Classifier(other.uri)


@pytest.mark.parametrize(
    "arguments", [[], ["port=80"], ["--help"], ["run", "port=x"], ["run", "ports=80"]]
)
def test_wrong_arguments_say_the_right_ones(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"python jobs/serve.py RUN_DIR"):
        service.options_of(arguments)
    assert service.options_of(["r", "port=9", "num_gpus=0.5"]) == service.Options(
        "r", port=9, num_gpus=0.5
    )


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        options = service.Options("run", port=one.getsockname()[1])
        with pytest.raises(ConfigError, match="is taken; choose another port="):
            service.check_port(options)
    service.check_port(options)


def test_a_run_without_a_classifier_is_one_line(tmp_path: Path, repository: Path) -> None:
    script = str(repository / "jobs" / "serve.py")
    done = subprocess.run(
        [sys.executable, script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode in (ConfigError.exit_code, ArtifactError.exit_code)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "has no finished classifier" in done.stderr or ".[serve]" in done.stderr
