"""jobs/benchmark.py ablation: what it cuts from data, measures, and prints."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from icce_ray.core.unit_rows import unit_rows
from icce_ray.errors import StageError


@pytest.fixture
def ablation(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "jobs"))
    from benchmarks import ablation

    return ablation


def trials(ablation: ModuleType) -> list[object]:
    """Three settings of two seeds. `good` ranks them as accuracy does, `bad` in reverse."""
    found = []
    for setting, acc in (("defaults", 0.6), ("heads.count=8", 0.5), ("consensus.keep=1", 0.7)):
        for seed in (0, 1):
            true = {"consensus": acc + 0.02 * seed, "gap": 0.1}
            free = {"good": acc**2, "bad": -acc, "head_agreement": 0.5}
            found.append(ablation.Trial(setting, seed, true, free, {"balance 0": acc}, 10.0))
    return found


def test_a_line_for_each_setting_with_mean_and_spread(ablation: ModuleType) -> None:
    head, _, *lines = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in ablation.table(trials(ablation)).splitlines()
    )
    assert head == ["setting", "consensus", "gap", "balance 0", "s"]
    assert [line[0] for line in lines] == ["defaults", "heads.count=8", "consensus.keep=1"]
    assert lines[1][1:] == ["51.0 ± 1.4", "10.0 ± 0.0", "50.0 ± 0.0", "10"]


def test_scores_are_correlated_over_settings(ablation: ModuleType) -> None:
    found = ablation.correlations(trials(ablation))
    assert found["good"]["all"] == pytest.approx(1) and found["bad"]["all"] == pytest.approx(-1)
    assert found["head_agreement"]["all"] is None
    assert found["good"]["heads"] is None  # two settings tell nothing
    assert next(iter(found)) == "good"
    table = ablation.correlation_table(trials(ablation))
    assert "all 3 settings" in table and "| good | +1.00 | - | - | - |" in table


def test_a_space_becomes_settings_and_seeds(ablation: ModuleType, tmp_path: Path) -> None:
    text = "{search: each, space: {seed: [3, 4], heads.steps: [5, 6], neighbors.pca: [null]}}"
    (tmp_path / "space.yaml").write_text(text)
    settings, seeds = ablation.choices(str(tmp_path / "space.yaml"))
    assert settings == ["heads.steps=5", "heads.steps=6", "neighbors.pca=null"]
    assert seeds == [3, 4]
    assert ablation.choices(None) == ([], [0, 1, 2])


def test_long_tails_and_subsets_keep_what_they_say(ablation: ModuleType) -> None:
    codes = np.repeat(np.arange(5), 64)
    codes[:4] = -1
    tail = ablation.long_tail(codes, 16.0, seed=0)
    assert sorted(np.bincount(codes[tail])) == [4, 8, 15, 30, 60]
    rows, own = ablation.some_classes(codes, 3)
    assert (np.diff(rows) > 0).all() and set(own) == {0, 1, 2}
    for one in range(3):
        (code,) = set(codes[rows[own == one]])
        assert (own == one).sum() == (codes == code).sum()


def test_trials_in_memory_are_scored_against_the_truth(ablation: ModuleType) -> None:
    """Three blobs: every clustering is right, rows without a label are not counted."""
    codes = np.repeat(np.arange(3), 40)
    x = unit_rows(np.random.default_rng(0).normal(0, 0.05, (120, 8)) + np.eye(3, 8)[codes])
    codes[:5] = -1
    said: list[str] = []
    found = ablation.measure(
        x, codes, ["heads.balance=0.0"], ["heads.steps=20", "heads.count=6"], [0], True, said.append
    )
    assert [trial.setting for trial in found] == ["defaults", "heads.balance=0.0"] and len(
        said
    ) == 2
    for trial in found:
        for name in ("consensus", "classifier", "heads", "best head", "nmi"):
            assert trial.true[name] == pytest.approx(1), name
        assert {"neighbor_information", "silhouette, features", "silhouette, t-SNE"} < set(
            trial.free
        )
        assert trial.free["silhouette, features"] > 0.5
    assert set(found[0].balances) == {"balance 0.5", "balance 0.25", "balance 0"}
    assert set(found[1].balances) == {"balance 0"}


@pytest.mark.parametrize("command", ["ablation", "classes", "starts", "truth", "peers"])
def test_every_command_takes_some_of_the_classes_only(
    repository: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.syspath_prepend(str(repository / "jobs"))
    main = runpy.run_path(str(repository / "jobs" / "benchmark.py"))
    asked: list[object] = []

    def data(source: str, labels: Path | None, only: int = 0, *more: object) -> None:
        asked.extend([source, only])
        raise StageError("enough")

    monkeypatch.setitem(main["_data"].__globals__, "_data", data)
    with pytest.raises(StageError, match="enough"):
        main["app"]([command, "x.npy", "--only", "7"], standalone_mode=False)
    assert asked == ["x.npy", 7]
