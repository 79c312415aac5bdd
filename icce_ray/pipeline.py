"""The chain: skip what is done, resume what is half done, run the rest.

from icce_ray import config, pipeline
pipeline.run(config.load("quickstart", ["heads.count=8"]))
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from icce_ray import config as configs
from icce_ray.config.schema import Config
from icce_ray.distributed.cluster import Cluster, NodeWatch, shared_memory_hint
from icce_ray.errors import ArtifactError, ConfigError, IcceError, StageError
from icce_ray.rundir import storage
from icce_ray.rundir.directory import PARTIAL, Manifest, RunDirectory, differing_keys, fingerprint
from icce_ray.rundir.progress import Reporter, duration
from icce_ray.stages import classify as classifier
from icce_ray.stages import consensus, embed, evaluate, heads, index, report
from icce_ray.stages import search as neighbors
from icce_ray.stages.base import Context, Need, Outcome, Size, Stage

STAGES: tuple[Stage, ...] = tuple(
    module.STAGE
    for module in (index, embed, neighbors, heads, consensus, classifier, evaluate, report)
)
NAMES = tuple(stage.name for stage in STAGES)
DISK_MARGIN = 1.1  # free space asked for, relative to the estimate


@dataclass(frozen=True)
class Step:
    """What will happen to one stage, and why."""

    stage: Stage
    state: str  # done, resume, run, again, changed, excluded
    fingerprint: str
    inputs: Mapping[str, str]  # fingerprints of the stages it reads
    reason: str = ""


# --- what there is to do -------------------------------------------------------------------------


def fingerprints(config: Config) -> dict[str, str]:
    """Fingerprint of every stage; each covers those of the stages that it reads."""
    prints: dict[str, str] = {}
    for stage in STAGES:
        inputs = {need: prints[need] for need in stage.needs}
        prints[stage.name] = fingerprint(stage.name, stage.settings(config), inputs)
    return prints


def make_steps(config: Config, run: RunDirectory, chosen: Sequence[str] = NAMES) -> list[Step]:
    """Compare each stage's artifacts with the settings. Starts nothing, writes nothing."""
    steps: list[Step] = []
    prints = fingerprints(config)
    fresh: set[str] = set()  # stages whose artifacts will be new
    for stage in STAGES:
        inputs = {need: prints[need] for need in stage.needs}
        step = _classify(stage, config, run, prints[stage.name], inputs, fresh)
        if stage.name not in chosen and step.state != "done":
            step = Step(stage, "excluded", step.fingerprint, inputs, step.reason)
        if step.state not in ("done", "excluded"):
            fresh.add(stage.name)
        steps.append(step)
    return steps


def _classify(
    stage: Stage,
    config: Config,
    run: RunDirectory,
    print_: str,
    inputs: Mapping[str, str],
    fresh: set[str],
) -> Step:
    def step(state: str, reason: str = "") -> Step:
        return Step(stage, state, print_, inputs, reason)

    done = run.manifest(stage.folder)
    if done is None:
        partial = run.partial(stage.folder)
        if partial is None:
            return step("run")
        if partial["fingerprint"] == print_ and not fresh & set(stage.needs):
            return step("resume", "half done")
        if run.list(stage.folder) == [PARTIAL]:
            return step("run")  # begun with other settings, but there is nothing to lose
        return _changed(step, partial["settings"], stage.settings(config), "half done")
    if done.fingerprint != print_:
        return _changed(step, done.settings, stage.settings(config), "done")
    if fresh & set(stage.needs):
        return step("again", f"{', '.join(sorted(fresh & set(stage.needs)))} will be new")
    ids = {need: _id(run, need) for need in stage.needs}
    if dict(done.inputs) != ids:
        stale = [n for n in ids if done.inputs.get(n) != ids[n]]
        return step("again", f"{', '.join(stale)} changed since")
    return step("done")


def _changed(step: Any, old: Mapping[str, Any], new: Mapping[str, Any], was: str) -> Step:
    keys = differing_keys(old, new)
    return step("changed" if keys else "again", "; ".join(keys) or f"{was} with other inputs")


def _id(run: RunDirectory, name: str) -> str | None:
    folder = next(stage.folder for stage in STAGES if stage.name == name)
    done = run.manifest(folder)
    return done.id if done else None


def select(first: str | None, last: str | None) -> tuple[str, ...]:
    """Names of the stages from `first` to `last`. Raises ConfigError for names out of order."""
    for name in (first, last):
        if name is not None and name not in NAMES:
            raise ConfigError(f"no stage {name!r}; the stages are {', '.join(NAMES)}")
    start = NAMES.index(first) if first else 0
    stop = NAMES.index(last) + 1 if last else len(NAMES)
    if start >= stop:
        raise ConfigError(f"--from {first} comes after --until {last}")
    return NAMES[start:stop]


def _check(
    steps: Sequence[Step], run: RunDirectory, chosen: Sequence[str], overwrite: bool
) -> None:
    """Refuse to destroy, or to build on, artifacts of other settings."""
    before = NAMES.index(chosen[0])
    for step in steps[:before]:
        if step.state != "done":
            reason = f" ({step.reason})" if step.reason else ""
            raise ArtifactError(
                f"--from {chosen[0]} needs a finished {step.stage.name} of the same settings in "
                f"{run.uri}{reason}. Run from {step.stage.name}."
            )
    changed = [step for step in steps if step.state == "changed"]
    if not changed or overwrite:
        return
    lost = [s.stage.name for s in steps if s.state in ("changed", "again")]
    kept = [s.stage.name for s in steps if s.state == "done"]
    lines = "\n".join(f"  {step.stage.name}: {step.reason}" for step in changed)
    raise ArtifactError(
        f"{run.uri} was made with other settings:\n{lines}\n"
        f"This invalidates: {', '.join(lost)}. Kept: {', '.join(kept) or 'nothing'}.\n"
        "Add --overwrite to replace what is invalid, or choose another run_dir=..."
    )


# --- the plan ------------------------------------------------------------------------------------


def _size(config: Config, run: RunDirectory) -> Size:
    images = features = None
    done = run.manifest("index")
    if done:
        images = done.rows
    embedded = run.manifest("embeddings")
    if embedded:
        images, features = embedded.rows, embedded.results.get("features")
    return Size(images, features or embed.features(config))


def _gigabytes(count: float) -> str:
    if count < 1e6:
        return "-" if count < 1e3 else f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


_STATE_TEXT = {
    "done": "skip, done",
    "resume": "resume",
    "run": "run",
    "again": "run again",
    "changed": "overwrite",
    "excluded": "not asked for",
}


def _show_plan(context: Context, steps: Sequence[Step], size: Size, log: bool = True) -> None:
    config = context.config
    needs = {s.stage.name: s.stage.estimate(config, size, context.cluster) for s in steps}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "what happens", "memory", "disk", "worked by"):
        table.add_column(name, justify="right" if name in ("memory", "disk") else "left")
    for step in steps:
        need = needs[step.stage.name] if step.state not in ("done", "excluded") else Need(where="")
        text = _STATE_TEXT[step.state] + (f" ({step.reason})" if step.reason else "")
        table.add_row(
            step.stage.name, text, _gigabytes(need.memory), _gigabytes(need.disk), need.where
        )
    known = f"N {size.images:,} images" if size.images else "N not known yet"
    known += f", D {size.features or '?'}, H {config.heads.count}, K {config.num_classes}"
    where = "a local Ray" if context.cluster.is_local else f"Ray at {context.cluster.address}"
    context.reporter.say(f"{known}; run directory {context.run.uri}; on {where}", log)
    if not context.reporter.quiet:
        context.reporter.console.print(table)
    hint = shared_memory_hint() if context.cluster.is_local else None
    if hint is not None:
        context.reporter.say(f"! {hint}", log)


def _check_disk(context: Context, steps: Sequence[Step], size: Size) -> None:
    free = context.run.free_bytes()
    todo = [s for s in steps if s.state not in ("done", "excluded")]
    needs = [s.stage.estimate(context.config, size, context.cluster).disk for s in todo]
    if free is not None and sum(needs) * DISK_MARGIN > free:
        raise StageError(
            f"no disk space left for this run: it needs about {_gigabytes(sum(needs))} in "
            f"{context.run.uri}, where {_gigabytes(free)} are free. Free some, or choose another "
            "run_dir=..."
        )


# --- running -------------------------------------------------------------------------------------


def preflight(config: Config, chosen: Sequence[str] = NAMES) -> list[Step]:
    """Everything that can be wrong and is cheap to see, before anything is started.

    Returns what `make_steps` does, which it looks at.
    """
    with storage.hastily():
        storage.check(config.run_dir)
        index.preflight(config)
        steps = make_steps(config, RunDirectory(config.run_dir), chosen)
        embedded = any(step.stage is embed.STAGE and step.state == "done" for step in steps)
        if not embedded:  # else the backbone was there; to import timm takes seconds
            embed.preflight(config)
    return steps


def run(
    config: Config,
    *,
    first: str | None = None,
    last: str | None = None,
    overwrite: bool = False,
    plan_only: bool = False,
    quiet: bool = False,
) -> dict[str, Manifest]:
    """Run the chain, or the part of it from `first` to `last`, and return the manifests.

    Raises:
        ConfigError, DataError, ArtifactError: for what is wrong before anything is started.
        StageError: for a stage that failed; the same call again goes on from there.
    """
    chosen = select(first, last)
    directory = RunDirectory(config.run_dir)
    steps = preflight(config, chosen)
    _check(steps, directory, chosen, overwrite)
    reporter = Reporter(directory, quiet)
    cluster = Cluster(config.ray)
    context = Context(config, directory, reporter, cluster)
    if plan_only:
        _show_plan(context, steps, _size(config, directory), log=False)
        return {}
    with exclusive(directory), terminable(), reporter.listening():
        try:
            if first and overwrite:
                _drop(directory, chosen)
            _run_chain(context, chosen)
        except (KeyboardInterrupt, SystemExit):  # the latter from Ray, for a signal while it starts
            reporter.say("stopped; the same command goes on from here")
            reporter.status("stopped")
            raise
        except IcceError as error:
            reporter.status("failed", error=str(error))
            reporter._log(f"error: {error}")
            raise
        finally:
            cluster.stop()
            with contextlib.suppress(Exception):
                reporter.flush()
    finished = {s.name: directory.manifest(s.folder) for s in STAGES}
    return {name: manifest for name, manifest in finished.items() if manifest}


def _drop(run: RunDirectory, names: Sequence[str]) -> None:
    for stage in STAGES:
        if stage.name in names:
            run.delete(stage.folder)


def _run_chain(context: Context, chosen: Sequence[str]) -> None:
    config, run, reporter = context.config, context.run, context.reporter
    steps = make_steps(config, run, chosen)
    if any(step.state not in ("done", "excluded") for step in steps):
        run.write_json({"state": "running", "pid": os.getpid(), "time": time.time()}, "status.json")
        run.write_bytes(configs.to_yaml(config).encode(), "config.yaml")
    shown = False
    for position in range(len(STAGES)):
        if not shown and (position == 1 or steps[0].state in ("done", "excluded")):
            size = _size(config, run)  # the number of images is known once index is done
            _show_plan(context, steps, size)
            _check_disk(context, steps, size)
            shown = True
        step = steps[position]
        if step.state not in ("done", "excluded"):
            run_stage(context, step)
            steps = make_steps(config, run, chosen)
    reporter.stage = ""
    reporter.status("done" if chosen[-1] == NAMES[-1] else f"done until {chosen[-1]}")


def run_stage(context: Context, step: Step) -> None:
    stage, run, reporter = step.stage, context.run, context.reporter
    reporter.stage, reporter.events = stage.name, []
    mark: dict[str, Any] = {
        "fingerprint": step.fingerprint,
        "settings": stage.settings(context.config),
        "inputs": {need: _id(run, need) for need in stage.needs},
    }
    context.resumed = run.begin(stage.folder, mark)
    reporter.status("running")
    if context.resumed:
        reporter.event(f"{stage.name} goes on from partial work")
    started = time.monotonic()
    with NodeWatch(reporter):
        outcome = _guarded(stage, context)
    seconds = time.monotonic() - started
    manifest = Manifest(
        stage=stage.name,
        fingerprint=step.fingerprint,
        settings=mark["settings"],
        inputs=mark["inputs"],
        rows=outcome.rows,
        seconds=round(seconds, 3),
        results=outcome.results,
        resources=context.cluster.used(),
        events=tuple(reporter.events),
    )
    run.finish(stage.folder, manifest)
    reporter.say(f"{stage.name:<11}done in {duration(seconds)}, {outcome.rows:,} rows")
    reporter.flush()


def _guarded(stage: Stage, context: Context) -> Outcome:
    """Run a stage; a failure of the machine (not of the code) gets a clear error of ours."""
    try:
        return stage.run(context)
    except MemoryError:
        raise StageError(
            f"{stage.name}: out of memory. Lower its batch size, or use a larger machine; the plan "
            "above says what it needs."
        ) from None
    except OSError as error:
        raise StageError(
            f"{stage.name}: {type(error).__name__}: {error}. Finished work is kept; run the same "
            "command again once the cause is gone."
        ) from error


@contextlib.contextmanager
def exclusive(run: RunDirectory) -> Iterator[None]:
    """One process at a time in a local run directory."""
    if not run.is_local:
        yield
        return
    with run.node_file("running").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArtifactError(
                f"another process is running in {run.uri}. Wait for it (icce-ray status), or "
                "choose another run_dir=..."
            ) from None
        yield


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM (a stopped job, a lost spot machine) end the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = [
    "NAMES",
    "STAGES",
    "Step",
    "exclusive",
    "fingerprints",
    "make_steps",
    "preflight",
    "run",
    "run_stage",
    "select",
    "terminable",
]
