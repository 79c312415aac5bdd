"""What a listing left out, so that "N of N images" never hides a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypedDict

from icce_ray.data.formats import UNDECODABLE, dotted
from icce_ray.errors import printable

HIDDEN = "hidden files and folders"
FOREIGN = "folders of other programs (thumbnails, metadata, trash)"
NOWHERE = "links that lead nowhere or cannot be followed"
AGAIN = "links to folders that are listed already"
LOCKED = "folders that cannot be read"
SPECIAL = "pipes, sockets and devices"
NOT_TEXT = "names that are not valid UTF-8"
EMPTY_NAME = "object names with an empty part (//), which cannot be read"
OWN = "folders that icce-ray wrote"
UNMATCHED = "files that the pattern does not match"
MOST = 5  # endings that a reason names


class Omission(TypedDict):
    """A reason, how many entries it left out, and the first of them."""

    reason: str
    count: int
    example: str


class Omissions:
    """What was left out, by reason."""

    def __init__(self) -> None:
        self._found: dict[str, Omission] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count what was left out; the first example is kept."""
        shown = printable(example)
        one = self._found.setdefault(reason, Omission(reason=reason, count=0, example=shown))
        one["count"] += count

    def take(self, other: Omissions) -> None:
        """Add those of another part of the listing."""
        for one in other.results():
            self.add(one["reason"], one["example"], one["count"])

    def add_endings(self, counts: Mapping[str, int], example: Callable[[str], str]) -> None:
        """Count files by their endings. example: the name of a file with a given ending."""
        ends = sorted(counts, key=lambda end: (-counts[end], end))
        groups: dict[str, list[str]] = {
            "images of formats that cannot be decoded, in ": [e for e in ends if e in UNDECODABLE],
            "files ending in ": [e for e in ends if e and e not in UNDECODABLE],
            "files without an ending": [e for e in ends if not e],
        }
        for reason, group in groups.items():
            if group:
                total = sum(counts[end] for end in group)
                self.add(f"{reason}{_named(group)}", example(group[0]), total)

    def results(self) -> list[Omission]:
        """For a manifest, the most frequent first."""
        return sorted(self._found.values(), key=lambda one: -one["count"])

    def __bool__(self) -> bool:
        return bool(self._found)

    def __str__(self) -> str:
        """What was found but not taken: 3 files ending in .txt (a.txt); 1 link ..."""
        parts = (f"{o['count']:,} {o['reason']} ({o['example']})" for o in self.results())
        return "; ".join(parts)


def _named(endings: list[str]) -> str:
    if not endings[0]:
        return ""
    return dotted(endings[:MOST]) + (", ..." if len(endings) > MOST else "")
