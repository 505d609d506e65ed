"""Conditions on the rows' columns: SQL's WHERE, answered by DuckDB over the Arrow table as it lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unlabeled.errors import UserError


def rows_where(rows: pa.Table, condition: str) -> NDArray[np.int64]:
    """Return the numbers of the rows for which a condition holds, ascending.

    condition: what follows WHERE in SQL, as "label = 'cat' AND width >= 640" or "key LIKE 'holiday/%'".
    Raises UserError for a condition that is no SQL, or names a column there is not.
    """
    with _tables(rows=_numbered(rows)) as connection:
        try:
            found = connection.table("rows").filter(condition).select("row").fetchnumpy()["row"]
        except duckdb.Error as error:
            reason = " ".join(str(error).split("\n\nLINE")[0].split()).rstrip(".")
            raise UserError(
                f'The condition "{condition}" does not hold together: {reason}. '
                f"Columns are {', '.join(rows.column_names)}; an example is \"label = 'cat'\"."
            ) from error
    return np.sort(np.asarray(found, np.int64))


def rows_not_in(rows: pa.Table, others: pa.Table, columns: list[str]) -> NDArray[np.int64]:
    """Return the numbers of the rows whose values in some columns are those of no row of another table, ascending."""
    names = ", ".join(f'"{name}"' for name in columns)
    with _tables(rows=_numbered(rows.select(columns)), others=others.select(columns)) as connection:
        found = connection.execute(f"SELECT row FROM rows ANTI JOIN others USING ({names})").fetchnumpy()[
            "row"
        ]
    return np.sort(np.asarray(found, np.int64))


@contextmanager
def _tables(**tables: pa.Table) -> Iterator[duckdb.DuckDBPyConnection]:
    """Give a connection that sees these tables and nothing else: no file, no variable of this program."""
    with duckdb.connect(config={"python_enable_replacements": "false"}) as connection:
        for name, table in tables.items():
            connection.register(name, table)
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        yield connection


def _numbered(rows: pa.Table) -> pa.Table:
    return rows.append_column("row", pa.array(np.arange(len(rows))))
