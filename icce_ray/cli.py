"""The command line: icce-ray run | sweep | predict | curate | export | status | report | config.

Each command imports what it needs, so that help and status appear at once.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from typing import Annotated, Any

import typer

import icce_ray
from icce_ray.distributed import compat
from icce_ray.errors import (
    ArtifactError,
    ConfigError,
    IcceError,
    StageError,
    printable,
    printable_lines,
)

STALE = 120.0  # seconds without a sign of life after which a running run is called silent
NEW = 0.99  # novelty from which the line of one image warns
RESUME = "Run the same command again to resume"

app = typer.Typer(
    name="icce-ray",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Unsupervised image classification. It takes unlabeled images and a number of classes; it
makes a class and a confidence for every image, a classifier for new images, and a report.

Examples:

* `icce-ray run quickstart` runs all stages on 1,797 small images.

* `icce-ray run photos -k 20` sorts a folder of images into 20 classes.

* `icce-ray config imagenet` prints every setting with its meaning.

* `icce-ray run imagenet data.path=s3://bucket/train run_dir=s3://bucket/runs/1` is ImageNet; on a
cluster: `ray job submit --working-dir . -- python jobs/pipeline.py imagenet ...`

* `icce-ray sweep quickstart ensemble` tries other settings and ranks them without labels.
""",
)

Name = Annotated[
    str, typer.Argument(metavar="CONFIG", help="Name of a golden config, or a YAML file.")
]
Plan = Annotated[bool, typer.Option("--plan", help="Show what would be done, and stop.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only errors and the final result.")]
Source = Annotated[
    str,
    typer.Argument(
        metavar="DATA|CONFIG",
        help="Images (a folder, Parquet, tars, s3://), embeddings (.npy), the name of a golden "
        "config, or a YAML file.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Settings that replace those of CONFIG: heads.count=16 seed=1"
    ),
]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"icce-ray {icce_ray.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version, and stop."
        ),
    ] = False,
) -> None:
    """What all commands share."""


@app.command()
def run(
    source: Source,
    overrides: Overrides = None,
    number: Annotated[
        str | None,
        typer.Option(
            "-k", "--classes", metavar="K", help="Number of classes: 20, a range 50-200, or auto."
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="dinov2-small, dinov3-base, clip-base, ..., or any timm model. Default for DATA: "
            "what this machine can bear.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="RUN_DIR", help="Where results go. Default: runs/, then the name of the data."
        ),
    ] = None,
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="First stage to run.")
    ] = None,
    last: Annotated[
        str | None, typer.Option("--until", metavar="STAGE", help="Last stage to run.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace what was made with other settings; with --from, run those stages again.",
        ),
    ] = False,
    plan: Plan = False,
    quiet: Quiet = False,
) -> None:
    """Run the stages: index, embed, search, select, heads, consensus, answer, classify, evaluate,
    report.

    Finished stages are skipped, and a half-done one resumes: after a crash or Ctrl-C, run the same
    command again.
    """
    from icce_ray import pipeline
    from icce_ray.pipeline import num_classes

    pipeline.names_between(first, last)
    started = time.monotonic()
    short = {"num_classes": number, "backbone": backbone, "run_dir": out}
    given = [f"{key}={value}" for key, value in short.items() if value is not None]
    config = num_classes.resolve(
        source, [*given, *(overrides or [])], overwrite=overwrite, plan_only=plan, quiet=quiet
    )
    if config is None:
        return
    pipeline.run(config, first=first, last=last, overwrite=overwrite, plan_only=plan, quiet=quiet)
    if not plan:
        _print_end(config.run_dir, time.monotonic() - started)


def _print_end(run_dir: str, seconds: float | None = None) -> None:
    from icce_ray.rundir import curated
    from icce_ray.rundir.directory import RunDirectory
    from icce_ray.rundir.progress import duration
    from icce_ray.rundir.results import LABELS, LABELS_CSV

    directory = curated.current(RunDirectory(run_dir))
    if directory.exists("evaluation", "metrics.json"):
        metrics = directory.read_json("evaluation", "metrics.json")
        if metrics.get("acc") is not None:
            print(_accuracy_line(metrics))
    if directory.exists("report", "index.html"):
        print(f"report    {directory.address('report', 'index.html')}")
    labeled = directory.manifest("answer") is not None
    if labeled:
        print(f"labels    {directory.address(LABELS_CSV)}, and {LABELS}")
    if seconds is not None:
        print(f"time      {duration(seconds)}")
    if labeled:
        print(f"next      icce-ray export {shlex.quote(run_dir)} --to folders")


def _accuracy_line(metrics: dict[str, Any]) -> str:
    parts = [f"consensus {100 * metrics['acc']:.1f} %"]
    for name, label in (("classifier", "classifier"), ("kmeans", "k-means on the same features")):
        value = (metrics.get(name) or {}).get("acc")
        if value is not None:
            parts.append(f"{label} {100 * value:.1f} %")
    return "accuracy  " + ", ".join(parts)


@app.command()
def sweep(
    name: Name,
    space: Annotated[
        str,
        typer.Argument(
            metavar="SPACE", help="What to vary: ensemble, neighbors, heads, full, or a YAML file."
        ),
    ],
    overrides: Overrides = None,
    plan: Plan = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete earlier results of this sweep.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Try many settings and rank the results by a score that needs no labels.

    What the run directory holds already is used, and what several trials share is made once. After
    a crash or Ctrl-C, run the same command again: finished trials are kept. The same holds after
    SPACE was extended. The sweep ends with a table, a report, and best.yaml for `icce-ray run`.
    """
    from rich.console import Console

    from icce_ray import config as configs
    from icce_ray.sweeps import results as results_
    from icce_ray.sweeps import running as sweeps

    config = configs.load(name, overrides or [])
    results = sweeps.run(config, space, overwrite=overwrite, plan_only=plan, quiet=quiet)
    if results is not None:
        results_.show(results, Console(highlight=False, soft_wrap=True))


@app.command()
def predict(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A finished run.")],
    images: Annotated[
        str,
        typer.Argument(
            metavar="NEW_IMAGES",
            help="A folder of images, Parquet files, WebDataset tars, or one image file.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="out=FOLDER KEY=VALUE",
            help="Folder of the predictions (default: RUN_DIR/predictions), and embed.*, data.* or "
            "ray.* settings.",
        ),
    ] = None,
    min_confidence: Annotated[
        float,
        typer.Option("--min-confidence", metavar="X", help="Images less sure get cluster -1."),
    ] = 0.0,
) -> None:
    """Classify new images with the classifier of a run.

    Writes Parquet files with the cluster, the confidence and the novelty of each image: the share
    of the run's images that lie nearer to the others. Of one image file, without out=..., prints
    them at once.
    """
    from icce_ray.stages import predict as stage

    out, rest = _take_out(overrides or [])
    if out is None and stage.is_image(images):
        print(_prediction_line(stage.predict_one(run_dir, images, rest, min_confidence)))
    else:
        stage.predict(run_dir, images, out, overrides=rest, min_confidence=min_confidence)


def _prediction_line(found: Any) -> str:
    """A line for one stages.predict.Prediction."""
    text = f"cluster {found.cluster}{f' ({found.name})' if found.name else ''}"
    if found.cluster < 0:
        text = "no cluster: it is like images that were dropped"
    text += f", confidence {found.confidence:.2f}"
    if not found.is_sure:
        text = f"no cluster is sure enough: the likeliest is {text}"
    if not math.isnan(found.novelty):
        text += f", novelty {found.novelty:.2f}"
    if found.novelty >= NEW:
        text += f": {NEW:.0%} of the run's images or more are nearer to the others, so look at it"
    return text


def _take_out(overrides: list[str]) -> tuple[str | None, list[str]]:
    """The last out=..., and the other overrides."""
    outs = [text[4:] for text in overrides if text.startswith("out=")]
    rest = [text for text in overrides if not text.startswith("out=")]
    return (outs[-1] if outs else None) or None, rest


@app.command()
def curate(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A finished run.")],
    edits: Annotated[
        str | None,
        typer.Argument(metavar="EDITS", help="A YAML file with names, merge, split, drop, images."),
    ] = None,
    back: Annotated[
        bool, typer.Option("--undo", help="Make the run's own clusters count again.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Name, merge, split and drop clusters of a run, and correct single images.

    Makes new labels, a new classifier and a new report, in RUN_DIR/curated; no head is trained
    again. EDITS is about the run's own clusters: to change more, extend it and give it again. The
    run's report helps to write it.
    """
    from icce_ray.pipeline import curation

    if back == (edits is not None):
        raise ConfigError("curate needs a file of edits, or --undo")
    if edits is None:
        done = curation.undo(run_dir)
        print("the run's own clusters count again" if done else "nothing was curated")
        return
    for one in curation.curate(run_dir, edits, quiet=quiet).results["clusters"]:
        number = "dropped" if one["cluster"] is None else f"cluster {one['cluster']}"
        made_of = f"was {' + '.join(one['made_of'])}"
        print(f"{number:<12} {one['images']:>9,} images  {one['name'] or '-':<24} {made_of}")
    _print_end(run_dir)


@app.command()
def export(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A finished run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="out=FOLDER", help="A local folder (default: RUN_DIR/exports/FORMAT)."
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="folders, csv, fiftyone, label-studio, imagefolder-hf or coco.",
        ),
    ] = "folders",
    clusters: Annotated[
        str | None,
        typer.Option("--clusters", metavar="NUMBERS", help="Only these, as 3,7. Default: all."),
    ] = None,
    min_confidence: Annotated[
        float, typer.Option("--min-confidence", metavar="X", help="Only images as sure as this.")
    ] = 0.0,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy image files; default: links to them.")
    ] = False,
) -> None:
    """Write the labels of a run, and its images, in the form of another tool.

    Images that lie in tars, Parquet files or object storage are always copied. A folder that holds
    an earlier export of the same run is written anew.
    """
    from icce_ray.data import export as exports

    out, rest = _take_out(overrides or [])
    if rest:
        raise ConfigError(f"{rest[0]}: export takes out=FOLDER only")
    chosen = None if clusters is None else _numbers(clusters)
    made = exports.export(
        run_dir, to, out, clusters=chosen, min_confidence=min_confidence, copy=copy
    )
    print(f"exported {made.images:,} images to {made.folder}")
    if made.missing:
        uri, reason = made.missing[0]
        first = f"the first is {printable(uri)}: {reason}"
        print(f"! {len(made.missing):,} images were left out, {first}", file=sys.stderr)


def _numbers(text: str) -> list[int]:
    parts = text.replace(" ", "").split(",")
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--clusters={text} must be numbers of clusters, as 3,7")
    return [int(part) for part in parts]


@app.command()
def status(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory.")],
) -> None:
    """Show which stages of a run are done, and how far the current one is."""
    from icce_ray.rundir import storage
    from icce_ray.rundir.directory import RunDirectory, stored
    from icce_ray.rundir.progress import duration
    from icce_ray.stages.table import STAGES

    storage.check(run_dir)
    directory = RunDirectory(run_dir)
    sweeps = _sweep_lines(directory)
    known = directory.exists("status.json")
    if not known and not sweeps:
        raise ArtifactError(f"{directory.uri} is not a run directory: it has no status.json")
    print(f"{'stage':<10} {'state':<9} {'rows':>11} {'time':>12} finished")
    for stage in STAGES:
        look = directory.look(stage.folder)
        if done := look.manifest:
            took = duration(done.seconds)
            print(f"{stage.name:<10} {'done':<9} {done.rows:>11,} {took:>12} {done.finished}")
        else:
            print(f"{stage.name:<10} {'half done' if look.partial else 'to do'}")
    if known:
        with stored(directory.path("status.json")):
            print(_status_line(directory.read_json("status.json")))
    for line in sweeps:
        print(line)


def _sweep_lines(directory: Any) -> list[str]:
    """One line for each sweep of a run."""
    from icce_ray.rundir.directory import stored

    lines = []
    for name in directory.folders("sweeps"):
        if directory.exists("sweeps", name, "status.json"):
            state = directory.read_json("sweeps", name, "status.json")
            with stored(directory.path("sweeps", name, "status.json")):
                lines.append(f"sweep {name}: {_status_line(state)}")
    return lines


def _status_line(state: dict[str, Any]) -> str:
    text = state.get("state", "?")
    if text == "running":
        return _running_line(state)
    return printable_lines(f"failed: {state.get('error', '')}") if text == "failed" else str(text)


def _running_line(state: dict[str, Any]) -> str:
    from icce_ray.rundir.lock import is_gone
    from icce_ray.rundir.progress import duration

    text = f"running {state.get('stage', '')}".rstrip()
    if is_gone(state):
        return f"{text}: process {state['pid']} has ended. {RESUME}"
    if "waiting" in state:
        text += f": {state['waiting']}"
    elif "step" in state:
        text += f": {state['step']} {state['done']:,} of {state['total']:,} {state['unit']}"
        if state.get("remaining_seconds") is not None:
            text += f", {duration(state['remaining_seconds'])} left"
    age = time.time() - state.get("time", 0)
    if age > STALE:
        text += f" (no sign of life for {duration(age)}. {RESUME})"
    return text


@app.command()
def report(
    run_dir: Annotated[
        str, typer.Argument(metavar="RUN_DIR", help="A run whose evaluation is finished.")
    ],
) -> None:
    """Build the report of a run again, and print its path."""
    from icce_ray.stages import report as stage

    print(stage.build(run_dir))


@app.command()
def config(
    name: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="Name of a golden config, or a YAML file."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print the settings of a config with their meaning; without CONFIG, list golden configs."""
    from icce_ray import config as configs

    if name is None:
        for known, path in configs.golden_configs().items():
            print(f"{known:<15}{_first_comment(path.read_text())}")
        return
    sys.stdout.write(configs.to_yaml(configs.load(name, overrides or [])))


def _first_comment(text: str) -> str:
    line = text.splitlines()[0] if text else ""
    return line.lstrip("# ") if line.startswith("#") else ""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Prints an expected error as text and exits with its code."""
    compat.quiet_terminal()
    alone = arguments is None  # else a caller lives on
    try:
        app(arguments)
    except (IcceError, OSError) as error:  # the latter of files that are not as they should be
        from rich.console import Console

        kind = "" if isinstance(error, IcceError) else f"{type(error).__name__}: "
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"error: {kind}{printable_lines(str(error))}", markup=False, style="red"
        )
        compat.leave(getattr(error, "exit_code", StageError.exit_code), at_once=alone)
    except KeyboardInterrupt:
        compat.leave(130, at_once=alone)
    except SystemExit as end:
        compat.leave(end.code, at_once=alone)


if __name__ == "__main__":
    main()
