"""Running the stages: skip what is done, resume what is half done, run the rest.

from icce_ray import config, pipeline
pipeline.run(config.load("quickstart", ["heads.count=8"]))
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rich.table import Table

from icce_ray import config as configs
from icce_ray.config.schema import Config
from icce_ray.core import importing
from icce_ray.data import naming
from icce_ray.distributed.cluster import Cluster, NodeWatch, shared_memory_hint
from icce_ray.errors import ArtifactError, ConfigError, IcceError, StageError, one_line
from icce_ray.rundir import storage, tracking
from icce_ray.rundir.cache import free_bytes
from icce_ray.rundir.directory import (
    MANIFEST,
    Content,
    Manifest,
    RunDirectory,
    Snapshot,
    differing_keys,
    fingerprint,
)
from icce_ray.rundir.lock import exclusive
from icce_ray.rundir.progress import Reporter, duration
from icce_ray.rundir.tracking import Tracking
from icce_ray.stages import table
from icce_ray.stages.base import Context, Need, Outcome, Size, Stage
from icce_ray.stages.table import NAMES, STAGES

RENAMED = {"neighbors": "two: search and select", "classifier": "called classify"}
DISK_MARGIN = 1.1  # free space asked for, relative to the estimate


@dataclass(frozen=True)
class Step:
    """What will happen to one stage, and why."""

    stage: Stage
    state: str  # a key of _STATE_TEXT
    fingerprint: str
    inputs: Mapping[str, str | None]  # ids of the artifacts it reads, None where there is none yet
    reason: str = ""

    @property
    def todo(self) -> bool:
        """Whether the stage will run."""
        return self.state not in ("done", "excluded")


# --- what there is to do -------------------------------------------------------------------------


def fingerprints(config: Config) -> dict[str, str]:
    """Fingerprint of every stage; each covers those of the stages that it reads."""
    keys: dict[str, str] = {}
    for stage in STAGES:
        inputs = {need: keys[need] for need in stage.needs}
        keys[stage.name] = fingerprint(stage.name, stage.settings(config), inputs)
    return keys


def make_steps(
    config: Config,
    run: RunDirectory,
    chosen: Sequence[str] = NAMES,
    snapshot: Snapshot | None = None,
) -> list[Step]:
    """Compare each stage's artifacts with the settings. Starts nothing, writes nothing.

    snapshot: what is known of the stages' folders; without one, each is looked at once. Its holder
    has it forget the folder of a stage that was run.

    Raises ArtifactError: a damaged manifest, or one of another version.
    """
    look = snapshot or Snapshot()
    keys, ids = fingerprints(config), dict.fromkeys(NAMES, "")
    steps: list[Step] = []
    fresh: set[str] = set()  # stages whose artifacts will be new
    for stage in STAGES:
        content = look.look(run, stage.folder)
        inputs = {need: ids[need] or None for need in stage.needs}
        step = Step(stage, "run", keys[stage.name], inputs)
        state, reason = _compare(step, config, content, fresh)
        if stage.name not in chosen and state != "done":
            state = "excluded"
        step = replace(step, state=state, reason=reason)
        if step.todo:
            fresh.add(stage.name)
        ids[stage.name] = content.manifest.id if content.manifest else ""
        steps.append(step)
    return steps


def _compare(step: Step, config: Config, content: Content, fresh: set[str]) -> tuple[str, str]:
    """State and reason of a stage, from what its folder holds."""
    stage, done, partial = step.stage, content.manifest, content.partial
    renewed = sorted(fresh & set(stage.needs))
    if done is None and partial is None:
        return "run", ""
    if done is None:
        assert partial is not None
        same = partial["fingerprint"] == step.fingerprint and partial.get("inputs") == step.inputs
        if same and not renewed:
            return "resume", "half done"
        if content.empty:
            return "run", ""  # begun with other settings, but there is nothing to lose
        return _changed(stage, partial["settings"], stage.settings(config), "half done")
    if done.fingerprint != step.fingerprint:
        return _changed(stage, done.settings, stage.settings(config), "done")
    if renewed:
        return "again", f"{', '.join(renewed)} will be new"
    stale = [need for need, id_ in step.inputs.items() if done.inputs.get(need) != id_]
    return ("again", f"{', '.join(stale)} changed since") if stale else ("done", "")


def _changed(
    stage: Stage, old: Mapping[str, Any], new: Mapping[str, Any], was: str
) -> tuple[str, str]:
    keys = differing_keys(old, new)
    state = "changed" if keys and not stage.is_view else "again"
    return state, "; ".join(keys) or f"{was} with other inputs"


def names_between(first: str | None, last: str | None) -> tuple[str, ...]:
    """Names of the stages from `first` to `last`. Raises ConfigError for names out of order."""
    for name in (first, last):
        if name in RENAMED:
            raise ConfigError(f"the stage {name!r} is now {RENAMED[name]}")
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


def _size(config: Config, run: RunDirectory, snapshot: Snapshot) -> Size:
    done = snapshot.look(run, "index").manifest
    embedded = snapshot.look(run, "embeddings").manifest
    rows = embedded or done
    features = embedded.results.get("features") if embedded else None
    if not features:
        from icce_ray.stages import embed  # which may ask the backbone

        features = embed.features(config)
    return Size(rows.rows if rows else None, features)


def _bytes_text(count: float) -> str:
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
    plan = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("stage", "what happens", "memory", "disk", "worked by"):
        plan.add_column(name, justify="right" if name in ("memory", "disk") else "left")
    for step in steps:
        need = step.stage.estimate(config, size, context.cluster) if step.todo else Need(where="")
        text = _STATE_TEXT[step.state] + (f" ({step.reason})" if step.reason else "")
        disk = need.disk + (need.cache if context.run.is_local else 0.0)
        memory = _bytes_text(need.memory)
        plan.add_row(step.stage.name, text, memory, _bytes_text(disk), need.where)
    known = f"N {size.images:,} images" if size.images else "N not known yet"
    known += f", D {size.features or '?'}"
    if any(step.state != "excluded" for step in steps[NAMES.index("embed") + 1 :]):  # else no K yet
        known += f", H {config.head_count}, K {config.num_classes}"
    where = "a local Ray" if context.cluster.is_local else f"Ray at {context.cluster.address}"
    context.reporter.say(f"{known}; run directory {context.run.uri}; on {where}", log)
    if not context.reporter.quiet:
        context.reporter.console.print(plan)
    hint = shared_memory_hint() if context.cluster.is_local else None
    for text in filter(None, (hint, context.cluster.ignored)):
        context.reporter.say(f"! {text}", log)


def _check_disk(context: Context, steps: Sequence[Step], size: Size) -> None:
    """See that the run directory, or this node's cache, has room. Raises StageError."""
    run, cluster = context.run, context.cluster
    needs = [s.stage.estimate(context.config, size, cluster) for s in steps if s.todo]
    cached = sum(need.cache for need in needs)
    if run.is_local:
        total, free = sum(need.disk for need in needs) + cached, run.free_bytes()
        where, remedy = run.uri, "choose another run_dir=..."
    elif cluster.is_local:
        total, free = cached, free_bytes(run.cache.folder)
        where, remedy = str(run.cache.folder), "name a folder on another disk by ICCE_RAY_CACHE"
    else:  # nothing is known of the disks of other nodes
        return
    if free is not None and total * DISK_MARGIN > free:
        raise StageError(
            f"no disk space left for this run: it needs about {_bytes_text(total)} in {where}, "
            f"where {_bytes_text(free)} are free. Free some, or {remedy}"
        )


# --- running -------------------------------------------------------------------------------------


def preflight(
    config: Config, chosen: Sequence[str] = NAMES, snapshot: Snapshot | None = None
) -> list[Step]:
    """Everything that can be wrong and is cheap to see, before anything is started.

    Returns what `make_steps` does. Raises ConfigError, DataError, ArtifactError, StorageError.
    """
    from icce_ray.stages import index

    with storage.hastily():
        storage.check(config.run_dir)
        tracking.check(config.track, RunDirectory(config.run_dir))
        index.preflight(config)
        steps = make_steps(config, RunDirectory(config.run_dir), chosen, snapshot)
        embedded = any(step.stage.name == "embed" and step.state == "done" for step in steps)
        if not embedded:  # else the backbone was there; to import timm takes seconds
            from icce_ray.stages import embed

            embed.preflight(config)
        if any(step.stage.name == "answer" and step.state != "done" for step in steps):
            naming.preflight(config)
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
        StageError: for a stage that failed; the same call again resumes there.
    """
    chosen = names_between(first, last)
    directory, snapshot = RunDirectory(config.run_dir), Snapshot()
    steps = preflight(config, chosen, snapshot)
    _check(steps, directory, chosen, overwrite)
    reporter = Reporter(directory, quiet, tracking=tracking_of(config, directory))
    cluster = Cluster(config.ray)
    context = Context(config, directory, reporter, cluster)
    if plan_only:
        _show_plan(context, steps, _size(config, directory, snapshot), log=False)
        return {}
    until = "done" if chosen[-1] == NAMES[-1] else f"done until {chosen[-1]}"
    with running(directory, reporter, cluster, until):
        if first and overwrite:
            for name in chosen:
                _clear(directory, table.stage(name))
                snapshot.forget(directory, table.stage(name).folder)
        _run_chain(context, chosen, snapshot)
    finished = {s.name: snapshot.look(directory, s.folder).manifest for s in STAGES}
    return {name: manifest for name, manifest in finished.items() if manifest}


def _clear(run: RunDirectory, stage: Stage) -> None:
    """Have a stage run again. What a view shows of images that are gone is nowhere else."""
    if stage.is_view:
        run.delete_file(stage.folder, MANIFEST)
    else:
        run.delete(stage.folder)


def tracking_of(config: Config, where: RunDirectory, **more: Any) -> Tracking | None:
    """What the setting `track` asks for. where: the run, or a sweep; more: beside the settings."""
    if config.track is None:
        return None
    return Tracking(config.track, where, {**config.model_dump(mode="json"), **more})


def _run_chain(context: Context, chosen: Sequence[str], snapshot: Snapshot) -> None:
    config, run = context.config, context.run
    steps = make_steps(config, run, chosen, snapshot)
    text = configs.to_yaml(config).encode()
    # Also where nothing is to do: `num_classes=auto` was embedded with another number.
    if not run.exists("config.yaml") or run.read_bytes("config.yaml") != text:
        run.write_bytes(text, "config.yaml")
    shown = False
    for position, stage in enumerate(STAGES):
        if not shown and (position == 1 or not steps[0].todo):
            _show_and_check(context, steps, snapshot)  # `index` has counted the images
            shown = True
        if steps[position].todo:
            importing.whole("torch")
            run_stage(context, steps[position])
            snapshot.forget(run, stage.folder)
            steps = make_steps(config, run, chosen, snapshot)


def _show_and_check(context: Context, steps: Sequence[Step], snapshot: Snapshot) -> None:
    """Show the plan, and see what may be missing before anything expensive starts."""
    size = _size(context.config, context.run, snapshot)
    _show_plan(context, steps, size)
    _check_disk(context, steps, size)


def run_stage(context: Context, step: Step) -> None:
    """Run one stage and write its manifest.

    step: from a look at the run after the stages it reads were finished.

    Raises StageError, or another error of ours: what the stage could not do.
    """
    stage, run, reporter = step.stage, context.run, context.reporter
    reporter.stage, reporter.events = stage.name, []
    mark: dict[str, Any] = {
        "fingerprint": step.fingerprint,
        "settings": stage.settings(context.config),
        "inputs": dict(step.inputs),
    }
    context.resumed = run.begin(stage.folder, mark, keep=stage.is_view)
    reporter.status("running")
    if context.resumed:
        reporter.event(f"{stage.name} resumes from partial work")
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
    reporter.measured({"rows": outcome.rows, "seconds": seconds, **outcome.results})
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
def running(
    directory: RunDirectory, reporter: Reporter, cluster: Cluster, done: str = "done"
) -> Iterator[None]:
    """A run or a sweep at work: alone in its run directory, with an end that is written down.

    Holds the lock of `directory`, turns SIGTERM into KeyboardInterrupt, and reports storage
    failures that are waited out. The state in status.json is `running`, then `done`, `stopped` or
    `failed`, whatever ends the work. Stops `cluster` and writes the log at the end.

    Args:
        directory: the run directory to keep others out of.
        reporter: writes log and status.json; a sweep's lie in its own folder.
        cluster: what the work may start.
        done: the state at the end of all work.

    Raises:
        ArtifactError: another process works in `directory`.
    """
    with (
        exclusive(directory, partial(_lost, reporter), partial(reporter.say, log=False)),
        _terminable(reporter),
        reporter.listening(),
        reporter.tracked(),
    ):
        try:
            reporter.status("running")
            yield
            reporter.stage = ""
            reporter.status(done)
        except (KeyboardInterrupt, SystemExit):  # the latter from Ray, for a signal while it starts
            reporter.say("stopped; run the same command again to resume")
            reporter.status("stopped")
            raise
        except BaseException as error:
            # Before the cluster stops: what ends this process then must not leave it "running".
            ours = isinstance(error, IcceError)
            reason = str(error) if ours else f"{type(error).__name__}: {one_line(error)}"
            reporter.status("failed", error=reason)
            reporter.log(f"error: {reason}")
            raise
        finally:
            cluster.stop()
            with contextlib.suppress(Exception):
                reporter.flush()


def _lost(reporter: Reporter, text: str) -> None:
    """The lease of the run directory is another process's now: stop before both write."""
    reporter.event(f"{text}. This process stops")
    _thread.interrupt_main(signal.SIGTERM)


@contextlib.contextmanager
def _terminable(reporter: Reporter) -> Iterator[None]:
    """Let SIGTERM (a stopped job, a lost spot machine) end the work as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        # `timeout` sends two: the second must not interrupt the writing of the status.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # At once: where the whole process group got the signal, Ray is gone, and its client may end
        # this process before the exception below is handled.
        reporter.status("stopped")
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
    "fingerprints",
    "make_steps",
    "names_between",
    "preflight",
    "run",
    "run_stage",
    "running",
    "tracking_of",
]
