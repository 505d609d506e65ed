"""A feature table as one file for other tools: Parquet, CSV or npz."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unlabeled.errors import UserError, writing
from unlabeled.features.table import SCHEMA, FeatureTable, open_table
from unlabeled.weights.files import replacing

FORMATS = ("parquet", "csv", "npz")
CHUNK = 8192  # rows held at once


def convert(table: str | Path | FeatureTable, to: str, out: str | Path) -> Path:
    """Write a feature table of vectors as one file, a chunk of rows at a time.

    Args:
        table: a table or its folder.
        to: parquet: the rows with a column `vector` of fixed-size lists; csv: the rows with columns v0, v1, ...;
            npz: arrays vectors (N, D) and one of each column of the rows.
        out: the file.

    Raises:
        UserError: the format is unknown, the table holds grids, or the file cannot be written.
    """
    table, out = open_table(table), Path(out).expanduser()
    if to not in FORMATS:
        raise UserError(f"A feature table is written as {', '.join(FORMATS)}, not {to}.")
    if table.is_grid:
        raise UserError(
            f"{table.path} holds grids of {table.identity['kind']}; only tables of vectors are converted."
        )
    if out.is_dir():
        raise UserError(f"{out} is a folder; --out names the file to write.")
    with writing(out), replacing(out) as part:
        if to == "npz":
            _write_npz(table, part)
        else:
            _write_rows(table, to, part)
    return out


def _write_rows(table: FeatureTable, to: str, part: Path) -> None:
    width, kind = table.dimension, pa.from_numpy_dtype(table.dtype)
    if to == "parquet":
        schema = SCHEMA.append(pa.field("vector", pa.list_(kind, width)))
        with pq.ParquetWriter(part, schema, use_dictionary=SCHEMA.names) as writer:
            for _, rows, vectors in table.chunks(CHUNK):
                values = pa.array(np.ascontiguousarray(vectors).reshape(-1))
                column = pa.FixedSizeListArray.from_arrays(values, width)
                writer.write_table(rows.append_column("vector", column).cast(schema))
        return
    names = [f"v{number}" for number in range(width)]
    schema = pa.schema([*SCHEMA, *((name, pa.float32()) for name in names)])
    with pyarrow.csv.CSVWriter(part, schema) as writer:
        for _, rows, vectors in table.chunks(CHUNK):
            columns = [pa.array(np.ascontiguousarray(column)) for column in vectors.T.astype(np.float32)]
            writer.write_table(pa.table([*rows.columns, *columns], schema=schema))


def _write_npz(table: FeatureTable, part: Path) -> None:
    with zipfile.ZipFile(part, "w", allowZip64=True) as archive:
        with archive.open("vectors.npy", "w", force_zip64=True) as file:
            header = {
                "descr": np.lib.format.dtype_to_descr(table.dtype),
                "fortran_order": False,
                "shape": (len(table), table.dimension),
            }
            np.lib.format.write_array_header_2_0(file, header)
            for _, _, vectors in table.chunks(CHUNK):
                file.write(np.ascontiguousarray(vectors).tobytes())
        for name in table.rows.column_names:
            column: NDArray[Any] = table.rows.column(name).to_numpy()
            if column.dtype == object:
                column = np.array([text or "" for text in column], np.str_)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, column, allow_pickle=False)
