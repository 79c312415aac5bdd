"""The command line: icce-ray run | sweep | predict | status | report | config."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from icce_ray import config as configs
from icce_ray.distributed import compat
from icce_ray.errors import IcceError
from icce_ray.rundir.progress import duration

STALE = 120.0  # seconds without a sign of life after which a running run is called silent

app = typer.Typer(
    name="icce-ray",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Unsupervised image classification: unlabeled images and a number of classes in, every
image's class and confidence, a classifier for new images and a report out.

Try it:

* `icce-ray run quickstart` runs the whole chain on 1,797 small images.

* `icce-ray config imagenet` prints every setting with its meaning.

* `icce-ray run imagenet data.path=s3://bucket/train run_dir=s3://bucket/runs/1` is the real thing;
on a cluster: `ray job submit --working-dir . -- python jobs/pipeline.py imagenet ...`

* `icce-ray sweep quickstart ensemble` tries other settings and ranks them without any label.
""",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings, as in the YAML: heads.count=16 seed=1"),
]


@app.command()
def run(
    name: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A golden config's name, or a YAML file.")
    ],
    overrides: Overrides = None,
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Begin with this stage.")
    ] = None,
    last: Annotated[
        str | None, typer.Option("--until", metavar="STAGE", help="End with this stage.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace artifacts of other settings; with --from, redo those stages.",
        ),
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would happen, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors and the end only.")] = False,
) -> None:
    """Run the chain: index, embed, neighbors, heads, consensus, classifier, evaluate, report.

    Finished stages are skipped and half-done ones resumed, so the same command goes on after a
    crash or Ctrl-C.
    """
    from icce_ray import pipeline
    from icce_ray.sweeps import num_classes as classes

    pipeline.select(first, last)
    started = time.monotonic()
    config = classes.resolve(
        name, overrides or [], overwrite=overwrite, plan_only=plan, quiet=quiet
    )
    if config is None:
        return
    pipeline.run(config, first=first, last=last, overwrite=overwrite, plan_only=plan, quiet=quiet)
    if not plan:
        _print_end(config.run_dir, time.monotonic() - started)


def _print_end(run_dir: str, seconds: float) -> None:
    from icce_ray.rundir.directory import RunDirectory

    directory = RunDirectory(run_dir)
    console = Console(highlight=False, soft_wrap=True)
    if directory.exists("evaluation", "metrics.json"):
        metrics = directory.read_json("evaluation", "metrics.json")
        if metrics.get("acc") is not None:
            console.print(_accuracy_line(metrics), markup=False)
    if directory.exists("report", "index.html"):
        console.print(f"report    {directory.address('report', 'index.html')}", markup=False)
    console.print(f"time      {duration(seconds)}", markup=False)


def _accuracy_line(metrics: dict[str, Any]) -> str:
    parts = [f"consensus {100 * metrics['acc']:.1f} %"]
    for name, label in (("classifier", "classifier"), ("kmeans", "k-means on the same features")):
        value = (metrics.get(name) or {}).get("acc")
        if value is not None:
            parts.append(f"{label} {100 * value:.1f} %")
    return "accuracy  " + ", ".join(parts)


@app.command()
def sweep(
    name: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A golden config's name, or a YAML file.")
    ],
    space: Annotated[
        str,
        typer.Argument(
            metavar="SPACE", help="What to vary: ensemble, neighbors, heads, full, or a YAML file."
        ),
    ],
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would happen, and stop.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Forget earlier results of this sweep.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors and the end only.")] = False,
) -> None:
    """Try many settings and rank the results by a label-free score.

    Takes what it can from the run's directory and makes the rest; what trials share is made once.
    The same command goes on after a crash or Ctrl-C, and runs what is new after SPACE was extended.
    Ends with a table, a report, and best.yaml, which `icce-ray run` takes.
    """
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
        str, typer.Argument(metavar="NEW_IMAGES", help="Folder, Parquet, or WebDataset tars.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="out=FOLDER KEY=VALUE",
            help="Where to (default: RUN_DIR/predictions); embed.* and data.* settings.",
        ),
    ] = None,
) -> None:
    """Classify new images with a run's classifier, into Parquet with cluster and confidence."""
    from icce_ray.stages import predict as stage

    out, rest = _take_out(overrides or [])
    stage.predict(run_dir, images, out, overrides=rest)


def _take_out(overrides: list[str]) -> tuple[str | None, list[str]]:
    """The last out=..., and the other overrides."""
    found = [text[4:] for text in overrides if text.startswith("out=")]
    rest = [text for text in overrides if not text.startswith("out=")]
    return (found[-1] if found else None) or None, rest


@app.command()
def status(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run directory.")],
) -> None:
    """Show what a run has done, and how far it is."""
    from icce_ray.errors import ArtifactError
    from icce_ray.pipeline import STAGES
    from icce_ray.rundir import storage
    from icce_ray.rundir.directory import RunDirectory

    storage.check(run_dir)
    directory = RunDirectory(run_dir)
    sweeps = _sweep_lines(directory)
    if not directory.exists("status.json") and not sweeps:
        raise ArtifactError(f"{directory.uri} is not a run directory: it has no status.json")
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("stage", "state", "rows", "time", "finished"):
        table.add_column(title, justify="right" if title in ("rows", "time") else "left")
    for stage in STAGES:
        done = directory.manifest(stage.folder)
        if done:
            took = duration(done.seconds)
            table.add_row(stage.name, "done", f"{done.rows:,}", took, done.finished)
        else:
            half = directory.partial(stage.folder) is not None
            table.add_row(stage.name, "half done" if half else "to do", "", "", "")
    console.print(table)
    if directory.exists("status.json"):
        console.print(_status_line(directory.read_json("status.json")), markup=False)
    for line in sweeps:
        console.print(line, markup=False)


def _sweep_lines(directory: Any) -> list[str]:
    """One line for each sweep of a run."""
    found = []
    for name in directory.folders("sweeps"):
        if directory.exists("sweeps", name, "status.json"):
            state = directory.read_json("sweeps", name, "status.json")
            found.append(f"sweep {name}: {_status_line(state)}")
    return found


def _status_line(state: dict[str, Any]) -> str:
    text = state.get("state", "?")
    if text == "running":
        age = time.time() - state.get("time", 0)
        text = f"running {state.get('stage', '')}".rstrip()
        if "waiting" in state:
            text += f": {state['waiting']}"
        elif "step" in state:
            text += f": {state['step']} {state['done']:,} of {state['total']:,} {state['unit']}"
            if state.get("remaining_seconds") is not None:
                text += f", {duration(state['remaining_seconds'])} left"
        if age > STALE:
            text += f" (no sign of life for {duration(age)}: run the same command again to go on)"
    elif text == "failed":
        text = f"failed: {state.get('error', '')}"
    return text


@app.command()
def report(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="A run with an evaluation.")],
) -> None:
    """Build the report page again, and print where it is."""
    from icce_ray.stages import report as stage

    print(stage.build(run_dir))


@app.command()
def config(
    name: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A golden config's name, or a file.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Print the resolved settings with their documentation; without a name, list the configs."""
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
    try:
        app(arguments)
    except IcceError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"error: {error}", markup=False, style="red"
        )
        compat.leave(error.exit_code)
    except KeyboardInterrupt:
        compat.leave(130)
    except SystemExit as end:
        compat.leave(end.code)


if __name__ == "__main__":
    main()
