"""Lists of images: the paths or URLs in a CSV file, or in a column of Parquet.

Relative paths are relative to the list's own folder.
Shapes: N images.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as pacsv

from icce_ray.data.formats import IMAGES, suffix_of
from icce_ray.errors import DataError, one_line, printable
from icce_ray.rundir.addresses import join_uri, split_options
from icce_ray.rundir.storage import read

# Usual names of a column of addresses, where data.image_column names none that there is.
COLUMNS = (
    *("image", "path", "uri", "url", "file", "filename", "file_name", "filepath", "file_path"),
    *("image_path", "image_url", "image_uri"),
)
MARK = "\0"  # stands for a name; none has it
WHOLE = r"^(?:[A-Za-z][A-Za-z0-9+.-]*://|/)"  # how an address that is not relative begins


def column(names: Sequence[str], asked: str) -> str | None:
    """The column of addresses: as asked for, else the first of a usual name."""
    usual = [name for name in names if name.lower() in COLUMNS]
    return asked if asked in names else next(iter(usual), None)


def addresses(values: pa.ChunkedArray, file: str) -> pa.Array:
    """Values of a column as addresses of images, string [N].

    Raises DataError: a row without one.
    """
    texts = pc.utf8_trim_whitespace(values.cast(pa.string()).combine_chunks())
    empty = pc.fill_null(pc.equal(texts, ""), True)
    if pc.any(empty).as_py():
        row = pc.index(empty, True).as_py()
        count = pc.sum(empty).as_py()
        raise DataError(
            f"{printable(file)}: {count:,} rows name no image, the first is row {row:,} (from 0)"
        )
    base, options = split_options(file)
    place = join_uri(base.rpartition("/")[0] + options, MARK)
    before, _, after = place.rpartition(MARK)
    below = pc.replace_substring_regex(texts, r"^(?:\./)+", "")
    joined = pc.binary_join_element_wise(before, below, after, "")
    return pc.if_else(pc.match_substring_regex(texts, WHOLE), texts, joined)


def read_csv(file: str, asked: str, labels: str) -> tuple[pa.Array, pa.ChunkedArray | None]:
    """Addresses of the images, and labels if there is a column of that name.

    A file of one column needs no head.

    Raises DataError: no table of text with a column of addresses.
    """
    try:
        table = _table(read(file), "\t" if suffix_of(file) == "tsv" else ",")
    except (OSError, pa.ArrowException, UnicodeError, csv.Error, StopIteration) as error:
        raise DataError(f"{printable(file)} cannot be read as CSV: {one_line(error)}") from None
    name = table.column_names[0] if table.num_columns == 1 else column(table.column_names, asked)
    if name is None:
        raise DataError(
            f"{printable(file)} has no column of paths; its columns are "
            f"{', '.join(map(printable, table.column_names))}. Name one by data.image_column=..."
        )
    if not table.num_rows:
        raise DataError(f"{printable(file)} names no images: it has no rows")
    known = table[labels] if labels in table.column_names and labels != name else None
    return addresses(table[name], file), known


def _table(data: bytes, sign: str) -> pa.Table:
    """All columns as text: a name 007.jpg or a label 1.0 is no number here."""
    first, _, _ = data.partition(b"\n")
    head = next(csv.reader([first.decode("utf-8-sig").strip("\r")], delimiter=sign))
    bare = len(head) == 1 and ("/" in head[0] or suffix_of(head[0]) in IMAGES)
    names = ["path"] if bare else [name.strip() for name in head]
    if len(set(names)) < len(names):
        raise csv.Error("two columns have the same name")
    return pacsv.read_csv(
        io.BytesIO(data),
        pacsv.ReadOptions(column_names=names, skip_rows=0 if bare else 1),
        pacsv.ParseOptions(delimiter=sign),
        pacsv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            strings_can_be_null=True,
            null_values=[""],
        ),
    )
