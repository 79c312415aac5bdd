"""Images or embeddings in place of a config: what is one, and the run directory's name for it."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from icce_ray.data.formats import DATA, PARQUET, VECTORS, suffix_of
from icce_ray.errors import ArtifactError, printable
from icce_ray.rundir.addresses import absolute, split_options, split_pattern

BESIDE, SHOWN = 1000, 8  # names looked at, and shown, beside a path that leads nowhere
LONGEST = 100  # characters of a run's name that are its data's; a folder has at most 255 bytes


def data_group(source: str) -> dict[str, Any] | None:
    """The group `data` for a path or address of images or embeddings; None for anything else."""
    ending = suffix_of(source)
    if not source or ending in ("yaml", "yml"):
        return None
    if "://" not in source:
        folder, pattern = split_pattern(source)
        matched = bool(pattern) and there(folder, Path.is_dir)
        if not (matched or there(source, Path.is_dir) or (ending in DATA and is_file(source))):
            return None
    return {"embeddings" if ending in VECTORS or _holds_vectors(source, ending) else "path": source}


def there(path: str | Path, kind: Callable[[Path], bool] = Path.exists) -> bool:
    """Whether there is a file or folder of a kind; False for what can be no path."""
    try:
        return kind(Path(path).expanduser())
    except (OSError, RuntimeError, ValueError):  # a name too long, an unknown home
        return False


def is_file(path: str | Path) -> bool:
    """Whether there is a file."""
    return there(path, Path.is_file)


def _holds_vectors(source: str, ending: str) -> bool:
    if ending not in PARQUET:
        return False
    from icce_ray.data import embeddings  # imports pyarrow, which takes long

    return embeddings.are_in(source)


def data_address(tree: Mapping[str, Any]) -> str:
    """Where a plain tree of settings has its images or embeddings; "" if nowhere."""
    data = tree.get("data")
    given = data if isinstance(data, Mapping) else {}
    return str(given.get("path") or given.get("embeddings") or "")


def data_name(address: str) -> str:
    """A name that no other data have: their own where they lie in the working directory, as `runs`
    does, else one with a hash of the whole address."""
    place = split_options(address)[0].rstrip("/")
    try:
        whole = absolute(address).rstrip("/")
    except ArtifactError:  # which the validation reports
        whole = place
    name = place.rpartition("/")[2]
    parents = (Path(place).absolute().parent, Path(whole).parent)
    plain = len(name) <= LONGEST and re.fullmatch(r"[\w-][\w.-]*", name)
    if "://" not in address and Path.cwd() in parents and plain:
        return name
    place = split_options(split_pattern(whole)[0])[0].rstrip("/")
    name = re.sub(r"[^\w.-]+", "-", place.rpartition("/")[2])[:LONGEST].strip("-.")
    digest = hashlib.sha256(whole.encode(errors="surrogatepass")).hexdigest()
    return f"{name or 'data'}-{digest[:8]}"


def around(path: Path) -> tuple[str, list[str]]:
    """What there is where a path leads nowhere: as a sentence, and as paths beside it."""
    if there(path) and not there(path, Path.is_dir):
        return f"{printable(str(path))} is a pipe, a socket or a device, not a file.", []
    folder = path.parent
    while not there(folder, Path.is_dir) and folder != folder.parent:
        folder = folder.parent
    try:
        names = sorted(found.name for found in itertools.islice(folder.iterdir(), BESIDE))
    except OSError:
        return "", []
    visible = [printable(name) for name in names if not name.startswith(".")]
    listed = ", ".join(visible[:SHOWN]) + (", ..." if len(visible) > SHOWN else "")
    beside = [str(folder / name) for name in names] if folder == path.parent else []
    return f"{printable(str(folder.absolute()))} holds {listed or 'nothing'}.", beside
