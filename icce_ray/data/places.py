"""A folder that exported files go to, and names that any file system takes.

Names come from addresses of images, which may hold anything: `..`, line breaks, or one name twice.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from icce_ray.errors import ArtifactError, ConfigError, StageError, one_line, printable
from icce_ray.rundir.addresses import absolute, is_remote
from icce_ray.rundir.storage import Storage, full_disk

MARK = "_export.json"  # whose it is; a listing of images leaves out the folder of such a file
FILES = ".icce-ray-files"  # names of the files, one a line, each listed before it is made
LONGEST = 120  # bytes of a name without its ending: systems take 255, and more may be added
BAD = re.compile(r"[^\w .,()+\-=@&]")  # but for letters of any script, digits and a few marks


def safe_name(text: str) -> str:
    """The last part of an address as a plain name: no folder, no dots around it, nothing that a
    file system refuses. "image" where nothing is left."""
    last = re.split(r"[/\\]", text)[-1]
    name = BAD.sub("_", last).strip(". ")
    stem, dot, ending = name.rpartition(".")
    if not dot or len(ending) > 10:
        stem, dot, ending = name, "", ""
    stem = stem.encode()[:LONGEST].decode(errors="ignore").strip(". ")
    return f"{stem or 'image'}{dot}{ending}"


class Names:
    """Names that differ without their endings, in a file system that ignores case as well."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}

    def give(self, folder: str, wanted: str) -> str:
        """The name, or with a number where a file of that name is in the folder already."""
        stem, dot, ending = wanted.rpartition(".")
        if not dot:
            stem, ending = wanted, ""
        key = f"{folder}/{stem}".casefold()
        number, name = self._taken.get(key, 0), stem
        while f"{folder}/{name}".casefold() in self._taken:
            number += 1
            name = f"{stem}-{number + 1}"
        self._taken[key] = number
        self._taken.setdefault(f"{folder}/{name}".casefold(), 0)
        return f"{name}{dot}{ending}"


class Place:
    """A local folder that holds one export and nothing else."""

    def __init__(self, out: str, run_uri: str) -> None:
        """Name the folder and see whether it may be used; nothing is changed yet.

        Raises:
            ConfigError: it is not a local folder.
            ArtifactError: it holds something else than an earlier export of the same run.
        """
        if is_remote(out):
            raise ConfigError(f"out={printable(out)} must be a local folder: exports are for tools")
        try:
            self.folder = Path(absolute(out))
        except ArtifactError as error:
            raise ConfigError(f"out={error}") from None
        self.run_uri = run_uri
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"out={printable(out)} must be a local folder, not a file")
        used = self.folder.exists() and any(self.folder.iterdir())
        if used and self._owner() != run_uri:
            raise ArtifactError(
                f"{self.folder} holds other files, or the export of another run. Choose another "
                "out=..., or remove it."
            )

    def _owner(self) -> str | None:
        try:
            return str(json.loads((self.folder / MARK).read_text(encoding="utf-8"))["run"])
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def clear(self) -> None:
        """Remove the files of the earlier export; others that lie among them stay."""
        try:
            if self._owner() is not None and (self.folder / FILES).is_file():
                for line in (self.folder / FILES).read_text(encoding="utf-8").splitlines():
                    self._remove(self.folder / line)
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / MARK).write_text(json.dumps({"run": self.run_uri, "files": FILES}))
            (self.folder / FILES).write_text("")
        except OSError as error:
            raise self._explain(error, self.folder) from None

    def _remove(self, path: Path) -> None:
        inside = path.parent.resolve().is_relative_to(self.folder) and ".." not in path.parts
        if inside and (path.is_symlink() or path.is_file()):
            path.unlink()
            for above in path.parents:
                if above == self.folder or any(above.iterdir()):
                    break
                above.rmdir()

    def announce(self, names: list[str]) -> None:
        """List files that are about to be made, so that the next export can remove them."""
        with (self.folder / FILES).open("a", encoding="utf-8") as stream:
            stream.writelines(f"{name}\n" for name in names)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file, which was announced, whole or not at all."""
        self._refuse_used(name)
        try:
            Storage(str(self.folder / name)).write(data)
        except OSError as error:
            raise self._explain(error, self.folder / name) from None

    def put(self, name: str, data: bytes) -> None:
        """Write an image, which was announced. Faster than `write`: a killed export is redone."""
        self._make(name, lambda path: path.write_bytes(data))

    def copy(self, name: str, source: str) -> None:
        """Copy a local file. The name was announced."""
        self._make(name, lambda path: shutil.copyfile(source, path))

    def link(self, name: str, source: str) -> None:
        """A symbolic link to a local file. The name was announced."""
        self._make(name, lambda path: path.symlink_to(source))

    def _make(self, name: str, work: Callable[[Path], Any]) -> None:
        self._refuse_used(name)
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            work(path)
        except OSError as error:
            raise self._explain(error, path) from None

    def _refuse_used(self, name: str) -> None:
        path = self.folder / name
        if path.is_symlink() or path.exists():
            raise ArtifactError(f"{path} is no file of the earlier export: move it away")

    def _explain(self, error: OSError, path: Path) -> Exception:
        return full_disk(error, str(path)) or StageError(
            f"{path} cannot be written: {one_line(error)}. Choose another out=..."
        )
