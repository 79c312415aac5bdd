"""What a sweep keeps: artifacts that its trials share, addressed by fingerprint, and records.

A fingerprint covers a stage's settings and those of all it reads, so two trials whose fingerprints
of a stage agree have the same artifact. It is read from the run itself where the run has it, else
it lives in RUN/store/FOLDER-FINGERPRINT/. All stages run unchanged on a trial's view: a run
directory with the `places` of that trial's artifacts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from icce_ray.rundir.directory import MANIFEST, Content, RunDirectory

STORE = "store"  # folder of a run
HEADS, TRIALS = "heads", "trials"  # kinds of records


def stored(folder: str, key: str) -> str:
    """Where the store keeps an artifact."""
    return f"{STORE}/{folder}-{key}"


def may_be_own(there: Content, key: str) -> bool:
    """Whether a folder of the run has the artifact of a fingerprint, has half of it, or has nothing
    that would be lost."""
    if there.manifest is not None:
        return there.manifest.fingerprint == key
    return there.partial is None or there.partial["fingerprint"] == key


def place_copies(view: RunDirectory, names: Sequence[str], target: RunDirectory) -> None:
    """Put finished artifacts into a run of its own: hard links where they can be, else copies.

    Artifacts are never changed in place, so links are safe. Folders that hold the same stay.
    """
    for name in names:
        there, wanted = target.manifest(name), view.manifest(name)
        if there is None or wanted is None or there.id != wanted.id:
            target.delete(name)
            _copy(view, name, target)


def _copy(view: RunDirectory, name: str, target: RunDirectory) -> None:
    """The manifest last, so that an interrupted copy is not taken for a finished stage."""
    for file in [n for n in view.list(name) if n != MANIFEST] + [MANIFEST]:
        if target.is_local:
            Path(target.path(name)).mkdir(parents=True, exist_ok=True)
            _link(view.path(name, file), target.path(name, file))
        else:
            pafs.copy_files(
                view.path(name, file),
                target.path(name, file),
                source_filesystem=view.filesystem,
                destination_filesystem=target.filesystem,
            )


def _link(source: str, target: str) -> None:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)


@dataclass(frozen=True)
class Records:
    """Small files that say how the pieces of a sweep ended, so that a killed sweep knows.

    heads/FINGERPRINT.json for each training that was stopped or failed, trials/ID.json for each
    trial. Travels to Ray workers, where trials write their own.
    """

    run: RunDirectory
    folder: str

    def read(self, kind: str, name: str) -> dict[str, Any]:
        """A record; empty where there is none."""
        file = (f"{self.folder}/{kind}", f"{name}.json")
        return self.run.read_json(*file) if self.run.exists(*file) else {}

    def write(self, kind: str, name: str, **content: Any) -> None:
        """Write or replace a record."""
        self.run.write_json(content, f"{self.folder}/{kind}", f"{name}.json")

    def delete(self) -> None:
        """Remove all of them."""
        for kind in (HEADS, TRIALS):
            self.run.delete(f"{self.folder}/{kind}")
