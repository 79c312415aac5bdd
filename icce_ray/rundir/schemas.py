"""Columns of the Parquet files, and the way between them and numpy arrays.

Shapes: N images, D features, M neighbors.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from icce_ray.errors import ArtifactError

INDEX_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),  # dense, 0..N-1, in listing order
        ("uri", pa.string()),  # where the image is; for a row or a member: FILE#ROW, TAR#MEMBER
        ("label", pa.string()),  # ground truth, or null; read only by evaluate and report
        ("offset", pa.int64()),  # byte offset inside a tar, else null
        ("size", pa.int64()),  # bytes inside a tar, else null
    ]
)

QUARANTINE = "_quarantine.parquet"  # beside the embeddings
QUARANTINE_SCHEMA = pa.schema(
    [("image_id", pa.int64()), ("uri", pa.string()), ("reason", pa.string())]
)


# The first `count` of an image's list of neighbors are kept.
SELECTION_SCHEMA = pa.schema([("image_id", pa.int64()), ("count", pa.int32())])

CONSENSUS_SCHEMA = pa.schema(
    [("image_id", pa.int64()), ("cluster", pa.int32()), ("confidence", pa.float32())]
)

# What is found of each image beside its cluster, in the row order of the embeddings.
ANSWER_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("second_choice", pa.int32()),  # the next likely cluster, or -1
        ("outlier", pa.float32()),  # share of the other images that lie nearer to their neighbors
        ("duplicate_of", pa.int64()),  # image_id of the first image that shows the same, or -1
    ]
)

# The answer for users: a row for every image of the index, in its order.
LABELS_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("cluster", pa.int32()),  # -1 where the image could not be read, or was dropped
        ("name", pa.string()),  # of the cluster; null while it has none
        ("confidence", pa.float32()),  # 0..1; from here on null where there is nothing to say
        ("second_choice", pa.int32()),
        ("outlier", pa.float32()),
        ("duplicate_of", pa.string()),  # uri of the first image that shows the same
        ("reason", pa.string()),  # why the image has no cluster
    ]
)

PREDICTIONS_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("cluster", pa.int32()),  # -1 where it could not be decoded, or was not sure enough
        ("name", pa.string()),  # of the cluster; null where it has none
        ("confidence", pa.float32()),
        ("novelty", pa.float32()),  # share of the run's images that lie nearer to the others
        ("reason", pa.string()),  # why it could not be decoded, or is left out; else null
    ]
)


def as_csv(table: pa.Table) -> memoryview:
    """A table as CSV: a header, quotes where they are needed, nothing for null."""
    from pyarrow import csv

    stream = pa.BufferOutputStream()
    csv.write_csv(table, stream, csv.WriteOptions(quoting_style="needed"))
    return memoryview(stream.getvalue())


def embeddings_schema(features: int) -> pa.Schema:
    """image_id, embedding: float16[D] as Arrow's own fixed-shape tensor."""
    tensor = pa.fixed_shape_tensor(pa.float16(), [features])
    return pa.schema([("image_id", pa.int64()), ("embedding", tensor)])


def neighbors_schema(neighbors: int) -> pa.Schema:
    """image_id, ids int32[M] best first, similarity float16[M]."""
    return pa.schema(
        [
            ("image_id", pa.int64()),
            ("ids", pa.fixed_shape_tensor(pa.int32(), [neighbors])),
            ("similarity", pa.fixed_shape_tensor(pa.float16(), [neighbors])),
        ]
    )


def tensor_column(array: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Rows of a 2-d array as an Arrow fixed-shape tensor column, without a copy where possible."""
    flat = pa.array(np.ascontiguousarray(array).reshape(-1), type=kind.value_type)
    storage = pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
    return pa.ExtensionArray.from_storage(kind, storage)


def runs_code(kind: pa.DataType) -> bool:
    """Whether reading values of a type runs Python: an extension type that a library registered.

    One of Ray Data's unpickles them, whoever wrote the file.
    """
    if isinstance(kind, pa.ExtensionType):
        return True
    if pa.types.is_dictionary(kind):
        return runs_code(kind.value_type)
    return any(runs_code(kind.field(i).type) for i in range(kind.num_fields))


def to_matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A tensor, fixed-size-list, list or plain column as a numpy array of 1 or 2 dimensions."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # no chunks at all
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if runs_code(array.type):
        raise ArtifactError("this column holds Python objects, which are not read")
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        widths = np.diff(array.offsets.to_numpy())
        if len(widths) and (widths != widths[0]).any():
            raise ArtifactError("the lists of this column differ in length")
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)
    if pa.types.is_fixed_size_list(array.type):
        width = array.type.list_size
        return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), width)
    return array.to_numpy(zero_copy_only=False)
