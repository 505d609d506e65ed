"""Approximate search: faiss's HNSW graph over float16 vectors, and how good it is.

Why faiss and this graph: see docs/search.md, and benchmarks/search.py for the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from unlabeled.atomic import replacing
from unlabeled.errors import UserError, writing
from unlabeled.search.scan import Nearest, scan

LINKS = 32  # of a vector in the graph; twice as many in its lowest layer
LINKS_A_VECTOR = 2 * LINKS + 1.1 * LINKS / (LINKS - 1)  # with those of the higher layers, and some to spare
BUILD_EFFORT = 160  # candidates that are looked at for a new vector's links
EFFORTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
MEASURED_K = 10  # neighbours whose recall is measured
MORE = 1.5  # effort for each neighbour beyond those
PERFECT = 0.999  # from this recall on no more efforts are measured


class Graph:
    """Vectors of length 1 and the links between near ones.

    Attributes:
        vectors: (N, D) float16, as they lie in memory or in the file.
    """

    def __init__(self, index: Any) -> None:
        self.index = index
        storage = faiss.downcast_index(index.storage)
        if storage.ntotal:
            codes = faiss.rev_swig_ptr(storage.codes.data(), storage.ntotal * storage.code_size)
            self.vectors = codes.view(np.float16).reshape(storage.ntotal, index.d)
        else:
            self.vectors = np.empty((0, index.d), np.float16)

    def __len__(self) -> int:
        """Number of vectors."""
        return int(self.index.ntotal)

    def nearest(self, queries_BD: NDArray[np.float32], k: int, effort: int) -> Nearest:
        """Return about the k most similar; the more candidates (`effort`) are kept on the way, the truer."""
        parameters = faiss.SearchParametersHNSW(efSearch=max(effort, k))
        similarities, rows = self.index.search(queries_BD, k, params=parameters)
        similarities[rows < 0] = -np.inf
        return Nearest(similarities, rows)

    def write(self, folder: Path, number: int) -> str:
        """Write to a file of its own, whole or not at all, and return its name. Raises UserError for a full disk."""
        path = folder / f"graph-{number:06}.faiss"
        with writing(path), replacing(path) as part, part.open("wb") as file:
            failed: list[OSError] = []

            def write(data: bytes) -> int:
                try:
                    return file.write(data)
                except OSError as error:  # faiss would hide it behind its own words
                    failed.append(error)
                    return 0

            try:
                faiss.write_index(self.index, faiss.PyCallbackIOWriter(write, 2**20))
            except RuntimeError as error:
                raise failed[0] if failed else error from error
            if failed:
                raise failed[0]
        return path.name


def grow(graph: Graph | None, parts: Iterable[NDArray[np.float32]], dimension: int, count: int) -> Graph:
    """Return a graph with more vectors, all of length 1; a new one where there is none.

    count: of the vectors that it is to have, for which room is made at once.
    """
    if graph is None:
        index = faiss.IndexHNSWSQ(dimension, faiss.ScalarQuantizer.QT_fp16, LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILD_EFFORT
    else:
        index = graph.index
    storage = faiss.downcast_index(index.storage)
    # Arrays that grow are held twice whenever they are moved: 1.5 GB more for a million vectors of 384.
    for array, needed in (
        (storage.codes, count * storage.code_size),
        (index.hnsw.neighbors, round(count * LINKS_A_VECTOR)),
    ):
        size = array.size()
        array.resize(max(size, needed))
        array.resize(size)  # what is reserved stays
    for part in parts:
        index.add(part)
    return Graph(index)


def read_graph(path: Path, *, mapped: bool = True) -> Graph:
    """Open a graph's file; mapped: read from the disk as it is used and shared between processes, but it cannot grow.

    Raises UserError where it is damaged.
    """
    try:
        return Graph(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0))
    except RuntimeError as error:
        if not path.exists():
            raise FileNotFoundError(path) from error
        raise UserError(f"{path} is damaged; build the index again from its table.") from error


def measure(graph: Graph, queries_BD: NDArray[np.float32]) -> list[dict[str, float]]:
    """Return the recall@10 at each effort: of the 10 nearest by exact search, the share found.

    Returns {"effort", "recall", "images"}, the last being how many queries it was measured with.
    queries: of length 1, not among the graph's vectors: those find their own neighbours more easily.
    """
    k = min(MEASURED_K, len(graph))
    truth = scan(queries_BD, graph.vectors, k).rows
    curve = []
    for effort in EFFORTS:
        found = graph.nearest(queries_BD, k, effort).rows
        hits = (found[:, :, None] == truth[:, None, :]).any(2)
        curve.append({"effort": effort, "recall": round(float(hits.mean()), 4), "images": len(queries_BD)})
        if curve[-1]["recall"] >= PERFECT:
            break
    return curve


def effort_for(curve: list[dict[str, float]], recall: float, k: int) -> int:
    """Return the least effort that reaches a recall of the k nearest; it was measured of 10, and more need more.

    Between two measured efforts it lies on the line through both: recall grows ever more slowly, so the true one is
    above that line. Raises UserError where no measured effort reaches it.
    """
    below: dict[str, float] | None = None
    for point in curve:
        if point["recall"] >= recall:
            effort = point["effort"]
            if below:
                share = (recall - below["recall"]) / (point["recall"] - below["recall"])
                effort = below["effort"] + share * (point["effort"] - below["effort"])
            return math.ceil(round(effort, 6)) + math.ceil(MORE * max(0, k - MEASURED_K))
        below = point
    best = max(point["recall"] for point in curve)
    raise UserError(f"This index reaches a recall of {best:.3f}, not {recall:g}; ask for {best:.3f} or less.")
