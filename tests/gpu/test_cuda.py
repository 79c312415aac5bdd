"""What only a GPU can show. Run with `pytest -m gpu`; without a CUDA device these fail, loudly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import icce_ray
from icce_ray.config.schema import ClassifierConfig, HeadsConfig
from icce_ray.core import neighbors
from icce_ray.core.classifier import probe
from icce_ray.core.ensemble.consensus import consensus
from icce_ray.core.evaluation.truth import accuracy
from icce_ray.core.heads import closed_form
from icce_ray.core.heads.trainer import Data, HeadTrainer
from icce_ray.core.projection import fit_projection, project

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("the gpu tests need a CUDA device, and there is none")
    return torch.device("cuda")


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Unit rows float16 [2000, 64] around 8 directions, and which one each belongs to."""
    generator = np.random.default_rng(0)
    labels = np.arange(2000) % 8
    rows = generator.normal(size=(8, 64))[labels] + 0.5 * generator.normal(size=(2000, 64))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16), labels


def heads_data(matrix: np.ndarray, device: torch.device) -> Data:
    """Rows with their 10 nearest neighbors, as heads train on them."""
    ids, _ = neighbors.search(matrix, 0, len(matrix), 10, device)
    counts = torch.full((len(ids),), 10, dtype=torch.int32, device=device)
    features = project(matrix, fit_projection(matrix, 32, 0), device)
    return Data(features, torch.from_numpy(ids).to(device), counts, device)


def test_search_finds_what_the_cpu_finds(
    device: torch.device, blobs: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "BASE_CHUNK", 700)
    matrix, _ = blobs
    _, expected = neighbors.search(matrix, 0, len(matrix), 10)
    ids, found = neighbors.search(matrix, 0, len(matrix), 10, device)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert not (ids == np.arange(len(ids))[:, None]).any()


@pytest.mark.parametrize(("heads", "pairs", "clusters"), [(3, 100, 10), (2, 300, 1000)])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_kernels_compute_the_closed_form(
    device: torch.device, heads: int, pairs: int, clusters: int, kind: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (heads, 2 * pairs, clusters)
    student, teacher = (
        (3 * torch.randn(shape, generator=generator)).to(device, kind) for _ in range(2)
    )
    even = torch.full((heads, clusters), 1 / clusters, device=device)
    balance = torch.tensor([0.5, 0.0, 1.0], device=device)[:heads].view(-1, 1)
    about = (closed_form.Terms(0.6, 0.1, 3), closed_form.Target(balance, None))
    results = []
    for step in (closed_form.loss_and_gradient, closed_form.fused(device, clusters)):
        assert step is not None
        running = closed_form.Running(even.clone(), even.clone())
        logits = (student.clone(), teacher.clone())
        if step is closed_form.loss_and_gradient:
            logits = (student.float().clone(), teacher.float().clone())  # both are overwritten
        results.append([*step(*logits, *about, running, lambda a: a.mean(0)), running.marginal])
    for plain, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel.float(), plain, atol=1e-3, rtol=1e-3)


def test_the_dense_em_finds_what_the_sparse_one_finds(device: torch.device) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 20, 5000)
    wrong = rng.random((5000, 8)) < 0.3
    heads = np.where(wrong, rng.integers(0, 20, (5000, 8)), truth[:, None]).astype(np.int16)
    on_cpu = consensus(heads, 20, "dawid-skene", seed=0)
    on_gpu = consensus(heads, 20, "dawid-skene", seed=0, device=device)
    assert (on_cpu.labels == on_gpu.labels).mean() > 0.999
    np.testing.assert_allclose(on_cpu.confidence, on_gpu.confidence, atol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_heads_train_on_the_device(
    device: torch.device, blobs: tuple[np.ndarray, np.ndarray], precision: str
) -> None:
    matrix, labels = blobs
    data = heads_data(matrix, device)
    trainer = HeadTrainer(data, HeadsConfig(count=4, precision=precision), 8, 0, 200)
    trainer.start()
    for _ in range(200):
        trainer.step()
    assigned = trainer.assign()
    table = np.zeros((8, 8), int)
    np.add.at(table, (labels, assigned[:, 0]), 1)
    assert table.max(1).sum() > 0.9 * len(labels)


@pytest.mark.parametrize("hidden", [(), (32,)])
def test_a_resumed_training_is_the_undisturbed_one(
    device: torch.device, blobs: tuple[np.ndarray, np.ndarray], hidden: tuple[int, ...]
) -> None:
    matrix, _ = blobs
    data = heads_data(matrix, device)
    settings = HeadsConfig(count=3, hidden=hidden)
    plain, first, second = (HeadTrainer(data, settings, 8, 0, 20) for _ in range(3))
    for trainer, steps in ((plain, 20), (first, 10)):
        trainer.start()
        for _ in range(steps):
            trainer.step()
    second.restore([first.state()])
    for _ in range(10):
        second.step()
    for name, tensor in plain.state().items():
        torch.testing.assert_close(second.state()[name], tensor, atol=1e-4, rtol=1e-3)


def test_a_recorded_step_of_the_probe_computes_the_same(
    device: torch.device, blobs: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, labels = blobs
    weights = np.linspace(0.5, 1.5, len(labels)).astype(np.float32)
    settings = ClassifierConfig(epochs=4, batch_size=30)  # the last batch of an epoch is shorter
    given = (matrix, labels.astype(np.int64), weights, settings, 8, 0)
    recorded, history = probe.train_probe(*given, device=device)
    monkeypatch.setattr(probe, "RECORD_FROM", 10**9)
    plain, expected = probe.train_probe(*given, device=device)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(recorded.state_dict()[name], tensor, atol=1e-4, rtol=1e-3)
    for one, other in zip(history, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_probe_trains_on_the_device(
    device: torch.device, blobs: tuple[np.ndarray, np.ndarray]
) -> None:
    matrix, labels = blobs
    model, _ = probe.train_probe(
        matrix,
        labels.astype(np.int64),
        np.ones(len(labels), np.float32),
        ClassifierConfig(epochs=5),
        8,
        0,
        device=device,
    )
    predicted, _ = probe.predict(model, matrix, device)
    assert (predicted == labels).mean() > 0.95


def test_the_method_in_memory_agrees_with_the_cpu(
    device: torch.device, blobs: tuple[np.ndarray, np.ndarray]
) -> None:
    matrix, labels = blobs
    given = torch.from_numpy(matrix).to(device)
    # One balance: of three, two heads each would remain, and both may be unlucky.
    settings = {"heads": {"count": 12, "steps": 400, "balance": 0.5}, "classifier": {"epochs": 5}}
    found = icce_ray.cluster(given, 8, **settings)
    assert found.device.type == "cuda"
    on_cpu = icce_ray.cluster(matrix, 8, device="cpu", **settings)
    for one in (found, on_cpu):
        assert accuracy(labels, one.labels) > 0.95
    predicted, _ = found.predict(given)
    assert (predicted == found.labels).mean() > 0.95
