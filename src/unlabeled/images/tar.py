"""Images in tar shards, in webdataset's layout: members that share a name up to the first dot are one sample."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.images.sources import IMAGE_SUFFIXES, Sample

# One image: shard, where its header and its bytes start, how many bytes, label (-1: none).
_ENTRY = np.dtype([("shard", "i4"), ("header", "i8"), ("start", "i8"), ("size", "i8"), ("label", "i4")])


class TarSource:
    """Images of tar shards, read by offset; 32 bytes an image.

    Args:
        name: what the user called it.
        files: the shards, in order.

    Raises:
        UserError: a shard is no tar file, or there is no image in any.
    """

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name, self.files = name, [str(file) for file in files]
        classes: dict[str, int] = {}
        parts = [np.array(list(_entries(number, file, classes)), _ENTRY) for number, file in enumerate(files)]
        self.entries = np.concatenate(parts)
        if not len(self.entries):
            raise UserError(f"{name} holds no image ({len(files)} tar files)")
        sizes = [len(part) for part in parts if len(part)]
        self.block_starts: NDArray[np.int64] | None = np.cumsum([0, *sizes[:-1]])
        self.class_names: list[str] | None = None
        if len(classes) >= 2 and (self.entries["label"] >= 0).all():
            # Numbers sort as numbers, names as names.
            order = sorted(classes, key=lambda text: (not text.isdigit(), int(text) if text.isdigit() else 0, text))
            self.class_names = order
            ranks = np.array([order.index(text) for text in classes], np.int32)
            self.entries["label"] = ranks[self.entries["label"]]
        self._open: dict[int, BinaryIO] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay in their process."""
        return self.__dict__ | {"_open": {}}

    def __len__(self) -> int:
        """Number of images."""
        return len(self.entries)

    def read(self, index: int) -> Sample:
        """The member's bytes; its key is the shard's name and the member's."""
        entry = self.entries[index]
        file = self._file(int(entry["shard"]))
        file.seek(int(entry["header"]))
        header = file.read(int(entry["start"] + entry["size"] - entry["header"]))
        before = int(entry["start"] - entry["header"])
        name = tarfile.TarInfo.frombuf(header[before - 512 : before], "utf-8", "surrogateescape").name
        if before > 512:
            name = _long_name(file, int(entry["header"])) or name
        label = int(entry["label"]) if self.class_names else None
        return Sample(header[before:], f"{Path(self.files[entry['shard']]).name}/{name}", label)

    def labels(self) -> NDArray[np.int64] | None:
        """From the .cls or .json members."""
        return self.entries["label"].astype(np.int64) if self.class_names else None

    def _file(self, shard: int) -> BinaryIO:
        if shard not in self._open:
            if len(self._open) >= 64:
                self._open.pop(next(iter(self._open))).close()
            self._open[shard] = open(self.files[shard], "rb")  # noqa: SIM115, PTH123  (kept open for the next read)
        return self._open[shard]


def _long_name(file: BinaryIO, header: int) -> str | None:
    """The name of a member whose name does not fit one header block."""
    file.seek(header)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        member = archive.next()
        return member.name if member else None


def _entries(number: int, path: Path, classes: dict[str, int]) -> Iterator[tuple[int, int, int, int, int]]:
    """The images of a shard; only headers and label members are read."""
    try:
        with tarfile.open(path, "r:") as archive:
            yield from _samples(number, archive, classes)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is no tar file that can be read: {error}") from error


def _samples(
    number: int, archive: tarfile.TarFile, classes: dict[str, int]
) -> Iterator[tuple[int, int, int, int, int]]:
    stem, label = "", -1
    images: list[tuple[int, int, int]] = []
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]  # it would remember every member
        if not member.isfile():
            continue
        folder, _, base = member.name.rpartition("/")
        first, _, suffix = base.partition(".")
        if base.startswith("."):
            continue
        if f"{folder}/{first}" != stem:
            yield from ((number, *image, label) for image in images)
            stem, label, images = f"{folder}/{first}", -1, []
        if f".{suffix.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES:
            images.append((member.offset, member.offset_data, member.size))
        elif suffix in ("cls", "json") and (text := _label(archive, member, suffix)) is not None:
            label = classes.setdefault(text, len(classes))
    yield from ((number, *image, label) for image in images)


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> str | None:
    file = archive.extractfile(member)
    content = file.read() if file else b""
    if suffix == "cls":
        return content.decode("utf-8", "replace").strip()
    try:
        found = json.loads(content)
    except ValueError:
        return None
    value = found.get("label", found.get("class")) if isinstance(found, dict) else None
    return None if value is None else str(value)
