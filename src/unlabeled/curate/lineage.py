"""What each step decided of each image, and the table that says it of all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from unlabeled.atomic import replacing
from unlabeled.curate.blocks import Integers
from unlabeled.errors import writing

ROWS = pa.schema(
    [
        ("index", pa.int64()),  # of the image, in DATA
        ("dropped", pa.bool_()),  # else the row only says something of an image that is kept
        ("reason", pa.string()),
        ("value", pa.float32()),  # that was measured: a figure, bits, a cosine
        ("limit", pa.float32()),  # that it was held against
        ("other_index", pa.int64()),  # of the other image, where that is of DATA
        ("other", pa.string()),  # key of the other image, or a cluster
    ]
)


@dataclass(frozen=True)
class Outcome:
    """What a step decided.

    Attributes:
        step: its name.
        rows: columns of ROWS, of the images that it drops or has something to say of.
        figures: what it measured, as JSON types, for the report.
    """

    step: str
    rows: pa.Table
    figures: dict[str, Any]

    @property
    def dropped(self) -> Integers:
        """Indices of the images it drops."""
        found: Integers = self.column("index")[self.column("dropped")]
        return found

    def column(self, name: str) -> NDArray[Any]:
        """A column as an array."""
        values: NDArray[Any] = self.rows.column(name).to_numpy()
        return values

    def reasons(self) -> dict[str, int]:
        """How many images are dropped for each reason, most first."""
        texts = self.column("reason")[self.column("dropped")].astype(str)
        names, counts = np.unique(texts, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {str(names[place]): int(counts[place]) for place in order}


def rows_of(
    index: ArrayLike,
    reason: str | Sequence[str],
    *,
    dropped: ArrayLike = True,
    value: ArrayLike = np.nan,
    limit: ArrayLike = np.nan,
    other_index: ArrayLike | None = None,
    other: Sequence[str | None] | None = None,
) -> pa.Table:
    """Return rows of an outcome; single values are those of all."""
    indices = np.asarray(index, np.int64)
    n = len(indices)

    def spread(values: ArrayLike, kind: Any) -> NDArray[Any]:
        return np.broadcast_to(np.asarray(values, kind), (n,))

    columns = {
        "index": indices,
        "dropped": spread(dropped, bool),
        "reason": [reason] * n if isinstance(reason, str) else list(reason),
        "value": spread(value, np.float32),
        "limit": spread(limit, np.float32),
        "other_index": np.full(n, -1, np.int64) if other_index is None else np.asarray(other_index, np.int64),
        "other": [None] * n if other is None else list(other),
    }
    return pa.table(columns, schema=ROWS)


def kept_or_made(
    folder: Path, step: str, identity: dict[str, Any], make: Callable[[], tuple[pa.Table, dict[str, Any]]]
) -> Outcome:
    """Return the outcome of a step: what an earlier run left of the same identity, or else made and kept now."""
    path = folder / f"{step}.parquet"
    text = json.dumps(identity, sort_keys=True)
    if path.is_file() and (pq.read_schema(path).metadata or {}).get(b"identity", b"").decode() == text:
        return held(folder, step)
    rows, figures = make()
    with writing(path), replacing(path) as part:
        pq.write_table(rows.replace_schema_metadata({"identity": text, "figures": json.dumps(figures)}), part)
    return Outcome(step, rows, figures)


def held(folder: Path, step: str) -> Outcome:
    """Return the outcome of a step that was kept. Raises OSError, ValueError or KeyError where there is none."""
    table = pq.read_table(folder / f"{step}.parquet")
    figures = json.loads(table.schema.metadata[b"figures"])
    return Outcome(step, table.replace_schema_metadata(None), figures)


def write_lineage(
    path: Path, measured: Sequence[Path], outcomes: Sequence[Outcome], keys: Callable[[int], str]
) -> None:
    """Write the table of all images: what was measured, and kept, step, reason, value, limit, other_index, other.

    measured: shards of `measure_source`, in order. keys: from an index in DATA to a key.
    Rows go through one shard at a time; of every image 40 bytes are held.
    """
    total = sum(pq.read_metadata(shard).num_rows for shard in measured)
    step = np.full(total, -1, np.int8)
    said = np.full(total, -1, np.int64)  # row of the outcomes, one after another
    rows = pa.concat_tables([ROWS.empty_table(), *(outcome.rows for outcome in outcomes)])
    first = 0
    for number, outcome in enumerate(outcomes):
        index, dropped = outcome.column("index"), outcome.column("dropped")
        said[index] = np.arange(first, first + len(index))
        step[index[dropped]] = number
        first += len(index)
    names = [outcome.step for outcome in outcomes]
    start = 0
    with writing(path), replacing(path) as part:
        writer: pq.ParquetWriter | None = None
        try:
            for shard in measured:
                table = pq.read_table(shard)
                stop = start + len(table)
                place = pa.array(said[start:stop], mask=said[start:stop] < 0)
                own = rows.take(place)
                by = step[start:stop]
                table = table.append_column("kept", pa.array(by < 0))
                table = table.append_column(
                    "step", pa.array([names[one] if one >= 0 else None for one in by], pa.string())
                )
                for name in ("reason", "value", "limit", "other_index"):
                    table = table.append_column(name, own.column(name))
                others = [
                    keys(index) if other is None and index is not None and index >= 0 else other
                    for other, index in zip(
                        own.column("other").to_pylist(), own.column("other_index").to_pylist(), strict=True
                    )
                ]
                table = table.append_column("other", pa.array(others, pa.string()))
                writer = writer or pq.ParquetWriter(part, table.schema)
                writer.write_table(table)
                start = stop
        finally:
            if writer:
                writer.close()
