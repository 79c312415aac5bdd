"""Ray Tune glue of a sweep: many pieces of work side by side, the hopeless ones stopped early.

What a piece produces are artifacts and records in the run directory; Tune only places the work,
compares intermediate scores (ASHA) and starts a piece again whose process was lost. A killed sweep
resumes from the artifacts, so Tune's own state is thrown away.
"""

from __future__ import annotations

import contextlib
import io
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from icce_ray.distributed import compat
from icce_ray.distributed.context import Context
from icce_ray.errors import StageError
from icce_ray.rundir.progress import Bar

DONE = 100.0  # percent
NEARLY_DONE = 99.0  # what a piece may report at most before its artifacts are written
GRACE = 25.0  # percent before which ASHA stops nothing
REDUCTION = 3.0  # ASHA keeps the best third at each rung: at 25 and at 75 percent


_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "600",
}


Report = Callable[[float, float], None]  # called with (percent, score)
Work = Callable[[str, Report], None]  # does the piece of that name


@dataclass(frozen=True)
class Placement:
    """What each piece of work holds in its own process, and how many run at once."""

    cpus: float  # 0: the work is done by workers of its own
    gpus: float
    concurrent: int | None  # None: as many as the resources carry
    reuse: bool = False  # one process for many pieces

    def resources(self, ray: Any) -> dict[str, float]:
        """What Tune reserves. One that only waits for its workers must take no core from them,
        but Tune wants something to reserve.
        """
        if not self.cpus:
            return compat.head_share(ray)
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


@dataclass(frozen=True)
class Ended:
    """How a piece ended. `error` is set where its process was lost for good."""

    name: str
    percent: float | None
    score: float | None
    error: str | None = None


def search(
    context: Context,
    folder: str,
    work: Work,
    names: Sequence[str],
    placement: Placement,
    *,
    title: str,
    unit: str,
    early_stop: bool,
    on_end: Callable[[Ended], str],
) -> None:
    """Do all pieces with Ray Tune and wait, showing progress.

    Args:
        folder: where Tune may keep its working files; removed at the end.
        work: runs in a process of its own, on any node; what it raises is a loss of the process.
        on_end: called in the driver when a piece ends; returns what to call that: "done", or
            "stopped early", "failed", which are counted in the progress line.

    Raises:
        StageError: where Tune itself fails.
    """
    context.cluster.start()
    run = context.run
    run.delete(folder)
    with context.reporter.bar(title, len(names), unit) as bar:
        tuner = _tuner(context, folder, work, names, placement, early_stop, bar, on_end)
        try:
            # Tune prints its plan even when quiet.
            with compat.environment(_QUIET), contextlib.redirect_stdout(io.StringIO()):
                tuner.fit()
        except Exception as error:
            raise StageError(
                f"{title}: Ray Tune failed: {type(error).__name__}: {str(error).strip()[-1000:]}. "
                "Finished work is kept; run the same command again."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                run.delete(folder)


def _tuner(
    context: Context,
    folder: str,
    work: Work,
    names: Sequence[str],
    placement: Placement,
    early_stop: bool,
    bar: Bar,
    on_end: Callable[[Ended], str],
) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    asha = ASHAScheduler(
        time_attr="percent",
        metric="score",
        mode="max",
        max_t=int(DONE),
        grace_period=int(GRACE),
        reduction_factor=REDUCTION,
    )
    run = context.run
    return tune.Tuner(
        tune.with_resources(_trainable(work), placement.resources(context.cluster.start())),
        param_space={"name": tune.grid_search(list(names))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=placement.concurrent,
            scheduler=asha if early_stop else FIFOScheduler(),
            reuse_actors=placement.reuse,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{uuid.uuid4().hex[:8]}",
            storage_path=run.path(folder),
            storage_filesystem=None if run.is_local else run.filesystem,
            failure_config=tune.FailureConfig(max_failures=context.config.ray.max_failures),
            callbacks=[_watcher(bar, on_end)],
            verbose=0,
        ),
    )


def _trainable(work: Work) -> Callable[[dict[str, Any]], None]:
    def trial(config: dict[str, Any]) -> None:
        from ray import tune

        def report(percent: float, score: float) -> None:
            tune.report({"percent": percent, "score": score})

        work(config["name"], report)

    return trial


def _watcher(bar: Bar, on_end: Callable[[Ended], str]) -> Any:
    """A Tune callback, in the driver. Made here, since only a sweep needs ray.tune."""
    from ray import tune

    class Watcher(tune.Callback):
        def __init__(self, bar: Bar, on_end: Callable[[Ended], str]) -> None:
            self.bar, self.on_end = bar, on_end
            self.counts: dict[str, int] = {}

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune saves its callbacks; nothing of ours is to be restored

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            last = trial.last_result or {}
            self._count(Ended(trial.config["name"], last.get("percent"), last.get("score")))

        def on_trial_error(
            self, iteration: int, trials: list[Any], trial: Any, **info: Any
        ) -> None:
            lost = trial.get_error() if hasattr(trial, "get_error") else None
            reason = " ".join(str(lost).split())[-500:] if lost else "its process was lost"
            self._count(Ended(trial.config["name"], None, None, reason))

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            self._show()

        def _count(self, ended: Ended) -> None:
            kind = self.on_end(ended)
            self.counts[kind] = self.counts.get(kind, 0) + 1
            self._show()

        def _show(self) -> None:
            odd = [f"{n} {kind}" for kind, n in self.counts.items() if kind != "done"]
            self.bar.update(sum(self.counts.values()), ", ".join(odd))

    return Watcher(bar, on_end)
