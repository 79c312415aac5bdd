"""Time, memory and disk of the chain at ImageNet's size, on synthetic embeddings.

Shapes: N rows, D features, H heads, K clusters.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import markdown

IMAGENET = 1_281_167  # training images
BLOCK = 20_000  # rows made at a time
LINKS = 60_000  # hard links to one file; ext4 takes 65,000
LATENT = 32  # dimensions that the centers differ in; few, so that classes touch
SPREAD = 0.7  # deviation of rows around their center; of the centers, 1
EMBEDDED = 1_000  # image files that are embedded, as many as there are classes or more
BACKBONE_FEATURES = 512  # of resnet18
CHECKED = 2_000  # rows whose neighbors are compared with the centers they were made from
SAMPLE_EVERY = 0.2  # seconds between looks at the memory of all processes


# --- synthetic input ------------------------------------------------------------------------------


def center_of(rows: np.ndarray, classes: int) -> np.ndarray:
    """The center that each row lies around."""
    return rows % classes


def blocks(rows: int, features: int, classes: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Unit vectors around `classes` random centers, float16, BLOCK rows at a time."""
    generator = np.random.default_rng(seed)
    latent = min(LATENT, features)
    centers = generator.standard_normal((classes, latent), np.float32)
    basis = np.linalg.qr(generator.standard_normal((features, latent)))[0].T.astype(np.float32)
    for start in range(0, rows, BLOCK):
        numbers = np.arange(start, min(start + BLOCK, rows))
        noise = generator.standard_normal((len(numbers), latent), np.float32)
        block = (centers[center_of(numbers, classes)] + SPREAD * noise) @ basis
        block += 0.02 * generator.standard_normal(block.shape, np.float32)
        yield (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float16)


def write_embeddings(file: Path, rows: int, features: int, classes: int) -> None:
    """The vectors of `blocks` as one .npy, [N, D], never whole in memory."""
    header = {"descr": "<f2", "fortran_order": False, "shape": (rows, features)}
    with file.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for block in blocks(rows, features, classes):
            stream.write(block.tobytes())


def make_images(folder: Path, rows: int, classes: int) -> None:
    """A folder per class with `rows` image files in all: hard links to a few small images."""
    from PIL import Image

    base = folder / "base"
    for k in range(classes):
        (folder / "tree" / f"{k:05d}").mkdir(parents=True)
    base.mkdir()
    for number in range(rows):
        source = base / f"{number // LINKS}.png"
        if number % LINKS == 0:
            Image.new("RGB", (8, 8), (number // LINKS, 0, 0)).save(source)
        os.link(source, folder / "tree" / f"{number % classes:05d}" / f"{number:08d}.png")


# --- memory ---------------------------------------------------------------------------------------


@dataclass
class Peak:
    """Largest memory seen, bytes. Pages that processes share are counted in shares."""

    own: float = 0.0  # of one process: what it allocated (anonymous pages)
    process: str = ""  # that one
    mapped: float = 0.0  # of one process: pages of memory-mapped files, and shared memory
    all_own: float = 0.0  # of all processes together
    all: float = 0.0  # the same with mapped files and shared memory
    disk: float = 0.0  # of a folder that is watched

    def see(self, sample: Mapping[int, tuple[str, float, float]]) -> None:
        """Take in one look at all processes: pid -> name, own, mapped."""
        for name, own, mapped in sample.values():
            if own > self.own:
                self.own, self.process = own, name
            self.mapped = max(self.mapped, mapped)
        self.all_own = max(self.all_own, sum(own for _, own, _ in sample.values()))
        self.all = max(self.all, sum(own + mapped for _, own, mapped in sample.values()))


def family(root: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        parents[int(entry.name)] = int(fields[1])
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def memory_of(pid: int) -> tuple[str, float, float] | None:
    """Name, own and mapped bytes of a process; None where it is gone, or the kernel says nothing.

    From the kernel's proportional sums, which tell allocated memory from memory-mapped files.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        name = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return None
    sizes = {line.split(":")[0]: 1024.0 * int(line.split()[1]) for line in lines}
    own = sizes.get("Pss_Anon", 0.0) + sizes.get("SwapPss", 0.0)
    return name.strip(), own, sizes.get("Pss_File", 0.0) + sizes.get("Pss_Shmem", 0.0)


def look(root: int) -> dict[int, tuple[str, float, float]]:
    """Memory of a process, named `driver`, and of all below it."""
    sample = {}
    for pid in family(root):
        found = memory_of(pid)
        if found is not None:
            sample[pid] = ("driver" if pid == root else short_name(found[0]), *found[1:])
    return sample


def short_name(command: str) -> str:
    """A process as a reader knows it: Ray's task or actor, else the program."""
    if command.startswith("ray::"):
        return command.split(maxsplit=1)[0].removeprefix("ray::").removesuffix("()")
    words = [Path(word).name for word in command.split()[:3] if not word.startswith("-")]
    return next((word for word in words if not word.startswith("python")), "?")


# --- the stages -----------------------------------------------------------------------------------


@dataclass
class Measured:
    """One stage: what it took, and what the plan had said."""

    stage: str
    rows: int
    seconds: float  # of the stage's work, as in its manifest
    wall: float  # of the whole command, with starting Python and Ray
    disk: float  # bytes by which the run directory grew, at most
    peak: Peak
    planned_memory: float  # bytes, in the largest process, with what any process takes
    planned_disk: float  # with the arrays of the run's cache
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Memory measured, relative to that planned: within 0.8 and 1.25, the plan is right."""
        return self.peak.own / self.planned_memory


def watch(command: Sequence[str], log: Path, folder: Path | None = None) -> tuple[float, Peak]:
    """Run a command to its end: seconds, and memory and the size of a folder at their highest.

    Raises StageError if it fails."""
    from icce_ray.errors import StageError

    started, peak = time.monotonic(), Peak()
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as job:
        try:
            while job.poll() is None:
                peak.see(look(job.pid))
                peak.disk = max(peak.disk, folder_bytes(folder) if folder else 0.0)
                time.sleep(SAMPLE_EVERY)
        except BaseException:
            job.terminate()
            raise
    if job.returncode:
        said = log.read_text().strip().splitlines()
        reason = said[-1].removeprefix("error: ") if said else f"exit code {job.returncode}"
        raise StageError(f"{' '.join(command)} failed: {reason}")
    return time.monotonic() - started, peak


def measure(stage: str, tree: Mapping[str, Any], features: int, label: str = "") -> Measured:
    """Run one stage of the chain in a process of its own."""
    import yaml

    from icce_ray import config as configs
    from icce_ray.distributed.cluster import Cluster
    from icce_ray.pipeline import STAGES as KNOWN
    from icce_ray.rundir.directory import RunDirectory
    from icce_ray.stages.base import Size

    config, run, folder = configs.load(tree), RunDirectory(tree["run_dir"]), Path(tree["run_dir"])
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dict(tree)))
    command = [sys.executable, "-m", "icce_ray.cli", "run", str(file), "--until", stage]
    before = folder_bytes(folder)
    wall, peak = watch(command, file.with_suffix(".log"), folder)
    known = next(one for one in KNOWN if one.name == stage)
    done, index = run.manifest(known.folder), run.manifest("index")
    assert done is not None and index is not None
    need = known.estimate(config, Size(index.rows, features), Cluster(config.ray))
    return Measured(
        stage=label or stage,
        rows=done.rows,
        seconds=done.seconds,
        wall=round(wall, 1),
        disk=max(peak.disk, folder_bytes(folder)) - before,
        peak=peak,
        planned_memory=need.memory,
        planned_disk=need.disk + need.cache,
        results=dict(done.results),
    )


def idle_memory(log: Path) -> float:
    """Bytes that a process has before it works: table.PROCESS is to be about as much."""
    code = f"import time, ray, torch, icce_ray.pipeline; time.sleep({3 * SAMPLE_EVERY})"
    return watch([sys.executable, "-c", code], log)[1].own


def folder_bytes(folder: Path) -> float:
    """Bytes of all files below a folder, some of which may be going."""
    total = 0.0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def right_neighbors(run_dir: str, rows: int, classes: int) -> float:
    """Share of neighbors around the same center, over CHECKED rows: was the input what it says?"""
    from icce_ray.rundir.directory import RunDirectory

    ids = RunDirectory(run_dir).matrix("neighbors", "ids")
    chosen = np.linspace(0, rows - 1, min(rows, CHECKED)).astype(int)
    found = np.asarray(ids[chosen])
    same = center_of(found, classes) == center_of(chosen, classes)[:, None]
    return float(same[found >= 0].mean())


def scale_settings(
    folder: Path, classes: int, heads: int, steps: int, search: str = "ivf"
) -> dict[str, Any]:
    """Settings of the rehearsal: defaults, but for the search."""
    files = {"embeddings": folder / "embeddings.npy", "labels": folder / "labels.npy"}
    return {
        "num_classes": classes,
        "run_dir": str(folder / "given"),
        "data": {name: str(file) for name, file in files.items()},
        "neighbors": {"search": search},
        "heads": {"count": heads, "steps": steps, "num_workers": 1},
        "ray": {"num_gpus": 0},
    }


def measure_images(folder: Path, rows: int, tree: Mapping[str, Any]) -> list[Measured]:
    """Index of `rows` image files, and some of them through a backbone."""
    classes = tree["num_classes"]
    make_images(folder, rows, classes)
    listed = {**tree, "run_dir": str(folder / "listed"), "data": {"path": str(folder / "tree")}}
    listed["backbone"] = {"name": "resnet18", "pretrained": False}
    out = [measure("index", listed, BACKBONE_FEATURES, "index of image files")]
    few = {**listed["data"], "limit": max(EMBEDDED, classes)}
    fewer = {**listed, "run_dir": str(folder / "fewer"), "data": few}
    out.append(measure("embed", fewer, BACKBONE_FEATURES, "embed image files"))
    shutil.rmtree(folder / "tree")
    return out


def measure_scale(
    folder: Path, rows: int, features: int, classes: int, heads: int, steps: int, search: str
) -> tuple[list[Measured], dict[str, Any]]:
    """All measurements of `scale`, and remarks. What it makes below `folder` stays there."""
    from icce_ray import config as configs
    from icce_ray.pipeline import NAMES

    tree = scale_settings(folder, classes, heads, steps, search)
    configs.load(tree)  # a mistake shows before a million files are made
    started = time.monotonic()
    out = measure_images(folder, rows, tree)
    remarks = {"seconds of the image files": round(time.monotonic() - started, 1)}
    started = time.monotonic()
    write_embeddings(folder / "embeddings.npy", rows, features, classes)
    np.save(folder / "labels.npy", center_of(np.arange(rows), classes))
    remarks["seconds to make the embeddings"] = round(time.monotonic() - started, 1)
    for stage in NAMES:
        out.append(measure(stage, tree, features))
        print(f"{stage}: {out[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    remarks["GB of a process that has only started"] = idle_memory(folder / "idle.log") / 1e9
    share = right_neighbors(str(folder / "given"), rows, classes)
    return out, {**remarks, "neighbors around the same center": round(share, 3)}


# --- tables --------------------------------------------------------------------------------------


def gigabytes(count: float) -> str:
    """Bytes with three digits, in GB."""
    return f"{count / 1e9:.3g}" if count >= 1e6 else f"{count / 1e9:.0g}"


def scale_table(measured: Sequence[Measured]) -> str:
    """Memory and disk in GB."""
    head = ["stage", "rows", "s", "s with start", "memory", "plan", "ratio", "in process", "mapped"]
    head += ["all processes", "with mapped", "disk", "plan"]
    lines = [
        [
            *(one.stage, f"{one.rows:,}", f"{one.seconds:.1f}", f"{one.wall:.1f}"),
            *(gigabytes(one.peak.own), gigabytes(one.planned_memory), f"{one.ratio:.2f}"),
            one.peak.process,
            *(gigabytes(one.peak.mapped), gigabytes(one.peak.all_own), gigabytes(one.peak.all)),
            *(gigabytes(one.disk), gigabytes(one.planned_disk)),
        ]
        for one in measured
    ]
    return markdown(head, lines)
