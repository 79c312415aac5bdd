"""The errors a user may meet. The command line prints each as one line, never as a traceback."""

from __future__ import annotations


class IcceError(Exception):
    """Base of every expected error: what happened, where, and how to fix it, in its message."""

    exit_code = 1


class ConfigError(IcceError):
    """A setting is unknown, of the wrong type, out of range, or does not fit the data."""

    exit_code = 2


class DataError(IcceError):
    """The input images, embeddings or labels cannot be used."""

    exit_code = 3


class ArtifactError(IcceError):
    """A file of the run directory is missing, damaged, or was made with other settings."""

    exit_code = 4


class StageError(IcceError):
    """A stage failed while it ran: workers lost for good, a loss not finite, a full disk."""

    exit_code = 5


class StorageError(StageError):
    """A storage refuses access, lacks the bucket, or fails in another way that will not pass."""


class NoAnswerError(StorageError):
    """A storage has not answered for so long that waiting for it was given up."""


def one_line(error: BaseException, most: int = 300) -> str:
    """The message of an error of another library as one line of at most `most` characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def printable(text: str) -> str:
    """A name as one line: what a terminal would act on, or is no text, is written as an escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """A message of several lines, each of them `printable`."""
    return "\n".join(printable(line) for line in text.split("\n"))
