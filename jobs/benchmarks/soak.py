"""The chain on local nodes whose processes are killed at random, compared with an undisturbed run.

A run of a few hundred images is repeated until the time is up. Meanwhile, every so often, something
happens to it, chosen by a seeded generator:

    worker   a process of Ray that computes for the run is killed
    node     a node is lost with all its processes, and a new one starts
    freeze   the processes of a node are stopped, and killed much later; a new node starts
    driver   the command is killed, and given again
    stop     the command is asked to stop (SIGTERM), and given again

Each finished run must have the heads' assignments and the consensus of the undisturbed run, and its
embeddings within the rounding of other batches.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.nodes import Nodes, children
from benchmarks.tables import markdown

Say = Callable[[str], None]
FAULTS = ("worker", "node", "freeze", "driver", "stop")
WEIGHTS = (0.4, 0.2, 0.1, 0.15, 0.15)
COUNT, CLUSTERS = 361, 3  # rows that do not divide by two workers
NO_WORK = ("IDLE", "Agent")  # in the names of processes that do not compute for a run
STOP_WITHIN = 15.0  # seconds in which a command that is asked to stop has to end
SILENCE = 60.0  # seconds after which a frozen node counts as lost
HANG = 1200.0  # seconds without any sign of work after which a run counts as hanging
CONFIG = f"""
num_classes: {CLUSTERS}
data: {{labels: none}}
backbone: {{name: test_resnet, pretrained: false, image_size: 32}}
embed: {{precision: float32, shard_size: 24, batch_size: 8, max_actors: 2}}
neighbors: {{max_neighbors: 20, pca: null}}
heads: {{count: 5, steps: 6000, batch_size: 256, checkpoint_every: 100, num_workers: 2}}
evaluate: {{kmeans: false}}
report: {{images_per_cluster: 2}}
ray: {{min_workers: 1, max_failures: 100}}
"""


@dataclass
class Tally:
    """What happened."""

    faults: Counter[str] = field(default_factory=Counter)
    where: Counter[str] = field(default_factory=Counter)  # stages in which something happened
    runs: int = 0
    commands: int = 0  # given in all
    failures: list[str] = field(default_factory=list)
    stops: list[float] = field(default_factory=list)  # seconds until a command had stopped


class Soak:
    """Runs and faults, one after the other."""

    def __init__(self, folder: Path, minutes: float, every: float, seed: int, say: Say) -> None:
        self.folder, self.every, self.say = folder, every, say
        self.minutes, self.until = minutes, 0.0
        self.rng = np.random.default_rng(seed)
        self.tally = Tally()
        self.nodes = Nodes(folder, SILENCE)
        self.live: list[str] = []
        self.frozen: dict[str, float] = {}  # nodes, and since when
        self.started = 0  # nodes so far
        self.driver: subprocess.Popen[bytes] | None = None

    def play(self) -> Tally:
        """Until the time is up, and the run at work then has ended."""
        write_images(self.folder / "images")
        (self.folder / "config.yaml").write_text(CONFIG)
        try:
            for _ in range(2):
                self._add_node()
            self._run(self.folder / "undisturbed", disturbed=False)
            self.say("the undisturbed run is done")
            self.until = time.monotonic() + 60 * self.minutes
            while time.monotonic() < self.until:
                run = self.folder / f"run-{self.tally.runs}"
                self._run(run, disturbed=True)
                self._compare(run)
                self.tally.runs += 1
                self.say(f"{self.tally.runs} runs, {sum(self.tally.faults.values())} faults")
        finally:
            self._end_driver(signal.SIGKILL)
            self.nodes.close()
        return self.tally

    # one run

    def _run(self, run: Path, disturbed: bool) -> None:
        self._command(run)
        began = time.monotonic()
        due = began + self._pause()
        while True:
            assert self.driver is not None
            if (code := self.driver.poll()) is not None:
                if code == 0:
                    return
                self._note(f"the command ended with {code}: {self._last_words()}")
                self._command(run)
            self._end_frozen()
            if disturbed and time.monotonic() > due and time.monotonic() < self.until:
                self._fault(run)
                due = time.monotonic() + self._pause()
            if time.monotonic() - max(began, _touched(run)) > HANG:
                self._note(f"no sign of work for {HANG:.0f} s in {_stage(run)}")
                self._end_driver(signal.SIGKILL)
                self._command(run)
                began = time.monotonic()
            time.sleep(0.2)

    def _pause(self) -> float:
        return float(self.rng.exponential(self.every))

    def _command(self, run: Path) -> None:
        command = [sys.executable, "-m", "icce_ray.cli", "run", str(self.folder / "config.yaml")]
        settings = [f"run_dir={run}", f"data.path={self.folder}/images"]
        settings.append(f"ray.address={self.nodes.head['address']}")
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # else each node installs the project anew
        }
        with (self.folder / "said.txt").open("wb") as said:
            self.driver = subprocess.Popen(
                [*command, *settings],
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.tally.commands += 1

    def _end_driver(self, kind: signal.Signals) -> None:
        if self.driver is not None and self.driver.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.driver.pid, kind)
            self.driver.wait()

    def _last_words(self) -> str:
        lines = (self.folder / "said.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing was said"

    def _note(self, text: str) -> None:
        self.tally.failures.append(text)
        self.say(f"FAILED: {text}")

    # faults

    def _fault(self, run: Path) -> None:
        kind = str(self.rng.choice(FAULTS, p=WEIGHTS))
        stage = _stage(run)
        if getattr(self, f"_{kind}")(run) is False:
            return  # there was nothing to disturb
        self.tally.faults[kind] += 1
        self.tally.where[stage] += 1
        self.say(f"{kind} in {stage}")

    def _worker(self, run: Path) -> bool:
        found = [
            pid
            for name in self.live
            for pid, text in sorted(children(self.nodes.nodes[name]["raylet"]).items())
            if text.startswith("ray::") and not any(word in text for word in NO_WORK)
        ]
        if not found:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(self.rng.choice(found)), signal.SIGKILL)
        return True

    def _node(self, run: Path) -> bool:
        name = self._pick()
        self.nodes.kill(name)
        self.live.remove(name)
        self._add_node()
        return True

    def _freeze(self, run: Path) -> bool:
        """The node still holds its connections: Ray learns by silence that it is lost."""
        name = self._pick()
        self.live.remove(name)
        self.nodes.freeze(name)
        self.frozen[name] = time.monotonic()
        self._add_node()
        return True

    def _end_frozen(self) -> None:
        for name, since in list(self.frozen.items()):
            if time.monotonic() - since > 2 * SILENCE:
                self.nodes.kill(name)
                del self.frozen[name]

    def _driver(self, run: Path) -> bool:
        self._end_driver(signal.SIGKILL)
        self._command(run)
        return True

    def _stop(self, run: Path) -> bool:
        began = time.monotonic()
        self._end_driver(signal.SIGTERM)
        taken = time.monotonic() - began
        self.tally.stops.append(taken)
        if taken > STOP_WITHIN:
            self._note(f"took {taken:.0f} s to stop in {_stage(run)}")
        state = (
            json.loads((run / "status.json").read_text())["state"] if run.exists() else "stopped"
        )
        if state not in ("stopped", "done"):
            self._note(f"stopped, but its status says {state}")
        self._command(run)
        return True

    def _pick(self) -> str:
        return str(self.rng.choice(self.live))

    def _add_node(self) -> None:
        name = f"node{self.started}"
        self.started += 1
        self.nodes.add(name)
        self.live.append(name)

    # the result

    def _compare(self, run: Path) -> None:
        from icce_ray.rundir.directory import RunDirectory

        plain, found = (RunDirectory(str(one)) for one in (self.folder / "undisturbed", run))
        ids = found.matrix("embeddings", "image_id")
        if ids.tolist() != list(range(COUNT)):
            self._note("images are missing, or twice there")
        one, other = (np.array(r.matrix("embeddings", "embedding")) for r in (plain, found))
        if not np.allclose(one, other, atol=1e-3):
            self._note("other embeddings")
        for folder, column in (("heads", "assignments"), ("consensus", "cluster")):
            pair = [np.array(r.matrix(folder, column)) for r in (plain, found)]
            if not (pair[0] == pair[1]).all():
                self._note(f"{100 * np.mean(pair[0] != pair[1]):.1f} % other {folder}")


def write_images(folder: Path) -> None:
    """Noise around three colors, as PNG files."""
    from PIL import Image

    rng = np.random.default_rng(0)
    colors = np.array([(220, 40, 40), (40, 200, 60), (50, 60, 230)])
    folder.mkdir()
    for number in range(COUNT):
        noise = rng.integers(-40, 40, (32, 32, 3))
        pixels = (colors[number % CLUSTERS] + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")


def _touched(run: Path) -> float:
    """When the run last wrote its log or status, on the monotonic clock."""
    times = [0.0]
    for name in ("log", "status.json"):
        with contextlib.suppress(OSError):
            times.append((run / name).stat().st_mtime)
    return max(times) - time.time() + time.monotonic()


def _stage(run: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError):
        status: dict[str, Any] = json.loads((run / "status.json").read_text())
        return str(status.get("stage") or status["state"])
    return "start"


def table(tally: Tally) -> str:
    """Faults by kind, and by the stage they fell in."""
    kinds = [[name, f"{tally.faults[name]}"] for name in FAULTS]
    stages = [[name, f"{count}"] for name, count in sorted(tally.where.items())]
    stop = f"{max(tally.stops):.1f} s" if tally.stops else "-"
    notes = [
        f"- runs finished: {tally.runs}; commands given: {tally.commands}",
        f"- longest time to stop: {stop}",
        f"- failures: {len(tally.failures)}",
        *(f"  - {text}" for text in tally.failures),
    ]
    tables = (markdown(["fault", "times"], kinds), markdown(["in stage", "times"], stages))
    return "\n\n".join([*tables, "\n".join(notes)])
