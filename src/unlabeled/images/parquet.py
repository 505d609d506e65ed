"""Images in Parquet files, as the Hugging Face hub serves them, and in Hugging Face datasets."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.images.sources import Sample

CACHE_BYTES = 256 * 2**20  # of row groups kept in memory, a process
_IMAGE_NAMES = ("image", "img", "jpg", "png", "bytes", "picture", "pixel_values")
_LABEL_NAMES = ("label", "labels", "class", "fine_label", "target", "cls")


class ParquetSource:
    """An image column of encoded bytes, read a row group at a time.

    Args:
        name: what the user called it.
        files: Parquet files, in order.

    Raises:
        UserError: a file is no Parquet, or has no column of image bytes.
    """

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name, self.files = name, [str(file) for file in files]
        groups: list[tuple[int, int, int]] = []
        for number, file in enumerate(self.files):
            metadata = _opened(file).metadata
            groups += [
                (number, group, metadata.row_group(group).num_rows)
                for group in range(metadata.num_row_groups)
                if metadata.row_group(group).num_rows
            ]
        if not groups:
            raise UserError(f"{name} holds no row")
        self.groups = np.array(groups, np.int64)
        self.ends = np.cumsum(self.groups[:, 2])
        self.block_starts: NDArray[np.int64] | None = self.ends - self.groups[:, 2]
        schema = _opened(self.files[0]).schema_arrow
        self.image_column = _image_column(schema, self.files[0])
        self.label_column = next((c for c in _LABEL_NAMES if c in schema.names), None)
        self.class_names: list[str] | None = None
        self._labels: NDArray[np.int64] | None = None
        if self.label_column:
            self._read_labels(schema)
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._cached_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        """The cache stays in its process."""
        return self.__dict__ | {"_cache": OrderedDict(), "_cached_bytes": 0}

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.ends[-1])

    def read(self, index: int) -> Sample:
        """The row's bytes; its key is the path stored with them, or the row's number."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        row = index - int(self.ends[group] - self.groups[group, 2])
        value = self._group(group)[row].as_py()
        label = None if self._labels is None else int(self._labels[index])
        if not isinstance(value, dict):
            return Sample(value or b"", f"row {index}", label)
        return Sample(value.get("bytes") or b"", value.get("path") or f"row {index}", label)

    def labels(self) -> NDArray[np.int64] | None:
        """The label column, where there is one of numbers or names."""
        return self._labels

    def _group(self, group: int) -> pa.ChunkedArray:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        file, inner, _ = self.groups[group]
        try:
            column = _opened(self.files[file]).read_row_group(int(inner), columns=[self.image_column]).column(0)
        except pa.ArrowException as error:
            raise OSError(f"{self.files[file]}: {error}") from error
        self._cache[group] = column
        self._cached_bytes += column.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return column

    def _read_labels(self, schema: pa.Schema) -> None:
        column = pa.chunked_array(
            [
                chunk
                for file in self.files
                for chunk in pq.read_table(file, columns=[self.label_column]).column(0).chunks
            ]
        )
        if column.null_count:
            return
        if pa.types.is_integer(column.type):
            self._labels = column.to_numpy().astype(np.int64)
            names = _declared_names(schema, self.label_column)
            self.class_names = names or [str(number) for number in range(int(self._labels.max()) + 1)]
        elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            names, self._labels = np.unique(column.to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
            self.class_names = [str(name) for name in names]


def _opened(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file that can be read: {error}") from error


def _image_column(schema: pa.Schema, path: str) -> str:
    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    columns = [item.name for item in schema if holds_bytes(item.type)]
    if not columns:
        raise UserError(f"{path} has no column of encoded image bytes; it has {', '.join(schema.names)}")
    return next((name for name in _IMAGE_NAMES if name in columns), columns[0])


def _declared_names(schema: pa.Schema, column: str | None) -> list[str] | None:
    """Class names that the datasets library keeps in the schema's metadata."""
    declared = (schema.metadata or {}).get(b"huggingface")
    if not declared:
        return None
    feature = json.loads(declared).get("info", {}).get("features", {}).get(column, {})
    names = feature.get("names")
    return [str(name) for name in names] if names else None


class HuggingFaceSource:
    """A split of a Hugging Face dataset, its images left encoded."""

    block_starts: NDArray[np.int64] | None = None

    def __init__(self, name: str, table: Any) -> None:
        from datasets import Image

        self.name = name
        columns = [column for column, kind in table.features.items() if isinstance(kind, Image)]
        if not columns:
            raise UserError(f"{name} has no image column; it has {', '.join(table.features)}")
        self.column = columns[0]
        self.label = next((c for c in _LABEL_NAMES if c in table.features), None)
        self.class_names: list[str] | None = getattr(table.features.get(self.label), "names", None)
        self.table = table.cast_column(self.column, Image(decode=False))
        self._labels = None
        if self.label and self.class_names:
            self._labels = np.asarray(self.table[self.label], np.int64)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.table)

    def read(self, index: int) -> Sample:
        """The row's bytes, or those of the file it names."""
        value = self.table[index][self.column]
        data = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        label = None if self._labels is None else int(self._labels[index])
        return Sample(data, value["path"] or f"row {index}", label)

    def labels(self) -> NDArray[np.int64] | None:
        """The label column, where it is one of classes."""
        return self._labels


def open_hugging_face(text: str) -> HuggingFaceSource:
    """hf:NAME or hf:NAME:SPLIT, of the datasets library (the split is train by default).

    Raises:
        UserError: the library is missing, or the data set cannot be had.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"{text} needs the datasets library: pip install 'unlabeled[hf]'") from error
    name, _, split = text.removeprefix("hf:").partition(":")
    try:
        table = load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises errors of every kind, its own and its transports'
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{text} cannot be loaded: {first}") from error
    return HuggingFaceSource(text, table)
