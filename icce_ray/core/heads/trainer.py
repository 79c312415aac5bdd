"""Trains H heads by self-distillation on pairs (image, random neighbor). State in, state out.

Shapes: N rows, D features, P components, H heads (of this worker), A all heads, B pairs,
K clusters, M neighbors. Student s and teacher t (its moving average) see both images of a pair.
The loss of a head is the mean over pairs of  w * (-PMI + cross_entropy * CE),  PMI and CE made
symmetric in the pair (TEMI, arXiv 2303.17896, eq. 5-8, plus ICCE's cross-entropy term).

Work is split by heads: worker w of W owns heads w, w + W, ... Every worker draws the same pairs,
from a generator seeded by the step, and gathers only the agreement of each head on each pair. So
any number of workers trains the same heads, and a resumed run repeats an undisturbed one. CPU and
CUDA generators give different streams: results repeat on one kind of device, not between kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icce_ray.config.schema import HeadsConfig
from icce_ray.core.collective import Alone, Collective
from icce_ray.core.constants import START_ROWS, default_batch
from icce_ray.core.evaluation.labelfree import neighbor_consistency
from icce_ray.core.heads import closed_form
from icce_ray.core.heads.closed_form import Running, Target, Terms
from icce_ray.core.heads.model import Heads, with_ones
from icce_ray.core.heads.start import (
    FEWEST_PER_CLUSTER,
    SMOOTHED,
    TREES,
    evened,
    kmeans_start,
    smoothed,
    ward_start,
    ward_tree,
)
from icce_ray.core.neighbors import reference_k
from icce_ray.core.optimizer import AdamW
from icce_ray.core.projection import Projection, project
from icce_ray.core.sampling import seed_of
from icce_ray.core.schedule import cosine_rise, warmup_cosine
from icce_ray.core.tensors import below
from icce_ray.errors import StageError

WEIGHT_DECAY = 1e-4  # AdamW's, as TEMI's
WARMUP = 0.05  # share of the steps over which the learning rate rises
CHECK_EVERY = 50  # steps between looks at the losses: each look waits for the device
ASSIGN_ROWS = 8192  # rows per forward pass when all images are assigned


def own_heads(count: int, rank: int, world: int) -> list[int]:
    """Numbers of the heads that a worker owns."""
    return list(range(count))[rank::world]


@dataclass(frozen=True)
class Data:
    """What heads are trained on, on the worker's device or (features) on the host."""

    features: Tensor  # float16 [N, P], projected
    ids: Tensor  # int32 [N, M], row numbers, best first
    counts: Tensor  # int32 [N], valid neighbors per row, at least 1
    device: torch.device

    @classmethod
    def of(
        cls,
        embeddings: np.ndarray,
        ids: np.ndarray,
        counts: np.ndarray,
        projection: Projection,
        device: torch.device,
    ) -> Data:
        """From embeddings [N, D] and their neighbors; arrays may be memory-mapped."""
        lists, valid = (torch.from_numpy(np.array(one)).to(device) for one in (ids, counts))
        return cls(project(embeddings, projection, device), lists, valid, device)

    def rows(self, index: Tensor) -> Tensor:
        """Features of some rows, float32 on the device. [B] -> [B, P]."""
        picked = self.features[index.to(self.features.device)]
        return picked.to(self.device, non_blocking=True).float()

    def __len__(self) -> int:
        return len(self.counts)


class HeadTrainer:
    """One worker's share of the training."""

    def __init__(
        self,
        data: Data,
        settings: HeadsConfig,
        num_clusters: int,
        seed: int,
        steps: int,
        collective: Collective | None = None,
    ) -> None:
        self.data, self.settings, self.seed, self.steps = data, settings, seed, steps
        self.group: Collective = collective or Alone()
        self.batch = settings.batch_size or default_batch(num_clusters)
        self.count = settings.count_of(num_clusters)
        self.numbers = own_heads(self.count, self.group.rank, self.group.world)
        self.student = self._new_heads(num_clusters)
        self.teacher = self._new_heads(num_clusters).requires_grad_(False)
        balances = [settings.balance_of(number, num_clusters) for number in self.numbers]
        self.clusters = num_clusters
        even = torch.full((len(self.numbers), num_clusters), 1 / num_clusters, device=data.device)
        self.running = Running(marginal=even, usage=even.clone())
        sizes = None
        if settings.prior is not None:
            sizes = torch.tensor(sorted(settings.prior, reverse=True), device=data.device)
            sizes = sizes / sizes.sum()
        self.target = Target(torch.tensor(balances, device=data.device).view(-1, 1), sizes)
        self.terms = Terms(settings.beta, settings.cross_entropy, settings.sinkhorn_iterations)
        self.linear = not settings.hidden
        self.half = settings.precision == "auto" and data.device.type == "cuda"
        kernels = closed_form.fused(data.device, num_clusters) if self.half else None
        self.objective = kernels or closed_form.loss_and_gradient
        # Logits in half precision are for the kernels, which compute in float32 inside.
        self.dtype = torch.float32
        if self.half and not self.linear:
            self.dtype = torch.bfloat16
        elif kernels:
            self.dtype = torch.float16
        decayed = [p for p in self.student.parameters() if p.shape[1] > 1]
        plain = [p for p in self.student.parameters() if p.shape[1] == 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = AdamW(groups, lr=settings.lr, weight_decay=WEIGHT_DECAY)
        self.generator = torch.Generator(data.counts.device)
        self.step_number = 0
        self._unchecked: list[Tensor] = []  # losses [H] of the last steps

    def _new_heads(self, num_clusters: int) -> Heads:
        s = self.settings
        features = self.data.features.shape[1]
        heads = Heads(self.numbers, features, num_clusters, s.hidden, s.batch_norm, self.seed)
        return heads.to(self.data.device)

    def start(self) -> None:
        """Give linear heads their first clusters. Not needed before `restore`."""
        clusters = self.clusters
        kind = self.settings.start_of(clusters)
        if kind == "random":
            return
        generator = np.random.default_rng(seed_of(self.seed, "start rows"))
        most = min(len(self.data), max(START_ROWS, 50 * clusters))
        rows = np.sort(generator.choice(len(self.data), most, replace=False))
        sample, smooth = self.data.rows(torch.from_numpy(rows)), None
        trees: dict[int, Tensor] = {}
        if kind == "ward" and most >= FEWEST_PER_CLUSTER * clusters:
            smooth = self._smoothed(rows).to(sample.device).float()
            for tree in sorted({number % TREES for number in self.numbers}):
                trees[tree] = ward_tree(smooth, clusters, seed_of(self.seed, "tree", tree))
        for position, number in enumerate(self.numbers):
            seed = seed_of(self.seed, "start", number)
            if smooth is None:
                weight = kmeans_start(sample, clusters, seed)
            else:
                weight = ward_start(sample, smooth, trees[number % TREES], seed)
            for heads in (self.student, self.teacher):
                heads.last.weight.data[position] = weight

    def _smoothed(self, rows: np.ndarray) -> Tensor:
        """Some rows averaged with their neighbors, float16."""
        ids, counts = self.data.ids, self.data.counts
        near = reference_k(SMOOTHED, len(ids), self.clusters, ids.shape[1])
        every = smoothed(evened(self.data.features, ids), ids[:, :near], counts)
        return every[torch.from_numpy(rows).to(every.device)]

    # one step

    def step(self, want_loss: bool = True) -> Tensor | None:
        """One update. Returns the loss of each of this worker's heads, [H], where it is wanted.

        Without a loss a step is faster; weights that are not finite are noticed all the same.

        Raises:
            StageError: for a loss that is not finite, naming step and head.
        """
        factor = warmup_cosine(self.step_number, self.steps, WARMUP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * factor
        loss = self._backward(torch.cat(self._draw_pairs()), want_loss)
        self.optimizer.step()
        self._update_teacher()
        self.step_number += 1
        self._note(self._signs() if loss is None else loss)
        return loss

    def _draw_pairs(self) -> tuple[Tensor, Tensor]:
        """Row numbers of images and of one random neighbor each, int64 [B] each."""
        device = self.data.counts.device
        seed = seed_of(self.seed, "pairs", self.step_number)
        generator = self.generator.manual_seed(seed)
        size = (self.batch,)
        x = torch.randint(len(self.data), size, generator=generator, device=device)
        u = torch.rand(size, generator=generator, device=device)
        column = (u * self.data.counts[x]).long()
        return x, self.data.ids[x, column].long()

    def _backward(self, images: Tensor, want_loss: bool = True) -> Tensor | None:
        """Set the gradients of the student. images: row numbers [2B]. Returns the losses [H]."""
        rows = self.data.rows(images).to(self.dtype)
        inverse = 1 / self.settings.temperature
        weigh = self._pair_weights if self.settings.instance_weights else None
        about = (self.terms, self.target, self.running, weigh, want_loss)
        if self.linear:
            with torch.no_grad():
                x = with_ones(rows) * inverse
                student, teacher = (heads.last.logits(x) for heads in (self.student, self.teacher))
                loss, gradient, weights = self.objective(student, teacher, *about)
            self.student.last.set_gradients(x, gradient, self._row_weights(weights))
            return loss
        with self._autocast():
            student = self.student(rows) * inverse
            with torch.no_grad():
                teacher = self.teacher(rows) * inverse
        with torch.no_grad():
            loss, gradient, weights = self.objective(student.detach().clone(), teacher, *about)
            gradient *= self._row_weights(weights).unsqueeze(1)
        self.optimizer.zero_grad()
        student.backward(gradient)
        return loss

    def _row_weights(self, pair_weights: Tensor | None) -> Tensor:
        """What the gradient of each row counts in the mean over the batch, [2B]."""
        if pair_weights is None:
            pair_weights = torch.ones(self.batch, device=self.data.device)
        return torch.cat([pair_weights, pair_weights]) / (2 * self.batch)

    def _pair_weights(self, agreement: Tensor) -> Tensor:
        """TEMI's w: mean over *all* heads of the probability that a pair shares a cluster, [B].

        Agreements of the own heads, [H, B], are gathered and averaged in head order, so that the
        result does not depend on the number of workers: the only exchange of a step, A x B numbers.
        """
        if self.group.world > 1:
            agreement = self._gather_heads(agreement)
        return agreement.mean(0)

    def _gather_heads(self, mine: Tensor) -> Tensor:
        """Rows of all heads, in head order; workers may own unequal numbers of heads."""
        world = self.group.world
        most = math.ceil(self.count / world)
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = self.group.all_gather(padded)
        full = torch.stack(parts, 1).flatten(0, 1)  # head number = position * world + rank
        return full[: self.count]

    @torch.no_grad()
    def _update_teacher(self) -> None:
        momentum = self.teacher_momentum()
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.lerp_(new, 1 - momentum)

    def teacher_momentum(self) -> float:
        """Rises from its first value to 1 by a cosine (TEMI, after BYOL)."""
        return cosine_rise(self.settings.teacher_momentum, self.step_number, self.steps)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.data.device.type, torch.bfloat16, enabled=self.half)

    def _signs(self) -> Tensor:
        """A number of each head that is not finite where its gradient is not, [H]."""
        layer = self.student.last
        gradient = layer.weight.grad if layer.bias is None else layer.bias.grad
        assert gradient is not None
        return gradient.sum((1, 2))

    def _note(self, loss: Tensor) -> None:
        """Keep a step's loss [H], and look at those kept now and then."""
        self._unchecked.append(loss)
        if len(self._unchecked) >= CHECK_EVERY or self.step_number >= self.steps:
            self._check_finite()

    def _check_finite(self) -> None:
        """Raise StageError for the first loss since the last look that is not finite."""
        if not self._unchecked:
            return
        bad = (~torch.isfinite(torch.stack(self._unchecked))).cpu()
        first = self.step_number - len(self._unchecked)
        self._unchecked = []
        if not bad.any():
            return
        row = int(bad.any(1).nonzero()[0])
        heads = [self.numbers[i] for i in bad[row].nonzero().flatten().tolist()]
        raise StageError(
            f"the loss of head {heads[0]} is not finite at step {first + row} "
            f"({len(heads)} of {len(self.numbers)} heads of this worker). Lower heads.lr (now "
            f"{self.settings.lr:g}), or use heads.precision=float32."
        )

    # results

    @torch.inference_mode()
    def assign(
        self, on_rows: Callable[[int], None] | None = None, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """Cluster of all rows, or of `rows`, by each own head's teacher, int16/int32 [N, H]."""
        kind = torch.int16 if self.clusters <= torch.iinfo(torch.int16).max else torch.int32
        chosen = torch.arange(len(self.data)) if rows is None else torch.from_numpy(rows)
        chosen = chosen.to(self.data.features.device)  # else each part would wait for its numbers
        out = torch.empty(len(chosen), len(self.numbers), dtype=kind, device=self.data.device)
        self.teacher.eval()
        for start in range(0, len(out), ASSIGN_ROWS):
            index = chosen[start : start + ASSIGN_ROWS]
            x = self.data.rows(index).to(self.dtype)
            with self._autocast():
                logits = self.teacher.last.logits(with_ones(x)) if self.linear else self.teacher(x)
            out[start : start + len(index)] = logits.argmax(-1).T
            if on_rows:
                on_rows(start + len(index))
        self.teacher.train()
        return out.cpu().numpy()

    def consistency(self, rows: np.ndarray, ids: np.ndarray) -> float:
        """Mean over own heads of `labelfree.neighbor_consistency`.

        rows: int [S]; ids: int [S, M], row numbers of their neighbors.
        """
        used, where = np.unique(np.concatenate([rows, ids.ravel()]), return_inverse=True)
        clusters = self.assign(rows=used)
        own, near = where[: len(rows)], where[len(rows) :].reshape(ids.shape)
        found = [neighbor_consistency(column[own], column[near]) for column in clusters.T]
        return float(np.mean(found))

    # state

    def state(self) -> dict[str, Tensor]:
        """Everything needed to resume, as named tensors; the first axis of most is the head."""
        self._check_finite()
        out = {f"student.{k}": v for k, v in self.student.state_dict().items()}
        out |= {f"teacher.{k}": v for k, v in self.teacher.state_dict().items()}
        names = [name for name, _ in self.student.named_parameters()]
        by_parameter = dict(zip(names, self.student.parameters(), strict=True))
        for name, parameter in by_parameter.items():
            slot = self.optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in slot:
                    out[f"optimizer.{key}.{name}"] = slot[key]
        out |= vars(self.running)
        out["numbers"] = torch.tensor(self.numbers)
        out["step"] = torch.tensor(self.step_number)
        # copies: on a CPU the next step would change them
        return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in out.items()}

    def restore(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Resume from the states of all workers of an earlier run, of whatever number."""
        merged = merge_states(states)
        order = {int(n): i for i, n in enumerate(merged["numbers"].tolist())}
        missing = [n for n in self.numbers if n not in order]
        if missing:
            raise StageError(f"the checkpoint lacks heads {missing[:5]}")
        pick = torch.tensor([order[n] for n in self.numbers])
        mine = {k: v[pick] if _per_head(k) else v for k, v in merged.items()}
        self.student.load_state_dict(below(mine, "student."))
        self.teacher.load_state_dict(below(mine, "teacher."))
        for name, mean in vars(self.running).items():
            mean.copy_(mine[name])
        self.step_number = int(mine["step"])
        for name, parameter in self.student.named_parameters():
            keys = ("exp_avg", "exp_avg_sq")
            slots = {
                # In the parameter's own layout, which a fused optimizer asks for.
                k: torch.empty_like(parameter).copy_(mine[f"optimizer.{k}.{name}"])
                for k in keys
                if f"optimizer.{k}.{name}" in mine
            }
            if slots:
                step = torch.tensor(float(self.step_number), device=self.data.device)
                self.optimizer.state[parameter] = {"step": step, **slots}


def merge_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the workers' states along the heads; heads that several hold are taken once."""
    first = dict(states[0])
    seen = set(first["numbers"].tolist())
    parts = [first]
    for state in states[1:]:
        if not seen & set(state["numbers"].tolist()):
            parts.append(dict(state))
            seen |= set(state["numbers"].tolist())
    return {
        key: torch.cat([part[key] for part in parts]) if _per_head(key) else value
        for key, value in first.items()
    }


def _per_head(key: str) -> bool:
    return key not in ("step", "history_steps")
