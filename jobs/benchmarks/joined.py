"""Two embeddings of the same images: what each finds, and ways to use both.

Labels are looked at when a clustering is made. Shapes: N images, D features, M neighbors, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.tables import markdown, spread
from icce_ray.config.loading import check
from icce_ray.config.schema import MethodConfig
from icce_ray.core import method
from icce_ray.core.device import default_device
from icce_ray.core.evaluation import truth
from icce_ray.core.unit_rows import unit_rows

CHUNK = 256  # rows whose lists are compared at a time: [CHUNK, M, M] at once
Say = Callable[[str], None]
Lists = tuple[np.ndarray, np.ndarray]  # ids int32 [N, M] best first, similarity float16 [N, M]


def compare(
    spaces: tuple[np.ndarray, np.ndarray], codes: np.ndarray, seeds: Sequence[int], say: Say
) -> list[dict[str, Any]]:
    """Accuracy in % of the consensus by each way and seed.

    spaces: float16 [N, D] each, unit rows; codes: int [N], -1 for no label.
    """
    clusters, device, known = int(codes.max()) + 1, default_device(), codes >= 0
    one, two = spaces
    both = unit_rows(np.concatenate(spaces, axis=1))
    tree = {"num_classes": clusters, "consensus": {"keep": 1}}  # also of more heads than usual
    searched = check(MethodConfig, tree)
    lists = [method.search(x, searched, device) for x in (one, two, both)]
    ranked = by_rank(lists[0][0], lists[1][0])
    found = []
    for seed in seeds:
        chosen = check(MethodConfig, {**tree, "seed": seed})

        def heads(x: np.ndarray, near: Lists, chosen: Any = chosen) -> np.ndarray:
            counts = method.select(*near, chosen).counts
            return method.train_heads(x, near[0], counts, chosen, device)

        own = [heads(x, near) for x, near in zip((one, two, both), lists, strict=True)]
        ways = {
            "the first": (own[0], lists[0]),
            "the second": (own[1], lists[1]),
            "both as one (default)": (own[2], lists[2]),
            "heads of each, merged": (np.hstack(own[:2]), lists[2]),
            "heads of each and of both as one, merged": (np.hstack(own), lists[2]),
            "neighbors by mean rank, heads of both as one": (heads(both, ranked), ranked),
            "the same neighbors, heads of each, merged": (
                np.hstack([heads(one, ranked), heads(two, ranked)]),
                ranked,
            ),
        }
        for way, (assignments, near) in ways.items():
            merged = method.merge(assignments, near[0], chosen, device)
            accuracy = 100 * truth.accuracy(codes[known], np.asarray(merged.labels)[known])
            found.append({"way": way, "seed": seed, "consensus": accuracy})
            say(f"seed {seed}, {way}: {accuracy:.1f} %")
    return found


def by_rank(first: np.ndarray, second: np.ndarray) -> Lists:
    """Neighbors in order of their mean rank in two lists of ids [N, M]; one that a list does not
    have has rank M there. The similarity is 1 for the first place of both, 0 for none."""
    rows, most = first.shape
    ids = np.empty_like(first)
    similarity = np.empty(first.shape, np.float16)
    for begin in range(0, rows, CHUNK):
        part = slice(begin, begin + CHUNK)
        a, b = first[part], second[part]
        same = a[:, :, None] == b[:, None, :]
        place = np.arange(most)
        of_a = place + np.where(same.any(2), same.argmax(2), most)
        of_b = np.where(same.any(1), 2 * most, place + most)  # those in both are counted once
        total = np.hstack([of_a, of_b])
        order = np.argsort(total, axis=1, kind="stable")[:, :most]
        ids[part] = np.take_along_axis(np.hstack([a, b]), order, 1)
        similarity[part] = 1 - np.take_along_axis(total, order, 1) / (2 * most)
    return ids, similarity


def table(found: Sequence[dict[str, Any]]) -> str:
    """A line for each way: mean and deviation over the seeds, and each seed."""
    lines = []
    for way in dict.fromkeys(one["way"] for one in found):
        scores = [one["consensus"] for one in found if one["way"] == way]
        lines.append([way, spread(scores), ", ".join(f"{score:.1f}" for score in scores)])
    return markdown(["way", "consensus", "by seed"], lines)
