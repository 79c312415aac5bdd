"""Trains H heads by self-distillation on pairs (image, random neighbor). State in, state out.

Shapes: N rows, D features, H heads (of this worker), A all heads, B pairs, K clusters, M neighbors.
Student s and teacher t (its moving average) see both images of a pair; loss of a head =
mean over pairs of  w * ( -pmi_weight * PMI + cross_entropy * CE ), PMI and CE made symmetric in
the pair (TEMI, arXiv 2303.17896, eq. 5-8, plus ICCE's cross-entropy term).

Pairs of step i are drawn from a generator seeded by (seed, i): every worker draws the same ones
and a resumed run goes on exactly. CPU and CUDA generators give different streams, so results
repeat on one kind of device, not between kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from icce_ray.config.schema import HeadsConfig
from icce_ray.core.collective import Alone, Collective
from icce_ray.core.constants import default_batch
from icce_ray.core.heads import diversity, losses
from icce_ray.core.heads.model import Heads, head_seed, kmeans_start
from icce_ray.core.heads.optimizer import AdamW
from icce_ray.core.projection import Projection, project
from icce_ray.errors import StageError

MARGINAL_MOMENTUM = 0.9  # TEMI: running mean of the teacher's predictions


ASSIGN_ROWS = 8192  # rows per forward pass when all images are assigned


START_ROWS = 20_000  # rows that the k-means of a head's start is made on, or 50 per cluster


def own_heads(count: int, rank: int, world: int) -> list[int]:
    """Numbers of the heads that a worker owns when the split is by heads."""
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
        self.by_heads = settings.split == "heads"
        self.batch = settings.batch_size or default_batch(num_clusters)
        count = settings.count
        self.numbers = (
            own_heads(count, self.group.rank, self.group.world)
            if self.by_heads
            else list(range(count))
        )
        self.student = self._new_heads(num_clusters)
        self.teacher = self._new_heads(num_clusters).requires_grad_(False)
        self.seeds = torch.tensor([head_seed(seed, n) for n in self.numbers], device=data.device)
        self.temperature = self._each(settings.temperature).view(-1, 1, 1)
        self.beta = self._each(settings.beta).view(-1, 1, 1)
        balances = diversity.in_turn(settings.balances, self.numbers)
        self.balance = torch.tensor(balances, device=data.device).view(-1, 1)
        self.marginal = torch.full(
            (len(self.numbers), num_clusters), 1 / num_clusters, device=data.device
        )
        self.usage = self.marginal.clone()  # the same before Sinkhorn
        decayed = [p for p in self.student.parameters() if p.shape[1] > 1]
        plain = [p for p in self.student.parameters() if p.shape[1] == 1]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
        self.step_number = 0
        self._hide_features()

    def _each(self, setting: diversity.Setting) -> Tensor:
        """A setting of each of this worker's heads, [H]. One balance's heads are merged: among
        them, too, it is to differ."""
        values = diversity.in_turn(setting, self.numbers, slower_than=self.settings.balances)
        return torch.tensor(values, device=self.data.device)

    def _hide_features(self) -> None:
        """Where heads see a part of the components, make the weights of the others 0, for good."""
        share = self.settings.feature_share
        if share == 1:
            return
        components = self.data.features.shape[1]
        mask = diversity.feature_mask(share, components, self.seeds.tolist())
        mask = mask.unsqueeze(2).to(self.data.device)
        for heads in (self.student, self.teacher):
            heads.first.weight.data.mul_(mask)
        self.student.first.weight.register_hook(lambda gradient: gradient * mask)

    def _new_heads(self, num_clusters: int) -> Heads:
        s = self.settings
        features = self.data.features.shape[1]
        heads = Heads(self.numbers, features, num_clusters, s.hidden, s.batch_norm, self.seed)
        return heads.to(self.data.device)

    def start(self) -> None:
        """Give linear heads their k-means start. Not needed before `restore`."""
        if self.settings.start != "kmeans" or self.settings.hidden:
            return
        clusters = self.marginal.shape[1]
        generator = np.random.default_rng(self.seed)
        most = min(len(self.data), max(START_ROWS, 50 * clusters))
        rows = np.sort(generator.choice(len(self.data), most, replace=False))
        sample = self.data.rows(torch.from_numpy(rows)).cpu().numpy()
        for position, number in enumerate(self.numbers):
            weight = kmeans_start(sample, clusters, head_seed(self.seed, number))
            for heads in (self.student, self.teacher):
                # what a head must not see is 0 here, and stays so
                seen = heads.last.weight.data[position].any(1, keepdim=True)
                heads.last.weight.data[position] = weight.to(self.data.device) * seen

    # one step

    def step(self) -> Tensor:
        """One update. Returns the loss of each of this worker's heads, [H].

        Raises:
            StageError: for a loss that is not finite, naming step and head.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * self._lr_factor()
        x, y, used = self._draw_pairs()
        loss = self._loss(*self._views(x, y), used)
        self._check_finite(loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        if not self.by_heads:
            grads = [p.grad for p in self.student.parameters() if p.grad is not None]
            self.group.all_reduce_mean_(grads)
        self.optimizer.step()
        self._update_teacher()
        self.step_number += 1
        return loss.detach()

    def _draw_pairs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Row numbers of images and of one random neighbor each, [B]; and which of these pairs each
        head is trained on, [H, B], or None where it is all."""
        device = self.data.counts.device
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + self.step_number)
        size = (self.batch,)
        x = torch.randint(len(self.data), size, generator=generator, device=device)
        u = torch.rand(size, generator=generator, device=device)
        column = (u * self.data.counts[x]).long()
        y = self.data.ids[x, column].long()
        if not self.by_heads:
            x, y, u = (part[self.group.rank :: self.group.world] for part in (x, y, u))
        return x, y, self._used_pairs(x, u)

    def _used_pairs(self, x: Tensor, u: Tensor) -> Tensor | None:
        """1 for the pairs that a head is trained on, else 0: [H, B]. u: how far down its image's
        list a neighbor stands, 0..1."""
        images, near = self.settings.image_share, self.settings.neighbor_share
        if images == 1 and near == 1:
            return None
        used = u.unsqueeze(0) < self._each(near).unsqueeze(1)
        return (used & diversity.in_bag(x, images, self.seeds)).float()

    def _views(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities of student and teacher for both images of each pair, [H, 2B, K]; and
        the shares of the clusters that are aimed at."""
        rows = self.data.rows(torch.cat([x, y]))
        with self._autocast():
            student = self.student(rows)
            with torch.no_grad():
                teacher = self.teacher(rows) / self.temperature
        s = losses.log_softmax(student / self.temperature)
        prior = self._prior(teacher)
        if not self.settings.sinkhorn:
            return s, losses.log_softmax(teacher), prior
        group, count = None if self.by_heads else self.group, self.settings.sinkhorn_iterations
        return s, losses.sinkhorn(teacher, count, prior=prior, collective=group), prior

    @torch.no_grad()
    def _prior(self, logits: Tensor) -> Tensor | None:
        """Shares of the clusters to aim at, [H, K]; None: equal ones. logits: [H, 2B, K]."""
        s = self.settings
        if s.prior is None and set(diversity.in_turn(s.balances, range(s.count))) == {1.0}:
            return None
        self._follow(self.usage, losses.log_softmax(logits.float()).exp())
        if s.prior is None:
            return F.normalize(self.usage ** (1 - self.balance), p=1, dim=1)
        shares = torch.tensor(sorted(s.prior, reverse=True), device=logits.device)
        rank = self.usage.argsort(1, descending=True).argsort(1)  # the largest gets the largest
        return (shares / shares.sum())[rank]

    def _loss(
        self,
        log_student: Tensor,
        log_teacher: Tensor,
        prior: Tensor | None,
        used: Tensor | None,
    ) -> Tensor:
        """Mean loss per head over the batch, [H]."""
        s = self.settings
        teacher = log_teacher.exp()
        self._follow(self.marginal, teacher)
        log_x, log_y = log_student.chunk(2, dim=1)
        log_t_x, log_t_y = log_teacher.chunk(2, dim=1)
        t_x, t_y = teacher.chunk(2, dim=1)
        total = torch.zeros_like(t_x[..., 0])
        if s.pmi_weight:
            both = losses.pmi(log_x, log_t_y, self.marginal, self.beta, prior) + losses.pmi(
                log_y, log_t_x, self.marginal, self.beta, prior
            )
            total = total - s.pmi_weight / 2 * both
        if s.cross_entropy:
            both = losses.cross_entropy(log_x, t_y) + losses.cross_entropy(log_y, t_x)
            total = total + s.cross_entropy / 2 * both
        if s.instance_weights:
            total = total * self._instance_weights(t_x, t_y)
        if used is None:
            return total.mean(1)
        return (total * used).sum(1) / used.sum(1).clamp_min(1)

    @torch.no_grad()
    def _instance_weights(self, t_x: Tensor, t_y: Tensor) -> Tensor:
        """TEMI's w: mean over *all* heads of the probability that a pair shares a cluster, [B].

        Split by heads, agreements are gathered and summed in head order, so that the result does
        not depend on the number of workers: the only exchange of a step, A x B numbers.
        """
        agreement = losses.pair_agreement(t_x, t_y)
        if not self.by_heads or self.group.world == 1:
            return agreement.mean(0)
        return self._gather_heads(agreement).mean(0)

    def _gather_heads(self, mine: Tensor) -> Tensor:
        """Rows of all heads, in head order; workers may own unequal numbers of heads."""
        world, count = self.group.world, self.settings.count
        most = math.ceil(count / world)
        padded = mine.new_zeros(most, *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = self.group.all_gather(padded)
        full = torch.stack(parts, 1).flatten(0, 1)  # head number = position * world + rank
        return full[:count]

    @torch.no_grad()
    def _follow(self, running: Tensor, teacher: Tensor) -> None:
        """Move a running mean, [H, K], towards that of the batch's probabilities, [H, 2B, K]."""
        mean = teacher.mean(1)
        if not self.by_heads:
            self.group.all_reduce_mean_([mean])
        running.lerp_(mean, 1 - MARGINAL_MOMENTUM)

    @torch.no_grad()
    def _update_teacher(self) -> None:
        momentum = self.teacher_momentum()
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.lerp_(new, 1 - momentum)

    def teacher_momentum(self) -> float:
        """Rises from its first value to 1 by a cosine (TEMI, after BYOL)."""
        start = self.settings.teacher_momentum
        done = self.step_number / max(1, self.steps)
        return 1 - (1 - start) * (math.cos(math.pi * done) + 1) / 2

    def _lr_factor(self) -> float:
        warmup = max(1, round(self.settings.warmup * self.steps))
        if self.step_number < warmup:
            return (self.step_number + 1) / warmup
        done = (self.step_number - warmup) / max(1, self.steps - warmup)
        return (math.cos(math.pi * min(1.0, done)) + 1) / 2

    def _autocast(self) -> torch.autocast:
        wanted = self.settings.precision == "bfloat16"
        return torch.autocast(self.data.device.type, torch.bfloat16, enabled=wanted)

    def _check_finite(self, loss: Tensor) -> None:
        if torch.isfinite(loss).all():
            return
        bad = [self.numbers[i] for i in (~torch.isfinite(loss)).nonzero().flatten().tolist()]
        raise StageError(
            f"the loss of head {bad[0]} is not finite at step {self.step_number} "
            f"({len(bad)} of {len(self.numbers)} heads of this worker). Lower heads.lr (now "
            f"{self.settings.lr:g}), or use heads.precision=float32."
        )

    # results

    @torch.inference_mode()
    def assign(
        self, on_rows: Callable[[int], None] | None = None, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """Cluster of all rows, or of `rows`, by each own head's teacher, int16/int32 [N, H]."""
        clusters = self.marginal.shape[1]
        dtype = np.int16 if clusters <= np.iinfo(np.int16).max else np.int32
        chosen = torch.arange(len(self.data)) if rows is None else torch.from_numpy(rows)
        out = np.empty((len(chosen), len(self.numbers)), dtype)
        self.teacher.eval()
        for start in range(0, len(out), ASSIGN_ROWS):
            index = chosen[start : start + ASSIGN_ROWS]
            with self._autocast():
                logits = self.teacher(self.data.rows(index))
            out[start : start + len(index)] = logits.argmax(-1).T.cpu().numpy()
            if on_rows:
                on_rows(start + len(index))
        self.teacher.train()
        return out

    def consistency(self, rows: np.ndarray, ids: np.ndarray) -> float:
        """How much more often a row and its neighbor share a cluster than by chance.

        Mean over own heads of (share - chance) / (1 - chance), chance being sum of p_k^2; at most
        1, and 0 for a head with one cluster. rows: int [S]; ids: int [S, M], row numbers.
        """
        used, where = np.unique(np.concatenate([rows, ids.ravel()]), return_inverse=True)
        clusters = self.assign(rows=used)
        own, near = where[: len(rows)], where[len(rows) :].reshape(ids.shape)
        found = []
        for column in clusters.T:
            share = float((column[own][:, None] == column[near]).mean())
            chance = float(((np.bincount(column[own]) / len(own)) ** 2).sum())
            found.append((share - chance) / (1 - chance) if chance < 1 else 0.0)
        return float(np.mean(found))

    # state

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as named tensors; the first axis of most is the head."""
        out = {f"student.{k}": v for k, v in self.student.state_dict().items()}
        out |= {f"teacher.{k}": v for k, v in self.teacher.state_dict().items()}
        names = [name for name, _ in self.student.named_parameters()]
        by_parameter = dict(zip(names, self.student.parameters(), strict=True))
        for name, parameter in by_parameter.items():
            slot = self.optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in slot:
                    out[f"optimizer.{key}.{name}"] = slot[key]
        out |= {"marginal": self.marginal, "usage": self.usage}
        out["numbers"] = torch.tensor(self.numbers)
        out["step"] = torch.tensor(self.step_number)
        # copies: on a CPU these would go on changing with the next step
        return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in out.items()}

    def restore(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from the states of all workers of an earlier run, however many they were."""
        merged = merge_states(states)
        order = {int(n): i for i, n in enumerate(merged["numbers"].tolist())}
        missing = [n for n in self.numbers if n not in order]
        if missing:
            raise StageError(f"the checkpoint lacks heads {missing[:5]}")
        pick = torch.tensor([order[n] for n in self.numbers])
        mine = {k: v[pick] if _per_head(k) else v for k, v in merged.items()}
        self.student.load_state_dict(_below(mine, "student."))
        self.teacher.load_state_dict(_below(mine, "teacher."))
        self.marginal.copy_(mine["marginal"])
        self.usage.copy_(mine["usage"])
        self.step_number = int(mine["step"])
        for name, parameter in self.student.named_parameters():
            keys = ("exp_avg", "exp_avg_sq")
            slots = {
                k: mine[f"optimizer.{k}.{name}"] for k in keys if f"optimizer.{k}.{name}" in mine
            }
            if slots:
                on_device = {k: v.to(self.data.device) for k, v in slots.items()}
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step_number)),
                    **on_device,
                }


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


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
