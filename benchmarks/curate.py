"""Curation at scale, on made vectors with planted near-duplicates: time, memory, recall and precision.

    python benchmarks/curate.py duplicates --sizes 100000 1000000 [--falling 0]
    python benchmarks/curate.py kmeans --size 100000 --clusters 1000
    python benchmarks/curate.py tree --size 1000000

Vectors are made of clusters with a heavy tail of sizes and a falling spectrum, as features have, or with `--falling 0`
a flat one, as they have when they are whitened; a tenth are copies of others at cosines of 0.82 to 0.99. Each size runs
in a process of its own, which reports its largest resident size.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from machine import device_name, peak_memory
from unlabeled.curate.blocks import Resources, Rows, parse_bytes, spans
from unlabeled.curate.duplicates import near_duplicates
from unlabeled.curate.hierarchy import hierarchical_kmeans
from unlabeled.curate.kmeans import kmeans
from unlabeled.curate.neighbours import pairs_above
from unlabeled.curate.sampling import balanced_sample

THRESHOLD = 0.8


def made(count, width, path, falling=0.5, seed=0):
    """Write vectors as float16; return the rows of copies and of what they are copies of.

    falling: the i-th direction's deviation is i^-falling.
    """
    generator = np.random.default_rng(seed)
    classes = max(8, round(count**0.5))
    spectrum = np.arange(1, width + 1) ** -falling
    spectrum = (spectrum / np.linalg.norm(spectrum)).astype(np.float32)
    turn = np.linalg.qr(generator.normal(size=(width, width)))[0].astype(np.float32)

    def drawn(rows):
        noise = (generator.standard_normal((rows, width), np.float32) * spectrum) @ turn
        return noise / np.linalg.norm(noise, axis=1, keepdims=True)

    centers = drawn(classes)
    weights = np.arange(1, classes + 1) ** -0.7
    label = generator.choice(classes, count, p=weights / weights.sum())
    pick = generator.permutation(count)
    copies = np.sort(pick[: count // 10])  # in the order in which they are written
    originals = pick[len(copies) :][generator.integers(count // 20, size=len(copies))]
    vectors = np.lib.format.open_memmap(path, "w+", np.float16, (count, width))
    for start, stop in spans(count, 65536):
        block = 0.5 * centers[label[start:stop]] + 0.866 * drawn(stop - start)
        vectors[start:stop] = block / np.linalg.norm(block, axis=1, keepdims=True)
    for start, stop in spans(len(copies), 65536):
        block = vectors[originals[start:stop]].astype(np.float32)
        other = drawn(len(block))
        other -= (other * block).sum(axis=1, keepdims=True) * block
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        cosine = generator.uniform(0.82, 0.99, (len(block), 1)).astype(np.float32)
        vectors[copies[start:stop]] = cosine * block + np.sqrt(1 - cosine**2) * other
    vectors.flush()
    del vectors
    return copies, originals


def made_elsewhere(count, width, path, falling=0.5):
    """The same by a process of its own, so that its memory does not count; and the vectors mapped."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        copies, originals = pool.apply(made, (count, width, path, falling))
    return np.load(path, mmap_mode="r"), copies, originals


def product_rate(width, seconds=2.0):
    """FLOP/s of matrix products of this width on every core, the best of some: what the machine could do."""
    left = np.random.default_rng(0).normal(size=(4096, width)).astype(np.float32)
    best, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        left @ left.T
        best = max(best, 2 * 4096 * 4096 * width / (time.perf_counter() - start))
    return best


def all_edges(vectors, threshold):
    """Number of pairs above the threshold by brute force."""
    rows, count = Rows(vectors), 0
    whole = rows.between(0, len(rows))
    for start, stop in spans(len(rows), 4096):
        for first, last in spans(stop, 4096):
            above = whole[start:stop] @ whole[first:last].T >= threshold
            count += int(np.tril(above, -1).sum()) if first == start else int(above.sum())
    return count


def duplicates(size, width, falling, resources, brute):
    with tempfile.TemporaryDirectory() as folder:
        vectors, copies, originals = made_elsewhere(size, width, Path(folder) / "vectors.npy", falling)
        rate = product_rate(width)
        begun, used = time.perf_counter(), time.process_time()
        found = near_duplicates(vectors, THRESHOLD, resources=resources)
        seconds, used = time.perf_counter() - begun, time.process_time() - used
        peak = peak_memory(torch.device("cpu"))
        joined = found.component_N[copies] == found.component_N[originals]
        dropped = np.flatnonzero(~found.is_kept)
        family = np.arange(size)
        family[copies] = originals
        right = family[dropped] == family[found.representative_N[dropped]]
        result = {
            "size": size,
            "falling": falling,
            "seconds": seconds,
            "cpu_seconds": used,
            "peak_gb": peak,
            "gemm_gflops": rate / 1e9,
            "times_products": seconds / (2 * width * found.compared / rate),
            "compared_each": found.compared / size,
            "planted_recall": float(joined.mean()),
            "planted_precision": float(right.mean()),
            "edge_recall_sample": str(found.recall),
            "pairs": found.pairs,
            "parts": {name: round(value, 1) for name, value in found.seconds.items()},
        }
        if brute:
            begun = time.perf_counter()
            edges = all_edges(vectors, THRESHOLD)
            result |= {"edge_recall": found.pairs / edges, "brute_seconds": time.perf_counter() - begun}
            streamed = sum(len(part.left_P) for part in pairs_above(vectors, THRESHOLD, resources=resources))
            assert streamed == found.pairs
    return result


def clusters(size, width, k, resources):
    """Our k-means beside faiss's and scikit-learn's mini-batches, from random rows, as many passes over the rows."""
    import faiss
    from sklearn.cluster import MiniBatchKMeans

    iterations = 10
    with tempfile.TemporaryDirectory() as folder:
        vectors, *_ = made_elsewhere(size, width, Path(folder) / "vectors.npy")
        whole = Rows(vectors).between(0, size)
        results = {"size": size, "clusters": k, "gemm_gflops": product_rate(width) / 1e9}

        def similarity(centroids):
            centroids = centroids / np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-30)
            return float(
                np.mean([(whole[a:b] @ centroids.T).max(axis=1).mean() for a, b in spans(size, 10000)])
            )

        def timed(name, train):
            begun, used = time.perf_counter(), time.process_time()
            centroids = train()
            seconds, used = time.perf_counter() - begun, time.process_time() - used
            results[name] = {"seconds": seconds, "cpu_seconds": used, "similarity": similarity(centroids)}

        settings = {"init": "random", "iterations": iterations, "tolerance": 0}
        timed("unlabeled", lambda: kmeans(vectors, k, resources=resources, **settings).centroids_KD)
        theirs = faiss.Kmeans(
            width, k, niter=iterations, spherical=True, max_points_per_centroid=size, seed=1
        )
        timed("faiss.Kmeans", lambda: (theirs.train(whole), theirs.centroids)[1])
        batches = MiniBatchKMeans(
            k, batch_size=8192, max_iter=iterations, n_init=1, init="random", random_state=0
        )
        timed("MiniBatchKMeans", lambda: batches.fit(whole).cluster_centers_)
    return results


def tree(size, width, levels, resources):
    with tempfile.TemporaryDirectory() as folder:
        vectors, *_ = made_elsewhere(size, width, Path(folder) / "vectors.npy")
        rate = product_rate(width)
        begun, used = time.perf_counter(), time.process_time()
        found = hierarchical_kmeans(vectors, levels, rounds=1, iterations=10, resources=resources)
        seconds, used = time.perf_counter() - begun, time.process_time() - used
        peak = peak_memory(torch.device("cpu"))
        begun = time.perf_counter()
        images = balanced_sample(found, size // 10)
        return {
            "size": size,
            "levels": levels,
            "seconds": seconds,
            "cpu_seconds": used,
            "peak_gb": peak,
            "gemm_gflops": rate / 1e9,
            "passes_of_products": seconds * rate / (2 * width * size * levels[0]),
            "similarity": float(found.levels[0].similarities_N.mean()),
            "sample": len(images),
            "sample_seconds": time.perf_counter() - begun,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["duplicates", "kmeans", "tree"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--levels", type=int, nargs="+", default=[10_000, 1000, 100])
    parser.add_argument("--falling", type=float, default=0.5, help="of the spectrum of `duplicates`; 0: flat")
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    resources = Resources(memory=parse_bytes(options.memory), workers=options.workers)
    if options.what == "kmeans":
        result = clusters(options.size, options.width, options.clusters, resources)
    elif options.what == "tree":
        result = tree(options.size, options.width, options.levels, resources)
    elif options.inside:
        result = duplicates(options.size, options.width, options.falling, resources, options.size <= 100_000)
    else:
        print(device_name(torch.device("cpu")), flush=True)
        for size in options.sizes:
            command = [sys.executable, __file__, "duplicates", "--inside", "--size", str(size)]
            command += ["--width", str(options.width), "--memory", options.memory]
            command += ["--falling", str(options.falling)]
            subprocess.run([*command, "--workers", str(options.workers)], check=True)
        return
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
