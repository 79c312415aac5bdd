"""Artifacts that the trials of a sweep share, addressed by fingerprint.

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
from pathlib import Path

import pyarrow.fs as pafs

from icce_ray.rundir.directory import MANIFEST, RunDirectory

STORE = "store"


def stored(folder: str, key: str) -> str:
    """Where the store keeps an artifact."""
    return f"{STORE}/{folder}-{key}"


def may_be_own(run: RunDirectory, folder: str, key: str) -> bool:
    """Whether the run has the artifact, has half of it, or has nothing there that would be lost."""
    done, partial = run.manifest(folder), run.partial(folder)
    if done is not None:
        return done.fingerprint == key
    return partial is None or partial["fingerprint"] == key


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
