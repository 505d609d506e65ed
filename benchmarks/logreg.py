"""Logistic regression with its C chosen: each fit begun from the last, beside scikit-learn's fits from zero.

    python benchmarks/logreg.py [--images 50000] [--width 384] [--classes 10] [--out TABLE.md]

Features are rows of length 1 around a direction for each class, so far apart that about nine in ten are told.
Both have the same values of C, the same nine tenths to fit and the same tenth to choose by, and fit the chosen C once
more on all.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from machine import device_name
from unlabeled.evaluate.logreg import CS, fitted, path


def features(images: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((classes, width)).astype(np.float32)
    labels = rng.integers(0, classes, images)
    rows = 0.12 * centres[labels] + rng.standard_normal((images, width), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    vectors, labels = features(options.images, options.width, options.classes)
    held = len(vectors) // 10
    fit, chosen_on = slice(held, None), slice(held)

    def best_of(fits: dict[float, LogisticRegression]) -> float:
        return max(fits, key=lambda c: fits[c].score(vectors[chosen_on], labels[chosen_on]))

    begun = time.perf_counter()
    warm = path(vectors[fit], labels[fit], CS)
    best = best_of(warm)
    final = fitted(vectors, labels, best, warm[best])
    seconds = time.perf_counter() - begun
    begun = time.perf_counter()
    cold = {c: fitted(vectors[fit], labels[fit], c) for c in CS}
    cold_best = best_of(cold)
    cold_final = fitted(vectors, labels, cold_best)
    cold_seconds = time.perf_counter() - begun
    rows = [
        f"{options.images:,} x {options.width} float32, {options.classes} classes, C of "
        f"{', '.join(f'{c:g}' for c in CS)}; {device_name(torch.device('cpu'))}.",
        "",
        "| way | seconds | iterations, of each C and at the end | C | training accuracy |",
        "|---|---|---|---|---|",
    ]
    for name, taken, fits, c, last in (
        ("each fit from the one before", seconds, warm, best, final),
        ("scikit-learn, each from zero", cold_seconds, cold, cold_best, cold_final),
    ):
        iterations = ", ".join(str(int(one.n_iter_.max())) for one in (*fits.values(), last))
        rows.append(f"| {name} | {taken:.1f} | {iterations} | {c:g} | {last.score(vectors, labels):.4f} |")
    print("\n".join(rows))
    if options.out:
        options.out.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
