"""DATA: wherever images come from, the same few methods.

A source is an index in numpy arrays (at most 64 bytes an image) and a way to read the encoded bytes of one.
"""

from __future__ import annotations

import difflib
import glob
import re
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError

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
        block_starts: int64, starts of the runs that are cheap to read together (shards, row groups); None where any
            order is equally cheap.
    """

    name: str
    class_names: list[str] | None
    block_starts: NDArray[np.int64] | None

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> Sample:
        """One image's bytes.

        Raises:
            OSError: it cannot be read.
        """

    def labels(self) -> NDArray[np.int64] | None:
        """All labels, without reading an image; None if the source has none."""


def open_source(data: str | Path) -> Source:
    """Open DATA.

    Args:
        data: a folder of images (any depth), a .tar or a folder or glob of them (webdataset layout), a .parquet or a
            folder or glob of them, a .txt or .csv list of paths, or hf:NAME[:SPLIT].

    Raises:
        UserError: nothing is there, or nothing of a kind that is read.
    """
    from unlabeled.images.files import open_folder, open_list
    from unlabeled.images.parquet import ParquetSource, open_hugging_face
    from unlabeled.images.tar import TarSource

    text = str(data)
    if text.startswith("hf:"):
        return open_hugging_face(text)
    path = Path(text).expanduser()
    if path.is_dir():
        children = sorted(child for child in path.iterdir() if child.suffix in (".tar", ".parquet"))
        for suffix, kind in ((".tar", TarSource), (".parquet", ParquetSource)):
            if files := [child for child in children if child.suffix == suffix]:
                return kind(text, files)
        return open_folder(text, path)
    files = [path] if path.is_file() else _expanded(str(path))
    if not files:
        raise UserError(_missing(path))
    suffixes = {file.suffix.lower() for file in files}
    if suffixes == {".tar"}:
        return TarSource(text, files)
    if suffixes == {".parquet"}:
        return ParquetSource(text, files)
    if len(files) == 1 and suffixes <= {".txt", ".csv", ".tsv", ".lst"}:
        return open_list(text, files[0])
    if suffixes <= IMAGE_SUFFIXES:
        return open_list(text, None, [str(file) for file in files])
    raise UserError(
        f"{text} is of no kind that is read ({', '.join(sorted(suffixes))}): "
        "a folder of images, .tar shards, .parquet, a .txt or .csv list, or hf:NAME is"
    )


def _expanded(pattern: str) -> list[Path]:
    """Files of a glob, with shell ranges like {000..012}, in sorted order."""
    if found := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = found[1], found[2]
        numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        return [
            file for number in numbers for file in _expanded(pattern[: found.start()] + number + pattern[found.end() :])
        ]
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]


def _missing(path: Path) -> str:
    parent = path.parent
    near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()], 1) if parent.is_dir() else []
    hint = f"; did you mean {parent / near[0]}?" if near else f"; the folder {parent} does not exist"
    return f"there is nothing at {path}" + (hint if near or not parent.is_dir() else "")
