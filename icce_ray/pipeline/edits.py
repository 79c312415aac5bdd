"""edits.yaml: what a person wants of the clusters, read and checked before any work.

    of: 0f3c...                    # the consensus that it is about; optional, written by the report
    names: {0: cats, 7a: cups}     # clusters by the numbers of the run's own report
    merge: [[0, 4], [2, 5, 9]]
    split: {7: 3}                  # into three parts: 7a, 7b, 7c, the largest first
    drop: [8]                      # no cluster any more: its images get -1
    images: {photos/a.jpg: cats}   # single corrections: image, as in labels.csv, to cluster or name

Shapes: N images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from icce_ray.config.loading import near, parse_yaml, problems_in
from icce_ray.core.regroup import LETTERS, Plan, parts_of
from icce_ray.errors import ConfigError
from icce_ray.rundir.directory import RunDirectory

KEYS = ("of", "names", "merge", "split", "drop", "images")
LONGEST = 200  # letters of a name


@dataclass(frozen=True)
class Edits:
    """The content of a file. Pieces are clusters, "7", or parts of a split one, "7b"."""

    names: Mapping[str, str] = field(default_factory=dict)
    merge: list[list[str]] = field(default_factory=list)
    split: Mapping[int, int] = field(default_factory=dict)
    drop: list[str] = field(default_factory=list)
    images: Mapping[str, str] = field(default_factory=dict)
    of: str | None = None


def read(path: str | Path) -> tuple[Edits, bytes]:
    """The edits of a file, and its bytes. Raises ConfigError, which lists all problems by key."""
    try:
        text = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    tree = parse_yaml(text, str(path)) if text.strip() else {}
    problems = list(_malformed(tree))
    if problems:
        raise problems_in(str(path), problems)
    return Edits(
        {str(key): name.strip() for key, name in (tree.get("names") or {}).items()},
        [[str(piece) for piece in group] for group in tree.get("merge") or []],
        {int(key): parts for key, parts in (tree.get("split") or {}).items()},
        [str(piece) for piece in tree.get("drop") or []],
        {str(uri): str(piece) for uri, piece in (tree.get("images") or {}).items()},
        tree.get("of"),
    ), text


def _malformed(tree: Mapping[str, Any]) -> Iterator[str]:
    """What is not of the form that the file has."""
    for key in tree:
        if key not in KEYS:
            yield f"{key}: no such key; there are {', '.join(KEYS)}.{near(str(key), KEYS)}"
    kinds = {"names": dict, "merge": list, "split": dict, "drop": list, "images": dict, "of": str}
    wrong = [k for k, kind in kinds.items() if not isinstance(tree.get(k), (kind, type(None)))]
    for key in wrong:
        form = {dict: "KEY: VALUE", list: "a list, as [3, 5]", str: "text"}[kinds[key]]
        yield f"{key}: must be {form}"
    for key, name in _items(tree, "names", wrong):
        if not isinstance(name, str) or not name.strip() or len(name) > LONGEST:
            yield f"names.{key}: must be text of 1 to {LONGEST} letters; put quotes around it"
        elif not name.isprintable():
            yield f"names.{key}: must be one line"
    for number, group in enumerate(() if "merge" in wrong else tree.get("merge") or ()):
        if not isinstance(group, list) or len({str(piece) for piece in group}) < 2:
            yield f"merge[{number}]: must be a list of two or more different clusters"
    for key, parts in _items(tree, "split", wrong):
        whole = isinstance(parts, int) and not isinstance(parts, bool)
        if not str(key).isdecimal():
            yield f"split.{key}: must be the number of a cluster"
        elif not whole or not 2 <= parts <= len(LETTERS):
            yield f"split.{key}: the number of parts must be 2 to {len(LETTERS)}, not {parts!r}"


def _items(tree: Mapping[str, Any], key: str, wrong: list[str]) -> Iterator[tuple[Any, Any]]:
    if key not in wrong:
        yield from (tree.get(key) or {}).items()


def plan(edits: Edits, run: RunDirectory, source: str) -> Plan:
    """What the edits make of the clusters of a run with a finished consensus.

    source: names the file in messages.

    Raises ConfigError, which lists all problems by key: what is unknown, and contradictions.
    """
    done = run.manifest("consensus")
    if done is not None and edits.of not in (None, done.id):
        raise problems_in(
            source,
            ["of: these edits are about another consensus; make them from this run's report"],
        )
    sizes = np.bincount(run.matrix("consensus", "cluster"))
    check = _Check(edits, sizes)
    problems = [*check.problems()]
    moved: dict[int, str] = {}
    if edits.images:
        moved, unknown = _rows(edits, run)
        problems += unknown
    if problems:
        raise problems_in(source, problems)
    groups = check.groups()
    names = [check.name_of(group) for group in groups]
    placed = {row: check.piece_of(uri) for row, uri in moved.items()}
    return Plan(edits.split, groups, names, edits.drop, placed)


def _rows(edits: Edits, run: RunDirectory) -> tuple[dict[int, str], list[str]]:
    """Row of the embeddings -> image, and what is wrong with the others."""
    uris = run.read_table("index", columns=["uri"])["uri"].combine_chunks()
    asked = list(edits.images)
    found = pc.index_in(pa.array(asked, pa.string()), value_set=uris).to_pylist()
    image_ids = np.asarray(run.matrix("embeddings", "image_id"))
    rows, problems = {}, []
    for uri, image_id in zip(asked, found, strict=True):
        if image_id is None:
            problems.append(f"images.{uri}: no such image; write it as in the uri of labels.csv")
            continue
        row = int(np.searchsorted(image_ids, image_id))
        if row == len(image_ids) or image_ids[row] != image_id:
            problems.append(f"images.{uri}: it could not be read, so it can have no cluster")
            continue
        rows[row] = uri
    return rows, problems


class _Check:
    """Edits against the clusters there are. sizes: images of each cluster, [K]."""

    def __init__(self, edits: Edits, sizes: np.ndarray) -> None:
        self.edits, self.sizes = edits, sizes
        self.pieces: list[str] = []
        for cluster in np.flatnonzero(sizes).tolist():
            parts = edits.split.get(cluster)
            self.pieces += parts_of(cluster, parts) if parts else [str(cluster)]
        self.named = {name: piece for piece, name in edits.names.items()}

    def problems(self) -> Iterator[str]:
        """Every problem, as key: what is wrong."""
        edits, top = self.edits, len(self.sizes) - 1
        for cluster, parts in edits.split.items():
            if cluster > top:
                yield f"split.{cluster}: there is no such cluster; they go from 0 to {top}"
            elif parts > self.sizes[cluster]:
                yield f"split.{cluster}: it has only {self.sizes[cluster]} images"
        for key, piece in self._mentioned():
            if why := self._unknown(piece):
                yield f"{key}: {why}"
        yield from self._contradictions()
        left = len(self.groups())
        if left < 2:
            yield f"merge, drop: {left} clusters would be left; a classifier needs two"

    def _mentioned(self) -> Iterator[tuple[str, str]]:
        edits = self.edits
        yield from ((f"names.{piece}", piece) for piece in edits.names)
        for number, group in enumerate(edits.merge):
            yield from ((f"merge[{number}]", piece) for piece in group)
        yield from (("drop", piece) for piece in edits.drop)
        yield from ((f"images.{uri}", self.piece_of(uri)) for uri in edits.images)

    def _unknown(self, piece: str) -> str | None:
        """Why there is no such piece, or None."""
        if piece in self.pieces:
            return None
        match = re.fullmatch(r"(\d+)([a-z]?)", piece)
        if not match:
            return f"no cluster has the name {piece!r}.{near(piece, list(self.named))}"
        cluster = int(match[1])
        if cluster >= len(self.sizes):
            return f"there is no cluster {cluster}; they go from 0 to {len(self.sizes) - 1}"
        if not self.sizes[cluster]:
            return f"cluster {cluster} has no image"
        if parts := self.edits.split.get(cluster):
            return f"cluster {cluster} is split; say {' or '.join(parts_of(cluster, parts))}"
        return f"cluster {cluster} is not split, so it has no part {piece}"

    def _contradictions(self) -> Iterator[str]:
        edits = self.edits
        seen = dict.fromkeys(edits.drop, "drop")
        for number, group in enumerate(edits.merge):
            for piece in dict.fromkeys(group):
                if piece in seen:
                    yield f"merge[{number}]: cluster {piece} is also in {seen[piece]}"
                seen.setdefault(piece, f"merge[{number}]")
        for piece in edits.names:
            if piece in edits.drop:
                yield f"names.{piece}: the cluster is dropped, so it needs no name"
        taken: dict[str, list[str]] = {}
        for group in self.groups():
            given = dict.fromkeys(edits.names[piece] for piece in group if piece in edits.names)
            if len(given) > 1:
                yield f"merge: {' + '.join(group)} has several names: {', '.join(given)}"
            for name in given:
                taken.setdefault(name, []).append(" + ".join(group))
        for name, groups in taken.items():
            if len(groups) > 1:
                yield f"names: {', '.join(groups)} have the same name {name!r}; merge them"

    def groups(self) -> list[list[str]]:
        """The pieces of each new cluster."""
        merged = {piece for group in self.edits.merge for piece in group}
        alone = [p for p in self.pieces if p not in merged and p not in self.edits.drop]
        return [*(list(dict.fromkeys(group)) for group in self.edits.merge), *([p] for p in alone)]

    def name_of(self, group: list[str]) -> str | None:
        """The name that one of the pieces was given."""
        return next((self.edits.names[p] for p in group if p in self.edits.names), None)

    def piece_of(self, uri: str) -> str:
        """Where an image belongs: names stand for their pieces."""
        given = self.edits.images[uri]
        return given if given in self.pieces else self.named.get(given, given)
