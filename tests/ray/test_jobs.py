"""Jobs on a real head: started by the test, asking for a token, reached by the jobs API alone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray  # noqa: F401

from icce_ray.config.loading import load
from icce_ray.errors import DataError
from icce_ray.rundir.directory import RunDirectory

import psutil  # isort: skip  # comes with Ray, and is found once that is imported

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

PATIENCE = 500.0  # seconds, on a machine that does other things too
SAID = "head.log"  # what `ray start` prints
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
CONFIG = """
num_classes: 3
heads: {count: 4, steps: 600, batch_size: 128, checkpoint_every: 50, num_workers: 1}
evaluate: {kmeans: false}
"""
# Which files a driver and a worker import, and what came with the job.
PROBE = """
import os, ray, icce_ray
def found():
    return icce_ray.__file__
ray.init(log_to_driver=False, logging_level="ERROR")
print("driver", found())
print("worker", ray.get(ray.remote(found).remote()))
print("shipped", *sorted(os.listdir(".")))
"""


def until(what: str, ready: Callable[[], Any]) -> Any:
    """Wait for a true value."""
    deadline = time.monotonic() + PATIENCE
    while True:
        value = ready()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.1)


# --- the cluster ---------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


PORTS = (
    *("port", "dashboard-port", "ray-client-server-port", "object-manager-port"),
    *("node-manager-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port"),
    *("runtime-env-agent-port", "metrics-export-port"),
)


def start_head(temporary: str, token: str) -> tuple[subprocess.Popen[bytes], str]:
    """`ray start --head` in a process group of its own; returns it and the dashboard's address."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(f"--{name}={port}" for name, port in ports.items()),
        *("--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"),
        *(f"--temp-dir={temporary}", "--num-cpus=2", "--object-store-memory=100000000"),
        *("--no-monitor", "--include-log-monitor=false"),  # fewer processes to start
    ]
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # the tests themselves run below `uv run`
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with (Path(temporary) / SAID).open("wb") as said:
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=said, stderr=said
        )
    return process, f"http://127.0.0.1:{ports['dashboard-port']}"


def family(pid: int, mark: str) -> list[psutil.Process]:
    """A process, all below it, and whoever else names `mark`, a folder that only they know."""
    try:
        root = psutil.Process(pid)
        found = {root, *root.children(recursive=True)}
    except psutil.NoSuchProcess:
        found = set()
    for process in psutil.process_iter():
        try:
            if any(mark in part for part in process.cmdline()):
                found.add(process)
        except psutil.Error:
            continue
    return list(found)


def kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()  # psutil checks that the number still means this process
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=30)


@dataclass
class Jobs:
    """The jobs API of one head, and the folder whose code it is sent."""

    client: Any
    code: Path

    def submit(self, entrypoint: str) -> str:
        """Send a job. A head that has just started may have no agent yet: HTTP 500, try again."""
        environment = {"working_dir": str(self.code)}

        def accepted() -> str | None:
            try:
                return self.client.submit_job(entrypoint=entrypoint, runtime_env=environment)
            except RuntimeError as error:
                assert "No available agent" in str(error)
                return None

        return until("an agent", accepted)

    def pipeline(self, run: Path, *more: str) -> str:
        settings = [f"run_dir={run}", f"data.embeddings={self.code.parent / 'x.npy'}", *more]
        return self.submit(f"python jobs/pipeline.py small.yaml {' '.join(settings)}")

    def end(self, job: str) -> str:
        """Wait for a job's end; its status."""
        return until(f"job {job}", lambda: self._ended(job))

    def _ended(self, job: str) -> str | None:
        status = self.client.get_job_status(job).value
        return status if status in ENDED else None

    def logs(self, job: str) -> str:
        return self.client.get_job_logs(job)


def is_up(head: subprocess.Popen[bytes], temporary: str) -> bool:
    """Wait for a head's start. False where it gave up."""
    said = Path(temporary) / SAID
    until("the head", lambda: b"Ray runtime started" in said.read_bytes() or head.poll())
    return head.poll() is None


def connect(address: str, token: str) -> Any:
    """A client, once the jobs API answers: early requests are refused, or end in HTTP 500."""
    from ray.job_submission import JobSubmissionClient

    def answer() -> Any:
        try:
            client = JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
            client.list_jobs()
        except (ConnectionError, RuntimeError):
            return None
        return client

    return until("the jobs API", answer)


def end(head: subprocess.Popen[bytes], mark: str) -> None:
    """Kill a head with all that it started."""
    members = family(head.pid, mark)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    kill(members)
    head.wait()
    kill(family(head.pid, mark))  # whoever was born while the others died


@contextlib.contextmanager
def started_head() -> Iterator[Any]:
    """A head, as a client of its jobs API. Ray gives a node 30 s to start, which a busy machine
    may exceed, so there are three attempts."""
    token = secrets.token_hex(32)
    for _ in range(3):
        temporary = tempfile.mkdtemp(prefix="icce-jobs-")  # short: sockets lie in it
        head, address = start_head(temporary, token)
        try:
            if is_up(head, temporary):
                yield connect(address, token)
                return
        finally:
            end(head, temporary)
            shutil.rmtree(temporary, ignore_errors=True)
    pytest.fail("the head did not start")


def make_code(repository: Path, folder: Path) -> Path:
    """A small checkout: the code, and what must not travel with a job."""
    code = folder / "code"
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("icce_ray", "jobs"):
        shutil.copytree(repository / name, code / name, ignore=skip)
    for name in ("pyproject.toml", ".gitignore", ".rayignore"):
        shutil.copy(repository / name, code / name)
    for name in ("runs/old", "data/images", ".venv/lib"):
        (code / name).mkdir(parents=True)
        (code / name / "file").write_text("stays here")
    (code / "small.yaml").write_text(CONFIG)
    (code / "probe.py").write_text(PROBE)
    generator = np.random.default_rng(0)
    labels = np.arange(240) % 3
    x = np.eye(3, 16)[labels] + 0.2 * generator.normal(size=(240, 16))
    np.save(folder / "x.npy", x.astype(np.float32))
    return code


@pytest.fixture(scope="module")
def jobs(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """A cluster of one node that runs until the tests of this file are done."""
    with started_head() as client:
        yield Jobs(client, make_code(repository, tmp_path_factory.mktemp("jobs")))


# --- a job that is stopped, and the same one again ------------------------------------------------


@dataclass
class Twice:
    """What a job left that was stopped while heads trained, and submitted again."""

    run: Path
    stopped: str
    again: str
    states: list[str]


def state(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


@pytest.fixture(scope="module")
def twice(jobs: Jobs) -> Twice:
    run = jobs.code.parent / "run"
    job = jobs.pipeline(run)

    def training() -> bool:
        assert jobs._ended(job) is None, jobs.logs(job)
        return any(run.glob("heads/train/step-*/complete.json"))

    until("a checkpoint", training)
    assert jobs.client.stop_job(job)
    assert jobs.end(job) == "STOPPED"
    assert not (run / "heads" / "_manifest.json").exists()
    stopped = state(run)
    again = jobs.pipeline(run, "heads.num_workers=0")  # by another number of workers
    assert jobs.end(again) == "SUCCEEDED", jobs.logs(again)
    assert jobs.client.get_job_info(again).driver_exit_code == 0
    return Twice(run, jobs.logs(job), jobs.logs(again), [stopped, state(run)])


def test_a_job_runs_the_chain_and_tells_of_it(twice: Twice) -> None:
    parts = (
        (twice.stopped, ("index", "embed", "search", "select")),
        (twice.again, ("heads", "consensus", "classify")),
    )
    for logs, stages in parts:
        for stage in stages:
            assert re.search(rf"^{stage} +done in .*240 rows$", logs, re.MULTILINE), stage
    assert f"report    {twice.run}/report/index.html" in twice.again


def test_ray_adds_no_noise_to_a_jobs_logs(twice: Twice) -> None:
    """Two lines of the job manager come first; the rest is ours."""
    for logs in (twice.stopped, twice.again):
        first, second, *ours = logs.splitlines()
        assert "Runtime env is setting up" in first and "Running entrypoint" in second
        noise = [
            line
            for line in ours
            if re.search(r"\b(INFO|WARNING|ERROR|DEBUG|Warning|Traceback)\b|\(\w+ pid=|\x1b", line)
        ]
        assert not noise


def test_a_stopped_job_goes_on_when_submitted_again(twice: Twice, train_heads: Any) -> None:
    assert twice.states == ["stopped", "done"]
    assert "stopped; run the same command again to resume" in twice.stopped
    assert re.search(r"resumed from the checkpoint at [1-9]", twice.again)
    run, settings = RunDirectory(str(twice.run)), load(twice.run / "config.yaml")
    assert (np.array(run.matrix("heads", "assignments")) == train_heads(run, settings)).all()


# --- mistakes, and what travels -------------------------------------------------------------------


@pytest.fixture(scope="module")
def mistaken(jobs: Jobs) -> tuple[Any, str]:
    """A job that looks around and then is given a file that does not exist: its end, its logs."""
    wrong = f"data.embeddings={jobs.code.parent}/absent.npy run_dir={jobs.code.parent}/wrong"
    job = jobs.submit(f"python probe.py && python jobs/pipeline.py small.yaml {wrong}")
    jobs.end(job)
    return jobs.client.get_job_info(job), jobs.logs(job)


def test_a_users_mistake_fails_the_job_with_one_line(jobs: Jobs, mistaken: tuple[Any, str]) -> None:
    info, logs = mistaken
    assert info.status.value == "FAILED"
    assert info.driver_exit_code == DataError.exit_code
    assert logs.splitlines()[-1].startswith("error: ")
    assert "absent.npy" in logs.splitlines()[-1]
    assert "Traceback" not in logs
    assert not (jobs.code.parent / "wrong").exists()


def test_driver_and_workers_run_the_code_that_came_with_the_job(
    mistaken: tuple[Any, str],
) -> None:
    found = dict(line.split(" ", 1) for line in mistaken[1].splitlines()[2:5])
    for place in ("driver", "worker"):
        assert "/working_dir_files/" in found[place], found
    shipped = found["shipped"].split()
    assert {"icce_ray", "jobs", "pyproject.toml", "small.yaml"} <= set(shipped)
    assert not {"runs", "data", ".venv"} & set(shipped)
