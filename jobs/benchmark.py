"""Measures time, memory, traffic, and how good the clusters are.

    python jobs/benchmark.py scale       the chain at ImageNet's size, on synthetic embeddings
    python jobs/benchmark.py workers     a step of the heads' training by 1 and 2 workers
    python jobs/benchmark.py accuracy    the whole chain against ground truth, seed by seed
    python jobs/benchmark.py ablation    what each setting earns, and how far to trust confidence
    python jobs/benchmark.py classes     the number of classes that is found, beside the true one
    python jobs/benchmark.py starts      the space of the neighbors, and the heads' first clusters
    python jobs/benchmark.py joined      ways to use two embeddings of the same images
    python jobs/benchmark.py truth       the label-free scores of the true classes themselves
    python jobs/benchmark.py fonts       images of many classes: characters in this machine's fonts
    python jobs/benchmark.py twin        features that resemble ImageNet's, of any number of classes
    python jobs/benchmark.py peers       accuracy and time beside k-means and UMAP
    python jobs/benchmark.py pace        accuracy over the time of training, beside TEMI's recipe
    python jobs/benchmark.py speed       each part beside a baseline and the machine's ceiling
    python jobs/benchmark.py alone       the parts of the method on one device, without Ray
    python jobs/benchmark.py startup     the time of commands that compute nothing
    python jobs/benchmark.py soak        random faults for an hour, beside an undisturbed run

Each prints a table and writes it as Markdown and JSON. `scale` and `workers` work on this
machine; inside a Ray job `scale` would see the memory of the driver only. `alone`, and `pace` on
embeddings in a file, need neither Ray nor pyarrow.
Shapes: N rows, D features, H heads, K clusters, M neighbors, B pairs per step, W workers.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from benchmarks import quality
from benchmarks import scale as sizes
from benchmarks import workers as groups
from benchmarks.tables import machine, publish

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

# --- commands ------------------------------------------------------------------------------------


@app.callback()
def _about() -> None:
    """Measure time, memory, traffic and accuracy."""


Out = Annotated[Path, typer.Option(help="Result files, without their endings.")]


@app.command()
def scale(
    rows: Annotated[int, typer.Option(help="N")] = sizes.IMAGENET,
    features: Annotated[int, typer.Option(help="D")] = 1024,
    classes: Annotated[int, typer.Option(help="K")] = 1000,
    heads: Annotated[int, typer.Option(help="H")] = 50,
    steps: Annotated[int, typer.Option(help="Steps of the heads' training.")] = 3,
    search: Annotated[str, typer.Option(help="ivf or exact")] = "ivf",
    folder: Annotated[Path, typer.Option(help="Scratch space: about 10 GB at full size.")] = Path(
        "runs/benchmark"
    ),
    out: Out = Path("runs/scale"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the scratch files.")] = False,
) -> None:
    """Time, memory and disk of every stage, beside the plan."""
    work = folder.absolute() / f"scale-{os.getpid()}"
    work.mkdir(parents=True)
    try:
        measured, remarks = sizes.measure_scale(work, rows, features, classes, heads, steps, search)
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)
    shape = {"rows": rows, "features": features, "classes": classes}
    about = {
        "settings": {**shape, "heads": heads, "steps": steps, "search": search},
        "machine": machine(),
    }
    content = {**about, "remarks": remarks, "stages": [asdict(one) for one in measured]}
    notes = "\n".join(f"- {key}: {value:.3g}" for key, value in remarks.items())
    publish(out, f"{sizes.scale_table(measured)}\n\n{notes}", content)


@app.command()
def workers(
    rows: Annotated[int, typer.Option(help="N")] = 20_000,
    features: Annotated[int, typer.Option(help="D")] = 256,
    classes: Annotated[int, typer.Option(help="K")] = 100,
    heads: Annotated[int, typer.Option(help="H")] = 16,
    batch: Annotated[int, typer.Option(help="B")] = 1024,
    steps: Annotated[int, typer.Option(help="Steps timed.")] = 20,
    threads: Annotated[int, typer.Option(help="Threads of each worker.")] = 1,
    count: Annotated[list[int] | None, typer.Option(help="W; default: 1 and 2")] = None,
    out: Out = Path("runs/workers"),
) -> None:
    """Time and bytes per training step of the heads, by the number of workers."""
    work = groups.Work(rows, features, classes, heads, batch, steps, threads)
    paces = groups.measure_workers(work, count or [1, 2])
    content = {"settings": asdict(work), "machine": machine()}
    publish(out, groups.workers_table(paces), {**content, "groups": [asdict(p) for p in paces]})


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


Source = Annotated[str, typer.Argument(help="A run with ground truth, or embeddings (.npy).")]
LabelFile = Annotated[
    Path | None, typer.Option(help="Labels (.npy) of embeddings; a run has its own.")
]
Seeds = Annotated[list[int] | None, typer.Option(help="Default: 0, 1, 2")]
Only = Annotated[int, typer.Option(help="Number of classes to use, drawn by that number. 0: all.")]
Tail = Annotated[float, typer.Option(help="Cut the largest class over the smallest to this ratio.")]


def _data(
    source: str, labels: Path | None, only: int = 0, tail: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows, float16 [N, D], and classes, int [N]."""
    from benchmarks import ablation as cuts
    from benchmarks import alone

    x, codes = alone.embeddings_of(source, labels)
    if only:
        rows, codes = cuts.some_classes(codes, only)
        x = np.asarray(x[rows])
    if tail > 1:
        rows = cuts.long_tail(codes, tail, seed=0)
        x, codes = np.asarray(x[rows]), codes[rows]
    return x, codes


@app.command()
def ablation(
    source: Source,
    overrides: Overrides = None,
    labels: LabelFile = None,
    space: Annotated[
        str | None, typer.Option(help="A space of lists: ablation, or a file. Default: no setting.")
    ] = None,
    only: Only = 0,
    tail: Tail = 1.0,
    seeds: Annotated[list[int] | None, typer.Option(help="Default: the space's.")] = None,
    out: Out = Path("runs/ablation"),
) -> None:
    """What each setting earns in memory, and how well each label-free score ranks the settings."""
    from benchmarks import ablation as one_at_a_time

    x, codes = _data(source, labels, only, tail)
    settings, own = one_at_a_time.choices(space)
    trials = one_at_a_time.measure(
        x, codes, settings, overrides or [], seeds or own, tail > 1, _tell
    )
    tables = [one_at_a_time.table(trials)]
    if settings:
        tables.append(one_at_a_time.correlation_table(trials))
    about = {"source": source, "overrides": overrides or [], "only": only, "tail": tail}
    content = {"settings": about, "machine": machine(), "trials": [asdict(one) for one in trials]}
    publish(out, "\n\n".join(tables), content)


@app.command()
def classes(
    source: Source,
    labels: LabelFile = None,
    only: Only = 0,
    tail: Tail = 1.0,
    seeds: Seeds = None,
    out: Out = Path("runs/classes"),
) -> None:
    """The number of classes that `-k auto` finds, beside the true one."""
    x, codes = _data(source, labels, only, tail)
    found = quality.count_classes(x, codes, seeds or [0, 1, 2])
    about = {"settings": {"source": source, "only": only, "tail": tail}, "machine": machine()}
    publish(out, quality.classes_table(found), {**about, "found": found})


@app.command()
def starts(
    source: Source,
    labels: LabelFile = None,
    only: Only = 0,
    seeds: Seeds = None,
    out: Out = Path("runs/starts"),
) -> None:
    """What the space of the neighbors and the heads' first clusters earn by themselves."""
    from benchmarks import starts as first

    x, codes = _data(source, labels, only)
    chosen = seeds or [0, 1, 2]
    spaces = first.by_space(x, codes, chosen, _tell)
    begun = first.by_start(x, codes, chosen, _tell)
    about = {"settings": {"source": source, "only": only}, "machine": machine()}
    content = {**about, "spaces": spaces, "starts": begun}
    publish(out, f"{first.table(spaces)}\n\n{first.table(begun)}", content)


@app.command()
def joined(
    source: Source,
    other: Annotated[str, typer.Argument(help="The same images with another backbone.")],
    labels: LabelFile = None,
    only: Only = 0,
    seeds: Seeds = None,
    out: Out = Path("runs/joined"),
) -> None:
    """Ways to use two embeddings of the same images."""
    from benchmarks import joined as ways

    from icce_ray.errors import DataError

    (one, codes), (two, others) = (_data(name, labels, only) for name in (source, other))
    if not np.array_equal(codes, others):
        raise DataError(f"{source} and {other} are not of the same images: their labels differ")
    found = ways.compare((one, two), codes, seeds or [0, 1, 2], _tell)
    settings = {"source": source, "other": other, "only": only}
    publish(out, ways.table(found), {"settings": settings, "machine": machine(), "found": found})


@app.command()
def truth(
    source: Source,
    labels: LabelFile = None,
    only: Only = 0,
    out: Out = Path("runs/truth"),
) -> None:
    """What the label-free scores say of the true classes themselves."""
    found = quality.score_truth(*_data(source, labels, only))
    about = {"settings": {"source": source, "only": only}, "machine": machine()}
    publish(out, quality.truth_table(found), {**about, "scores": found})


@app.command()
def fonts(
    folder: Annotated[Path, typer.Argument(help="For the images, one folder per character.")],
    fewest: Annotated[int, typer.Option(help="Fonts that a character needs.")] = 100,
    most: Annotated[int, typer.Option(help="Images of a character.")] = 150,
) -> None:
    """Real images of many classes: characters drawn in the fonts of this machine."""
    from benchmarks import fonts as characters

    counts = characters.draw(folder, fewest, most)
    print(f"{sum(counts.values()):,} images of {len(counts)} characters in {folder}")


@app.command()
def twin(
    out: Annotated[Path, typer.Argument(help="OUT.npy and OUT-labels.npy are written.")],
    classes: Annotated[int, typer.Option(help="K")] = 200,
    per_class: Annotated[int, typer.Option(help="Rows of each class.")] = 100,
    trials: Annotated[int, typer.Option(help="Search for a recipe; 0: the one known.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Features with the kNN, linear and k-means accuracy of DINOv2's on ImageNet."""
    from benchmarks import twin as twins

    recipe = twins.Recipe()
    if trials:
        recipe, _ = twins.fit(classes, per_class, _tell, recipe, trials, seed)
    x, y = twins.make(recipe, classes, per_class, seed=seed)
    np.save(out.with_suffix(".npy"), x)
    np.save(out.with_name(f"{out.stem}-labels.npy"), y)
    about = {"figures": twins.figures(x, y, seed), "recipe": asdict(recipe)}
    print(json.dumps(about, indent=2))


@app.command()
def peers(
    source: Source,
    overrides: Overrides = None,
    labels: LabelFile = None,
    only: Only = 0,
    seeds: Seeds = None,
    turtle: Annotated[int, typer.Option(help="Steps of TURTLE; its recipe has 6,000.")] = 0,
    out: Out = Path("runs/peers"),
) -> None:
    """The method in memory, beside k-means, TURTLE and, where it is installed, UMAP."""
    from benchmarks import peers as others

    x, codes = _data(source, labels, only)
    found = others.compare(x, codes, seeds or [0, 1, 2], overrides or [], turtle, _tell)
    settings = {"source": source, "only": only, "overrides": overrides or []}
    about = {"settings": settings, "machine": machine()}
    publish(out, others.table(found), {**about, "results": found})


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
    rows: Annotated[int, typer.Option(help="N")] = sizes.IMAGENET,
    features: Annotated[int, typer.Option(help="D")] = 1024,
    classes: Annotated[int, typer.Option(help="K")] = 1000,
    heads: Annotated[int, typer.Option(help="H")] = 50,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the heads' training; default: all.", min=10)
    ] = None,
    precision: Annotated[str, typer.Option(help="auto or float32, of the heads.")] = "auto",
    device: Device = "auto",
    out: Out = Path("runs/alone"),
) -> None:
    """Time of each part on one device, without Ray, on synthetic embeddings held in memory."""
    from benchmarks import alone as parts

    matrix = np.concatenate(list(sizes.blocks(rows, features, classes)))
    codes = sizes.center_of(np.arange(rows), classes)
    chosen, about = _device(device), {"count": heads, "precision": precision}
    measured, remarks = parts.measure_parts(matrix, codes, classes, about, steps, chosen, _tell)
    shape = {"rows": rows, "features": features, "classes": classes, **about}
    notes = "\n".join(f"- {key}: {value:.4g}" for key, value in remarks.items())
    content = {"settings": shape, "machine": machine(), "remarks": remarks}
    content["parts"] = [asdict(one) for one in measured]
    publish(out, f"{parts.parts_table(measured)}\n\n{notes}", content)


@app.command()
def startup(
    run_dir: Annotated[str, typer.Argument(help="A finished run.")],
    config: Annotated[list[str], typer.Argument(help="The config of that run, and overrides.")],
    repeats: Annotated[int, typer.Option(help="Times that each command is run.", min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time of commands that compute nothing, beside that of the imports which all of them need."""
    from benchmarks import startup as starting

    measured = starting.measure(run_dir, config, repeats)
    print(json.dumps(measured) if as_json else starting.table(measured))


@app.command()
def speed(
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help="heads, hidden, start, search, assign, consensus, probe, whole, many, embed, "
            "listing; default: all."
        ),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(help="N; default: ImageNet's on a GPU, else 60,000.")
    ] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Out = Path("runs/speed"),
) -> None:
    """Each part beside a baseline and this machine's ceiling. Only `embed` needs Ray."""
    from benchmarks import speed as fast

    from icce_ray.errors import ConfigError

    chosen = parts or list(fast.PARTS)
    if unknown := set(chosen) - set(fast.PARTS):
        raise ConfigError(f"no part {unknown.pop()!r}; the parts are {', '.join(fast.PARTS)}")
    ceiling, measured = fast.measure(chosen, _device(device), rows, _tell)
    about = {"machine": machine(), "ceiling": asdict(ceiling)}
    content = {**about, "parts": [asdict(row) for row in measured]}
    if as_json:
        print(json.dumps(content))
        return
    notes = "\n".join(f"- {row.part}: {row.note}" for row in measured if row.note)
    publish(out, f"{fast.table(ceiling, measured)}\n\n{notes}", content)


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(help="How long faults happen.")] = 60.0,
    every: Annotated[float, typer.Option(help="Mean seconds between two faults.")] = 45.0,
    seed: Annotated[int, typer.Option()] = 0,
    out: Out = Path("runs/soak"),
) -> None:
    """Random faults on local nodes for a given time; results beside those of an undisturbed run."""
    from benchmarks import soak as faults

    with tempfile.TemporaryDirectory() as folder:
        tally = faults.Soak(Path(folder), minutes, every, seed, _tell).play()
    about = {"settings": {"minutes": minutes, "every": every, "seed": seed}, "machine": machine()}
    publish(out, faults.table(tally), {**about, "tally": vars(tally)})
    if tally.failures:
        raise typer.Exit(1)


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
