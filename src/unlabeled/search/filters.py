"""Conditions on the rows' columns: SQL's WHERE, answered by DuckDB over the Arrow table as it lies."""

from __future__ import annotations

from typing import Any

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
    numbered = rows.append_column("row", pa.array(np.arange(len(rows))))
    found = _query(
        f"SELECT row FROM rows WHERE ({condition})", {"rows": numbered}, rows.column_names, condition
    )
    return np.sort(found)


def rows_not_in(rows: pa.Table, others: pa.Table, columns: list[str]) -> NDArray[np.int64]:
    """Return the numbers of the rows whose values in some columns are those of no row of another table, ascending."""
    numbered = rows.select(columns).append_column("row", pa.array(np.arange(len(rows))))
    names = ", ".join(f'"{name}"' for name in columns)
    statement = f"SELECT row FROM rows ANTI JOIN others USING ({names})"
    return np.sort(_query(statement, {"rows": numbered, "others": others.select(columns)}, columns, ""))


def _query(
    statement: str, tables: dict[str, pa.Table], columns: list[str], condition: str
) -> NDArray[np.int64]:
    # A condition reads the rows and nothing else: no file, no variable of this program.
    config: dict[str, Any] = {"python_enable_replacements": "false"}
    with duckdb.connect(config=config) as connection:
        for name, table in tables.items():
            connection.register(name, table)
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        try:
            found = connection.execute(statement).fetchnumpy()["row"]
        except duckdb.Error as error:
            reason = str(error).split("\n\nLINE")[0]
            raise UserError(
                f'The condition "{condition}" does not hold together: {reason.rstrip(".")}. '
                f"Columns are {', '.join(columns)}; an example is \"label = 'cat'\"."
            ) from error
    return np.asarray(found, np.int64)
