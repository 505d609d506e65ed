"""k-NN over a million training features: time, memory, and its share of the rate of matrix products.

    python benchmarks/knn.py --rows 1000000

The table is float16 on disk, as `embed --dtype float16` writes it, and memory-mapped. Each way runs in a process of
its own, for its peak memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from machine import device_name, peak_memory
from unlabeled.evaluate.nearest import nearest, unit

WAYS = (
    "product alone, numpy",
    "unlabeled",
    "faiss.knn, blocks and a heap",
    "torch: product and topk",
)


def run(way: str, path: Path, rows: int, width: int, queries: int, k: int) -> dict:
    table = np.memmap(path, np.float16, "r", shape=(rows, width))
    wanted = unit(np.random.default_rng(1).normal(size=(queries, width)))
    begun = time.perf_counter()
    if way == WAYS[0]:
        block, left = unit(table[:32768]), np.empty((queries, 32768), np.float32)
        np.matmul(wanted, block.T, out=left)
        begun = time.perf_counter()
        for _ in range(-(-rows // 32768)):
            np.matmul(wanted, block.T, out=left)
        rows = -(-rows // 32768) * 32768
        found = None
    elif way == WAYS[1]:
        found = nearest(table, wanted, k).rows
    elif way == WAYS[2]:
        heap = faiss.ResultHeap(queries, k, keep_max=True)
        for start in range(0, rows, 32768):
            block = unit(table[start : start + 32768])
            similarities, places = faiss.knn(
                wanted, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT
            )
            heap.add_result(similarities, places + start)
        heap.finalize()
        found = heap.I
    else:
        whole = torch.from_numpy(unit(np.asarray(table))).T
        parts = torch.from_numpy(wanted).split(max(1, 2**28 // (4 * rows)))
        found = torch.cat([(part @ whole).topk(k)[1] for part in parts]).numpy()
    seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "rate": 2 * rows * width * queries / seconds / 1e9,
        "memory": peak_memory(torch.device("cpu")),
        "first": None if found is None else found[:, :10].tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--k", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--one", nargs=3, metavar=("WAY", "PATH", "K"), help="Used by the command itself.")
    options = parser.parse_args()
    sizes = (options.rows, options.width, options.queries)
    if options.one:
        way, path, k = options.one
        print(json.dumps(run(way, Path(path), *sizes, int(k))))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table"
        rng = np.random.default_rng(0)
        with path.open("wb") as file:
            for start in range(0, options.rows, 65536):
                size = (min(65536, options.rows - start), options.width)
                file.write(rng.standard_normal(size, np.float32).astype(np.float16).tobytes())
        print(
            f"{options.rows:,} x {options.width} float16, {options.queries:,} queries, "
            f"{device_name(torch.device('cpu'))}\n"
        )
        print(
            "| k | way | seconds | GFLOP/s | of the product's | peak memory, GB |\n|---|---|---|---|---|---|"
        )
        for k in options.k:
            found = {}
            for way in WAYS:
                words = [sys.executable, __file__, "--one", way, str(path), str(k)]
                words += [
                    f"--{name}={value}"
                    for name, value in zip(("rows", "width", "queries"), sizes, strict=True)
                ]
                found[way] = json.loads(
                    subprocess.run(words, check=True, capture_output=True, text=True).stdout
                )
                one = found[way]
                share = one["rate"] / found[WAYS[0]]["rate"]
                print(
                    f"| {k} | {way} | {one['seconds']:.1f} | {one['rate']:.1f} | {share:.0%} | {one['memory']:.2f} |",
                    flush=True,
                )
            first = [np.array(found[way]["first"]) for way in WAYS[1:]]
            same = min(float((first[0] == other).mean()) for other in first[1:])
            print(f"\nthe first 10 neighbours are the same at {same:.3%} of the places\n")


if __name__ == "__main__":
    main()
