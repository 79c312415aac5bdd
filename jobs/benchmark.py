"""Measures time, memory, traffic, and how good the clusters are.

    python jobs/benchmark.py scale       the chain at ImageNet's size, on synthetic embeddings
    python jobs/benchmark.py split       training split by heads against by data, 1 and 2 workers
    python jobs/benchmark.py accuracy    the whole chain against ground truth, seed by seed
    python jobs/benchmark.py ablation    what each setting earns, as a sweep
    python jobs/benchmark.py truth       the label-free scores of the true classes themselves
    python jobs/benchmark.py imbalance   classes of unequal size, cut from a finished run's data
    python jobs/benchmark.py pace        accuracy over the time of training, beside TEMI's recipe
    python jobs/benchmark.py alone       the parts of the method on one device, without Ray

Each prints a table and writes it as Markdown and JSON. `scale` and `split` work on this machine;
inside a Ray job `scale` would see the memory of the driver alone. `alone`, and `pace` on
embeddings in a file, need neither Ray nor pyarrow.
Shapes: N rows, D features, H heads, K clusters, M neighbors, B pairs per step, W workers.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from benchmarks import quality
from benchmarks.tables import machine, markdown, publish

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

IMAGENET = 1_281_167  # training images
BLOCK = 20_000  # rows made at a time
LINKS = 60_000  # hard links to one file; ext4 takes 65,000
LATENT = 32  # dimensions that the centers differ in; few, so that classes touch
SPREAD = 0.7  # deviation of rows around their center; of the centers, 1
CHECKED = 2_000  # rows whose neighbors are compared with the centers they were made from
SAMPLE_EVERY = 0.5  # seconds between looks at the memory of all processes
STAGES = ("index", "embed", "neighbors", "heads", "consensus")


# --- scale: synthetic input ----------------------------------------------------------------------


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


# --- scale: memory -------------------------------------------------------------------------------


@dataclass
class Peak:
    """Largest memory seen, bytes. Pages that processes share are counted in shares."""

    own: float = 0.0  # of one process: what it allocated (anonymous pages)
    process: str = ""  # that one
    mapped: float = 0.0  # of one process: pages of memory-mapped files, and shared memory
    all_own: float = 0.0  # of all processes together
    all: float = 0.0  # the same with mapped files and shared memory

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


# --- scale: the stages ---------------------------------------------------------------------------


@dataclass
class Measured:
    """One stage: what it took, and what the plan had said."""

    stage: str
    rows: int
    seconds: float  # of the stage's work, as in its manifest
    wall: float  # of the whole command, with starting Python and Ray
    disk: float  # bytes written
    peak: Peak
    planned_memory: float  # bytes, in the largest process
    planned_disk: float
    results: dict[str, Any] = field(default_factory=dict)


def watch(command: Sequence[str], log: Path) -> tuple[float, Peak]:
    """Run a command to its end: seconds and memory. Raises StageError if it fails."""
    from icce_ray.errors import StageError

    started, peak = time.monotonic(), Peak()
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as job:
        try:
            while job.poll() is None:
                peak.see(look(job.pid))
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

    config, run = configs.load(tree), RunDirectory(tree["run_dir"])
    file = Path(tree["run_dir"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dict(tree)))
    command = [sys.executable, "-m", "icce_ray.cli", "run", str(file), "--until", stage]
    wall, peak = watch(command, file.with_suffix(".log"))
    known = next(one for one in KNOWN if one.name == stage)
    done = run.manifest(known.folder)
    assert done is not None
    need = known.estimate(config, Size(done.rows, features), Cluster(config.ray))
    return Measured(
        stage=label or stage,
        rows=done.rows,
        seconds=done.seconds,
        wall=round(wall, 1),
        disk=folder_bytes(Path(tree["run_dir"]) / known.folder),
        peak=peak,
        planned_memory=need.memory,
        planned_disk=need.disk,
        results=dict(done.results),
    )


def idle_memory(log: Path) -> float:
    """Bytes that a process has before it works: what the plan leaves out."""
    code = f"import time, ray, torch, icce_ray.pipeline; time.sleep({3 * SAMPLE_EVERY})"
    return watch([sys.executable, "-c", code], log)[1].own


def folder_bytes(folder: Path) -> float:
    """Bytes of all files below a folder."""
    return float(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))


def right_neighbors(run_dir: str, rows: int, classes: int) -> float:
    """Share of neighbors around the same center, over CHECKED rows: was the input what it says?"""
    from icce_ray.rundir.directory import RunDirectory

    ids = RunDirectory(run_dir).matrix("neighbors", "ids")
    chosen = np.linspace(0, rows - 1, min(rows, CHECKED)).astype(int)
    found = np.asarray(ids[chosen])
    same = center_of(found, classes) == center_of(chosen, classes)[:, None]
    return float(same[found >= 0].mean())


def scale_settings(folder: Path, classes: int, heads: int, steps: int) -> dict[str, Any]:
    """Settings of the rehearsal: defaults, but the approximate search at any size."""
    return {
        "num_classes": classes,
        "run_dir": str(folder / "given"),
        "data": {"embeddings": str(folder / "embeddings.npy"), "labels": "none"},
        "neighbors": {"search": "ivf"},
        "heads": {"count": heads, "steps": steps, "num_workers": 1, "num_gpus": 0},
    }


def measure_scale(
    folder: Path, rows: int, features: int, classes: int, heads: int, steps: int
) -> tuple[list[Measured], dict[str, Any]]:
    """All measurements of `scale`, and remarks. What it makes below `folder` stays there."""
    tree = scale_settings(folder, classes, heads, steps)
    listed = {**tree, "run_dir": str(folder / "listed"), "data": {"path": str(folder / "tree")}}
    listed["backbone"] = {"name": "resnet18", "pretrained": False}  # not run, only named
    started = time.monotonic()
    make_images(folder, rows, classes)
    remarks = {"seconds to link the images": round(time.monotonic() - started, 1)}
    out = [measure("index", listed, features, "index of image files")]
    shutil.rmtree(folder / "tree")
    started = time.monotonic()
    write_embeddings(folder / "embeddings.npy", rows, features, classes)
    remarks["seconds to make the embeddings"] = round(time.monotonic() - started, 1)
    for stage in STAGES:
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
    head = ["stage", "rows", "s", "s with start", "memory", "plan", "in process", "mapped"]
    head += ["all processes", "with mapped", "disk", "plan"]
    lines = [
        [
            *(one.stage, f"{one.rows:,}", f"{one.seconds:.1f}", f"{one.wall:.1f}"),
            *(gigabytes(one.peak.own), gigabytes(one.planned_memory), one.peak.process),
            *(gigabytes(one.peak.mapped), gigabytes(one.peak.all_own), gigabytes(one.peak.all)),
            *(gigabytes(one.disk), gigabytes(one.planned_disk)),
        ]
        for one in measured
    ]
    return markdown(head, lines)


# --- split ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The training that `split` times."""

    rows: int
    features: int
    classes: int
    heads: int
    batch: int
    steps: int
    threads: int  # per worker


@dataclass(frozen=True)
class Pace:
    """How fast one group trains."""

    split: str
    workers: int
    seconds: float  # per step, median
    sent: float  # bytes per step, by each worker


WARM_UP = 2  # steps before the clock starts


def time_steps(rank: int, world: int, split: str, work: Work, folder: str) -> None:
    """One worker of a group: train, and (the first one) write what it took."""
    import torch
    import torch.distributed as dist

    from icce_ray.core.collective import Alone, Counted, Distributed

    torch.set_num_threads(work.threads)
    place = f"file://{folder}/meeting-{split}-{world}"
    if world > 1:
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=world)
    group = Counted(Distributed() if world > 1 else Alone())
    try:
        pace = _pace(group, split, work)
        if rank == 0:
            name = Path(folder) / f"{split}-{world}.json"
            name.write_text(json.dumps(asdict(pace)))
    finally:
        if world > 1:
            dist.destroy_process_group()


def _pace(group: Any, split: str, work: Work) -> Pace:
    trainer = _trainer(group, split, work)
    times: list[float] = []
    sent = 0.0
    for step in range(WARM_UP + work.steps):
        before, started = sum(group.bytes.values()), time.perf_counter()
        trainer.step()
        if step >= WARM_UP:
            times.append(time.perf_counter() - started)
            sent += sum(group.bytes.values()) - before
    return Pace(split, group.world, statistics.median(times), sent / work.steps)


def _trainer(group: Any, split: str, work: Work) -> Any:
    """A trainer on random vectors and random neighbors, the same in every worker."""
    import torch

    from icce_ray.config.schema import HeadsConfig
    from icce_ray.core.heads.trainer import Data, HeadTrainer

    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(work.rows, work.features, generator=generator).half()
    ids = torch.randint(work.rows, (work.rows, 20), generator=generator, dtype=torch.int32)
    counts = torch.full((work.rows,), 20, dtype=torch.int32)
    data = Data(vectors, ids, counts, torch.device("cpu"))
    chosen = HeadsConfig.model_validate(
        {"count": work.heads, "split": split, "batch_size": work.batch, "pca": None}
    )
    return HeadTrainer(data, chosen, work.classes, 0, WARM_UP + work.steps, group)


def measure_split(work: Work, workers: Sequence[int]) -> list[Pace]:
    """Every split with every number of workers; with one worker the splits are the same."""
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        for world in workers:
            for split in ("heads", "data") if world > 1 else ("heads",):
                processes.spawn(time_steps, (world, split, work, folder), nprocs=world)
        found = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    paces = [Pace(**one) for one in found]
    return sorted(paces, key=lambda pace: (pace.workers, pace.split))


def split_table(paces: Sequence[Pace]) -> str:
    """Time relative to that of the smallest group."""
    base = paces[0].seconds
    lines = [
        [
            f"by {pace.split}" if pace.workers > 1 else "either",
            *(str(pace.workers), f"{1000 * pace.seconds:.1f}", f"{pace.seconds / base:.2f}"),
            f"{pace.sent / 1e6:.3f}",
        ]
        for pace in paces
    ]
    return markdown(["split", "workers", "ms per step", "relative", "MB sent per worker"], lines)


# --- commands ------------------------------------------------------------------------------------


@app.callback()
def _about() -> None:
    """Measure time, memory, traffic and accuracy."""


Out = Annotated[Path, typer.Option(help="Result files, without their endings.")]


@app.command()
def scale(
    rows: Annotated[int, typer.Option(help="N")] = IMAGENET,
    features: Annotated[int, typer.Option(help="D")] = 1024,
    classes: Annotated[int, typer.Option(help="K")] = 1000,
    heads: Annotated[int, typer.Option(help="H")] = 50,
    steps: Annotated[int, typer.Option(help="Steps of the heads' training.")] = 3,
    folder: Annotated[Path, typer.Option(help="Scratch space: about 10 GB at full size.")] = Path(
        "runs/benchmark"
    ),
    out: Out = Path("runs/scale"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the scratch files.")] = False,
) -> None:
    """Time, memory and disk of index, embed, neighbors, heads and consensus, beside the plan."""
    work = folder.absolute() / f"scale-{os.getpid()}"
    work.mkdir(parents=True)
    try:
        measured, remarks = measure_scale(work, rows, features, classes, heads, steps)
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)
    sizes = {"rows": rows, "features": features, "classes": classes}
    about = {"settings": {**sizes, "heads": heads, "steps": steps}, "machine": machine()}
    content = {**about, "remarks": remarks, "stages": [asdict(one) for one in measured]}
    notes = "\n".join(f"- {key}: {value:.3g}" for key, value in remarks.items())
    publish(out, f"{scale_table(measured)}\n\n{notes}", content)


@app.command()
def split(
    rows: Annotated[int, typer.Option(help="N")] = 20_000,
    features: Annotated[int, typer.Option(help="D")] = 256,
    classes: Annotated[int, typer.Option(help="K")] = 100,
    heads: Annotated[int, typer.Option(help="H")] = 16,
    batch: Annotated[int, typer.Option(help="B, over all workers")] = 1024,
    steps: Annotated[int, typer.Option(help="Steps timed.")] = 20,
    threads: Annotated[int, typer.Option(help="Threads of each worker.")] = 1,
    workers: Annotated[list[int] | None, typer.Option(help="W; default: 1 and 2")] = None,
    out: Out = Path("runs/split"),
) -> None:
    """Time and bytes per training step, by heads against by data."""
    work = Work(rows, features, classes, heads, batch, steps, threads)
    paces = measure_split(work, workers or [1, 2])
    content = {"settings": asdict(work), "machine": machine()}
    publish(out, split_table(paces), {**content, "groups": [asdict(pace) for pace in paces]})


Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")]


@app.command()
def accuracy(
    config: Annotated[str, typer.Argument(help="A golden config's name, or a YAML file.")],
    overrides: Overrides = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Default: 0, 1, 2")] = None,
    test: Annotated[str | None, typer.Option(help="New images with labels, to classify.")] = None,
    out: Out = Path("runs/accuracy"),
) -> None:
    """Accuracy and time of whole runs; a run directory is overwritten by each seed."""
    found = quality.measure_accuracy(config, overrides or [], seeds or [0, 1, 2], test)
    about = {"settings": {"config": config, "overrides": overrides or []}, "machine": machine()}
    publish(out, quality.accuracy_table(found), {**about, "runs": found})


@app.command()
def ablation(
    config: Annotated[str, typer.Argument(help="A golden config's name, or a YAML file.")],
    overrides: Overrides = None,
    space: Annotated[str, typer.Option(help="A space, normally of search: each.")] = "ablation",
    out: Out = Path("runs/ablation"),
) -> None:
    """What each setting earns, and how well each label-free score ranks the settings."""
    from icce_ray import config as configs
    from icce_ray.errors import DataError
    from icce_ray.sweeps import running as sweep

    results = sweep.run(configs.load(config, overrides or []), space)
    assert results is not None
    if not results["trials"][0]["accuracy"]:
        raise DataError("there is no ground truth to compare with; give data.labels")
    correlations = quality.correlation_rows(results)
    tables = [quality.ablation_table(results), quality.correlation_table(correlations)]
    content = {"machine": machine(), "correlations": correlations, "sweep": results}
    publish(out, "\n\n".join(tables), content)


@app.command()
def truth(
    run_dir: Annotated[str, typer.Argument(help="A finished run with ground truth.")],
    out: Out = Path("runs/truth"),
) -> None:
    """What the label-free scores say of the true classes themselves."""
    found = quality.score_truth(run_dir)
    about = {"settings": {"run": run_dir}, "machine": machine()}
    publish(out, quality.truth_table(found), {**about, "scores": found})


@app.command()
def imbalance(
    run_dir: Annotated[str, typer.Argument(help="A finished run with ground truth.")],
    overrides: Overrides = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Largest class over smallest; default: 2, 5, 20")
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="Default: 0, 1, 2")] = None,
    folder: Annotated[Path, typer.Option(help="Scratch space.")] = Path("runs/imbalance"),
    out: Out = Path("runs/imbalance"),
) -> None:
    """Classes of unequal size: the balance chosen, each one given, and the true sizes given."""
    ratios = ratio or [2.0, 5.0, 20.0]
    found = quality.measure_imbalance(run_dir, folder, ratios, seeds or [0, 1, 2], overrides or [])
    about = {"settings": {"run": run_dir, "overrides": overrides or []}, "machine": machine()}
    publish(out, quality.imbalance_table(found), {**about, "tails": found})


Device = Annotated[str, typer.Option(help="cpu, cuda; auto: a GPU if there is one.")]


def _device(name: str) -> Any:
    import torch

    from icce_ray.core.device import default_device

    return default_device() if name == "auto" else torch.device(name)


@app.command()
def pace(
    source: Annotated[str, typer.Argument(help="A run with neighbors, or embeddings (.npy).")],
    labels: Annotated[
        Path | None, typer.Option(help="Labels (.npy) of embeddings; a run has its own.")
    ] = None,
    heads: Annotated[int, typer.Option(help="H")] = 16,
    seconds: Annotated[float, typer.Option(help="Training by each recipe, at most.")] = 300.0,
    seed: Annotated[int, typer.Option()] = 0,
    only: Annotated[list[str] | None, typer.Option(help="A recipe; default: all.")] = None,
    device: Device = "auto",
    out: Out = Path("runs/pace"),
) -> None:
    """Accuracy over the time of training, beside TEMI's recipe; also a drawing, OUT.svg."""
    from benchmarks import alone
    from benchmarks import pace as recipes

    chosen = _device(device)
    if labels is None:
        case = alone.case_of_run(source)
    else:
        case = alone.case_of_files(Path(source), labels, chosen)
    found = recipes.measure_pace(case, heads, seconds, seed, chosen, only or ())
    recipes.pace_chart({name: one["curve"] for name, one in found.items()}, out.with_suffix(".svg"))
    about = {"settings": {"source": source, "heads": heads, "seed": seed}, "machine": machine()}
    publish(out, recipes.pace_table(found), {**about, "recipes": found})


@app.command()
def alone(
    rows: Annotated[int, typer.Option(help="N")] = IMAGENET,
    features: Annotated[int, typer.Option(help="D")] = 1024,
    classes: Annotated[int, typer.Option(help="K")] = 1000,
    heads: Annotated[int, typer.Option(help="H")] = 50,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the heads' training; default: all.", min=10)
    ] = None,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16, of the heads.")] = "float32",
    device: Device = "auto",
    out: Out = Path("runs/alone"),
) -> None:
    """Time of each part on one device, without Ray, on synthetic embeddings held in memory."""
    from benchmarks import alone as parts

    matrix = np.concatenate(list(blocks(rows, features, classes)))
    codes = center_of(np.arange(rows), classes)
    chosen, about = _device(device), {"count": heads, "precision": precision}
    measured, remarks = parts.measure_parts(matrix, codes, classes, about, steps, chosen, _tell)
    sizes = {"rows": rows, "features": features, "classes": classes, **about}
    notes = "\n".join(f"- {key}: {value:.4g}" for key, value in remarks.items())
    content = {"settings": sizes, "machine": machine(), "remarks": remarks}
    content["parts"] = [asdict(one) for one in measured]
    publish(out, f"{parts.parts_table(measured)}\n\n{notes}", content)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. An expected error is one line and an exit code."""
    from icce_ray.errors import IcceError

    try:
        app(arguments)
    except IcceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
