"""Images in Parquet files, as the Hugging Face hub serves them."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.images.sources import MAX_CLASSES, Sample, number_classes

CACHE_BYTES = 256 * 2**20  # of row groups kept in memory, a process
MAX_GROUP_BYTES = 2**30  # of images in one row group, which is read whole
IMAGE_NAMES = (
    "image",
    "img",
    "bytes",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "picture",
    "image_bytes",
    "pixel_values",
)
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "cls", "class_name", "coarse_label")
_OPEN_FILES = 8


class ParquetSource:
    """An image column of encoded bytes, read a row group at a time; 24 bytes a row group and a label of 4.

    Args:
        name: what the user called it.
        files: Parquet files, in order.

    Raises:
        UserError: a file is no Parquet, has no column of image bytes, or has row groups too large to be read
            whole.
    """

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name, self.files = name, [str(file) for file in files]
        self._reset()
        schema = _opened(self.files[0]).schema_arrow
        self.image_column = _image_column(schema, self.files[0])
        label = next((column for column in LABEL_NAMES if column in schema.names), None)
        self.label_column = label if label and _is_label(schema.field(label).type) else None
        with ThreadPoolExecutor(min(16, len(files))) as pool:
            parts = list(pool.map(self._index, self.files))
        groups = np.concatenate([groups for groups, _ in parts])
        if not len(groups):
            raise UserError(f"{name} holds no row")
        groups[:, 0] = np.repeat(np.arange(len(parts)), [len(own) for own, _ in parts])
        self.groups = groups[:, :2].astype(np.int32)
        self.ends = np.cumsum(groups[:, 2])
        total = int(groups[:, 3].sum())
        # What is kept in memory is read in any order; what is not, in a window that is.
        self.block_starts: NDArray[np.int64] | None = None
        self.window: int | None = None
        if total > CACHE_BYTES:
            self.block_starts = self.ends - groups[:, 2]
            self.window = max(256, int(CACHE_BYTES / 2 / (total / len(self))))
        self.class_names: list[str] | None = None
        self._labels: NDArray[np.int32] | None = None
        if self.label_column:
            column = pa.chunked_array([chunk for _, column in parts for chunk in column.chunks])
            self.class_names, self._labels = _numbered(column, _declared_names(schema, self.label_column))

    def __getstate__(self) -> dict[str, Any]:
        """Open files and the cache stay in their process."""
        own = ("_cache", "_cached_bytes", "_open", "_lock")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._cached_bytes = 0
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.ends[-1])

    def read(self, index: int) -> Sample:
        """The row's bytes; its key is the file and the path stored with them, or the row's number."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        group = int(np.searchsorted(self.ends, index, side="right"))
        with self._lock:
            column = self._group(group)
        value = column[index - int(self.ends[group - 1] if group else 0)].as_py()
        label = None if self._labels is None else int(self._labels[index])
        path = Path(self.files[self.groups[group, 0]])
        row = f"{path.name}/row {index}"
        if not isinstance(value, dict):
            return Sample(value or b"", row, label)
        data, inner = value["bytes"], value.get("path")
        if data is None and inner:
            data = (path.parent / inner).read_bytes()
        return Sample(data or b"", f"{path.name}/{inner}" if inner else row, label)

    def labels(self) -> NDArray[np.int64] | None:
        """The label column, where there is one of numbers or names without gaps."""
        return None if self._labels is None else self._labels.astype(np.int64)

    def _index(self, path: str) -> tuple[NDArray[np.int64], pa.ChunkedArray]:
        """(file, row group, rows, image bytes) of the row groups of a file, and its labels."""
        file = _opened(path)
        missing = {self.image_column, self.label_column} - {None, *file.schema_arrow.names}
        if missing:
            raise UserError(f"{path} has no column {missing.pop()}, which {self.files[0]} has")
        groups = []
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            size = sum(
                group.column(column).total_uncompressed_size
                for column in range(group.num_columns)
                if group.column(column).path_in_schema.split(".")[0] == self.image_column
            )
            if size > MAX_GROUP_BYTES:
                raise UserError(
                    f"{path} has a row group of {size / 2**30:.1f} GB, which would have to be read whole; "
                    "write it again with pyarrow.parquet.write_table(..., row_group_size=100)"
                )
            if group.num_rows:
                groups.append((0, number, group.num_rows, size))
        labels = None
        if self.label_column:
            try:
                labels = file.read(columns=[self.label_column], use_threads=False).column(0)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path} cannot be read: {_one_line(error)}") from error
        return np.array(groups, np.int64).reshape(-1, 4), labels

    def _group(self, group: int) -> pa.ChunkedArray:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        number, inner = self.groups[group].tolist()
        try:
            file = self._file(number)
            column = file.read_row_group(inner, columns=[self.image_column], use_threads=False).column(0)
        except (pa.ArrowException, OSError, UserError) as error:
            raise OSError(f"{self.files[number]}: {_one_line(error)}") from error
        self._cache[group] = column
        self._cached_bytes += column.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return column

    def _file(self, number: int) -> pq.ParquetFile:
        if number not in self._open:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            self._open[number] = _opened(self.files[number])
        return self._open[number]


def _opened(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file that can be read: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _image_column(schema: pa.Schema, path: str) -> str:
    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            index = kind.get_field_index("bytes")
            return index >= 0 and holds_bytes(kind.field(index).type)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    columns = [item.name for item in schema if holds_bytes(item.type)]
    if not columns:
        raise UserError(f"{path} has no column of encoded image bytes; it has {', '.join(schema.names)}")
    return next((name for name in IMAGE_NAMES if name in columns), columns[0])


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _numbered(
    column: pa.ChunkedArray, declared: list[str] | None
) -> tuple[list[str] | None, NDArray[np.int32] | None]:
    """Class names and the number of each row's; (None, None) where some row has none."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count or not len(column):
        return None, None
    if pa.types.is_integer(column.type):
        low, high = (pc.min_max(column)[bound].as_py() for bound in ("min", "max"))
        if declared and low >= 0 and high < len(declared):
            return declared, column.to_numpy().astype(np.int32)
        if low < 0 and high < MAX_CLASSES:  # -1 is how a split without labels is written
            return None, None
        if high < MAX_CLASSES:
            return [str(number) for number in range(high + 1)], column.to_numpy().astype(np.int32)
    coded = column.dictionary_encode().unify_dictionaries()
    texts = [str(text) for text in coded.chunk(0).dictionary.to_pylist()]
    names, numbers = number_classes(texts)
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in coded.chunks])
    return names, np.array(numbers, np.int32)[codes]


def _declared_names(schema: pa.Schema, column: str | None) -> list[str] | None:
    """Class names that the datasets library keeps in the schema's metadata."""
    declared = (schema.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(declared)["info"]["features"][column]["names"] if declared else None
    except (ValueError, KeyError, TypeError):
        return None
    return [str(name) for name in names] if names else None
