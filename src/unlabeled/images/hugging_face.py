"""Images of a data set that the datasets library can load: from the hub, or from a folder it has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.images.parquet import IMAGE_NAMES, LABEL_NAMES
from unlabeled.images.sources import MAX_CLASSES, Sample, number_classes


class HuggingFaceSource:
    """A split of a data set, its images left encoded; the rows stay in the library's memory-mapped files."""

    block_starts: NDArray[np.int64] | None = None
    window: int | None = None

    def __init__(self, name: str, table: Any) -> None:
        from datasets import Image

        self.name = name
        columns = [column for column, kind in table.features.items() if isinstance(kind, Image)]
        encoded = bool(columns)
        columns = columns or [column for column, kind in table.features.items() if _holds_bytes(kind)]
        if not columns:
            raise UserError(f"{name} has no image column; it has {', '.join(table.features)}")
        if not len(table):
            raise UserError(f"{name} holds no row")
        self.column = next((column for column in IMAGE_NAMES if column in columns), columns[0])
        self.class_names: list[str] | None = None
        self._labels: NDArray[np.int32] | None = None
        label = next((column for column in LABEL_NAMES if column in table.features), None)
        if label:
            names = getattr(table.features[label], "names", None)
            self._number(table.select_columns([label]).with_format(None)[label][:], names)
        self.table = table.select_columns([self.column])
        if encoded:
            self.table = self.table.cast_column(self.column, Image(decode=False))

    def _number(self, values: list[Any], names: list[str] | None) -> None:
        if any(not isinstance(value, (int, str)) for value in values):
            return
        if isinstance(values[0], str):
            texts = list(dict.fromkeys(values))
            self.class_names, numbers = number_classes(texts)
            rank = dict(zip(texts, numbers, strict=True))
            self._labels = np.array([rank[value] for value in values], np.int32)
        elif min(values) >= 0 and max(values) < MAX_CLASSES:  # -1 is how a split without labels is written
            self.class_names = list(names) if names else [str(number) for number in range(max(values) + 1)]
            self._labels = np.array(values, np.int32)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.table)

    def read(self, index: int) -> Sample:
        """The row's bytes, or those of the file it names."""
        value = self.table[index][self.column] or {}
        data, path = (value, None) if isinstance(value, bytes) else (value.get("bytes"), value.get("path"))
        if data is None and path:
            data = Path(path).read_bytes()
        label = None if self._labels is None else int(self._labels[index])
        return Sample(data or b"", path or f"row {index}", label)

    def labels(self) -> NDArray[np.int64] | None:
        """The label column, where there is one of numbers or names without gaps."""
        return None if self._labels is None else self._labels.astype(np.int64)


def _holds_bytes(kind: Any) -> bool:
    """Whether a feature is binary, or a struct as images are stored."""
    if isinstance(kind, dict):
        return "bytes" in kind
    return str(getattr(kind, "dtype", "")) in ("binary", "large_binary")


def open_hugging_face(text: str) -> HuggingFaceSource:
    """hf:NAME or hf:NAME:SPLIT (train by default); NAME is of the hub, or a folder.

    Raises:
        UserError: the library is missing, or the data set cannot be had.
    """
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise UserError(f"{text} needs the datasets library: pip install 'unlabeled[hf]'") from error
    name, _, split = text.removeprefix("hf:").partition(":")
    if not name:
        raise UserError(f"{text} names no data set; hf:NAME or hf:NAME:SPLIT does")
    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").exists():
            table = load_from_disk(str(folder))[split or "train"]
        elif (folder / "state.json").exists():
            table = load_from_disk(str(folder))
        else:
            table = load_dataset(str(folder) if folder.is_dir() else name, split=split or "train")
    except Exception as error:  # the library raises errors of every kind, its own and its transports'
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{text} cannot be loaded: {first.strip()}") from error
    return HuggingFaceSource(text, table)
