"""The feature table: a folder of shards, vectors memory-mapped beside their rows.

    table.json           identity, kind of values, where the images are
    000-000000.parquet   rows of the first shard of the first source
    000-000000.npy       their vectors, or all their grids one after another
    bad_files.jsonl      what could not be read

Shard s of a source has its images s * shard to (s + 1) * shard - 1, less the bad ones; it counts once its Parquet
file is there, which is written last. So what is done is what is there, and ranks share shards without a word.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.images.bad_files import BadFiles
from unlabeled.images.sources import Source, open_source

FORMAT = "unlabeled feature table 1"
GRID_COLUMNS = [("grid_height", pa.int32()), ("grid_width", pa.int32()), ("first_patch", pa.int64())]
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("index", pa.int64()),  # in the source
        ("content_hash", pa.string()),  # of the encoded bytes: the first 16 of SHA-256, as hex
        ("width", pa.int32()),  # of the image, in pixels
        ("height", pa.int32()),
        ("label", pa.string()),  # class name, or null
    ]
)
GRID_SCHEMA = pa.schema([*SCHEMA, *GRID_COLUMNS])  # first_patch: row of the shard's .npy


def content_hash(data: bytes) -> str:
    """Return what the column content_hash holds for an encoded image."""
    return hashlib.sha256(data).hexdigest()[:32]


class ShardedRows(Sequence[Any]):
    """Rows of several memory-mapped arrays as if they were one (N, D).

    Indexing by a number, a slice, or an array of numbers or truths reads just those rows. `np.asarray` reads all.
    """

    def __init__(self, parts: list[NDArray[Any]], dimension: int, dtype: np.dtype[Any]) -> None:
        self.parts = parts
        self.ends: NDArray[np.int64] = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.shape = (int(self.ends[-1]) if parts else 0, dimension)
        self.dtype, self.ndim = dtype, 2

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def __getitem__(self, wanted: Any) -> Any:
        """Rows: (D,) of a number, (n, D) otherwise."""
        if isinstance(wanted, slice):
            first, end, step = wanted.indices(len(self))
            if step == 1:
                return self._between(first, max(first, end))
            wanted = np.arange(first, end, step)
        numbers = np.asarray(wanted)
        if numbers.dtype == bool:
            if numbers.shape != self.shape[:1]:
                raise IndexError(f"{numbers.shape} truths for {len(self)} rows")
            numbers = numbers.nonzero()[0]
        if numbers.size and (numbers.max() >= len(self) or numbers.min() < -len(self)):
            raise IndexError(f"row {numbers.max()} of {len(self)}")
        flat = np.atleast_1d(numbers).astype(np.int64) % max(1, len(self))
        result = np.empty((len(flat), self.shape[1]), self.dtype)
        shards = np.searchsorted(self.ends, flat, side="right")
        for shard in np.unique(shards):
            chosen = shards == shard
            begin = self.ends[shard - 1] if shard else 0
            result[chosen] = self.parts[shard][flat[chosen] - begin]
        return result if numbers.ndim else result[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All rows in memory."""
        whole = self._between(0, len(self))
        return whole if dtype is None else whole.astype(dtype)

    def _between(self, first: int, end: int) -> NDArray[Any]:
        pieces, begin = [], 0
        for part, stop in zip(self.parts, self.ends.tolist(), strict=True):
            if begin < end and stop > first:
                pieces.append(part[max(0, first - begin) : end - begin])
            begin = stop
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty((0, self.shape[1]), self.dtype)


class Grids(Sequence[Any]):
    """Each image's grid of features, read from the disk when it is asked for.

    grids[i] is as the extractor made it: (h, w, D) of patch tokens, (heads, h, w) of attention; a slice is a list.
    """

    def __init__(
        self, rows: ShardedRows, first: NDArray[np.int64], table: pa.Table, is_attention: bool
    ) -> None:
        self.rows, self.first, self.is_attention = rows, first, is_attention
        self.sides = np.stack([table.column(name).to_numpy() for name in ("grid_height", "grid_width")], 1)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.first)

    @overload
    def __getitem__(self, wanted: int) -> NDArray[Any]: ...
    @overload
    def __getitem__(self, wanted: slice) -> list[NDArray[Any]]: ...
    def __getitem__(self, wanted: int | slice) -> NDArray[Any] | list[NDArray[Any]]:
        """One image's grid, or a list."""
        if isinstance(wanted, slice):
            return [self[place] for place in range(*wanted.indices(len(self)))]
        h, w = self.sides[wanted].tolist()
        first = int(self.first[wanted])
        grid: NDArray[Any] = self.rows[first : first + h * w].reshape(h, w, -1)
        return grid.transpose(2, 0, 1) if self.is_attention else grid


class FeatureTable:
    """A feature table on disk; opening it reads a few bytes a shard.

    Attributes:
        path: the folder.
        identity: what vectors must share to be comparable, see `Extractor`.
        sources: {"data", "images", "shard"} of each.
        dimension: D of the vectors.
        dtype: of the vectors, float32 or float16.
    """

    images_per_second = 0.0  # of the call of `embed` that returned it

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        held = read_header(self.path)
        self.identity: dict[str, Any] = held["identity"]
        self.sources: list[dict[str, Any]] = held["sources"]
        self.dimension: int = held["dimension"]
        self.dtype: np.dtype[Any] = np.dtype(held["dtype"])
        self.is_grid = self.identity["kind"] in ("patches", "attention")
        self._shards = sorted(self.path.glob("???-??????.parquet"))
        try:
            self._counts = [pq.read_metadata(shard).num_rows for shard in self._shards]
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path} has a shard that cannot be read: {' '.join(str(error).split())}"
            ) from error
        self._open_sources: dict[str, Source] = {}

    def __len__(self) -> int:
        """Number of images."""
        return sum(self._counts)

    @property
    def bad_files(self) -> int:
        """Number of files that could not be read; bad_files.jsonl names them."""
        return BadFiles(self.path / "bad_files.jsonl").count

    @cached_property
    def _values(self) -> ShardedRows:
        parts = []
        for shard, count in zip(self._shards, self._counts, strict=True):
            if not count:
                continue
            file = shard.with_suffix(".npy")
            try:
                part = np.load(file, mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"{file} cannot be read: {error}") from error
            if part.ndim != 2 or part.shape[1] != self.dimension or (len(part) != count and not self.is_grid):
                raise UserError(f"{file} has the shape {part.shape}, not ({count}, {self.dimension}).")
            parts.append(part)
        return ShardedRows(parts, self.dimension, self.dtype)

    @property
    def vectors(self) -> Any:
        """(N, D), memory-mapped: an array where there is one shard, else rows that behave as one (`ShardedRows`).

        Raises:
            UserError: the table holds grids.
        """
        if self.is_grid:
            raise UserError(f"{self.path} holds grids ({self.identity['kind']}), no vectors; use .grids.")
        return self._values.parts[0] if len(self._values.parts) == 1 else self._values

    @cached_property
    def grids(self) -> Grids:
        """Each image's grid of features.

        Raises:
            UserError: the table holds vectors.
        """
        if not self.is_grid:
            raise UserError(f"{self.path} holds vectors ({self.identity['kind']}), no grids; use .vectors.")
        starts = np.concatenate(([0], self._values.ends))
        counts = [count for count in self._counts if count]
        first = self.rows.column("first_patch").to_numpy() + np.repeat(starts[: len(counts)], counts)
        return Grids(self._values, first, self.rows, self.identity["kind"] == "attention")

    @cached_property
    def rows(self) -> pa.Table:
        """Columns key, source, index, content_hash, width, height, label; of grids also their sides and places."""
        schema = GRID_SCHEMA if self.is_grid else SCHEMA
        return pa.concat_tables([schema.empty_table(), *(self._read(shard) for shard in self._shards)])

    @property
    def keys(self) -> list[str]:
        """Names of the images."""
        keys: list[str] = self.rows.column("key").to_pylist()
        return keys

    def chunks(self, size: int = 65536) -> Iterator[tuple[int, pa.Table, NDArray[Any]]]:
        """Give (first row, rows, vectors), at most `size` of them, in order; memory does not grow with the table."""
        first = 0
        for shard, count in zip(self._shards, self._counts, strict=True):
            rows = self._read(shard) if count else None
            for start in range(0, count, size):
                length = min(size, count - start)
                assert rows is not None
                yield first, rows.slice(start, length), self.vectors[first : first + length]
                first += length

    def release(self) -> None:
        """Let the values' pages go from this process's memory; what is wanted again is read from the files again."""
        for part in self._values.parts:
            mapped = getattr(part, "_mmap", None)
            if mapped is not None and hasattr(mapped, "madvise"):
                mapped.madvise(mmap.MADV_DONTNEED)

    @property
    def source_numbers(self) -> NDArray[np.int32]:
        """Which of `sources` each row is of, (N,)."""
        numbers = [int(shard.name[:3]) for shard in self._shards]
        return np.repeat(np.array(numbers, np.int32), self._counts)

    def read_image(self, row: int) -> bytes:
        """Return the encoded image that a row was made of.

        Raises:
            UserError: its source is gone, or has another image there by now.
        """
        if not 0 <= row < len(self):
            raise IndexError(row)
        shard = int(np.searchsorted(np.cumsum(self._counts), row, side="right"))
        start = sum(self._counts[:shard])
        held = self._read(self._shards[shard]).slice(row - start, 1).to_pylist()[0]
        held["data"] = self.sources[int(self._shards[shard].name[:3])]["data"]
        return read_checked(self._open_sources, held)

    def _read(self, shard: Path) -> pa.Table:
        try:
            return pq.read_table(shard)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{shard} cannot be read: {' '.join(str(error).split())}") from error


def read_checked(opened: dict[str, Source], row: dict[str, Any]) -> bytes:
    """Return the encoded image of a row: index, key, source, content_hash, and data, the DATA that it is of.

    opened: sources by DATA, which is added to.
    Raises UserError where the source is gone, or has another image there by now.
    """
    data, key = row["data"], row["key"]
    try:
        file = Path(data) / key
        if file.is_file():  # of a folder, where an image's number changes with what else is there
            encoded: bytes = file.read_bytes()
        else:
            if data not in opened:
                opened[data] = open_source(data)
            encoded = opened[data].read(row["index"]).data
    except (OSError, IndexError) as error:
        raise UserError(f"{key} of {row['source']} cannot be read: {error}") from error
    if content_hash(encoded) != row["content_hash"]:
        raise UserError(f"{key} of {row['source']} is another image now than when its features were made.")
    return encoded


def read_header(path: Path) -> dict[str, Any]:
    """Return what table.json holds. Raises UserError where there is none, or of another kind."""
    file = path / "table.json"
    if not file.is_file():
        raise UserError(f"{path} is no feature table: it has no table.json; `unlabeled embed` makes one.")
    try:
        held = json.loads(file.read_text())
        known = isinstance(held, dict) and held["format"] == FORMAT
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} cannot be read: {error!r}") from error
    if not known:
        raise UserError(f"{file} is of another format than {FORMAT!r}.")
    return dict(held)


def open_table(path: str | Path | FeatureTable) -> FeatureTable:
    """Open a feature table; one that is open is returned as it is. Raises UserError where there is none."""
    return path if isinstance(path, FeatureTable) else FeatureTable(path)
