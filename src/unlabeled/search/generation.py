"""An index on disk: files that are never changed, and a manifest that says which of them are the index now.

    index.json             the manifest; replaced in one step, which is the moment a change happens
    rows-000001.arrow      keys and other columns, memory-mapped; one file an addition
    vectors-000001.npy     of an exact index: float32, one file an addition
    graph-000003.faiss     of an approximate index: all vectors, float16, and their links
    deleted-000004.npy     numbers of the rows that are deleted
    .lock                  held by the one who writes

A reader has the files of its generation open, so it goes on undisturbed when a writer removes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unlabeled.atomic import replacing
from unlabeled.errors import UserError, writing
from unlabeled.features.table import ShardedRows
from unlabeled.search.filters import rows_where
from unlabeled.search.graph import Graph, read_graph

Kind = Literal["exact", "approximate"]
Choice = Literal["auto", "exact", "approximate"]

FORMAT = "unlabeled index 1"
LOCK = ".lock"
OURS = re.compile(
    r"\.?(rows|vectors|graph|deleted)-\d{6}\.|\.index\.json\."
)  # written by us, or half written
PATIENCE = 600.0  # seconds that a writer waits for another
OPENINGS = 20  # times that opening is tried while a writer replaces files
MASKS = 16  # conditions whose rows are remembered


@dataclass(frozen=True)
class Manifest:
    """What the index is: its kind, whose features it holds, and its files.

    choice: what was asked for, and kind: what that made it. recall: wanted of an approximate index; curve: what it
    reaches, see `measure`.
    """

    generation: int
    kind: Kind
    choice: Choice
    identity: dict[str, Any]
    dimension: int
    recall: float
    curve: list[dict[str, float]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    graph: str = ""
    deleted: str = ""

    @property
    def files(self) -> set[str]:
        """Names of all files of this generation."""
        return {*self.rows, *self.vectors, self.graph, self.deleted} - {""}


class Generation:
    """One state of an index, open for reading.

    Attributes:
        rows: the table of keys and other columns; row i is of vector i.
        graph: of an approximate index.
        vectors: (N, D), of length 1; float32 of an exact index, float16 of an approximate one.
        alive: (N,) truths, or None while nothing is deleted.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.rows = pa.concat_tables([_read_rows(path / name) for name in manifest.rows])
        self.graph: Graph | None = None
        self.vectors: Any
        if manifest.kind == "approximate":
            self.graph = read_graph(path / manifest.graph)
            self.vectors = self.graph.vectors
        else:
            parts = [_read_array(path / name) for name in manifest.vectors]
            self.vectors = ShardedRows(parts, manifest.dimension, np.dtype(np.float32))
        if len(self.vectors) != len(self.rows):
            raise UserError(
                f"{path} is damaged: {len(self.vectors)} vectors for {len(self.rows)} rows; build it again."
            )
        self.alive: NDArray[np.bool_] | None = None
        if manifest.deleted:
            self.alive = np.ones(len(self.rows), bool)
            self.alive[_read_array(path / manifest.deleted)] = False
        self._masks: dict[str, NDArray[np.bool_]] = {}

    def __len__(self) -> int:
        """Number of images, deleted ones left out."""
        return len(self.rows) if self.alive is None else int(self.alive.sum())

    def alive_mask(self) -> NDArray[np.bool_]:
        """Return a copy of `alive`, all true while nothing is deleted."""
        return np.ones(len(self.rows), bool) if self.alive is None else self.alive.copy()

    def allowed(self, where: str | None) -> NDArray[np.bool_] | None:
        """Return which rows are not deleted and meet a condition, (N,); None for all. Raises UserError."""
        if where is None:
            return self.alive
        if where not in self._masks:
            mask = np.zeros(len(self.rows), bool)
            mask[rows_where(self.rows, where)] = True
            if self.alive is not None:
                mask &= self.alive
            while len(self._masks) >= MASKS:
                self._masks.pop(next(iter(self._masks)))
            self._masks[where] = mask
        return self._masks[where]


def open_generation(path: Path) -> Generation:
    """Open what an index is now. Raises UserError where there is none, or it is damaged."""
    for _ in range(OPENINGS):
        manifest = read_manifest(path)
        try:
            return Generation(path, manifest)
        except FileNotFoundError as error:
            missing = error
            if read_manifest(path).generation == manifest.generation:
                break
    raise UserError(f"{path} is damaged: {missing.filename or missing} is missing; build it again.")


def read_manifest(path: Path) -> Manifest:
    """Return what index.json says. Raises UserError where there is none, or of another kind."""
    file = path / "index.json"
    if not file.is_file():
        raise UserError(
            f"{path} is no index: it has no index.json; `unlabeled index TABLE --out {path}` makes one."
        )
    try:
        held = json.loads(file.read_text())
        known = held.pop("format") == FORMAT
        return Manifest(**held) if known else _refuse(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error!r}; build the index again.") from error


def publish(path: Path, manifest: Manifest) -> Generation:
    """Make a generation the index, and remove the files of others."""
    with writing(path), replacing(path / "index.json") as part:
        part.write_text(json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1) + "\n")
    opened = open_generation(path)
    for file in path.iterdir():
        if OURS.match(file.name) and file.name not in manifest.files:
            file.unlink(missing_ok=True)
    return opened


def check_free(path: Path) -> None:
    """Raise UserError unless an index can be begun at a path: nothing is there, or what a stopped build left."""
    if (path / "index.json").exists():
        raise UserError(f"{path} is an index already; add to it, or choose another --out.")
    strange = path.exists() and (
        not path.is_dir() or any(file.name != LOCK and not OURS.match(file.name) for file in path.iterdir())
    )
    if strange:
        raise UserError(f"{path} exists and is no index; choose another --out.")


@contextmanager
def writer(path: Path) -> Iterator[None]:
    """Hold the index's lock, for which another writer is waited for. Raises UserError after ten minutes."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path / LOCK, timeout=PATIENCE)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise UserError(
                f"{path} has been written to by another process for {PATIENCE:.0f} seconds."
            ) from error
    try:
        yield
    finally:
        lock.release()


def write_rows(path: Path, number: int, rows: pa.Table) -> str:
    """Write rows to a file of their own, and return its name."""
    name = f"rows-{number:06}.arrow"
    rows = rows.combine_chunks()
    with writing(path), replacing(path / name) as part, pa.ipc.new_file(part, rows.schema) as file:
        file.write_table(rows)
    return name


def write_array(path: Path, kind: str, number: int, values: NDArray[Any]) -> str:
    """Write an array to a file of its own, and return its name."""
    name = f"{kind}-{number:06}.npy"
    with writing(path), replacing(path / name) as part, part.open("wb") as file:
        np.save(file, values)
    return name


def _read_rows(file: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{file} is damaged: {' '.join(str(error).split())}; build the index again."
        ) from error


def _read_array(file: Path) -> NDArray[Any]:
    try:
        held: NDArray[Any] = np.load(file, mmap_mode="r")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} is damaged: {error}; build the index again.") from error
    return held


def _refuse(file: Path) -> Manifest:
    raise UserError(f"{file} is of another format than {FORMAT!r}; build the index again.")
