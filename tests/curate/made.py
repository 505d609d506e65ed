"""Vectors made for tests: clusters with a heavy tail of sizes, some vectors copies of others."""

import numpy as np


def clustered(count, width=32, seed=0, copies=0.1, noise=0.2):
    """Vectors of length 1, float32, and the numbers of copies and of what they are copies of."""
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(max(2, count // 100), width))
    vectors = 0.8 * centers[generator.integers(len(centers), size=count)] + generator.normal(
        size=(count, width)
    )
    number = int(copies * count)
    pick = generator.permutation(count)
    copy, original = pick[:number], pick[number : 2 * number]
    vectors[copy] = vectors[original] + noise * generator.normal(size=(number, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), copy, original


def parts_of(labels):
    """The sets of elements with the same label."""
    sets = {}
    for element, label in enumerate(np.asarray(labels).tolist()):
        sets.setdefault(label, set()).add(element)
    return sorted(map(sorted, sets.values()))
