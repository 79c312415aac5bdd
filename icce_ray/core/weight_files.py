"""Files of weights: their tensors by name, without running what a pickle asks for."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icce_ray.errors import ConfigError, one_line

SAVE = "Save the state dict alone: torch.save(model.state_dict(), FILE)"
AGAIN = "Download it again"

# What a download may have left instead of weights, by how the file begins.
_OTHERS = (
    (rb"\s*<(!doctype html|html|head|\?xml)", f"an HTML page, not weights. {AGAIN}, from a link "
     "to the file itself"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the weights. Fetch them: git lfs pull"),
    (rb"\s*[{\[]\s*[\"{\[\]}]", f"JSON text, not weights. {AGAIN}, from a link to the file itself"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd", "a compressed file. Unpack it first"),
    (rb"\x89HDF", f"an HDF5 file, as of Keras. {SAVE}"),
)  # fmt: skip
_BEGINNING = 4096  # bytes
_CUT = r"central directory|EOF|[Ii]ncomplete|not fully covered|buffer of \d+ bytes|invalid header"

# Wrappers of a module that torch puts into the names of what is below them.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DEEPEST = 8  # dictionaries within one another


class _Ignored:
    """Stands for settings and scores that lie beside the weights; keeps nothing of them."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


# Harmless types in many a checkpoint. Not even theirs is the code that runs, but that of _Ignored.
_HARMLESS: list[Any] = [
    (_Ignored, "argparse.Namespace"),
    (_Ignored, "numpy.dtype"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
]


def check(path: Path) -> None:
    """Refuse what can be seen from its beginning to be no file of weights. Raises ConfigError."""
    try:
        with path.open("rb") as stream:
            start = stream.read(_BEGINNING)
    except FileNotFoundError:
        raise ConfigError(f"backbone.weights={path}: there is no such file on this node") from None
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise ConfigError(f"backbone.weights={path} cannot be read: {reason}") from None
    if not start:
        raise _wrong(path, f"is empty. {AGAIN}")
    for pattern, what in _OTHERS:
        if re.match(pattern, start, re.IGNORECASE):
            raise _wrong(path, f"is {what}")


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors or PyTorch file, on the CPU, by their names joined by dots.

    Raises ConfigError: not such a file, truncated, or a pickle of more than plain data.
    """
    check(path)
    return dict(_tensors(_read(path), set()))


def _tensors(found: Any, seen: set[int], place: str = "", depth: int = 0) -> Iterator[Any]:
    """Names and tensors of nested dictionaries; of one that occurs twice, once."""
    if isinstance(found, Tensor):
        yield _WRAPPERS.sub("", place), found
    elif isinstance(found, Mapping) and depth < _DEEPEST and id(found) not in seen:
        seen.add(id(found))
        for key, value in found.items():
            yield from _tensors(value, seen, f"{place}.{key}" if place else str(key), depth + 1)


def _read(path: Path) -> Any:
    try:
        if _is_safetensors(path):
            from safetensors.torch import load_file

            return load_file(str(path))
        # A stream, since torch judges files by their names.
        with path.open("rb") as stream, _silent(), torch.serialization.safe_globals(_HARMLESS):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling of damaged files raises almost anything
        raise _wrong(path, _what_is_wrong(path, error)) from None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters is raised
        yield


def _is_safetensors(path: Path) -> bool:
    """By its beginning, the length of a header and the header: names lie."""
    with path.open("rb") as stream:
        return stream.read(9)[8:] == b"{"


def _what_is_wrong(path: Path, error: Exception) -> str:
    text = str(error) or type(error).__name__
    if named := re.search(r"GLOBAL (\S+)", text):
        return f"holds {named[1]}, which is not loaded, since it may run code. {SAVE}"
    if "TorchScript" in text:
        return f"is a TorchScript program. {SAVE}"
    if re.search(_CUT, text):
        return f"is truncated or damaged. {AGAIN}"
    with path.open("rb") as stream:  # zipfile.is_zipfile raises for some damaged files
        zipped = stream.read(2) == b"PK"
    if zipped:
        return f"is a zip archive without weights. {SAVE}"
    cause = re.search(r"WeightsUnpickler error:\s*(.*)", text)  # without torch's own advice
    return (
        "is neither a safetensors file nor a state dict that torch reads with weights_only "
        f"({(cause[1] if cause else one_line(error, 150)).strip()}). {SAVE}"
    )


def _wrong(path: Path, what: str) -> ConfigError:
    return ConfigError(f"backbone.weights={path} {what}")
