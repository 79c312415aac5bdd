"""Probes on frozen features. K clusters, D features, N rows."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch

from icce_ray.config.schema import ClassifierConfig
from icce_ray.core.classifier import model as C
from icce_ray.core.classifier import probe as probe_
from icce_ray.core.collective import Alone
from icce_ray.core.sampling import seed_of
from icce_ray.errors import DataError, StageError


def accuracy(model: C.Classifier, x: np.ndarray, y: np.ndarray) -> float:
    return float((probe_.predict(model, x)[0] == y).mean())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_probe_learns_separable_blobs_and_is_sure_of_them(
    blobs: Any, fit: Any, kind: str
) -> None:
    x, y = blobs(2000, 10)
    model, history = fit(x, y, 10, kind=kind)
    new, truth = blobs(500, 10, seed=1)
    clusters, confidence = probe_.predict(model, new)
    assert (clusters == truth).mean() > 0.99
    assert confidence.mean() > 0.9
    assert len(history) == 20
    assert history[-1]["loss"] < 0.2 * history[0]["loss"]
    assert history[-1]["agreement"] > 0.99


def test_confidence_of_pure_noise_is_low(fit: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 16))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    model, _ = fit(x, rng.integers(0, 10, 4000), 10)
    assert probe_.predict(model, x)[1].mean() < 0.25


def test_wrong_labels_of_low_weight_are_ignored(blobs: Any, fit: Any) -> None:
    x, y = blobs(2000, 5)
    labels, weights = y.copy(), np.ones(len(y), np.float32)
    wrong = np.random.default_rng(0).random(len(y)) < 0.6
    labels[wrong] = (y[wrong] + 1) % 5
    weights[wrong] = 1e-3
    trusted, _ = fit(x, labels, 5, weights=weights)
    fooled, _ = fit(x, labels, 5)
    assert accuracy(trusted, x, y) > 0.99
    assert accuracy(fooled, x, y) < 0.5


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("wanted", [0.4, 0.8])
def test_calibration_makes_probabilities_as_sure_as_asked(
    blobs: Any, fit: Any, kind: str, wanted: float
) -> None:
    x, y = blobs(1500, 5, spread=0.3)
    model, _ = fit(x, y, 5, kind=kind)
    before, _ = probe_.predict(model, x)
    temperature = probe_.calibrate(model, x, np.full(len(x), wanted))
    after, confidence = probe_.predict(model, x)
    assert (after == before).all() and temperature != 1
    assert confidence.mean() == pytest.approx(wanted, abs=0.01)


def test_calibration_goes_as_far_as_it_can(blobs: Any, fit: Any) -> None:
    x, y = blobs(300, 5)
    model, _ = fit(x, y, 5)
    expected = probe_.predict(model, x)[1]
    assert probe_.calibrate(model, x, np.ones(len(x))) == 1.0
    assert (probe_.predict(model, x)[1] == expected).all()
    assert probe_.calibrate(model, x, np.full(len(x), 0.1)) == pytest.approx(50)  # below 1 / K
    assert probe_.predict(model, x)[1].mean() < 0.3


def test_small_data_gets_small_batches() -> None:
    assert probe_.probe_batch(1, 1024) == 1
    assert probe_.probe_batch(1797, 1024) == 36
    assert probe_.probe_batch(1_281_167, 1024) == 1024
    assert probe_.probe_steps(1_281_167, ClassifierConfig(epochs=2)) == 2 * 1252


def test_only_ratios_of_weights_matter(blobs: Any, fit: Any) -> None:
    x, y = blobs(300, 3)
    weights = np.random.default_rng(0).random(300).astype(np.float32)
    one, _ = fit(x, y, 3, weights=weights, epochs=3)
    other, _ = fit(x, y, 3, weights=weights * 0.004, epochs=3)
    torch.testing.assert_close(one.out.weight, other.out.weight)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_seed_decides(blobs: Any, fit: Any, kind: str) -> None:
    x, y = blobs(300, 4)
    torch.manual_seed(1)
    first, _ = fit(x, y, 4, seed=3, kind=kind, epochs=2)
    torch.manual_seed(2)
    again, _ = fit(x, y, 4, seed=3, kind=kind, epochs=2)
    other, _ = fit(x, y, 4, seed=4, kind=kind, epochs=2)
    assert torch.equal(first.out.weight, again.out.weight)
    assert not torch.equal(first.out.weight, other.out.weight)


@pytest.mark.parametrize(("rows", "batch"), [(1, 1024), (20, 1024), (33, 16), (20, 1)])
def test_very_few_rows(blobs: Any, fit: Any, rows: int, batch: int) -> None:
    x, y = blobs(rows, 10)
    model, history = fit(x, y, 10, batch_size=batch)
    assert accuracy(model, x, y) == 1.0
    assert math.isfinite(history[-1]["loss"])


def test_clusters_without_rows_are_never_predicted(blobs: Any, fit: Any) -> None:
    x, y = blobs(600, 3)
    model, _ = fit(x, y * 4, 12)
    assert set(probe_.predict(model, x)[0].tolist()) == {0, 4, 8}


def test_constant_and_dead_coordinates(blobs: Any, fit: Any) -> None:
    x, y = blobs(400, 4)
    x = np.concatenate([x, np.zeros((400, 3), np.float16), np.full((400, 1), 0.7, np.float16)], 1)
    x = (x / np.linalg.norm(x.astype(np.float32), axis=1, keepdims=True)).astype(np.float16)
    model, _ = fit(x, y, 4)
    assert accuracy(model, x, y) > 0.99
    assert torch.isfinite(model.folded().out.weight).all()


def test_memory_mapped_array_and_tensor_give_the_same(blobs: Any, fit: Any, tmp_path: Any) -> None:
    x, y = blobs(200, 3)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    one, _ = fit(mapped, y, 3, epochs=2)
    other, _ = fit(torch.from_numpy(x), y, 3, epochs=2)
    assert torch.equal(one.out.weight, other.out.weight)


def test_bad_input_is_named(blobs: Any, fit: Any) -> None:
    x, y = blobs(30, 3)
    with pytest.raises(DataError, match=r"0\.\.1; found 0\.\.2"):
        fit(x, y, 2)
    with pytest.raises(DataError, match="not all 0"):
        fit(x, y, 3, weights=np.zeros(30, np.float32))
    with pytest.raises(DataError, match="must be equal"):
        fit(x[:20], y, 3)
    with pytest.raises(DataError, match="no rows"):
        fit(x[:0], y[:0], 3)


def test_a_loss_that_is_not_finite_names_its_step(blobs: Any) -> None:
    x, y = blobs(800, 3)
    seed = seed_of(0, "probe rows", 0)
    order = torch.randperm(800, generator=torch.Generator().manual_seed(seed))
    bad = int(order[16 * 4])  # first row of the fifth batch: step 4
    x[bad] = np.nan
    settings = ClassifierConfig(batch_size=16)
    model = C.Classifier("linear", 32, 3)  # statistics would spread the NaN to every step
    rows = probe_._Rows(x, torch.device("cpu"))
    trainer = probe_._ProbeTrainer(model, rows, y, np.ones(800), settings, seed=0)
    with pytest.raises(StageError, match=r"not finite at step 4 of 1000"):
        trainer.epoch(0, None)


def test_steps_are_reported(blobs: Any) -> None:
    x, y = blobs(2000, 3)
    seen: list[tuple[int, int, float]] = []
    settings = ClassifierConfig(epochs=3, batch_size=10)
    probe_.train_probe(x, y, np.ones(2000), settings, 3, 0, on_step=lambda *step: seen.append(step))
    done = [done for done, _, _ in seen]
    assert set(range(200, 601, 200)) <= set(done) and done == sorted(done)
    assert 6 <= len(done) < 60
    assert {total for _, total, _ in seen} == {600}


class _Thread(Alone):
    """One of several workers that are threads of this process."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, box: dict) -> None:
        self.rank, self.world, self.barrier, self.box = rank, world, barrier, box

    def all_reduce_mean_(self, tensors: Any) -> None:
        self.box[self.rank] = [t.clone() for t in tensors]
        self.barrier.wait()
        for i, tensor in enumerate(tensors):
            tensor.copy_(sum(self.box[r][i] for r in range(self.world)) / self.world)
        self.barrier.wait()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_three_workers_get_what_one_gets(blobs: Any, fit: Any, kind: str) -> None:
    x, y = blobs(241, 4)  # batches of 5; the last has one row: two workers have none
    weights = np.random.default_rng(0).random(241).astype(np.float32)
    options: dict[str, Any] = {"kind": kind, "epochs": 3, "batch_size": 24, "weights": weights}
    alone, history = fit(x, y, 4, **options)
    barrier, box, out = threading.Barrier(3), {}, {}

    def work(rank: int) -> None:
        group = _Thread(rank, 3, barrier, box)
        out[rank] = fit(x, y, 4, collective=group, **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    for rank in range(3):
        model, own = out[rank]
        torch.testing.assert_close(model.out.weight, alone.out.weight, atol=2e-4, rtol=1e-3)
        assert own[-1]["loss"] == pytest.approx(history[-1]["loss"], rel=1e-3)
        assert own[-1]["agreement"] == pytest.approx(history[-1]["agreement"])
