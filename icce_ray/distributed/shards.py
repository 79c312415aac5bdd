"""Results by image number -> files of consecutive numbers, each written once it is complete.

A killed run loses only the shards in flight. The driver writes them, in whatever order results
come, so that a file never has two writers.
Shapes: N images.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from icce_ray.distributed.stream import Columns
from icce_ray.errors import ArtifactError, DataError, StageError, printable
from icce_ray.rundir.directory import RunDirectory
from icce_ray.rundir.schemas import QUARANTINE_SCHEMA

LAYOUT = "_layout.json"  # ids per shard: a restart keeps the first run's


class Quarantine:
    """Images that cannot be used, with the reason."""

    def __init__(self, total: int, max_fraction: float, place: str) -> None:
        self.total, self.max_fraction, self.place = total, max_fraction, place
        self.ids: list[int] = []
        self.reasons: list[str] = []

    def add(self, ids: np.ndarray, reasons: np.ndarray) -> None:
        """Take in bad images; ones that were seen before (Ray may repeat work) count once."""
        known = set(self.ids)
        for number, reason in zip(ids.tolist(), reasons.tolist(), strict=True):
            if number not in known:
                self.ids.append(number)
                self.reasons.append(reason)

    @property
    def too_many(self) -> bool:
        """Whether the run must stop. One bad image may be, unless max_fraction is 0."""
        allowed = max(1.0, self.max_fraction * self.total) if self.max_fraction else 0.0
        return len(self.ids) > allowed

    def table(self, uris: pa.ChunkedArray) -> pa.Table:
        """QUARANTINE_SCHEMA, by id; `uris` are those of all images, by id."""
        order = np.argsort(self.ids, kind="stable")
        ids = pa.array(np.array(self.ids, np.int64)[order])
        reasons = pa.array([self.reasons[i] for i in order], pa.string())
        return pa.Table.from_arrays([ids, uris.take(ids), reasons], schema=QUARANTINE_SCHEMA)

    def error(self, uris: pa.ChunkedArray) -> DataError:
        """Why the run stops."""
        first = self.table(uris).slice(0, 3).to_pylist()
        shown = "; ".join(f"{printable(row['uri'])}: {row['reason']}" for row in first)
        return DataError(
            f"{len(self.ids):,} of {self.total:,} images ({len(self.ids) / self.total:.1%}) cannot "
            f"be used, more than embed.max_bad_fraction={self.max_fraction:g} allows: {shown}. "
            f"Those seen so far are listed in {self.place}. Repair or remove them, or raise "
            "embed.max_bad_fraction; finished work is kept."
        )


class Shards:
    """Rows by id -> Parquet files of consecutive ids, each written when all its rows are in.

    Args:
        total: N.
        size: ids per file.
        build: columns of a file's rows, by id -> its table.
        read: a file's name and its first and last-plus-one id -> its columns with image_id; ids it
            lacks (quarantined ones) are tried again. May raise ArtifactError: it is redone.
    """

    def __init__(
        self,
        run: RunDirectory,
        folder: str,
        total: int,
        size: int,
        build: Callable[[Columns], pa.Table],
        read: Callable[[str, int, int], Columns],
    ) -> None:
        self.run, self.folder, self.total, self.size = run, folder, total, size
        self.build, self.read = build, read
        self.have = np.zeros(total, bool)  # rows in files
        self.seen = np.zeros(total, bool)  # rows that came in, or are in files
        self._pieces: dict[int, list[Columns]] = {}
        self._written: set[int] = set()

    def name(self, shard: int) -> str:
        return f"part-{shard:05d}.parquet"

    def resume(self) -> None:
        """Take in the files there are; ones that cannot be read, or hold other ids, are redone."""
        names = set(self.run.list(self.folder, ".parquet"))
        for shard in range(math.ceil(self.total / self.size)):
            if self.name(shard) not in names:
                continue
            with contextlib.suppress(ArtifactError, KeyError):
                ids = self._read(shard)["image_id"]
                if (ids // self.size == shard).all() and (ids < self.total).all():
                    self.have[ids] = True
                    self._written.add(shard)
        self.seen |= self.have

    def _read(self, shard: int) -> Columns:
        start = shard * self.size
        return self.read(self.name(shard), start, min(start + self.size, self.total))

    @classmethod
    def open(
        cls,
        run: RunDirectory,
        folder: str,
        total: int,
        size: int,
        build: Callable[[Columns], pa.Table],
        read: Callable[[str, int, int], Columns],
        resumed: bool,
    ) -> Shards:
        """New shards; or those of an earlier run, of the size it chose, with what it finished."""
        if resumed and run.exists(folder, LAYOUT):
            size = run.read_json(folder, LAYOUT)["shard_size"]
        run.write_json({"shard_size": size}, folder, LAYOUT)
        shards = cls(run, folder, total, size, build, read)
        if resumed:
            shards.resume()
        return shards

    @property
    def missing(self) -> np.ndarray:
        """Ids still to be done."""
        return np.flatnonzero(~self.seen)

    @property
    def rows(self) -> int:
        """Rows in files."""
        return int(self.have.sum())

    def add(self, columns: Columns, keep: np.ndarray) -> int:
        """Take in results with image_id; those with keep=False have arrived but get no row.

        Returns how many were new: Ray may repeat work after a lost node.
        """
        ids = columns["image_id"]
        fresh = ~self.seen[ids]
        self.seen[ids] = True
        for shard in np.unique(ids[fresh] // self.size):
            chosen = fresh & keep & (ids // self.size == shard)
            piece = {name: values[chosen] for name, values in columns.items()}
            self._pieces.setdefault(int(shard), []).append(piece)
            if self.seen[shard * self.size : (shard + 1) * self.size].all():
                self._write(int(shard))
        return int(fresh.sum())

    def _write(self, shard: int) -> None:
        pieces = self._pieces.pop(shard)
        if shard in self._written:
            if not sum(len(piece["image_id"]) for piece in pieces):
                return  # what was bad before still is
            pieces.append(self._read(shard))
        joined = {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}
        order = np.argsort(joined["image_id"], kind="stable")
        columns = {name: values[order] for name, values in joined.items()}
        self.run.write_table(self.build(columns), self.folder, self.name(shard))
        self.have[columns["image_id"]] = True
        self._written.add(shard)

    def check(self) -> None:
        """Raises StageError where rows never came back."""
        _check_complete(self.missing, self.total)


class Arrays:
    """Results by image number, kept in memory: for what is small, and made anew when lost."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seen = np.zeros(total, bool)  # rows that came in
        self.kept = np.zeros(total, bool)  # rows with values
        self.columns: dict[str, np.ndarray] = {}  # [N, ...] each; zeros where nothing was kept

    @property
    def missing(self) -> np.ndarray:
        """Ids still to be done."""
        return np.flatnonzero(~self.seen)

    def add(self, columns: Columns, keep: np.ndarray) -> int:
        """As `Shards.add`."""
        ids = columns["image_id"]
        count = int((~self.seen[ids]).sum())
        self.seen[ids] = True
        self.kept[ids[keep]] = True
        for name, values in columns.items():
            if name not in self.columns:
                self.columns[name] = np.zeros((self.total, *values.shape[1:]), values.dtype)
            self.columns[name][ids[keep]] = values[keep]
        return count

    def check(self) -> None:
        """Raises StageError where rows never came back."""
        _check_complete(self.missing, self.total)


def _check_complete(missing: np.ndarray, total: int) -> None:
    if len(missing):
        raise StageError(
            f"{len(missing):,} of {total:,} images never came back from the workers, the first is "
            f"number {missing[0]}. Run the same command again: it resumes from here."
        )
