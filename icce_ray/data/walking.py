"""The files below a place, on any pyarrow file system, and what of them was left out.

Names are Arrow arrays: a million Python strings would take ten times as much memory.
Shapes: N files.
"""

from __future__ import annotations

import bisect
import heapq
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from icce_ray.data import omissions
from icce_ray.data.formats import suffix_of
from icce_ray.data.omissions import Omissions
from icce_ray.errors import ArtifactError, DataError, IcceError, one_line
from icce_ray.rundir.addresses import absolute, is_remote, join_uri
from icce_ray.rundir.progress import LINE_EVERY
from icce_ray.rundir.storage import Storage, may_pass

BLOCK = 65_536  # names held as Python strings at a time
MARK = "\0"  # stands for a name; none has it

Say = Callable[[str], None]

FOREIGN = {
    *("@eaDir", "__MACOSX", ".thumbnails", ".@__thumb", ".AppleDouble"),
    *("#recycle", "@Recycle", "$RECYCLE.BIN", "System Volume Information", ".Trashes"),
}

# Files that icce-ray writes into its folders, with keys that tell them from others of that name.
OURS = {
    "_manifest.json": {"stage", "fingerprint", "settings"},
    "_partial.json": {"fingerprint", "settings", "inputs"},
    "_export.json": {"run", "files"},
    "manifest.json": {"stage", "fingerprint", "settings"},  # up to version 3 of the format
    "partial.json": {"fingerprint", "settings", "inputs"},
    "status.json": {"state", "stage", "time"},
}


@dataclass(frozen=True)
class Files:
    """Files below a place, sorted by name."""

    base: str  # URI or absolute path of the place
    names: pa.Array  # string [N], relative to it; [""] where the place is itself a file
    left: Omissions = field(default_factory=Omissions)

    @property
    def is_file(self) -> bool:
        """Whether the place is itself a file."""
        return len(self.names) == 1 and not self.names[0].as_py()

    def uris(self) -> pa.Array:
        """Addresses of the files, string [N]."""
        if self.is_file:
            return pa.array([self.base])
        before, _, after = join_uri(self.base, MARK).rpartition(MARK)
        return pc.binary_join_element_wise(before, self.names, after, "")

    @cached_property
    def suffixes(self) -> pa.Array:
        """`suffix_of` each file, string [N]."""
        if self.is_file:
            return pa.array([suffix_of(self.base)])
        last = pc.replace_substring_regex(self.names, r"(?s)^.*/", "")
        after = pc.utf8_lower(pc.replace_substring_regex(last, r"(?s)^.*\.", ""))
        return pc.if_else(pc.match_substring(last, "."), after, "")

    def count(self, suffixes: Sequence[str]) -> int:
        """How many end in one of `suffixes`."""
        return pc.sum(_any_of(self.suffixes, suffixes)).as_py() or 0

    def only(self, suffixes: Sequence[str]) -> Files:
        """Those that end in one of `suffixes`; the others are left out."""
        good = _any_of(self.suffixes, suffixes)
        if not pc.all(good).as_py():
            self._leave(pc.invert(good))
        return Files(self.base, self.names.filter(good), self.left)

    def _leave(self, bad: pa.Array) -> None:
        names, ends = self.names.filter(bad), self.suffixes.filter(bad)
        counts = {one["values"]: one["counts"] for one in pc.value_counts(ends).to_pylist()}
        self.left.add_endings(counts, lambda end: names[pc.index(ends, end).as_py()].as_py())


def _any_of(values: pa.Array, wanted: Sequence[str]) -> pa.Array:
    return pc.is_in(values, value_set=pa.array(list(wanted), pa.string()))


def find_files(path: str, setting: str = "data.path", say: Say | None = None) -> Files:
    """All files below a folder, or the file itself, and what was left out.

    setting: what the user gave the path as, for messages. say: gets a line now and then.

    Raises:
        DataError: where there is nothing, or it cannot be listed.
    """
    left = Omissions()
    try:
        base = absolute(path)
        place = Storage(base)
        info = place.info()
        if info.type == pafs.FileType.File:
            return Files(base, pa.array([""]))
        if info.type == pafs.FileType.NotFound:
            raise DataError(f"{setting}={path}: there is no such file or folder")
        walk = _RemoteWalk(place, left) if is_remote(base) else _LocalWalk(place.root, left)
        blocks = [_texts(names, left) for names in _reporting(walk.blocks(), path, say)]
    except ArtifactError as error:
        raise DataError(f"{setting}={error}") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{setting}={path} cannot be listed: {one_line(error)}") from None
    names = pa.concat_arrays(blocks) if blocks else pa.array([], pa.string())
    files = Files(base, names.take(pc.sort_indices(names)), left)
    return _without_own(files, place)


def _reporting(walk: Iterator[list[str]], path: str, say: Say | None) -> Iterator[list[str]]:
    count, spoken = 0, time.monotonic()
    for names in walk:
        count += len(names)
        if say is not None and time.monotonic() - spoken >= LINE_EVERY:
            spoken = time.monotonic()
            say(f"listing {path}: {count:,} files so far")
        yield names


def _texts(names: list[str], left: Omissions) -> pa.Array:
    """Names as an Arrow array; those that are no text are left out."""
    try:
        return pa.array(names, pa.string())
    except UnicodeEncodeError:
        good = [name for name in names if _is_text(name)]
        bad = next(name for name in names if not _is_text(name))
        left.add(omissions.NOT_TEXT, bad, len(names) - len(good))
        return pa.array(good, pa.string())


def _is_text(name: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in name)


def _unwanted(name: str) -> str:
    """Why a name that is foreign or hidden is left out."""
    return omissions.FOREIGN if name in FOREIGN else omissions.HIDDEN


# --- a disk of this machine ----------------------------------------------------------------------


class _LocalWalk:
    """A walk through a folder of this machine. Links are followed.

    A folder that links lead to is entered once, after all that was found without them and by its
    shortest name: links in a circle end, and the disk's order of entries does not matter.
    """

    def __init__(self, root: str, left: Omissions) -> None:
        self.root, self.left = root, left
        self.folders = [""]
        self.links: list[tuple[int, str, str]] = []  # heap: depth, name, the real folder
        self.entered = {os.path.realpath(root)}  # the root, and what links led to

    def blocks(self) -> Iterator[list[str]]:
        """Names relative to the root, some at a time, at least every LINE_EVERY seconds."""
        names: list[str] = []
        shown = time.monotonic()
        while (folder := self._following()) is not None:
            try:
                with os.scandir(os.path.join(self.root, folder)) as entries:  # noqa: PTH118
                    for entry in entries:
                        if entry.name[0] == ".":
                            self.left.add(_unwanted(entry.name), folder + entry.name)
                        elif _is_file(entry):
                            names.append(folder + entry.name)
                            if len(names) == BLOCK:
                                yield names
                                names = []
                        else:
                            self._other(folder, entry)
            except OSError as error:
                if not folder or may_pass(error):  # what may pass must not shorten the list
                    raise
                self.left.add(omissions.LOCKED, folder)
            if time.monotonic() - shown >= LINE_EVERY:
                yield names
                names, shown = [], time.monotonic()
        yield names

    def _following(self) -> str | None:
        """The next folder to list, "" or ending in a slash; None at the end."""
        if self.folders:
            return self.folders.pop()
        while self.links:
            _, name, real = heapq.heappop(self.links)
            if real not in self.entered:
                self.entered.add(real)
                return name
            self.left.add(omissions.AGAIN, name)
        return None

    def _other(self, folder: str, entry: os.DirEntry[str]) -> None:
        """A folder, or something that cannot be listed."""
        name = folder + entry.name
        if not _is_folder(entry):
            link = entry.is_symlink()
            self.left.add(omissions.NOWHERE if link else omissions.SPECIAL, name)
        elif entry.name in FOREIGN:
            self.left.add(omissions.FOREIGN, name)
        elif not entry.is_symlink():
            self.folders.append(f"{name}/")
        else:
            self._link(f"{name}/", entry.path)

    def _link(self, name: str, path: str) -> None:
        real, inside = os.path.realpath(path), os.path.realpath(os.path.dirname(path))  # noqa: PTH120
        if f"{inside}/".startswith(f"{real.rstrip('/')}/"):
            self.left.add(omissions.AGAIN, name)
        else:
            heapq.heappush(self.links, (name.count("/"), name, real))


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself, or through a folder that cannot be read
        return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


# --- any file system -----------------------------------------------------------------------------


class _RemoteWalk:
    """The same for any file system, a folder at a time: its client lists a folder as a whole."""

    def __init__(self, place: Storage, left: Omissions) -> None:
        self.place, self.left = place, left
        self.folders = [""]

    def blocks(self) -> Iterator[list[str]]:
        """Names relative to the place, of a folder at a time."""
        while self.folders:
            folder = self.folders.pop()
            yield [folder + name for name in self._files(folder)]

    def _files(self, folder: str) -> Iterator[str]:
        parts = folder.split("/")[:-1]
        above = self.place.path(*parts).rstrip("/")
        for info in self.place.list(*parts):
            name = info.base_name
            if not name or info.path != f"{above}/{name}":
                # pyarrow takes x//a.png to lie in x again, which would never end
                self.left.add(omissions.EMPTY_NAME, f"{folder}/")
            elif name in FOREIGN or name.startswith("."):
                self.left.add(_unwanted(name), folder + name)
            elif info.type == pafs.FileType.Directory:
                self.folders.append(f"{folder}{name}/")
            elif info.type == pafs.FileType.File:
                yield name


# --- what icce-ray wrote itself ------------------------------------------------------------------


def _without_own(files: Files, place: Storage) -> Files:
    """Leave out run directories and predictions below the place; the place itself may be one."""
    own = _own_folders(files, place)
    if not own:
        return files
    keep = np.ones(len(files.names), bool)
    for folder in own:
        files.left.add(omissions.OWN, folder)
        keep[_first(files.names, folder) : _first(files.names, f"{folder[:-1]}0")] = False
    return Files(files.base, files.names.filter(pa.array(keep)), files.left)


def _own_folders(files: Files, place: Storage) -> list[str]:
    """The topmost folders that hold a file of ours, each ending in a slash."""
    texts = files.names.filter(_any_of(files.suffixes, ["json"]))
    marks = "|".join(name.removesuffix(".json") for name in OURS)
    found = texts.filter(pc.match_substring_regex(texts, rf"/(?:{marks})\.json$"))
    own: list[str] = []
    for name in sorted(found.to_pylist(), key=lambda name: name.rpartition("/")[0].count("/")):
        folder, _, mark = name.rpartition("/")
        known = any(f"{folder}/".startswith(above) for above in own)
        if not known and _is_ours(place, name, OURS[mark]):
            own.append(f"{folder}/")
    return own


def _is_ours(place: Storage, name: str, keys: set[str]) -> bool:
    try:
        content = json.loads(place.read(*name.split("/")))
    except (OSError, pa.ArrowException, IcceError, ValueError):
        return False
    return isinstance(content, dict) and keys <= content.keys()


def _first(names: pa.Array, prefix: str) -> int:
    """The first of the sorted names that does not come before `prefix`, as bytes."""
    return bisect.bisect_left(
        range(len(names)), prefix.encode(), key=lambda i: names[i].as_py().encode()
    )
