"""Images in tar shards, webdataset's layout: members that share a name up to the first dot are a sample."""

from __future__ import annotations

import array
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.images.sources import IMAGE_SUFFIXES, Sample, number_classes, printable

# One image: shard, where its header and its bytes start, how many bytes, label (-1: none).
_ENTRY = np.dtype([("shard", "i4"), ("header", "i8"), ("start", "i8"), ("size", "i8"), ("label", "i4")])
_RUN = 256  # images: reading this many in a row is as good as reading the whole shard
_OPEN_FILES = 64
_BLOCK = 512  # bytes a tar header takes, and what data are padded to


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    header: int  # offset of its first header
    start: int  # offset of its bytes
    size: int  # bytes


class _Handle:
    """A file descriptor, closed when nothing uses it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._close = os.close  # at the interpreter's end `os` goes before this does

    def __del__(self) -> None:
        if hasattr(self, "_close"):
            self._close(self.number)


class TarSource:
    """Images of tar shards, read by offset; 32 bytes an image.

    Args:
        name: what the user called it.
        files: the shards, in order.

    Raises:
        UserError: a shard is no tar file or is cut short, or there is no image in any.
    """

    window: int | None = None

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name, self.files = name, [str(file) for file in files]
        # Threads, because storage answers late and not because of the little there is to compute.
        with ThreadPoolExecutor(min(16, len(files))) as pool:
            shards = list(pool.map(_index, self.files))
        self.entries = np.concatenate([entries for entries, _ in shards])
        if not len(self.entries):
            raise UserError(f"{name} holds no image ({len(files)} tar files)")
        known = sorted({text for _, texts in shards for text in texts})
        self.class_names: list[str] | None = None
        numbers: dict[str, int] = {}
        if known and (self.entries["label"] >= 0).all():
            self.class_names, ranks = number_classes(known)
            numbers = dict(zip(known, ranks, strict=True))
        starts, first = [], 0
        for shard, (entries, texts) in enumerate(shards):
            own = self.entries[first : first + len(entries)]
            own["shard"] = shard
            own["label"] = (
                np.array([numbers[text] for text in texts], np.int32)[own["label"]] if numbers else -1
            )
            starts.append(np.arange(first, first + len(own), _RUN))
            first += len(own)
        self.block_starts: NDArray[np.int64] | None = np.concatenate(starts)
        self._open: dict[int, _Handle] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay in their process."""
        return self.__dict__ | {"_open": {}}

    def __len__(self) -> int:
        """Number of images."""
        return len(self.entries)

    def read(self, index: int) -> Sample:
        """The member's bytes; its key is the shard's name and the member's."""
        shard, header, start, size, label = self.entries[index].tolist()
        path = self.files[shard]
        handle = self._handle(shard)
        # Positioned reads: threads and forked workers share the descriptor, and with it the file position.
        raw = os.pread(handle.number, start + size - header, header)
        if len(raw) < start + size - header:
            raise OSError(f"{path} is shorter than it was")
        before = start - header
        if before == _BLOCK:
            name = _name(raw[:_BLOCK])
        else:  # a long name has headers of its own
            name = next(_members(handle.number, path, os.fstat(handle.number).st_size, header)).name
        return Sample(
            raw[before:], f"{Path(path).name}/{printable(name)}", label if self.class_names else None
        )

    def labels(self) -> NDArray[np.int64] | None:
        """From the .cls or .json members."""
        return self.entries["label"].astype(np.int64) if self.class_names else None

    def _handle(self, shard: int) -> _Handle:
        handle = self._open.get(shard)
        if handle is None:
            handle = _Handle(self.files[shard])
            while len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open)), None)
            self._open[shard] = handle
        return handle


def _index(path: str) -> tuple[NDArray[np.void], list[str]]:
    """The images of a shard, with labels as numbers of the texts returned beside them; data are not read."""
    classes: dict[str, int] = {}
    values = array.array("q")
    try:
        handle = _Handle(path)
        size = os.fstat(handle.number).st_size
        for entry in _samples(handle.number, _members(handle.number, path, size), classes):
            values.extend(entry)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    table = np.frombuffer(values, np.int64).reshape(-1, 4)
    entries = np.zeros(len(table), _ENTRY)
    for column, field in enumerate(("header", "start", "size", "label")):
        entries[field] = table[:, column]
    return entries, list(classes)


def _samples(
    file: int, members: Iterator[Member], classes: dict[str, int]
) -> Iterator[tuple[int, int, int, int]]:
    stem, label = "", -1
    images: list[tuple[int, int, int]] = []
    for member in members:
        folder, _, base = member.name.rpartition("/")
        first, _, suffix = base.partition(".")
        if not first:  # hidden, as macOS's ._name beside every file
            continue
        if f"{folder}/{first}" != stem:
            yield from ((*image, label) for image in images)
            stem, label, images = f"{folder}/{first}", -1, []
        suffix = suffix.lower()
        if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES:
            images.append((member.header, member.start, member.size))
        elif suffix in ("cls", "json") and (text := _label(file, member, suffix)) is not None:
            label = classes.setdefault(text, len(classes))
    yield from ((*image, label) for image in images)


def _label(file: int, member: Member, suffix: str) -> str | None:
    content = os.pread(file, min(member.size, 2**24), member.start)
    if suffix == "cls":
        return content.decode("utf-8", "replace").strip() or None
    try:
        found = json.loads(content)
    except ValueError:
        return None
    value = found.get("label", found.get("class")) if isinstance(found, dict) else None
    return str(value) if isinstance(value, (str, int)) else None


def _members(file: int, path: str, end: int, at: int = 0) -> Iterator[Member]:
    """The ordinary files of a tar from an offset on (POSIX.1-2017 pax and ustar; GNU tar), reading headers
    alone.

    Raises:
        UserError: these are no tar headers, or the file ends early.
    """
    first, long_name, long_size = at, "", -1
    while at < end:
        header = os.pread(file, _BLOCK, at)
        if not header.strip(b"\0"):  # the end: two empty blocks, or what padding follows
            return
        size = _number(header[124:136])
        if (
            len(header) < _BLOCK
            or size < 0
            or sum(header[:148], 256) + sum(header[156:]) != _number(header[148:156])
        ):
            what = "is no tar file (is it compressed?)" if at == 0 else f"is broken or cut short at byte {at}"
            raise UserError(f"{path} {what}")
        kind = header[156:157]
        if kind in b"Lx":
            text = os.pread(file, min(size, 2**20), at + _BLOCK)
            if kind == b"L":
                long_name = os.fsdecode(text.rstrip(b"\0"))
            else:
                records = _pax(text)
                long_name = os.fsdecode(records.get(b"path", os.fsencode(long_name)))
                long_size = int(records.get(b"size", b"-1"))
        else:
            size = long_size if long_size >= 0 else size
            if kind in b"0\x007":
                if at + _BLOCK + size > end:
                    raise UserError(
                        f"{path} is cut short: {end} bytes, and a member ends at {at + _BLOCK + size}"
                    )
                yield Member(long_name or _name(header), first, at + _BLOCK, size)
            elif kind in b"123456":  # links, devices, folders have no data
                size = 0
        at += _BLOCK + -(-size // _BLOCK) * _BLOCK
        if kind not in b"LxKg":
            first, long_name, long_size = at, "", -1


def _number(field: bytes) -> int:
    """An octal number, or a binary one where the first bit is set (GNU); -1 where it is neither."""
    if field[:1] and field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        return -1


def _name(header: bytes) -> str:
    """The name in a header block, with ustar's prefix."""
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == tarfile.POSIX_MAGIC[:6] else b""
    return os.fsdecode(prefix + b"/" + name if prefix else name)


def _pax(text: bytes) -> dict[bytes, bytes]:
    """The records "length key=value\\n" of an extended header."""
    records = {}
    while text:
        digits, _, _ = text.partition(b" ")
        if not digits.isdigit() or int(digits) <= len(digits):
            break
        key, _, value = text[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[key] = value
        text = text[int(digits) :]
    return records
