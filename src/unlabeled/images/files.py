"""Images as files: a folder of any depth, or a list of paths."""

from __future__ import annotations

import array
import csv
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.images.sources import IMAGE_SUFFIXES, Sample, number_classes, printable

MAX_BYTES = 2**30  # of a file: the largest image that is decoded has no more, uncompressed with 16 bits
_RUN_FILES = {"recipe.toml", "metrics.jsonl"}  # what a folder of a training has
_RUN = 64  # paths compressed together: one is found by unpacking a run, in some 10 microseconds


class PathTable:
    """Many paths in little memory: sorted paths share their beginnings, so runs of them are held compressed.

    3 to 10 bytes a path where names are numbered, about 40 where they are hashes of 64 digits.

    Args:
        paths: in the order of the table.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        blob, ends, run, count = bytearray(), array.array("q"), list[bytes](), 0
        for path in paths:
            run.append(os.fsencode(path))
            count += 1
            if len(run) == _RUN:
                blob += zlib.compress(b"\0".join(run), 1)
                ends.append(len(blob))
                run.clear()
        blob += zlib.compress(b"\0".join(run), 1)
        ends.append(len(blob))
        self.count = count
        self.blob: NDArray[np.uint8] = np.frombuffer(bytes(blob), np.uint8)
        self.ends: NDArray[np.int64] = np.frombuffer(ends, np.int64)
        self._last: tuple[int, list[bytes]] = (-1, [])

    def __len__(self) -> int:
        """Number of paths."""
        return self.count

    def __getitem__(self, index: int) -> str:
        """The path."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        run, within = divmod(index, _RUN)
        number, paths = self._last
        if number != run:
            first = self.ends[run - 1] if run else 0
            paths = zlib.decompress(self.blob[first : self.ends[run]].tobytes()).split(b"\0")
            self._last = (run, paths)
        return os.fsdecode(paths[within])


class FileSource:
    """Files, their paths in a PathTable, their labels (where there are any) in 4 bytes each.

    Args:
        name: what the user called it.
        root: what paths are relative to.
        entries: (path, class name or None) in the order of the source.
        min_classes: fewer classes than this are no labels.
    """

    block_starts: NDArray[np.int64] | None = None
    window: int | None = None

    def __init__(
        self, name: str, root: str, entries: Iterable[tuple[str, str | None]], min_classes: int = 1
    ) -> None:
        self.name, self.root = name, root
        classes: dict[str | None, int] = {}
        seen = array.array("i")

        def paths() -> Iterator[str]:
            for path, class_name in entries:
                seen.append(classes.setdefault(class_name, len(classes)))
                yield path

        self.paths = PathTable(paths())
        self.class_names: list[str] | None = None
        self._labels: NDArray[np.int32] | None = None
        known = [class_name for class_name in classes if class_name is not None]
        if len(known) == len(classes) >= min_classes:
            self.class_names, numbers = number_classes(known)
            self._labels = np.array(numbers, np.int32)[np.frombuffer(seen, np.int32)]

    def __len__(self) -> int:
        """Number of files."""
        return len(self.paths)

    def path(self, index: int) -> str:
        """Where the file is."""
        return os.path.join(self.root, self.paths[index])  # noqa: PTH118  (no Path per read)

    def read(self, index: int) -> Sample:
        """The file's bytes; its key is its path below the folder, or as the list has it."""
        key = self.paths[index]
        data = _contents(os.path.join(self.root, key))  # noqa: PTH118
        return Sample(data, printable(key), None if self._labels is None else int(self._labels[index]))

    def labels(self) -> NDArray[np.int64] | None:
        """Numbers of a folder's own folders (where every file lies in one of two or more), or a list's."""
        return None if self._labels is None else self._labels.astype(np.int64)


def _contents(path: str) -> bytes:
    """A file's bytes; raises OSError where it is a pipe or a device, which may have no end, or too large."""
    with open(path, "rb", opener=_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("no regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(f"too large: {status.st_size} bytes, {MAX_BYTES} are allowed")
        return file.read()


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for a pipe's other end."""
    return os.open(path, flags | os.O_NONBLOCK)


def open_folder(name: str, folder: Path) -> FileSource:
    """All image files of a folder, in the order of their paths.

    Raises:
        UserError: there is none.
    """
    root = os.path.abspath(folder)  # noqa: PTH100  (workers may run elsewhere; links stay as they are)
    source = FileSource(name, root, _walk(root, "", None, ()), min_classes=2)
    if not len(source):
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{name} holds no image file (of {suffixes}), no .tar and no .parquet")
    return source


def _walk(
    root: str, below: str, class_name: str | None, above: tuple[str, ...]
) -> Iterator[tuple[str, str | None]]:
    folder = f"{root}/{below}"
    try:
        with os.scandir(folder) as found:
            listed = list(found)
        if below and {entry.name for entry in listed} >= _RUN_FILES:  # its pictures are no images of ours
            return
        entries = sorted(
            (entry.name, entry.is_dir(), entry.is_symlink())
            for entry in listed
            if not entry.name.startswith(".") and (_is_image(entry.name) or entry.is_dir())
        )
    except OSError:  # what may not be listed is not ours
        return
    own = (*above, os.path.realpath(folder)) if any(is_link for _, _, is_link in entries) or above else above
    for name, is_folder, is_link in entries:
        path = f"{below}{name}"
        if not is_folder:
            yield path, class_name
        elif not (is_link and _encloses(f"{root}/{path}", folder)):
            yield from _walk(root, f"{path}/", class_name if below else name, own)


def _encloses(link: str, folder: str) -> bool:
    """Whether a link leads to a folder that it lies in, where a walk would not end."""
    target, here = os.path.realpath(link), os.path.realpath(folder)
    return here == target or here.startswith(target.rstrip("/") + "/")


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122


def open_list(name: str, path: Path | None, paths: list[str] | None = None) -> FileSource:
    """The files a list names: one path a line, or a CSV with a path column and perhaps a label column.

    Paths are relative to the list's folder, or else to the working folder, whichever has the first.

    Raises:
        UserError: the list names no file, or its first does not exist.
    """
    rows = iter(_rows(path) if path else ((text, None) for text in paths or []))
    first = next(rows, None)
    if first is None:
        raise UserError(f"{name} lists no image")
    bases = [os.path.abspath(base) for base in ((path.parent, Path()) if path else (Path(),))]  # noqa: PTH100
    root = next((base for base in bases if os.path.exists(os.path.join(base, first[0]))), None)  # noqa: PTH110, PTH118
    if root is None:
        raise UserError(
            f"{name} lists {printable(first[0])} first, which does not exist; "
            "paths are relative to the list's folder or to the working folder"
        )

    def entries() -> Iterator[tuple[str, str | None]]:
        yield first
        yield from rows

    return FileSource(name, root, entries())


def _rows(path: Path) -> Iterator[tuple[str, str | None]]:
    # Names need not be UTF-8: what is not goes through unchanged.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if path.suffix.lower() in (".txt", ".lst"):
            for line in file:
                if text := line.strip():
                    yield text, None
            return
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        columns = list(reader.fieldnames or [])
        column = _first(
            columns, ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "img")
        )
        if column is None:
            raise UserError(
                f"{path} has no column path (or file, filename, image); it has {', '.join(columns)}"
            )
        label = _first(columns, ("label", "class", "target", "fine_label", "class_name"))
        for row in reader:
            if text := (row[column] or "").strip():
                yield text, (row[label] or None) if label else None


def _first(columns: list[str], names: tuple[str, ...]) -> str | None:
    """The column whose name comes first among `names`, in any case."""
    by_name = {column.strip().lower(): column for column in reversed(columns)}
    return next((by_name[name] for name in names if name in by_name), None)
