"""Conditions on rows: against plain Python, and what they may not do."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from unlabeled import UserError
from unlabeled.search.filters import rows_not_in, rows_where

ROWS = pa.concat_tables(
    [
        pa.table({"key": [f"a/{n}.jpg" for n in part], "label": [None if n % 3 else "it's" for n in part],
                  "width": list(part)})
        for part in (range(700), range(700, 1000))
    ]
)  # fmt: skip


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("label = 'it''s'", lambda n: n % 3 == 0),
        ("label <> 'x'", lambda n: n % 3 == 0),  # SQL: null is neither equal nor unequal
        ("label IS NULL", lambda n: n % 3 != 0),
        ("width BETWEEN 690 AND 710 OR key = 'a/3.jpg'", lambda n: 690 <= n <= 710 or n == 3),
        ("key LIKE 'a/9_.jpg'", lambda n: 90 <= n <= 99),
        ("width % 2 = 0 -- a remark\n", lambda n: n % 2 == 0),
        ("width < 0", lambda n: False),
    ],
)
def test_conditions_are_those_of_sql(condition: str, expected) -> None:
    assert rows_where(ROWS, condition).tolist() == [n for n in range(1000) if expected(n)]


@pytest.mark.parametrize(
    "condition", ["labl = 'x'", "label =", "1 = 1) OR (", "width = 'wide'", "", "true; DROP TABLE rows"]
)
def test_what_is_no_condition_is_one_line(condition: str) -> None:
    with pytest.raises(UserError, match=r"Columns are key, label, width"):
        rows_where(ROWS, condition)


def test_a_condition_reads_the_rows_and_nothing_else(tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("key\na/3.jpg\n")
    for condition in (
        f"key IN (SELECT key FROM read_csv('{secret}'))",
        f"key IN (SELECT key FROM '{secret}')",
        "width IN (SELECT width FROM ROWS_OF_TEST)",
    ):
        with pytest.raises(UserError):
            rows_where(ROWS, condition)
    assert os.listdir(tmp_path) == ["secret.csv"]  # noqa: PTH208


def test_rows_that_another_table_lacks() -> None:
    others = ROWS.filter(pa.array(np.arange(1000) % 5 == 0))
    assert rows_not_in(ROWS, others, ["key", "width"]).tolist() == [n for n in range(1000) if n % 5]
    assert rows_not_in(others, ROWS, ["key"]).tolist() == []
    assert rows_not_in(others, ROWS.slice(0, 0), ["key"]).tolist() == list(range(200))
