"""Probes and fine-tuning against plain references. K clusters, D features, N rows."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from icce_ray.config.schema import BackboneConfig, ClassifierConfig
from icce_ray.core import backbone
from icce_ray.core.classifier import finetune as finetune_
from icce_ray.core.classifier import model as C
from icce_ray.core.classifier import probe as probe_
from icce_ray.core.classifier import training
from icce_ray.core.collective import Alone
from icce_ray.errors import ArtifactError, DataError, StageError


def blobs(
    rows: int, clusters: int, features: int = 32, spread: float = 0.05, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around random directions, float16 [N, D], and the blob of each."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(clusters, features))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    labels = np.arange(rows) % clusters
    x = centers[labels] + spread * rng.normal(size=(rows, features))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float16), labels


def fit(
    x: Any, y: np.ndarray, clusters: int, seed: int = 0, **options: Any
) -> tuple[C.Classifier, list[dict[str, float]]]:
    weights = options.pop("weights", np.ones(len(y), np.float32))
    collective = options.pop("collective", None)
    settings = ClassifierConfig(**options)
    return probe_.train_probe(x, y, weights, settings, clusters, seed, collective=collective)


def accuracy(model: C.Classifier, x: np.ndarray, y: np.ndarray) -> float:
    return float((probe_.predict(model, x)[0] == y).mean())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_probe_learns_separable_blobs_and_is_sure_of_them(kind: str) -> None:
    x, y = blobs(2000, 10)
    model, history = fit(x, y, 10, kind=kind)
    new, truth = blobs(500, 10, seed=1)
    clusters, confidence = probe_.predict(model, new)
    assert (clusters == truth).mean() > 0.99
    assert confidence.mean() > 0.9
    assert len(history) == 20
    assert history[-1]["loss"] < 0.2 * history[0]["loss"]
    assert history[-1]["agreement"] > 0.99


def test_confidence_of_pure_noise_is_low() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 16))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    model, _ = fit(x, rng.integers(0, 10, 4000), 10)
    assert probe_.predict(model, x)[1].mean() < 0.25


def test_wrong_labels_of_low_weight_are_ignored() -> None:
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
def test_calibration_makes_probabilities_as_sure_as_asked(kind: str, wanted: float) -> None:
    x, y = blobs(1500, 5, spread=0.3)
    model, _ = fit(x, y, 5, kind=kind)
    before, _ = probe_.predict(model, x)
    temperature = probe_.calibrate(model, x, np.full(len(x), wanted))
    after, confidence = probe_.predict(model, x)
    assert (after == before).all() and temperature != 1
    assert confidence.mean() == pytest.approx(wanted, abs=0.01)


def test_calibration_goes_as_far_as_it_can() -> None:
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


def test_only_ratios_of_weights_matter() -> None:
    x, y = blobs(300, 3)
    weights = np.random.default_rng(0).random(300).astype(np.float32)
    one, _ = fit(x, y, 3, weights=weights, epochs=3)
    other, _ = fit(x, y, 3, weights=weights * 0.004, epochs=3)
    torch.testing.assert_close(one.out.weight, other.out.weight)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_seed_decides(kind: str) -> None:
    x, y = blobs(300, 4)
    torch.manual_seed(1)
    first, _ = fit(x, y, 4, seed=3, kind=kind, epochs=2)
    torch.manual_seed(2)
    again, _ = fit(x, y, 4, seed=3, kind=kind, epochs=2)
    other, _ = fit(x, y, 4, seed=4, kind=kind, epochs=2)
    assert torch.equal(first.out.weight, again.out.weight)
    assert not torch.equal(first.out.weight, other.out.weight)


@pytest.mark.parametrize(("rows", "batch"), [(1, 1024), (20, 1024), (33, 16), (20, 1)])
def test_very_few_rows(rows: int, batch: int) -> None:
    x, y = blobs(rows, 10)
    model, history = fit(x, y, 10, batch_size=batch)
    assert accuracy(model, x, y) == 1.0
    assert math.isfinite(history[-1]["loss"])


def test_clusters_without_rows_are_never_predicted() -> None:
    x, y = blobs(600, 3)
    model, _ = fit(x, y * 4, 12)
    assert set(probe_.predict(model, x)[0].tolist()) == {0, 4, 8}


def test_constant_and_dead_coordinates() -> None:
    x, y = blobs(400, 4)
    x = np.concatenate([x, np.zeros((400, 3), np.float16), np.full((400, 1), 0.7, np.float16)], 1)
    x = (x / np.linalg.norm(x.astype(np.float32), axis=1, keepdims=True)).astype(np.float16)
    model, _ = fit(x, y, 4)
    assert accuracy(model, x, y) > 0.99
    assert torch.isfinite(model.folded().out.weight).all()


def test_memory_mapped_array_and_tensor_give_the_same(tmp_path: Any) -> None:
    x, y = blobs(200, 3)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    one, _ = fit(mapped, y, 3, epochs=2)
    other, _ = fit(torch.from_numpy(x), y, 3, epochs=2)
    assert torch.equal(one.out.weight, other.out.weight)


def test_bad_input_is_named() -> None:
    x, y = blobs(30, 3)
    with pytest.raises(DataError, match=r"0\.\.1; found 0\.\.2"):
        fit(x, y, 2)
    with pytest.raises(DataError, match="not all 0"):
        fit(x, y, 3, weights=np.zeros(30, np.float32))
    with pytest.raises(DataError, match="must be equal"):
        fit(x[:20], y, 3)
    with pytest.raises(DataError, match="no rows"):
        fit(x[:0], y[:0], 3)


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    x, y = blobs(800, 3)
    order = torch.randperm(800, generator=torch.Generator().manual_seed(0))
    bad = int(order[16 * 4])  # first row of the fifth batch: step 4
    x[bad] = np.nan
    settings = ClassifierConfig(batch_size=16)
    model = C.Classifier("linear", 32, 3)  # statistics would spread the NaN to every step
    rows = probe_._Rows(x, torch.device("cpu"))
    trainer = probe_._ProbeTrainer(model, rows, y, np.ones(800), settings, seed=0)
    with pytest.raises(StageError, match=r"not finite at step 4 of 1000"):
        trainer.epoch(0, None)


def test_steps_are_reported() -> None:
    x, y = blobs(2000, 3)
    seen: list[tuple[int, int, float]] = []
    settings = ClassifierConfig(epochs=3, batch_size=10)
    probe_.train_probe(x, y, np.ones(2000), settings, 3, 0, on_step=lambda *step: seen.append(step))
    done = [done for done, _, _ in seen]
    assert set(range(200, 601, 200)) <= set(done) and done == sorted(done)
    assert 6 <= len(done) < 60
    assert {total for _, total, _ in seen} == {600}


# --- several workers -----------------------------------------------------------------------------


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
def test_three_workers_get_what_one_gets(kind: str) -> None:
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


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_folding_changes_nothing(kind: str) -> None:
    x, y = blobs(500, 4)
    model, _ = fit(x, y, 4, kind=kind, epochs=3)
    folded = model.folded()
    rows = torch.from_numpy(x).float()
    assert not torch.equal(folded.out.bias, model.out.bias) or kind == "mlp"
    assert (folded.shift == 0).all() and (folded.scale == 1).all()
    torch.testing.assert_close(folded(rows), model(rows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_save_and_load(kind: str) -> None:
    x, y = blobs(500, 4)
    model, _ = fit(x, y, 4, kind=kind, hidden=24, epochs=3)
    weights, description = C.save(model, {"clusters": [125] * 4})
    loaded = C.load(weights, description)
    rows = torch.from_numpy(x).float()
    torch.testing.assert_close(loaded(rows), model(rows), atol=1e-4, rtol=1e-4)
    assert description["kind"] == kind and description["num_clusters"] == 4
    assert description["features"] == 32 and description["clusters"] == [125] * 4


def test_a_linear_file_needs_one_matrix_product() -> None:
    from safetensors.torch import load

    x, y = blobs(500, 4)
    model, _ = fit(x, y, 4, epochs=3)
    tensors = load(C.save(model)[0])
    assert set(tensors) == {"weight", "bias"} and tensors["weight"].shape == (4, 32)
    logits = torch.from_numpy(x).float() @ tensors["weight"].T + tensors["bias"]
    assert (logits.argmax(1).numpy() == probe_.predict(model, x)[0]).all()


def test_damaged_files_are_artifact_errors() -> None:
    x, y = blobs(50, 4)
    weights, description = C.save(fit(x, y, 4, epochs=1)[0])
    with pytest.raises(ArtifactError, match="damaged"):
        C.load(weights[:100], description)
    with pytest.raises(ArtifactError, match="format 9"):
        C.load(weights, {**description, "format": 9})
    with pytest.raises(ArtifactError, match="do not fit"):
        C.load(weights, {**description, "num_clusters": 5})
    with pytest.raises(ArtifactError, match="lacks 'features'"):
        C.load(weights, {k: v for k, v in description.items() if k != "features"})


# --- fine-tuning ---------------------------------------------------------------------------------

TINY = BackboneConfig(name="test_efficientnet", pretrained=False, image_size=32)


def pictures(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of three colors, uint8 [B, 3, S, S], and the color of each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 3
    colors = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200]])[labels]
    noise = torch.randint(-50, 50, (rows, 3, 32, 32), generator=generator)
    return (colors[:, :, None, None] + noise).clamp(0, 255).to(torch.uint8), labels


@pytest.fixture
def warm() -> tuple[C.FineTuned, torch.Tensor, torch.Tensor]:
    """A model whose head is the probe trained on its own frozen features."""
    torch.manual_seed(0)
    network = backbone.load(TINY)
    images, labels = pictures(96)
    with torch.inference_mode():
        features = backbone.normalize(network(images))
    head, _ = fit(features.half().numpy(), labels.numpy(), 3)
    return C.FineTuned(network, head).eval(), images, labels


def batches(images: torch.Tensor, labels: torch.Tensor, rows: int = 16) -> list[dict[str, Any]]:
    ones = torch.ones(len(labels))
    parts = zip(images.split(rows), labels.split(rows), ones.split(rows), strict=True)
    return [{"image": i, "label": y, "weight": w} for i, y, w in parts]


def test_fine_tuning_starts_at_the_probe_and_improves(warm: Any) -> None:
    model, images, labels = warm
    with torch.inference_mode():
        before = model(images)
        start = F.cross_entropy(before, labels)
        probe = model.head(backbone.normalize(model.backbone(images)))
    torch.testing.assert_close(before, probe)
    settings = ClassifierConfig(kind="finetune", backbone_lr=1e-3, lr=1e-2)
    optimizer = finetune_.finetune_optimizer(model, settings)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if "running_" in k}
    seen: list[int] = []
    for epoch in range(3):
        result = finetune_.finetune_epoch(
            model,
            optimizer,
            batches(images, labels),
            finetune_.Position(epoch, 6, 3),
            seed=0,
            bfloat16=False,
            on_step=lambda done, total, loss: seen.append(done),
        )
    assert result["epoch"] == 3 and result["agreement"] > 0.95 and seen[-1] == 18
    with torch.inference_mode():
        assert F.cross_entropy(model(images), labels) < start
    assert frozen and all(torch.equal(v, model.state_dict()[k]) for k, v in frozen.items())


def test_both_learning_rates_are_used_and_decay(warm: Any) -> None:
    model, images, labels = warm
    optimizer = finetune_.finetune_optimizer(model, ClassifierConfig(backbone_lr=1e-5, lr=1e-2))
    assert sorted({group["peak"] for group in optimizer.param_groups}) == [1e-5, 1e-2]
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    assert held == len(list(model.parameters()))
    finetune_.finetune_epoch(
        model, optimizer, batches(images, labels), finetune_.Position(0, 6, 1), 0, False
    )
    assert all(group["lr"] < 0.2 * group["peak"] for group in optimizer.param_groups)


def test_weights_count_in_fine_tuning(warm: Any) -> None:
    model, images, labels = warm
    batch = {"image": images, "label": labels, "weight": torch.zeros(len(labels))}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = finetune_.finetune_optimizer(model, ClassifierConfig(weight_decay=0))
    loss, hits = finetune_.finetune_step(model, optimizer, batch, torch.Generator(), bfloat16=False)
    assert loss == 0 and hits > 80
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


def test_a_diverging_fine_tuning_stops(warm: Any) -> None:
    model, images, labels = warm
    optimizer = finetune_.finetune_optimizer(model, ClassifierConfig())
    with torch.no_grad():
        model.head.out.bias.fill_(torch.nan)
    with pytest.raises(StageError, match="not finite at step 6 of 12"):
        finetune_.finetune_epoch(
            model, optimizer, batches(images, labels), finetune_.Position(1, 6, 2), 0
        )


def test_state_goes_on_exactly(warm: Any) -> None:
    from safetensors.torch import load, save

    model, images, labels = warm
    settings = ClassifierConfig(backbone_lr=1e-3)
    optimizer = finetune_.finetune_optimizer(model, settings)
    position = finetune_.Position(0, 6, 2), finetune_.Position(1, 6, 2)
    finetune_.finetune_epoch(model, optimizer, batches(images, labels), position[0], 0, False)
    packed = load(save(training.pack_state(model, optimizer)))
    finetune_.finetune_epoch(model, optimizer, batches(images, labels), position[1], 0, False)
    other = C.FineTuned(backbone.load(TINY), C.Classifier("linear", model.head.features, 3))
    resumed = finetune_.finetune_optimizer(other, settings)
    training.unpack_state(packed, other, resumed)
    finetune_.finetune_epoch(other, resumed, batches(images, labels), position[1], 0, False)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], atol=1e-5, rtol=1e-4)
    with pytest.raises(ArtifactError, match="do not fit"):
        training.unpack_state({"model.x": torch.zeros(1)}, other, resumed)


def test_a_fine_tuned_file_loads_with_torch_and_timm_alone(warm: Any, tmp_path: Path) -> None:
    """The example of the module's docstring, run as written."""
    model, images, _ = warm
    weights, description = C.save(model, {"backbone": [model.backbone.describe()]})
    (tmp_path / "classifier.safetensors").write_bytes(weights)
    (tmp_path / "classifier.json").write_text(json.dumps(description))
    example = textwrap.dedent(C.__doc__.split("says):\n\n")[1])
    prepared = (images.float() / 255 - model.backbone.mean) / model.backbone.std
    script = (
        "import json, sys, timm, torch, safetensors.torch\nfrom pathlib import Path\n"
        "images = torch.load('images.pt', weights_only=True)\n"
        f"with torch.inference_mode():\n{textwrap.indent(example, '    ')}\n"
        "torch.save(logits, 'logits.pt')\n"
        "assert not {'ray', 'icce_ray'} & set(sys.modules)\n"
    )
    torch.save(prepared, tmp_path / "images.pt")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = model(images)
        again = C.load(weights, description)
        torch.testing.assert_close(again(images), expected, atol=1e-4, rtol=1e-4)
    plain = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=1e-4)


def test_augmentation_crops_and_mirrors() -> None:
    ramp = torch.arange(32).mul(8).expand(3, 32, 32).to(torch.uint8)  # grows from left to right
    out = finetune_.augment(ramp.expand(256, 3, 32, 32), torch.Generator().manual_seed(0))
    assert out.shape == (256, 3, 32, 32) and out.dtype == torch.uint8
    row = out[:, 0, 16].float()
    mirrored = row[:, 0] > row[:, -1]
    assert 90 < mirrored.sum() < 166
    kept = (row[:, 0] - row[:, -1]).abs() / (31 * 8)  # side of the crop
    assert kept.min() > math.sqrt(finetune_.CROP[0]) - 0.04 and kept.max() <= 1
    assert kept.std() > 0.02
    again = finetune_.augment(ramp.expand(256, 3, 32, 32), torch.Generator().manual_seed(0))
    assert torch.equal(out, again)


def test_the_learning_rate_rises_then_falls() -> None:
    factors = [training.lr_factor(step, 100) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] < 0.01
    assert training.lr_factor(0, 1) == 1.0
