"""The command line's own part: help, errors, status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import icce_ray
from icce_ray import cli, pipeline
from icce_ray.config.loading import load
from icce_ray.config.schema import Config
from icce_ray.errors import ArtifactError, ConfigError, DataError, StageError
from icce_ray.pipeline.results import Result
from icce_ray.rundir.directory import Manifest, RunDirectory


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    code: int | str | None = 0
    try:
        cli.main(list(arguments))
    except SystemExit as leave:
        code = leave.code
    shown = capsys.readouterr()
    return int(code or 0), shown.out, shown.err


def test_bare_and_help_teach(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, err = call(capsys)
    assert "icce-ray run quickstart" in out + err
    for name in ("run", "predict", "status", "report", "config"):
        for option in ("--help", "-h"):
            code, out, _ = call(capsys, name, option)
            assert code == 0 and "Usage" in out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"icce-ray {icce_ray.__version__}\n", "")


def test_one_line_starts_a_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    ran: list[Config] = []
    monkeypatch.setattr(pipeline, "run", lambda config, **_: ran.append(config))
    line = ("run", "photos", "-k", "20", "--backbone", "dinov2-small", "--out", "x", "seed=3")
    code, _, err = call(capsys, *line)
    assert code == 0 and err == "backbone dinov2-small is vit_small_patch14_dinov2.lvd142m\n"
    monkeypatch.setattr(Result, "__init__", lambda *_: None)
    given = {"backbone": "dinov2-small", "run_dir": "x", "seed": 3}
    icce_ray.run("photos", num_classes=20, **given)
    icce_ray.cluster_images(Path("photos"), k=20, **given)
    (tmp_path / "x.yaml").write_text(
        "{num_classes: 20, data: {path: photos}, backbone: dinov2-small, run_dir: x, seed: 3}"
    )
    call(capsys, "run", "x.yaml")
    assert ran == [ran[0]] * 4 and ran[0].num_classes == 20


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        (("run", "quikstart"), ConfigError, "Did you mean 'quickstart'"),
        (("run", "."), ConfigError, "-k N, or -k auto"),
        (("run", ".", "-k", "2", "--backbone", "dinov3"), ConfigError, "Near ones: dinov3-"),
        (("run", "quickstart", "heads.cuont=3"), ConfigError, "heads.count"),
        (("run", "quickstart", "num_classes=1"), ConfigError, "num_classes"),
        (("run", "quickstart", "num_classes=9-4"), ConfigError, "such as 4-30"),
        (("run", "quickstart", "num_classes=auto", "--until", "hedas"), ConfigError, "stages are"),
        (("sweep", "quickstart", "heads", "num_classes=auto"), ConfigError, "num_classes"),
        (("run", "quickstart", "heads.lr=fast"), ConfigError, "heads.lr"),
        (("run", "quickstart", "backbone.name=tf_efficientnet_lit0"), ConfigError, "lite0"),
        (("run", "imagenet", "data.path=nowhere"), DataError, "nowhere"),
        (("run", "quickstart", "--until", "hedas"), ConfigError, "the stages are"),
        (("run", "quickstart", "--until", "neighbors"), ConfigError, "two: search and select"),
        (("run", "quickstart", "--from", "classifier"), ConfigError, "now called classify"),
        (("status", "nowhere"), ArtifactError, "not a run directory"),
        (("predict", "nowhere", "images", "out=x"), ArtifactError, "classifier"),
        (("report", "nowhere"), ArtifactError, "not a run directory"),
    ],
)
def test_mistakes_give_one_error_and_no_traceback(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    kind: type[ConfigError],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *arguments)
    assert code == kind.exit_code
    assert err.startswith("error: ") and text in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_files_that_are_not_as_they_should_be_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Whatever the operating system says of them, and wherever."""
    (tmp_path / "status.json").mkdir()
    code, _, err = call(capsys, "status", str(tmp_path))
    assert code == StageError.exit_code
    assert err.startswith("error: ") and err.count("\n") == 1 and "status.json" in err


@pytest.mark.parametrize(
    "command",
    [
        ("run", "mine.yaml"),
        ("run", "mine.yaml", "--plan"),
        ("run", "mine.yaml", "num_classes=auto"),
        ("sweep", "mine.yaml", "ensemble"),
        ("status", "old"),
        ("predict", "old", "x.npy", "out=new"),
    ],
)
def test_a_run_of_an_older_version_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.eye(20))
    Path("mine.yaml").write_text("{num_classes: 2, data: {embeddings: x.npy}, run_dir: old}")
    run = RunDirectory("old")
    for stage in ("index", "embeddings", "neighbors", "heads", "consensus", "classifier"):
        run.finish(stage, Manifest(stage, "f", {}, {}, 20, 1.0, format=1))
    run.write_json({"state": "done"}, "status.json")
    run.write_bytes(Path("mine.yaml").read_bytes(), "config.yaml")
    before = sorted(Path("old").rglob("*"))
    code, _, err = call(capsys, *command)
    assert code == ArtifactError.exit_code and err.count("\n") == 1
    assert re.fullmatch(
        r"error: .*/old/\w+ was made by another version of icce_ray \(format 1; this one reads 4\)"
        r"\. Run again with another run_dir=..., or use the version that made it.\n",
        err,
    )
    assert sorted(Path("old").rglob("*")) == before


def test_config_lists_and_prints(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = call(capsys, "config")
    assert {"quickstart", "imagenet"} <= {line.split()[0] for line in out.splitlines()}
    _, out, _ = call(capsys, "config", "quickstart", "heads.count=5")
    assert "count: 5" in out and "# H: clustering heads" in out


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"state": "done"}, "done"),
        ({"state": "failed", "error": "why"}, "failed: why"),
        ({"state": "running", "stage": "heads", "time": 0}, "no sign of life"),
        (
            {
                "state": "running",
                "stage": "embed",
                "step": "embedding",
                "done": 10,
                "total": 1000,
                "unit": "images",
                "remaining_seconds": 90,
                "time": 1e12,
            },
            "running embed: embedding 10 of 1,000 images, 1 min 30 s left",
        ),
    ],
)
def test_status_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, state: dict[str, object], expected: str
) -> None:
    RunDirectory(str(tmp_path)).write_json(state, "status.json")
    code, out, _ = call(capsys, "status", str(tmp_path))
    assert code == 0 and expected in out
    assert out.count("to do") == 10


def test_a_fresh_sign_of_life_is_believed() -> None:
    assert "no sign" not in cli._status_line({"state": "running", "time": time.time()})


def test_a_killed_run_does_not_count_as_running() -> None:
    code = "from icce_ray.rundir.lock import this_process as p; import json; print(json.dumps(p()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    state = {"state": "running", "stage": "heads", "time": time.time(), **json.loads(done.stdout)}
    line = cli._status_line(state)
    assert "has ended" in line and "same command" in line
    assert "has ended" not in cli._status_line({**state, "host": "another"})


HEAVY = {"torch", "ray", "timm", "sklearn", "scipy", "torchvision", "faiss"}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A configuration file whose run has finished."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(30, 8)))
    file = tmp_path / "own.yaml"
    file.write_text(
        f"num_classes: 3\ndata: {{embeddings: {tmp_path}/x.npy}}\nrun_dir: {tmp_path}/run\n"
    )
    settings, run = load(str(file)), RunDirectory(str(tmp_path / "run"))
    done: dict[str, str] = {}
    for step in pipeline.make_steps(settings, run):
        stage = step.stage
        values = (step.fingerprint, stage.settings(settings), {n: done[n] for n in stage.needs})
        manifest = Manifest(stage.name, *values, 30, 1.0, {"features": 8})
        run.finish(stage.folder, manifest)
        done[stage.name] = manifest.id
    run.write_json({"state": "done", "time": 0}, "status.json")
    return file


@pytest.mark.parametrize("command", ["--help", "status", "run --help", "run --plan", "run"])
def test_commands_that_compute_nothing_import_nothing_heavy(finished: Path, command: str) -> None:
    run_dir, (name, *options) = finished.parent / "run", command.split()
    arguments = {"status": ["status", str(run_dir)], "run": ["run", str(finished), *options]}
    code = (
        "import sys\nfrom icce_ray import cli\n"
        "try: cli.main(sys.argv[1:])\nexcept SystemExit as end: assert not end.code, end\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        f"print('heavy:', sorted(loaded & {HEAVY!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.get(name, [name])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
