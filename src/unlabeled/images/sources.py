"""DATA: wherever images come from, the same few methods.

A source is an index in numpy arrays (at most 64 bytes an image) and a way to read the encoded bytes of one.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError

MAX_CLASSES = 1_000_000  # numbers up to this are labels as they are; beyond, they are names
LIST_NAME = "curated.csv"  # the images of a folder that has this are those it lists
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp"))


class Sample(NamedTuple):
    """One image as it is stored."""

    data: bytes  # the encoded file
    key: str  # its name within the source
    label: int | None  # an index into the source's class names, where it has them


class Source(Protocol):
    """Images that can be counted and read by index.

    Attributes:
        name: what the user called it, for messages.
        class_names: of the labels, or None.
        block_starts: int64, starts of the runs that are cheap to read together (shards, row groups); None
            where any order is equally cheap.
        window: how many images in a row of blocks can be read in any order without reading a block twice;
            None where that does not matter.
    """

    name: str
    class_names: list[str] | None
    block_starts: NDArray[np.int64] | None
    window: int | None

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> Sample:
        """One image's bytes.

        Raises:
            OSError: it cannot be read.
        """

    def labels(self) -> NDArray[np.int64] | None:
        """All labels, without reading an image; None if the source has none."""


def number_classes(texts: list[str]) -> tuple[list[str], list[int]]:
    """Class names, and the number of each distinct text among them.

    Texts that are all numbers keep them, so that they mean the same in a source with other classes; others
    are numbered in sorted order.
    """
    if all(text.isascii() and text.isdigit() and str(int(text)) == text for text in texts):
        numbers = [int(text) for text in texts]
        if max(numbers, default=0) < MAX_CLASSES:
            return [str(number) for number in range(max(numbers, default=-1) + 1)], numbers
    names = sorted(texts)
    rank = {name: number for number, name in enumerate(names)}
    return names, [rank[text] for text in texts]


def printable(name: str) -> str:
    """A file name as text, with bytes that are no UTF-8 escaped."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def lasting(data: str | Path) -> str:
    """DATA that means the same from every folder."""
    text = str(data)
    return text if text.startswith("hf:") else os.path.abspath(Path(text).expanduser())  # noqa: PTH100


def open_source(data: str | Path) -> Source:
    """Open DATA.

    Args:
        data: a folder of images (any depth), a .tar or a folder or glob of them (webdataset layout), a
            .parquet or a folder or glob of them, a .txt or .csv list of paths, what `unlabeled curate` wrote,
            or hf:NAME[:SPLIT].

    Raises:
        UserError: nothing is there, or nothing of a kind that is read.
    """
    from unlabeled.images.files import open_folder, open_list

    text = str(data)
    if not text.strip():
        raise UserError("DATA is empty; the folder that you are in is given as .")
    if text.startswith("hf:"):
        from unlabeled.images.hugging_face import open_hugging_face

        return open_hugging_face(text)
    path = Path(text).expanduser()
    if path.is_dir():
        if (path / LIST_NAME).is_file():
            return open_list(text, path / LIST_NAME)
        return _shards(text, _shards_in(path)) or open_folder(text, path)
    files = [path] if path.is_file() else _expanded(str(path))
    if not files:
        raise UserError(_missing(path))
    if shards := _shards(text, files):
        return shards
    suffixes = {file.suffix.lower() for file in files}
    if len(files) == 1 and suffixes <= {".txt", ".csv", ".tsv", ".lst"}:
        return open_list(text, files[0])
    if suffixes <= IMAGE_SUFFIXES:
        return open_list(text, None, [str(file) for file in files])
    kinds = ", ".join(sorted(suffix or "no suffix" for suffix in suffixes))
    raise UserError(
        f"{text} is of no kind that is read ({kinds}): "
        "a folder of images, .tar shards, .parquet, a .txt or .csv list, or hf:NAME is"
    )


def _shards(text: str, files: list[Path]) -> Source | None:
    """A source of files that are all tar shards or all Parquet; None of others."""
    suffixes = {file.suffix.lower() for file in files}
    if suffixes == {".tar"}:
        from unlabeled.images.tar import TarSource

        return TarSource(text, files)
    if suffixes == {".parquet"}:
        from unlabeled.images.parquet import ParquetSource

        return ParquetSource(text, files)
    return None


def _shards_in(folder: Path) -> list[Path]:
    """The tar shards of a folder, or else its Parquet files."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                entry.name
                for entry in entries
                if entry.name.lower().endswith((".tar", ".parquet")) and not entry.name.startswith(".")
            )
    except OSError as error:
        raise UserError(f"{folder} cannot be listed: {error.strerror or error}") from error
    tars = [name for name in names if name.lower().endswith(".tar")]
    return [folder / name for name in tars or names]


def _expanded(pattern: str) -> list[Path]:
    """Files of a glob, with shell ranges like {000..012}, in sorted order.

    Raises:
        UserError: a file of a range is missing.
    """
    if found := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = found[1], found[2]
        files = []
        for number in range(int(first), int(last) + 1):
            one = pattern[: found.start()] + str(number).zfill(len(first)) + pattern[found.end() :]
            if not (matches := _expanded(one)):
                raise UserError(f"{one} of {pattern} does not exist")
            files += matches
        return files
    names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
    return [Path(name) for name in names if Path(name).is_file()]


def _missing(path: Path) -> str:
    if glob.has_magic(str(path)):
        return f"no file matches {path}"
    parent = path.parent
    if not parent.is_dir():
        return f"there is nothing at {path}: the folder {parent} does not exist"
    try:
        near = difflib.get_close_matches(path.name, os.listdir(parent), 1)  # noqa: PTH208
    except OSError:
        near = []
    return f"there is nothing at {path}" + (f"; did you mean {parent / near[0]}?" if near else "")
