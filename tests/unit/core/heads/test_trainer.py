"""The trainer against the formula in loops, and against itself: split over workers, resumed."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from icce_ray.config.schema import HeadsConfig
from icce_ray.core.heads import losses
from icce_ray.core.heads import trainer as core
from icce_ray.core.heads.trainer import Data, HeadTrainer
from icce_ray.errors import StageError

CPU = torch.device("cpu")
POISON = 10**9  # an id that no row has: reading it raises


def blobs(rows=240, features=12, clusters=3, most=6, noise=0.2, seed=0):
    """Unit rows around orthogonal centers, neighbors by brute force, labels. Counts vary; ids
    beyond a row's count are poisoned."""
    rng = np.random.default_rng(seed)
    centers = np.linalg.qr(rng.normal(size=(features, clusters)))[0].T
    labels = rng.integers(0, clusters, rows)
    x = centers[labels] + noise * rng.normal(size=(rows, features))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    scores = x @ x.T
    np.fill_diagonal(scores, -2)
    ids = np.argsort(-scores, axis=1)[:, :most].astype(np.int32)
    counts = rng.integers(1, most + 1, rows).astype(np.int32)
    ids[np.arange(most) >= counts[:, None]] = POISON
    features = torch.from_numpy(x).half()
    return Data(features, torch.from_numpy(ids), torch.from_numpy(counts), CPU), labels


DATA, LABELS = blobs()
HARD, _ = blobs(noise=0.6, clusters=6)


def make(settings=None, data=HARD, clusters=4, seed=0, steps=30, group=None, **options):
    if settings is None:
        settings = HeadsConfig(**{"count": 5, "batch_size": 64, **options})
    return HeadTrainer(data, settings, clusters, seed, steps, group)


def train(trainer, steps=None):
    for _ in range(trainer.steps if steps is None else steps):
        trainer.step()
    return trainer


def same(one, two):
    """Two states are equal to the last bit."""
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


# --- the loss ------------------------------------------------------------------------------------


def softmax(values):
    top = max(values)
    parts = [math.exp(v - top) for v in values]
    return [p / sum(parts) for p in parts]


def slow_sinkhorn(rows, s, head):
    q = [softmax(row) for row in rows]
    target = slow_target(q, s, head)
    for _ in range(s.sinkhorn_iterations):
        sums = [sum(column) for column in zip(*q, strict=True)]
        q = [[v * t / s for v, t, s in zip(row, target, sums, strict=True)] for row in q]
        q = [[v / sum(row) for v in row] for row in q]
    return q


def slow_target(rows, s, head):
    """Shares of the clusters that are aimed at in the first step."""
    clusters = len(rows[0])
    used = [0.9 / clusters + 0.1 * sum(column) / len(rows) for column in zip(*rows, strict=True)]
    if s.prior is None:
        shares = [value ** (1 - s.balance_of(head, clusters)) for value in used]
        return [value / sum(shares) for value in shares]
    largest = sorted(range(clusters), key=lambda c: -used[c])
    sizes = dict(zip(largest, sorted(s.prior, reverse=True), strict=True))
    return [sizes[c] / sum(s.prior) for c in range(clusters)]


def slow_loss(trainer, x, y):
    """Loss of each head, from the logits on, with one loop per axis of the formula."""
    s, clusters = trainer.settings, trainer.clusters
    logits = trainer.student(trainer.data.rows(torch.cat([x, y]))).detach().double()
    scaled = (logits / s.temperature).tolist()
    student = [[softmax(row) for row in head] for head in scaled]
    teacher = [slow_sinkhorn(one, s, head) for head, one in enumerate(scaled)]
    pairs, heads, every = len(x), len(scaled), range(clusters)
    weights = [
        sum(sum(t[b][c] * t[pairs + b][c] for c in every) for t in teacher) / heads
        for b in range(pairs)
    ]
    out = []
    for head, (one, t) in enumerate(zip(student, teacher, strict=True)):
        p = slow_target(one, s, head)
        m = [0.9 / clusters + 0.1 * sum(row[c] for row in t) / (2 * pairs) for c in every]
        total = 0.0
        for b in range(pairs):
            value = 0.0
            for i, j in ((b, pairs + b), (pairs + b, b)):
                pmi = math.log(sum(p[c] * (one[i][c] * t[j][c]) ** s.beta / m[c] for c in every))
                entropy = -sum(t[j][c] * math.log(one[i][c]) for c in every)
                value += (-pmi + s.cross_entropy * entropy) / 2
            total += value * (weights[b] if s.instance_weights else 1.0)
        out.append(total / pairs)
    return out


SWITCHES = {
    "default": {},
    "no sinkhorn": {"sinkhorn_iterations": 0},
    "more sinkhorn": {"sinkhorn_iterations": 7},
    "prior": {"prior": (1, 5, 2, 2)},
    "some balance": {"balance": 0.5},
    "full balance": {"balance": 1},
    "two balances": {"balance": (0.25, 1)},
    "prior without sinkhorn": {"prior": (1, 5, 2, 2), "sinkhorn_iterations": 0},
    "no balance": {"balance": 0},
    "no weights": {"instance_weights": False},
    "no cross-entropy": {"cross_entropy": 0},
    "much cross-entropy": {"cross_entropy": 2.0},
    "beta": {"beta": 1.0},
    "temperature": {"temperature": 0.3},
    "hidden": {"hidden": (16, 8)},
    "no norm": {"hidden": (16, 8), "batch_norm": False},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_the_first_step_has_the_formulas_loss(name):
    trainer = make(count=5, batch_size=10, **SWITCHES[name])
    trainer.start()
    expected = slow_loss(trainer, *trainer._draw_pairs())
    np.testing.assert_allclose(trainer.step().numpy(), expected, rtol=2e-4, atol=2e-5)


def test_every_switch_changes_the_loss_and_trains():
    seen = {}
    for name, options in SWITCHES.items():
        trainer = make(**options)
        trainer.start()
        seen[name] = tuple(train(trainer, 3).step().tolist())
        assert np.isfinite(seen[name]).all() and trainer.assign().shape == (len(HARD), 5)
    assert len(set(seen.values())) == len(SWITCHES)


@pytest.mark.parametrize("clusters", [4, 70])  # both layouts of the weights
@pytest.mark.parametrize("hidden", [(), (16,)])
@pytest.mark.parametrize(
    "options", [{}, {"cross_entropy": 0}, {"instance_weights": False}], ids=str
)
def test_the_gradient_is_that_of_the_formulas(clusters, hidden, options):
    """Recorded by autograd from `losses`, for weights and biases."""
    trainer = make(count=3, clusters=clusters, hidden=hidden, **options)
    trainer.start()
    images = torch.cat(trainer._draw_pairs())
    expected, loss = autograd(trainer, images)
    found = trainer._backward(images)
    np.testing.assert_allclose(found, loss, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(trainer.student.parameters(), expected, strict=True):
        np.testing.assert_allclose(parameter.grad, gradient, rtol=2e-3, atol=1e-6)


def autograd(trainer, images):
    """Gradients of the student's parameters, and the loss of each head."""
    s, running = trainer.settings, copy.deepcopy(trainer.running)
    rows = trainer.data.rows(images)
    student = losses.log_softmax(trainer.student(rows) / s.temperature)
    with torch.no_grad():
        teacher = trainer.teacher(rows) / s.temperature
        running.follow("usage", teacher.softmax(-1).mean(1))
        shares = trainer.target.shares(running)
        log_t = losses.sinkhorn(teacher, s.sinkhorn_iterations, prior=shares)
        running.follow("marginal", log_t.exp().mean(1))
    (p_x, p_y), (t_x, t_y) = student.chunk(2, 1), log_t.chunk(2, 1)
    m = running.marginal
    value = losses.pmi(p_x, t_y, m, s.beta, shares) + losses.pmi(p_y, t_x, m, s.beta, shares)
    entropy = losses.cross_entropy(p_x, t_y.exp()) + losses.cross_entropy(p_y, t_x.exp())
    each = (s.cross_entropy * entropy - value) / 2
    if s.instance_weights:
        each = each * losses.pair_agreement(t_x.exp(), t_y.exp()).mean(0)
    loss = each.mean(1)
    return torch.autograd.grad(loss.sum(), list(trainer.student.parameters())), loss.detach()


def test_heads_do_not_touch_each_other_without_instance_weights():
    all_heads = train(make(instance_weights=False), 5)
    settings = HeadsConfig(count=1, batch_size=64, instance_weights=False)
    alone = train(make(settings), 5)
    np.testing.assert_allclose(
        alone.student.last.weight[0].detach(), all_heads.student.last.weight[0].detach(), atol=1e-5
    )


# --- pairs ---------------------------------------------------------------------------------------


def test_pairs_are_an_image_and_one_of_its_valid_neighbors():
    trainer = make(batch_size=4000)
    x, y = trainer._draw_pairs()
    ids, counts = HARD.ids.numpy(), HARD.counts.numpy()
    assert all(b in ids[a][: counts[a]] for a, b in zip(x.tolist(), y.tolist(), strict=True))
    assert len(x.unique()) == len(HARD)
    drawn = Counter(zip(x.tolist(), y.tolist(), strict=True))
    row = int(np.argmax(counts))  # each of a row's neighbors comes up
    assert {b for a, b in drawn if a == row} == set(ids[row][: counts[row]].tolist())


def test_pairs_depend_on_seed_and_step_only():
    one, two, other = make(), make(hidden=(8,)), make(seed=1)
    first = one._draw_pairs()
    assert all(map(torch.equal, first, two._draw_pairs()))
    assert not torch.equal(first[0], other._draw_pairs()[0])
    one.step()
    assert not torch.equal(first[0], one._draw_pairs()[0])


# --- what it finds -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"start": "random"}, {"hidden": (32,)}],
    ids=str,
)
def test_separated_blobs_are_found(options):
    trainer = make(data=DATA, clusters=3, steps=150, count=4, lr=1e-2, **options)
    trainer.start()
    train(trainer)
    assignments = trainer.assign()
    for column in assignments.T:
        pairs = set(zip(column.tolist(), LABELS.tolist(), strict=True))
        assert len(pairs) == 3 == len({cluster for cluster, _ in pairs})


def test_training_lowers_the_loss_and_keeps_clusters_alive():
    trainer = make(steps=60, balance=0.5)
    first = trainer.step().mean()
    train(trainer, 58)
    assert trainer.step().mean() < first
    assert all(len(np.unique(column)) == 4 for column in trainer.assign().T)


def shares_of(trainer):
    """Mean share of a head's largest cluster, of its second one, and so on."""
    counts = [np.bincount(column, minlength=3) / len(column) for column in trainer.assign().T]
    return np.sort(counts, axis=1)[:, ::-1].mean(0)


def test_a_prior_and_less_balance_let_clusters_be_unequal():
    """Classes of 70, 20 and 10 % that touch: with equal clusters the largest one is cut."""
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 600, p=[0.7, 0.2, 0.1])
    x = np.linalg.qr(rng.normal(size=(12, 3)))[0].T[labels] + 0.3 * rng.normal(size=(600, 12))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    scores = x @ x.T
    np.fill_diagonal(scores, -2)
    ids = torch.from_numpy(np.argsort(-scores, axis=1)[:, :6].astype(np.int32))
    data = Data(torch.from_numpy(x).half(), ids, torch.full((600,), 6), CPU)
    true = np.sort(np.bincount(labels))[::-1] / 600
    errors = {}
    for name, options in {
        "even": {"balance": 1.0},
        "free": {"balance": 0.0},
        "given": {"prior": (1, 2, 7)},
    }.items():
        trainer = make(data=data, clusters=3, steps=150, lr=1e-2, **options)
        trainer.start()
        errors[name] = np.abs(shares_of(train(trainer)) - true).sum()
    assert errors["given"] < 0.1 and errors["free"] < 0.2 < errors["even"] / 2, errors


# --- several workers -----------------------------------------------------------------------------


def trained_by(run_workers, world, steps, **options):
    """Each worker's trainer after some steps."""

    def work(group):
        trainer = make(group=group, **options)
        trainer.start()
        return train(trainer, steps)

    return run_workers(world, work)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden": (16, 8)},
        {"sinkhorn_iterations": 0},
        {"balance": (1, 0.5)},
    ],
    ids=str,
)
def test_any_number_of_workers_trains_the_same_heads(run_workers, world, options):
    alone = make(**options)
    alone.start()
    train(alone)
    expected = alone.assign()
    for trainer in trained_by(run_workers, world, 30, **options):
        rank = trainer.group.rank
        assert trainer.numbers == list(range(5))[rank::world]
        assert (trainer.assign() == expected[:, rank::world]).all()
        for mine, whole in zip(
            trainer.teacher.parameters(), alone.teacher.parameters(), strict=True
        ):
            np.testing.assert_allclose(mine.detach(), whole[rank::world].detach(), atol=1e-4)


def test_a_step_exchanges_only_the_pair_weights(run_workers):
    for trainer in trained_by(run_workers, 2, 4):
        assert trainer.group.calls == 4
        assert trainer.group.sent == 4 * 3 * 64  # ceil(5 / 2) heads, 64 pairs
    for trainer in trained_by(run_workers, 2, 4, instance_weights=False):
        assert trainer.group.calls == 0


@pytest.mark.parametrize(("count", "world"), [(4, 3), (5, 2), (3, 3), (16, 5)])
def test_heads_are_gathered_in_their_own_order(run_workers, count, world):
    def work(group):
        trainer = make(count=count, group=group)
        return trainer._gather_heads(torch.tensor(trainer.numbers).unsqueeze(1))

    for full in run_workers(world, work):
        assert full.flatten().tolist() == list(range(count))


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"hidden": (16, 8)}, {"balance": 0.5}], ids=str)
def test_a_resumed_run_repeats_an_undisturbed_one(options):
    unbroken = make(**options)
    unbroken.start()
    train(unbroken, 10)
    middle = unbroken.state()
    expected = [unbroken.step() for _ in range(12)]
    resumed = make(**options)
    resumed.restore([middle])
    assert resumed.step_number == 10
    for loss in expected:
        assert torch.equal(resumed.step(), loss)
    same(resumed.state(), unbroken.state())
    assert (resumed.assign() == unbroken.assign()).all()


def test_a_state_is_a_copy_on_disk_and_back():
    from safetensors.torch import load, save

    trainer = train(make(hidden=(8,)), 3)
    state = trainer.state()
    kept = load(save(state))
    trainer.step()
    again = make(hidden=(8,))
    again.restore([kept])
    again.step()
    same(again.state(), trainer.state())


def test_restored_moments_lie_in_memory_as_their_parameters_do():
    """Few clusters are laid out the other way round; a fused optimizer refuses any other layout."""
    trainer, again = make(), make()
    trainer.step()
    again.restore([trainer.state()])
    assert again.optimizer.state
    for parameter, slot in again.optimizer.state.items():
        assert slot["step"].device == parameter.device
        for key in ("exp_avg", "exp_avg_sq"):
            assert slot[key].stride() == parameter.stride()


def test_a_state_before_the_first_step_restores_too():
    trainer, again = make(), make(seed=1)
    trainer.start()
    again.restore([trainer.state()])
    same(again.state(), trainer.state())


@pytest.mark.parametrize("hidden", [(), (16, 8)])
@pytest.mark.parametrize("worlds", [(2, 1), (1, 2), (2, 3), (3, 2)], ids=str)
def test_another_number_of_workers_resumes_exactly(run_workers, hidden, worlds):
    before, after = worlds
    states = [t.state() for t in trained_by(run_workers, before, 6, hidden=hidden)]

    def work(group):
        trainer = make(hidden=hidden, group=group if after > 1 else None)
        trainer.restore(states)
        return train(trainer, 6)

    unbroken = make(hidden=hidden)
    unbroken.start()
    whole = train(unbroken, 12).state()
    for trainer in run_workers(after, work):
        mine, pick = trainer.state(), trainer.numbers
        assert int(mine["step"]) == 12
        assert mine["numbers"].tolist() == pick
        for name in mine.keys() - {"step", "numbers"}:
            np.testing.assert_allclose(mine[name], whole[name][pick], atol=2e-4, err_msg=name)


def test_a_checkpoint_without_some_heads_is_refused(run_workers):
    states = [t.state() for t in trained_by(run_workers, 2, 1)]
    with pytest.raises(StageError, match=r"lacks heads \[1, 3\]"):
        make().restore(states[:1])


# --- errors --------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_and_head():
    trainer = train(make(), 3)
    trainer.student.last.weight.data[2] = torch.nan
    trainer.step()
    with pytest.raises(StageError, match=r"loss of head 2 is not finite at step 3 .*heads\.lr"):
        trainer.state()  # so that no checkpoint holds it


@pytest.mark.parametrize("steps", [30, 200])
def test_losses_are_looked_at_now_and_then_and_at_the_end(steps):
    trainer = make(steps=steps)
    trainer.student.last.weight.data[1] = torch.inf
    with pytest.raises(StageError, match="loss of head 1 is not finite at step 0"):
        train(trainer)
    assert trainer.step_number == min(steps, core.CHECK_EVERY)


def test_a_worker_names_its_heads_by_their_own_numbers(run_workers):
    def work(group):
        trainer = make(group=group)
        if group.rank == 1:
            trainer.student.last.weight.data[1] = torch.inf
        trainer.step()
        trainer.state()

    with pytest.raises(StageError, match="loss of head 3 is not finite at step 0"):
        run_workers(2, work)


# --- cost ----------------------------------------------------------------------------------------


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"hidden": (16, 8)}], ids=str)
def test_a_step_of_many_heads_makes_no_more_calls_than_of_two(options):
    counts = []
    for heads in (2, 9, 17):
        trainer = make(count=heads, **options)
        trainer.step()
        with CountOps() as ops:
            trainer.step()
        counts.append(ops.seen)
    assert counts[0] == counts[1] == counts[2]
    assert any("mm" in name for name in counts[0])


# --- schedules and the rest ----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
def test_shortest_runs(steps):
    assert train(make(steps=steps)).step_number == steps


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_teacher_is_the_students_moving_average(momentum):
    trainer = make(steps=10**9, teacher_momentum=momentum)
    before = trainer.teacher.last.weight.clone()
    trainer.step()
    student = trainer.student.last.weight.detach()
    expected = momentum * before + (1 - momentum) * student
    np.testing.assert_allclose(trainer.teacher.last.weight, expected, atol=1e-6)
    assert not torch.equal(before, student)


def test_only_the_seed_changes_the_result():
    one, two, other = (train(make(seed=s), 5).student.last.weight.detach() for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("kind", ["ward", "kmeans"])
def test_start_gives_student_and_teacher_the_same_centers_of_each_head(kind):
    trainer, other = make(start=kind), make()
    trainer.start()
    other.start()  # few clusters
    same = torch.equal(trainer.student.last.weight, other.student.last.weight)
    assert same == (kind == "kmeans")
    weight = trainer.student.last.weight
    assert torch.equal(weight, trainer.teacher.last.weight)
    assert len(weight.detach().flatten(1).unique(dim=0)) == 5
    random = make(start="random")
    before = random.student.last.weight.clone()
    random.start()
    assert torch.equal(before, random.student.last.weight)


def test_assignment_in_pieces_is_the_whole(monkeypatch):
    trainer = train(make(hidden=(16,)), 5)
    whole, seen = trainer.assign(), []
    monkeypatch.setattr(core, "ASSIGN_ROWS", 50)
    assert (trainer.assign(seen.append) == whole).all()
    assert seen == [50, 100, 150, 200, 240]
    assert whole.shape == (240, 5) and whole.dtype == np.int16
    teacher = trainer.teacher.eval()
    logits = teacher(HARD.features.float())
    assert (whole == logits.argmax(-1).T.numpy()).all()


def test_assigning_does_not_disturb_the_training():
    one, two = (train(make(hidden=(8,)), 3) for _ in range(2))
    two.assign()
    assert torch.equal(one.step(), two.step())
    same(one.state(), two.state())


def test_many_clusters_need_wider_numbers():
    trainer = make(clusters=40_000, count=1)
    with torch.no_grad():
        trainer.teacher.last.weight.zero_()
        trainer.teacher.last.bias[..., 39_999] = 1
    found = trainer.assign()
    assert found.dtype == np.int32 and (found == 39_999).all()


@pytest.mark.parametrize(("count", "world"), [(5, 1), (5, 2), (16, 3), (3, 3)])
def test_heads_are_shared_out_once_and_evenly(count, world):
    shares = [core.own_heads(count, rank, world) for rank in range(world)]
    assert sorted(n for share in shares for n in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class _Assigned:
    """A trainer whose heads have assigned every row already."""

    def __init__(self, *columns: Sequence[int]) -> None:
        self.columns = np.array(columns).T

    def assign(self, rows: np.ndarray) -> np.ndarray:
        return self.columns[rows]


def test_an_unfinished_training_is_scored_above_chance() -> None:
    ids = np.array([[1], [0], [3], [2]])
    score = HeadTrainer.consistency
    rows = np.arange(4)
    assert score(_Assigned([0, 0, 1, 1]), rows, ids) == pytest.approx(1)  # type: ignore[arg-type]
    assert score(_Assigned([0, 0, 0, 0]), rows, ids) == 0  # type: ignore[arg-type]
    assert score(_Assigned([0, 1, 0, 1]), rows, ids) == pytest.approx(-1)  # type: ignore[arg-type]
    both = _Assigned([0, 0, 1, 1], [0, 0, 0, 0])
    assert score(both, rows[2:], ids[2:]) == pytest.approx(0)  # type: ignore[arg-type]
