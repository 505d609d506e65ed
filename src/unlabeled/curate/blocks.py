"""Work in blocks: rows of a matrix on disk, on every core, within a memory budget, resumed from a folder.

Shape suffixes: N rows, D width, n rows of a block.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from unlabeled.ahead import ahead
from unlabeled.atomic import replacing
from unlabeled.errors import UserError, writing

Context = TypeVar("Context")
Item = TypeVar("Item")
Result = TypeVar("Result")
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
LARGEST_BLOCK = 65536  # rows
LEAST_MEMORY = 1 << 27  # that searches and joins of any size take


def parse_bytes(text: str | int) -> int:
    """Return the number of bytes that "4GB", "500 M" or "1.5G" stands for (powers of 1024).

    Raises:
        UserError: it stands for none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", str(text), re.IGNORECASE)
    if not match or not float(match[1]):
        raise UserError(f"{text!r} is no amount of memory; 4GB would be.")
    return int(float(match[1]) * UNITS[match[2].upper()])


class Executor(Protocol):
    """Something that calls a function on many items, several at a time, and gives the results in order."""

    def map(
        self, function: Callable[[Context, Item], Result], context: Context, items: Sequence[Item]
    ) -> Iterator[Result]:
        """Give function(context, item) of each item, in order."""


class Threads:
    """The cores of this machine: a thread each, with matrix products that use one core each.

    So a block is computed in the same way, to the last bit, whatever the number of workers.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def map(
        self, function: Callable[[Context, Item], Result], context: Context, items: Sequence[Item]
    ) -> Iterator[Result]:
        """Give function(context, item) of each item, in order; one result a worker waits at most."""
        one = {"initializer": threadpool_limits, "initargs": (1,)}  # OpenMP's limit is each thread's own
        with threadpool_limits(1), ThreadPoolExecutor(self.workers, **one) as pool:
            yield from ahead(pool, partial(function, context), items, most=self.workers)


@dataclass(frozen=True)
class Resources:
    """What a step of curation may use.

    Args:
        workers: threads; 0 is one for each core. The result does not depend on it.
        memory: bytes that may be held; arrays on disk that are mapped do not count. Products of thousands of
            rows hold 50 MB a worker.
        work: folder of finished blocks, from which a step that was stopped goes on; without it nothing is kept.
        seed: of everything drawn at random.
        executor: what runs the blocks, if not threads: see `unlabeled.curate.distributed`.
    """

    workers: int = 0
    memory: int = 4 << 30
    work: Path | None = None
    seed: int = 0
    executor: Executor | None = None

    def map(
        self,
        function: Callable[[Context, Item], Result],
        context: Context,
        items: Sequence[Item],
        held: int = 0,
    ) -> Iterator[Result]:
        """Give function(context, item) of each item, in order, on as many workers as the memory allows.

        held: bytes that one call holds.
        """
        if self.executor:
            return self.executor.map(function, context, items)
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(self.workers or allowed, self.memory // max(1, 2 * held))
        return Threads(max(1, workers)).map(function, context, items)

    def written(
        self,
        function: Callable[[Context, tuple[int, Item]], None],
        context: Context,
        folder: Path,
        name: str,
        items: Sequence[Item],
        held: int = 0,
    ) -> list[Path]:
        """Have function(context, (number, item)) write the files that are not there yet; return all, in order.

        name: of an item's file, of its number, as "cells-{:06d}.npy". held: see `map`.
        """
        numbered = list(enumerate(items))
        files = [folder / name.format(number) for number, _ in numbered]
        left = [item for item, file in zip(numbered, files, strict=True) if not file.is_file()]
        for _ in self.map(function, context, left, held):
            pass
        return files

    def block_rows(self, row_bytes: int) -> int:
        """Rows of a block that holds `row_bytes` each: a power of two, an eighth of the memory at most."""
        rows = max(1, self.memory // 8 // max(1, row_bytes))
        return min(LARGEST_BLOCK, 1 << (rows.bit_length() - 1))

    @contextmanager
    def folder(self, name: str, identity: dict[str, Any]) -> Iterator[Path]:
        """Give the folder of a step: what an earlier run with the same identity left there, else empty."""
        if self.work is None:
            with tempfile.TemporaryDirectory(prefix="unlabeled-") as temporary:
                yield Path(temporary)
            return
        text = json.dumps(identity, sort_keys=True)
        path = Path(self.work) / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            with replacing(path / "step.json") as temporary_file:
                temporary_file.write_text(text)
        yield path


class Rows:
    """Rows of a matrix (N, D), float16 or float32, in memory or on disk, read as float32 a block at a time.

    Travels to another process as the names of its files where it has any.

    Args:
        vectors: an array, a memory map, or several as one (`ShardedRows`, `Parts`).
        unit: scale each row to length 1; a row of zeros stays.
        is_ready: rows are finite and of the length wanted, so that they are given as they are.
        stays: mapped pages stay in memory (`release` does nothing).
    """

    def __init__(self, vectors: Any, unit: bool = True, is_ready: bool = False, stays: bool = False) -> None:
        parts = vectors.parts if hasattr(vectors, "parts") else [vectors]
        self.parts: list[NDArray[Any]] = [part for part in parts if len(part)]
        self.unit, self.is_ready, self.stays = unit, is_ready, stays
        self.shape = (len(vectors), int(vectors.shape[1]))
        if vectors.dtype not in (np.float16, np.float32, np.float64):
            raise TypeError(f"vectors of {vectors.dtype}, not float16 or float32")
        self.dtype = np.dtype(np.float16 if vectors.dtype == np.float16 else np.float32)
        self._prepare()

    def _prepare(self) -> None:
        self.ends = np.cumsum([len(part) for part in self.parts], dtype=np.int64)
        self.maps = [_root(part) for part in self.parts]
        self.parts = [np.asarray(part) for part in self.parts]

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def between(self, start: int, stop: int) -> Floats:
        """Rows start to stop - 1, (n, D)."""
        return self._scaled(self.as_stored(start, stop).astype(np.float32, copy=False), start)

    def as_stored(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop - 1, (n, D), of the length and dtype they have."""
        result = np.empty((max(0, stop - start), self.shape[1]), self.dtype)
        begin = 0
        for part, end in zip(self.parts, self.ends.tolist(), strict=True):
            if begin < stop and end > start:
                first, last = max(start, begin), min(stop, end)
                result[first - start : last - start] = part[first - begin : last - begin]
            begin = end
        return result

    def at(self, rows: Integers) -> Floats:
        """Rows of these numbers, (n, D)."""
        return self._scaled(self.at_as_stored(rows).astype(np.float32, copy=False), rows)

    def at_as_stored(self, rows: Integers) -> NDArray[Any]:
        """Rows of these numbers, (n, D), of the length and dtype they have."""
        if len(self.parts) == 1:
            return self.parts[0][rows].astype(self.dtype, copy=False)
        result = np.empty((len(rows), self.shape[1]), self.dtype)
        order = np.argsort(rows, kind="stable")
        cuts = np.searchsorted(rows, self.ends, sorter=order)
        begin = first = 0
        for part, end, last in zip(self.parts, self.ends.tolist(), cuts.tolist(), strict=True):
            inside = order[first:last]
            if len(inside):
                result[inside] = part[rows[inside] - begin]
            begin, first = end, last
        return result

    def release(self) -> None:
        """Let the pages of mapped files go from this process's memory; they are read again when needed."""
        for root in [] if self.stays else self.maps:
            if root is not None and hasattr(root._mmap, "madvise"):
                root._mmap.madvise(mmap.MADV_DONTNEED)

    def fingerprint(self) -> str:
        """Hash of the shape and of some rows."""
        some = np.linspace(0, len(self) - 1, min(len(self), 256)).astype(np.int64)
        held = np.ascontiguousarray(self.at(some) if len(self) else np.empty(0))
        return hashlib.sha256(repr((self.shape, self.dtype.str)).encode() + held.tobytes()).hexdigest()[:32]

    def _scaled(self, block: Floats, rows: int | Integers) -> Floats:
        if self.is_ready:
            return block
        lengths = np.sqrt(np.einsum("nd,nd->n", block, block))
        if not np.isfinite(lengths).all():
            bad = int(np.flatnonzero(~np.isfinite(lengths))[0])
            row = rows + bad if isinstance(rows, int) else rows[bad]
            raise UserError(f"Row {row} of the vectors is not finite; leave it out.")
        if self.unit:
            lengths[lengths == 0] = 1
            block = block / lengths[:, None]
        return block

    def __getstate__(self) -> dict[str, Any]:
        """Files by name, arrays as they are."""
        return {
            "unit": self.unit,
            "is_ready": self.is_ready,
            "stays": self.stays,
            "shape": self.shape,
            "dtype": self.dtype,
            "parts": [
                part if root is None else _place(part, root)
                for part, root in zip(self.parts, self.maps, strict=True)
            ],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the files."""
        self.__dict__.update(state)
        self.parts = [np.memmap(**part) if isinstance(part, dict) else part for part in state["parts"]]
        self._prepare()


class Parts:
    """Arrays one below the other, as `Rows` takes them."""

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        self.parts, self.dtype = list(parts), parts[0].dtype
        self.shape = (sum(map(len, parts)), parts[0].shape[1])

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]


def _root(part: Any) -> Any:
    """Return the memory map that an array is a contiguous piece of, or None."""
    if not isinstance(part, np.ndarray) or not part.flags.c_contiguous:
        return None
    while isinstance(part, np.ndarray):
        if isinstance(part, np.memmap) and not isinstance(part.base, np.ndarray):
            return part if part.mode == "r" else None  # advice on a writable map could lose what was written
        part = part.base
    return None


def _place(part: NDArray[Any], root: Any) -> dict[str, Any]:
    return {
        "filename": str(root.filename),
        "dtype": part.dtype,
        "shape": part.shape,
        "mode": "r",
        "offset": root.offset + part.ctypes.data - root.ctypes.data,
    }


def spans(total: int, size: int) -> list[tuple[int, int]]:
    """Cut 0 to total - 1 into (start, stop) of at most `size`."""
    return [(start, min(total, start + size)) for start in range(0, total, size)]


def grouped(labels_N: NDArray[np.integer[Any]]) -> Iterator[tuple[int, Integers]]:
    """Give each label that there is, ascending, and the places that have it, ascending."""
    order = np.argsort(labels_N, kind="stable")
    counts = np.bincount(labels_N)
    ends = np.cumsum(counts)
    for label in np.flatnonzero(counts).tolist():
        yield label, order[ends[label] - counts[label] : ends[label]]


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as .npy, all or nothing."""
    with writing(path), replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays as .npz, all or nothing."""
    with writing(path), replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return what `save_arrays` wrote."""
    with np.load(path) as held:
        return dict(held)


def load_one(path: Path, name: str) -> NDArray[Any]:
    """Return one of the arrays that `save_arrays` wrote; the others are not read."""
    with np.load(path) as held:
        array: NDArray[Any] = held[name]
    return array
