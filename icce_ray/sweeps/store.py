"""Artifacts that the trials of a sweep share, addressed by fingerprint.

A fingerprint covers a stage's settings and those of all it reads, so two trials whose fingerprints
of a stage agree have the same artifact. It is read from the run itself where the run has it, else
it lives in RUN/store/FOLDER-FINGERPRINT/. All stages run unchanged on a `View`: a run directory
whose folders lie where one trial's artifacts are.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.fs as pafs

from icce_ray.rundir.directory import MANIFEST, RunDirectory

STORE = "store"


class View(RunDirectory):
    """A run directory some of whose folders lie elsewhere in it. Travels to Ray workers."""

    def __init__(self, uri: str, places: Mapping[str, str]) -> None:
        """places: folder as stages name it -> where it lies, both relative to the run."""
        super().__init__(uri)
        self.places = dict(places)

    def __reduce__(self) -> tuple[type[View], tuple[str, dict[str, str]]]:
        return View, (self.uri, self.places)

    def place(self, folder: str) -> str:
        """Where a folder, or a file in it, lies; the longest name that fits decides."""
        parts = folder.split("/")
        for length in range(len(parts), 0, -1):
            found = self.places.get("/".join(parts[:length]))
            if found is not None:
                return "/".join([found, *parts[length:]])
        return folder

    def path(self, *parts: str) -> str:
        return super().path(self.place("/".join(parts))) if parts else super().path()

    def address(self, *parts: str) -> str:
        return super().address(self.place("/".join(parts))) if parts else super().address()

    def matrix_name(self, folder: str) -> str:
        """The place's name, so that trials do not remove each other's node files."""
        return self.place(folder).replace("/", "-")


def stored(folder: str, print_: str) -> str:
    """Where the store keeps an artifact."""
    return f"{STORE}/{folder.replace('/', '-')}-{print_}"


def may_be_own(run: RunDirectory, folder: str, print_: str) -> bool:
    """Whether the run has the artifact, has half of it, or has nothing there that would be lost."""
    done, partial = run.manifest(folder), run.partial(folder)
    if done is not None:
        return done.fingerprint == print_
    return partial is None or partial["fingerprint"] == print_


def place_copies(view: View, names: Sequence[str], target: RunDirectory) -> None:
    """Put finished artifacts into a run of its own: hard links where they can be, else copies.

    Artifacts are never changed in place, so links are safe. Folders that hold the same stay.
    """
    for name in names:
        there, wanted = target.manifest(name), view.manifest(name)
        if there is None or wanted is None or there.id != wanted.id:
            target.delete(name)
            _copy(view, name, target)


def _copy(view: View, name: str, target: RunDirectory) -> None:
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
