"""Images as files: a folder of any depth, or a list of paths."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.images.sources import IMAGE_SUFFIXES, Sample


class FileSource:
    """Files, held as one run of name bytes, an end offset and a folder number each: 12 bytes and the name.

    Args:
        name: what the user called it.
        root: what keys are relative to.
        entries: (folder, file name, class name or None) in the order of the source.
    """

    block_starts: NDArray[np.int64] | None = None

    def __init__(self, name: str, root: Path, entries: Iterable[tuple[str, str, str | None]]) -> None:
        self.name, self.root = name, str(root)
        folders: dict[str, int] = {}
        classes: dict[str | None, int] = {}
        names, ends = bytearray(), _Growing(np.int64)
        folder_of, class_of = _Growing(np.int32), _Growing(np.int32)
        for folder, file_name, class_name in entries:
            names += os.fsencode(file_name)
            ends.append(len(names))
            folder_of.append(folders.setdefault(folder, len(folders)))
            class_of.append(classes.setdefault(class_name, len(classes)))
        self.names = np.frombuffer(bytes(names), np.uint8)
        self.ends, self.folder_of, classes_seen = ends.array(), folder_of.array(), class_of.array()
        self.folders = list(folders)
        self.class_names: list[str] | None = None
        self._labels: NDArray[np.int32] | None = None
        known = [class_name for class_name in classes if class_name is not None]
        if len(known) >= 2 and len(known) == len(classes):
            self.class_names = sorted(known)
            rank = {class_name: number for number, class_name in enumerate(self.class_names)}
            self._labels = np.array([rank[str(class_name)] for class_name in classes], np.int32)[classes_seen]

    def __len__(self) -> int:
        """Number of files."""
        return len(self.ends)

    def path(self, index: int) -> str:
        """Where the file is."""
        first = self.ends[index - 1] if index else 0
        file_name = os.fsdecode(self.names[first : self.ends[index]].tobytes())
        return os.path.join(self.folders[self.folder_of[index]], file_name)  # noqa: PTH118  (no Path per read)

    def read(self, index: int) -> Sample:
        """The file's bytes; its key is its path below the source's folder."""
        path = self.path(index)
        with open(path, "rb") as file:  # noqa: PTH123
            data = file.read()
        return Sample(data, os.path.relpath(path, self.root), None if self._labels is None else int(self._labels[index]))

    def labels(self) -> NDArray[np.int64] | None:
        """Numbers of the top-level folders, where every file lies in one and there are at least two."""
        return None if self._labels is None else self._labels.astype(np.int64)


class _Growing:
    """An array that is appended to."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self.values, self.count = np.empty(1024, dtype), 0

    def append(self, value: int) -> None:
        if self.count == len(self.values):
            self.values = np.resize(self.values, 2 * self.count)
        self.values[self.count] = value
        self.count += 1

    def array(self) -> NDArray[np.int64]:
        return self.values[: self.count].copy()


def open_folder(name: str, folder: Path) -> FileSource:
    """All image files of a folder, in the order of their paths.

    Raises:
        UserError: there is none.
    """
    source = FileSource(name, folder, _walk(str(folder), None, str(folder)))
    if not len(source):
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{name} holds no image file (of {suffixes}), no .tar and no .parquet")
    return source


def _walk(folder: str, class_name: str | None, root: str) -> Iterator[tuple[str, str, str | None]]:
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry.name, entry.is_dir()) for entry in found if not entry.name.startswith("."))
    except PermissionError:
        return
    for name, is_folder in entries:
        if is_folder:
            yield from _walk(f"{folder}/{name}", name if folder == root else class_name, root)
        elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122
            yield folder, name, class_name


def open_list(name: str, path: Path | None, paths: list[str] | None = None) -> FileSource:
    """The files a list names: one path a line, or a CSV with a path column and perhaps a label column.

    Paths are relative to the list's folder, or else to the working folder.

    Raises:
        UserError: the list names no file, or none that exists.
    """
    rows = _rows(path) if path else ((text, None) for text in paths or [])
    base = path.parent if path else Path()
    entries = FileSource(name, Path(os.path.abspath(base)), _located(rows, base))
    if not len(entries):
        raise UserError(f"{name} lists no image")
    if not os.path.exists(entries.path(0)):  # noqa: PTH110
        raise UserError(f"{name} lists {entries.path(0)} first, which does not exist; paths are relative to the list")
    return entries


def _located(rows: Iterable[tuple[str, str | None]], base: Path) -> Iterator[tuple[str, str, str | None]]:
    start = ""
    for text, label in rows:
        if not start and not os.path.isabs(text):  # noqa: PTH117
            beside = (base / text).exists() or not Path(text).exists()
            start = os.path.abspath(base) if beside else os.getcwd()  # noqa: PTH100, PTH109
        folder, file_name = os.path.split(os.path.join(start, text))  # noqa: PTH118
        yield folder, file_name, label


def _rows(path: Path) -> Iterator[tuple[str, str | None]]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".txt" or path.suffix == ".lst":
            for line in file:
                if text := line.strip():
                    yield text, None
            return
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        columns = reader.fieldnames or []
        column = next((c for c in columns if c.lower() in ("path", "file", "filename", "image", "file_name")), None)
        if column is None:
            raise UserError(f"{path} has no column path (or file, filename, image); it has {', '.join(columns)}")
        label = next((c for c in columns if c.lower() in ("label", "class", "target")), None)
        for row in reader:
            yield row[column], row[label] if label else None
