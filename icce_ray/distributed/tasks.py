"""Ray tasks: start them, wait for them, and raise their errors as ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from icce_ray.distributed.cluster import LOOK_EVERY, Request, Wait
from icce_ray.distributed.context import Context
from icce_ray.errors import IcceError, StageError

Tick = Callable[[], None]


def run_task(
    context: Context,
    function: Callable[..., Any],
    *arguments: Any,
    request: Request,
    advice: str,
    retries: int = 3,
    tick: Tick | None = None,
    every: float = LOOK_EVERY,
) -> Any:
    """The result of `function(*arguments)`, computed in one Ray task on any node.

    Args:
        request: the cores and GPUs that the task reserves.
        advice: which settings ask for less, where the cluster does not provide it.
        retries: how often Ray starts the task again after its node or process was lost.
        tick: called every `every` seconds while the task runs; what it raises ends the task.

    Raises:
        IcceError: what the function raised of our own.
        StageError: for anything else, or where no node carries the task for `ray.worker_wait` s.
    """
    tasks = run_tasks(
        context,
        function,
        [arguments],
        request=request,
        advice=advice,
        retries=retries,
        tick=tick,
        every=every,
    )
    return next(tasks)[1]


def run_tasks(
    context: Context,
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    *,
    request: Request,
    advice: str,
    retries: int = 3,
    tick: Tick | None = None,
    every: float = LOOK_EVERY,
) -> Iterator[tuple[int, Any]]:
    """Yield (position in `calls`, result) as the tasks end; see `run_task`.

    Tasks are spread over the nodes, since each reads its own copy of a matrix only once per node.
    """
    ray = context.cluster.start()
    task = ray.remote(
        num_cpus=request.cpus,
        num_gpus=request.gpus,
        max_retries=retries,
        scheduling_strategy="SPREAD",
    )(function)
    refs = [task.remote(*arguments) for arguments in calls]
    wait = Wait(context.cluster, context.reporter, [request], advice)
    yield from collect(ray, refs, wait, tick, every)


def collect(
    ray: Any,
    refs: Sequence[Any],
    wait: Wait,
    tick: Tick | None = None,
    every: float = LOOK_EVERY,
    end: Callable[[Any], None] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield (position, result) of started tasks as they end.

    Where an error or Ctrl-C comes first, `end` is called with each task that is left (default: kill
    it): else they would hold their cores in a cluster that outlives us.
    """
    position = {ref: index for index, ref in enumerate(refs)}
    waiting = list(refs)
    try:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=every)
            if tick is not None:
                tick()  # before the result, for what the task said since the last look
            for ref in done:
                yield position[ref], fetch(ray, ref)
            if not done:
                wait.check()
    finally:
        for ref in waiting:
            with contextlib.suppress(Exception):  # Ray itself may be gone
                end(ref) if end is not None else ray.cancel(ref, force=True)


def fetch(ray: Any, ref: Any) -> Any:
    """The result of one ended Ray task; an IcceError raised in it is raised here as itself."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, IcceError):
            raise error.cause from None
        raise StageError(f"a Ray task failed:\n{str(error).strip()[-2000:]}") from None
    except ray.exceptions.RayError as error:
        raise StageError(f"a Ray task was lost: {str(error).strip()[-500:]}") from None
