"""Search a million vectors: unlabeled beside scikit-learn's brute force and faiss's flat index, two cores.

    python benchmarks/search.py [--images 1000000] [--lancedb PYTHON] [--out benchmarks/results/search.md]

--lancedb: a Python that has lancedb and numpy, for a table at 100,000.
All is measured in this run, on the same vectors and queries, in turns. The truth is float32 exact search.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

import unlabeled
from machine import device_name, report
from unlabeled.features.table import FORMAT, SCHEMA

D, K, QUERIES, ROUNDS = 384, 10, 2000, 3
SLOW_QUERIES = 200  # of the brute-force rivals
TOPICS, CLUSTERS, RANK = 200, 20_000, 24
FILTERS = {
    "width >= 500": "half of the images, anywhere",
    "width >= 900": "a tenth, anywhere",
    "width >= 990": "a hundredth, anywhere",
    "label IN ('0', '1', '2', '3', '4')": "a fifth, all in some clusters",
    "label = '0'": "a twenty-fifth, all in some clusters",
}


class World:
    """Vectors like features: clusters within topics, of power-law sizes, each with some directions of its own.

    Scales are such that the nearest neighbours' cosines and the intrinsic dimension (TwoNN, 1803.06992) are those of
    ViT features of photographs: about .6 to .9, and 15 to 25.
    """

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        spectrum = (1 + np.arange(D, dtype=np.float32)) ** -0.5
        spectrum /= np.linalg.norm(spectrum)
        self.topic_of = generator.integers(0, TOPICS, CLUSTERS)
        topics = generator.standard_normal((TOPICS, D), np.float32) * spectrum
        self.centres = 0.7 * topics[self.topic_of]
        self.centres += 0.5 * generator.standard_normal((CLUSTERS, D), np.float32) * spectrum
        self.directions = generator.standard_normal((TOPICS, RANK, D), np.float32) * spectrum
        self.shares = (1.0 + generator.permutation(CLUSTERS)) ** -0.5
        self.shares /= self.shares.sum()

    def draw(self, count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Vectors (count, D) and their topics (count,)."""
        generator = np.random.default_rng(seed)
        clusters = generator.choice(CLUSTERS, count, p=self.shares)
        topics = self.topic_of[clusters]
        vectors = self.centres[clusters]
        order = np.argsort(topics, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(topics[order])) + 1):
            weights = generator.standard_normal((len(part), RANK), np.float32)
            vectors[part] += 0.11 * weights @ self.directions[topics[part[0]]]
        vectors += 0.012 * generator.standard_normal(vectors.shape, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), topics


def write_table(folder: Path, vectors: NDArray[np.float32], topics: NDArray[np.int64]) -> None:
    """A feature table as `unlabeled embed` writes it."""
    folder.mkdir()
    shard, count = 65536, len(vectors)
    identity = {"model": {"name": "", "weights": "0" * 64}, "kind": "cls", "layer": 11}
    source = {"data": "synthetic", "images": count, "shard": shard}
    header = {"format": FORMAT, "identity": identity, "dtype": "float32", "dimension": D, "sources": [source]}
    (folder / "table.json").write_text(json.dumps(header))
    widths = np.random.default_rng(9).integers(0, 1000, count)
    for number, start in enumerate(range(0, count, shard)):
        part = slice(start, start + shard)
        places = np.arange(count)[part]
        columns = {
            "key": [f"folder {place // 1000:05}/image {place:08}.jpg" for place in places],
            "source": ["synthetic"] * len(places),
            "index": places,
            "content_hash": [f"{place:032x}" for place in places],
            "width": widths[part].astype(np.int32),
            "height": widths[part].astype(np.int32),
            "label": [str(topic % 25) for topic in topics[part]],
        }
        np.save(folder / f"000-{number:06}.npy", vectors[part])
        pq.write_table(pa.table(columns, schema=SCHEMA), folder / f"000-{number:06}.parquet")


def rate(search: Callable[[NDArray[np.float32]], object], queries: NDArray[np.float32]) -> float:
    start = time.perf_counter()
    search(queries)
    return len(queries) / (time.perf_counter() - start)


def found_by(index: unlabeled.Index, queries: NDArray[np.float32], **options: Any) -> NDArray[np.int64]:
    """Numbers of the vectors found, as in the table: an index that measured itself has them in another order."""
    rows = index.nearest(queries, K, **options).rows
    numbers = index.now.rows.column("index").to_numpy()
    return np.where(rows < 0, -1, numbers[rows])


def recall_of(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    hits = (found[:, :, None] == truth[:, None, :]) & (truth[:, None, :] >= 0)
    return float(hits.sum() / (truth >= 0).sum())


def intrinsic_dimension(queries: NDArray[np.float32], flat: faiss.Index) -> float:
    """TwoNN, from the ratio of the distances to the second and to the first neighbour."""
    squares = 2 - 2 * flat.search(queries, 2)[0]
    return float(1 / np.log(np.sqrt(squares[:, 1] / squares[:, 0])).mean())


MEASURED_APART = """
import pathlib, re, sys, time
import numpy as np
import unlabeled
start = time.perf_counter()
if sys.argv[1] == "build":
    index = unlabeled.build_index(sys.argv[2], sys.argv[3], choice="approximate")
    print(time.perf_counter() - start)
else:
    index = unlabeled.open_index(sys.argv[3])
    index.search(np.load(sys.argv[2])[0], k=10)
    print(time.perf_counter() - start)
    index.search(np.load(sys.argv[2]), k=10)
    index.search(np.load(sys.argv[2]), k=10, where="width >= 900")
# ru_maxrss would be at least what the process had that started this one.
status = pathlib.Path("/proc/self/status").read_text()
print(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024 / 1e9)
"""


def apart(verb: str, source: Path, index: Path) -> tuple[float, float]:
    """Seconds and the largest resident size in GB of a process of its own."""
    command = [sys.executable, "-c", MEASURED_APART, verb, str(source), str(index)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory


def beside_lancedb(python: str, vectors: NDArray[np.float32], queries: NDArray[np.float32]) -> list[str]:
    """One query at a time, as LanceDB is asked; both indexes are on disk."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        np.save(folder / "vectors.npy", vectors)
        np.save(folder / "queries.npy", queries)
        write_table(folder / "table", vectors, np.zeros(len(vectors), np.int64))
        begun = time.perf_counter()
        index = unlabeled.build_index(folder / "table", folder / "index", choice="approximate")
        seconds = time.perf_counter() - begun
        flat = faiss.IndexFlatIP(D)
        flat.add(vectors)
        truth = flat.search(queries, K)[1]
        lines = [
            "",
            f"## Beside LanceDB, at {len(vectors):,}",
            "",
            "One query at a time, from a vector to keys (unlabeled) or row numbers (LanceDB).",
            "",
            "| | built in s | recall@10 | queries/s |",
            "|---|---|---|---|",
        ]
        for target in (0.95, 0.99):
            index.search(queries[0], k=K, recall=target)
            begun = time.perf_counter()
            for query in queries:
                index.search(query, k=K, recall=target)
            one = len(queries) / (time.perf_counter() - begun)
            recall = recall_of(found_by(index, queries, recall=target), truth)
            lines.append(f"| unlabeled, recall {target} | {seconds:.0f} | {recall:.3f} | {one:,.0f} |")
        script = Path(__file__).parent / "rivals" / "lancedb_search.py"
        command = [
            python,
            str(script),
            *(str(folder / name) for name in ("vectors.npy", "queries.npy", "lance")),
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        for line in done.stdout.splitlines():
            held = json.loads(line)
            for way in held["ways"]:
                how = ", ".join(f"{name} {value}" for name, value in way["way"].items())
                recall = recall_of(np.array(way["rows"]), truth)
                lines.append(
                    f"| LanceDB {held['kind']}, {how} | {held['seconds']:.0f} | {recall:.3f} | {way['rate']:,.0f} |"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--lancedb", metavar="PYTHON")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    world = World(0)
    vectors, topics = world.draw(arguments.images, 1)
    queries, _ = world.draw(QUERIES, 2)
    few = queries[:SLOW_QUERIES]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_table(folder / "table", vectors, topics)
        np.save(folder / "queries.npy", queries)
        build_seconds, build_memory = apart("build", folder / "table", folder / "index")
        first_seconds, search_memory = apart("search", folder / "queries.npy", folder / "index")
        index = unlabeled.open_index(folder / "index")
        flat = faiss.IndexFlatIP(D)
        flat.add(vectors)
        truth = flat.search(queries, K)[1]
        brute = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="cosine").fit(vectors)
        runs: dict[str, Callable[[NDArray[np.float32]], object]] = {
            f"unlabeled, recall {target}": lambda queries, target=target: index.search(
                queries, k=K, recall=target
            )
            for target in (0.9, 0.95, 0.99)
        }
        runs["unlabeled, one query at a time, recall 0.95"] = lambda queries: [
            index.search(query, k=K, recall=0.95) for query in queries
        ]
        slow = {
            "faiss IndexFlatIP": lambda queries: flat.search(queries, K),
            "scikit-learn NearestNeighbors, cosine, brute": lambda queries: brute.kneighbors(queries),
        }
        rates: dict[str, float] = {}
        for _ in range(ROUNDS):  # in turns, the best of each
            for name, search in (runs | slow).items():
                rates[name] = max(rates.get(name, 0), rate(search, few if name in slow else queries))
        base = rates["scikit-learn NearestNeighbors, cosine, brute"]
        lines = [
            f"# Search: {arguments.images:,} vectors of {D}, k = {K}",
            "",
            f"`python benchmarks/search.py --images {arguments.images}` on {device_name(torch.device('cpu'))}; "
            f"faiss {faiss.__version__}. Queries are not among the vectors. Cosine to the 1st and {K}th neighbour: "
            f"{' and '.join(f'{value:.2f}' for value in flat.search(few, K)[0].mean(0)[[0, -1]])}; intrinsic dimension "
            f"(TwoNN) {intrinsic_dimension(queries, flat):.0f}.",
            "",
            "| | recall@10 | queries/s | times scikit-learn |",
            "|---|---|---|---|",
        ]
        for name in runs:
            target = float(name.split()[-1])
            recall = recall_of(found_by(index, queries, recall=target), truth)
            lines.append(f"| {name} | {recall:.3f} | {rates[name]:,.0f} | {rates[name] / base:.0f} |")
        lines += [f"| {name} | 1 | {rates[name]:,.0f} | {rates[name] / base:.1f} |" for name in slow]
        stored = ", ".join(f"{point['recall']:.3f}" for point in index.now.manifest.curve)
        size = sum(file.stat().st_size for file in (folder / "index").iterdir()) / 1e9
        lines += [
            "",
            f"Built in {build_seconds:.0f} s with at most {build_memory:.2f} GB resident. On disk {size:.2f} GB. A "
            f"process that opens the index and searches {QUERIES:,} vectors with and without a condition has "
            f"{search_memory:.2f} GB resident at most; its first answer comes after {first_seconds:.2f} s.",
            "",
            f"Recall that the index stored of itself, by effort: {stored}.",
        ]
        report(lines, arguments.out)
        lines = [
            "",
            "## With a condition",
            "",
            "scikit-learn is fitted on the very vectors that meet the condition, beforehand; the index is asked with "
            "`where`.",
            "",
            "| where | | recall@10 | queries/s | scikit-learn on the subset | times | times scikit-learn on all |",
            "|---|---|---|---|---|---|---|",
        ]
        for where, words in FILTERS.items():
            mask = index.now.allowed(where)
            assert mask is not None
            rows = index.now.rows.column("index").to_numpy()[mask]
            subset_flat = faiss.IndexFlatIP(D)
            subset_flat.add(vectors[rows])
            subset_truth = rows[subset_flat.search(queries, K)[1]]
            subset = NearestNeighbors(n_neighbors=K, algorithm="brute", metric="cosine").fit(vectors[rows])
            ours = theirs = 0.0
            for _ in range(ROUNDS):
                ours = max(ours, rate(lambda q: index.search(q, k=K, where=where), queries))  # noqa: B023
                theirs = max(theirs, rate(subset.kneighbors, few))
            recall = recall_of(found_by(index, queries, where=where), subset_truth)
            lines.append(
                f"| `{where}` | {words} | {recall:.3f} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.1f} | "
                f"{ours / base:.0f} |"
            )
    report(lines, arguments.out)
    if arguments.lancedb:
        report(beside_lancedb(arguments.lancedb, vectors[:100_000], queries[:500]), arguments.out)


if __name__ == "__main__":
    main()
