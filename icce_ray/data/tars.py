"""Members of uncompressed WebDataset tars, by a scan of their headers.

Joined archives (cat a.tar b.tar) are read to the end. Damage is an error: a reader that stops at it
would take a part for the whole.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from icce_ray.data import omissions
from icce_ray.data.formats import IMAGES
from icce_ray.data.omissions import Omissions
from icce_ray.data.reading import member_uri
from icce_ray.errors import DataError, one_line, printable
from icce_ray.rundir.storage import Storage

BUFFER = 1 << 23  # bytes read at once while an object store's tar streams by
BLOCK = tarfile.BLOCKSIZE
END = 2 + tarfile.RECORDSIZE // BLOCK - 1  # most blocks of zeros that writers put at an end


@dataclass
class Members:
    """The images of a tar, in its order."""

    uris: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)  # of the members KEY.cls
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    left: Omissions = field(default_factory=Omissions)


def scan(uri: str) -> Members:
    """Find the images of a tar. Raises DataError: it is damaged, truncated or no tar."""
    try:
        return Storage(uri).attempt(lambda files, path: _scan(files, path, uri))
    except (OSError, tarfile.TarError, pa.ArrowException) as error:
        raise DataError(
            f"{printable(uri)} cannot be read as a tar: {one_line(error)}. Write or fetch it again"
        ) from None


def _scan(filesystem: pafs.FileSystem, path: str, uri: str) -> Members:
    """A local file is sought through; an object store's is streamed, since a request per header
    would take longer than to read all of it."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        with filesystem.open_input_file(path) as file:
            return _Scan(uri, file).members()
    with filesystem.open_input_stream(path, buffer_size=BUFFER) as stream:
        return _Scan(uri, _Forward(stream)).members()


class _Forward:
    """A stream as a file that can only be sought forward."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self.stream, self.position = stream, 0

    def read(self, size: int) -> bytes:
        data: bytes = self.stream.read(size)
        self.position += len(data)
        return data

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> None:
        while (missing := position - self.position) > 0 and self.read(min(missing, BUFFER)):
            pass


class _Scan:
    """One pass over the headers of a tar."""

    def __init__(self, uri: str, stream: Any) -> None:
        self.uri, self.stream = uri, stream
        self.found, self.keys = Members(), list[str]()
        self.labels: dict[str, str] = {}
        self.others: Counter[str] = Counter()  # by ending
        self.examples: dict[str, str] = {}

    def members(self) -> Members:
        for member in self._headers():
            self._take(member)
        self.found.labels = [self.labels.get(key) for key in self.keys]
        self.found.left.add_endings(self.others, self.examples.__getitem__)
        return self.found

    def _take(self, member: tarfile.TarInfo) -> None:
        address, (key, suffix) = f"{self.uri}#{member.name}", _key(member.name)
        if not member.isreg() or member.issparse():  # a sparse one may claim any size
            if not member.isdir():
                self.found.left.add("links and special files in tars", address)
        elif suffix in IMAGES:
            self.keys.append(key)
            self.found.uris.append(member_uri(self.uri, member.name))
            self.found.offsets.append(member.offset_data)
            self.found.sizes.append(member.size)
        elif suffix == "cls":
            self.labels[key] = self._content(member).decode("utf-8-sig", "replace").strip()
        elif PurePosixPath(member.name).name.startswith("."):
            self.found.left.add(omissions.HIDDEN, address)
        else:
            self.others[suffix] += 1
            self.examples.setdefault(suffix, address)

    def _content(self, member: tarfile.TarInfo) -> bytes:
        self.stream.seek(member.offset_data)
        return self.stream.read(member.size)

    def _headers(self) -> Iterator[tarfile.TarInfo]:
        """Members of all joined archives. Raises TarError for anything else between them."""
        tar: Any = tarfile.TarFile(fileobj=self.stream)  # reads the first header
        member, zeros = tar.next(), 0
        if member is None:
            tar.offset, zeros = BLOCK, 1
        while True:
            if member is not None:
                yield member
                tar.members = []  # else tarfile keeps all it has seen
            self._go_to(tar.offset)
            try:  # not tar.next(): it takes a damaged header for the end
                member = tarfile.TarInfo.fromtarfile(tar)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                member, zeros = None, zeros + 1
                tar.offset += BLOCK
                tar.pax_headers = {}  # those of an archive end with it
                continue
            except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
                return self._judge(zeros, last=True)
            except tarfile.HeaderError as error:
                raise tarfile.ReadError(f"damaged at byte {tar.offset:,}: {error}") from None
            self._judge(zeros)
            zeros = 0

    def _go_to(self, offset: int) -> None:
        if offset == self.stream.tell():
            return
        self.stream.seek(offset - 1)
        if not self.stream.read(1):
            raise tarfile.ReadError("unexpected end of data")

    def _judge(self, zeros: int, last: bool = False) -> None:
        """What so many blocks of zeros mean: an end has at least two, and hardly more than END."""
        if zeros == 1 and not last:
            raise tarfile.ReadError(f"damaged before byte {self.stream.tell():,}: a block of zeros")
        if zeros > END:
            self.found.left.add("tars that may lack members (long runs of zeros)", self.uri)
        elif last and not zeros:
            self.found.left.add("tars that may lack members (no end mark)", self.uri)


def _key(name: str) -> tuple[str, str]:
    """WebDataset's convention: the sample's key is all before the base name's first dot."""
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return str(path.parent / stem), suffix.lower() if stem else ""
