"""The classifier's files, and its standardization folded in. K clusters, D features, N rows."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from icce_ray.core.classifier import model as C
from icce_ray.core.classifier import probe as probe_
from icce_ray.errors import ArtifactError


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_folding_changes_nothing(blobs: Any, fit: Any, kind: str) -> None:
    x, y = blobs(500, 4)
    model, _ = fit(x, y, 4, kind=kind, epochs=3)
    folded = model.folded()
    rows = torch.from_numpy(x).float()
    assert not torch.equal(folded.out.bias, model.out.bias) or kind == "mlp"
    assert (folded.shift == 0).all() and (folded.scale == 1).all()
    torch.testing.assert_close(folded(rows), model(rows), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_save_and_load(blobs: Any, fit: Any, kind: str) -> None:
    x, y = blobs(500, 4)
    model, _ = fit(x, y, 4, kind=kind, epochs=3)
    weights, description = C.save(model, {"clusters": [125] * 4})
    loaded = C.load(weights, description)
    rows = torch.from_numpy(x).float()
    torch.testing.assert_close(loaded(rows), model(rows), atol=1e-4, rtol=1e-4)
    assert description["kind"] == kind and description["num_clusters"] == 4
    assert description["features"] == 32 and description["clusters"] == [125] * 4


def test_a_linear_file_needs_one_matrix_product(blobs: Any, fit: Any) -> None:
    from safetensors.torch import load

    x, y = blobs(500, 4)
    model, _ = fit(x, y, 4, epochs=3)
    tensors = load(C.save(model)[0])
    assert set(tensors) == {"weight", "bias"} and tensors["weight"].shape == (4, 32)
    logits = torch.from_numpy(x).float() @ tensors["weight"].T + tensors["bias"]
    assert (logits.argmax(1).numpy() == probe_.predict(model, x)[0]).all()


def test_damaged_files_are_artifact_errors(blobs: Any, fit: Any) -> None:
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
