"""How fast images are embedded: the command, beside a plain torch loop with the same preparation
and the same arithmetic of the backbone.

Shapes: N images, B batch, S side of the input.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEIGHT = 500, 375  # of the images, as in ImageNet
DISTINCT = 1000  # images that are made; the others are links to them
WARM_UP = 0.25  # share of the images before the steady rate is taken


@dataclass(frozen=True)
class Work:
    """What is embedded, by what."""

    images: int  # N
    backbone: str
    size: int  # S
    batch: int  # B
    weights: str | None = None  # default: random ones, made once and kept in a file


@dataclass(frozen=True)
class Pace:
    """How one way does."""

    name: str
    first: float  # seconds from the command to the first batch's result
    rate: float  # images per second, once WARM_UP of them are done
    total: float  # seconds from the command to the end


# The two ways. Each prints how many images were done, and when, as JSON.

COMMAND = """
import json, sys, time
began, config = float(sys.argv[1]), json.loads(sys.argv[2])
from icce_ray import config as configs, pipeline
from icce_ray.distributed import inference
marks, take = [], inference.Inference._take
def taken(self, batch, job):
    count = take(self, batch, job)
    marks.append((time.time() - began, count))
    return count
inference.Inference._take = taken
pipeline.run(configs.load(config), last="embed", quiet=True)
print(json.dumps({"marks": marks, "total": time.time() - began}))
"""

LOOP = """
import json, os, sys, time
began, config = float(sys.argv[1]), json.loads(sys.argv[2])
from pathlib import Path
import torch
from torch.utils.data import DataLoader, Dataset
from icce_ray import config as configs
from icce_ray.core import backbone as backbones, preprocess
class Images(Dataset):
    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform
    def __len__(self):
        return len(self.paths)
    def __getitem__(self, row):
        image = preprocess.decode(Path(self.paths[row]).read_bytes(), 10**9)
        return torch.from_numpy(self.transform(image))
settings = configs.load(config)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = backbones.load(settings.backbone[0])
precision = backbones.arithmetic("auto", device)
model = model.on(device, precision)
folder = settings.data.path
paths = sorted(entry.path for entry in os.scandir(folder))
cores = len(os.sched_getaffinity(0))
gpu = device.type == "cuda"
loader = DataLoader(Images(paths, model.transform), settings.embed.batch_size,
                    num_workers=cores if gpu else max(1, cores - 1), pin_memory=gpu)
marks = []
for batch in loader:
    model.embed(batch.to(device, non_blocking=True), precision).half().cpu()
    marks.append((time.time() - began, len(batch)))
print(json.dumps({"marks": marks, "total": time.time() - began}))
"""

WAYS = (("a plain torch loop", LOOP), ("icce-ray run --until embed", COMMAND))


def measure(work: Work, say: Callable[[str], None]) -> list[Pace]:
    """The command, and the plain loop, each in a process of its own, on the same files."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_images(place / "images", work.images)
        tree = _config(place, work)
        found = []
        for name, program in (
            ("a plain torch loop", LOOP),
            ("icce-ray run --until embed", COMMAND),
        ):
            found.append(_pace(name, program, tree))
            say(
                f"{name}: first batch after {found[-1].first:.1f} s, {found[-1].rate:,.0f} images/s"
            )
    return found


def write_images(folder: Path, count: int) -> None:
    """JPEG files of the size in pixels and bytes of photographs, [count] names in `folder`."""
    from concurrent.futures import ProcessPoolExecutor

    folder.mkdir()
    distinct = min(count, DISTINCT)
    with ProcessPoolExecutor() as pool:
        encoded = list(pool.map(photograph, range(distinct), chunksize=16))
    for number in range(count):
        path = folder / f"{number:06d}.jpg"
        if number < distinct:
            path.write_bytes(encoded[number])
        else:
            path.hardlink_to(folder / f"{number % distinct:06d}.jpg")


def photograph(seed: int) -> bytes:
    """A JPEG file with detail at every scale, about as large as a photograph of these pixels."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    picture = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for side in (4, 16, 64, 256):
        coarse = rng.normal(size=(side, side, 3))
        image = Image.fromarray((128 + 40 * coarse).clip(0, 255).astype(np.uint8))
        scaled = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        picture += (np.asarray(scaled, np.float32) - 128) * (4 / side) ** 0.5
    out = io.BytesIO()
    Image.fromarray((128 + picture).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=96)
    return out.getvalue()


def _config(place: Path, work: Work) -> dict[str, Any]:
    backbone = {"name": work.backbone, "image_size": work.size, "weights": work.weights}
    if work.weights is None:
        backbone["weights"] = str(place / "weights.safetensors")
        _write_weights(work, place / "weights.safetensors")
    return {
        "num_classes": 2,
        "run_dir": str(place / "run"),
        "data": {"path": str(place / "images"), "labels": "none"},
        "backbone": backbone,
        "embed": {"batch_size": work.batch},
    }


def _write_weights(work: Work, path: Path) -> None:
    from safetensors.torch import save_file

    from icce_ray.config.schema import BackboneConfig
    from icce_ray.core import backbone

    given = {"name": work.backbone, "image_size": work.size, "pretrained": False}
    model = backbone.load(BackboneConfig.model_validate(given)).model
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)


def _pace(name: str, program: str, tree: dict[str, Any]) -> Pace:
    command = [sys.executable, "-c", program, str(time.time()), json.dumps(tree)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=offline)
    said = json.loads(done.stdout.splitlines()[-1])
    times, counts = (np.array(column, float) for column in zip(*said["marks"], strict=True))
    return Pace(name, float(times[0]), steady_rate(times, counts), said["total"])


def steady_rate(times: np.ndarray, counts: np.ndarray) -> float:
    """Images per second after the first WARM_UP of all images.

    times: seconds at which a batch was done, increasing, [T]; counts: its images, [T].
    """
    done = counts.cumsum()
    begin = int(np.searchsorted(done, WARM_UP * done[-1]))
    begin = min(begin, len(times) - 2)
    return float((done[-1] - done[begin]) / max(1e-9, times[-1] - times[begin]))
