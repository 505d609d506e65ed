"""Few-shot classification: logistic regression on a few training images a class, drawn several times.

Shape suffixes: M test images, S draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.evaluate.examples import examples
from unlabeled.evaluate.labelled import Data, Extraction, Model, labelled
from unlabeled.evaluate.logreg import fitted
from unlabeled.evaluate.nearest import unit
from unlabeled.evaluate.result import Figure, Result, result_of

SHOTS = (1, 5, 10)
DRAWS = 10
CS = (1.0, 10.0, 100.0, 1000.0)
CHOSEN_ON = 1000  # training images that no draw has, to choose C on
CHOOSING_DRAWS = 3


def fewshot(
    model: Model | None = None,
    train: Data = "",
    test: Data = "",
    *,
    shots: int | Sequence[int] = SHOTS,
    draws: int = DRAWS,
    cs: Sequence[float] = CS,
    features: str = "cls",
    seed: int = 0,
    **extraction: Unpack[Extraction],
) -> Result:
    """Accuracy of logistic regression on n training images a class: the mean over draws of them.

    C is chosen for each n on training images that are never drawn. Intervals are over test images and draws
    together. The same seed draws the same images for every model.

    Args:
        model: a MODEL; none where both sides are feature tables.
        train, test: labelled DATA, or feature tables.
        shots: n, one number or several; those that the smallest class has no images for are left out.
        draws: of the training images.
        cs: to choose from, see `logreg`.
        features: cls, or cls+mean for CLS and mean patch side by side.
        seed: of the draws.
        extraction: see `Extraction`.

    Raises:
        UserError: as `labelled` does, or a class has too few images for the least n.
    """
    wanted = sorted({shots} if isinstance(shots, int) else set(shots))
    if not wanted or wanted[0] < 1 or draws < 1:
        raise UserError("Few-shot classification needs one image a class and one draw at least.")
    task = labelled(model, train, test, kind="cls+mean" if "mean" in features else "cls", **extraction)
    labels = task.train.labels_N
    sizes = np.bincount(labels)
    rng = np.random.default_rng(seed)
    kept_back = _kept_back(labels, rng)
    pools = [np.setdiff1d(np.flatnonzero(labels == number), kept_back) for number in range(len(sizes))]
    smallest = min(map(len, pools))
    possible = [n for n in wanted if n <= smallest]
    notes = list(task.notes)
    if not possible:
        name = task.classes[int(sizes.argmin())]
        raise UserError(
            f"{wanted[0]} images a class are too many: {name} has {sizes.min()} in {task.train.name}."
        )
    if left_out := [n for n in wanted if n > smallest]:
        name = task.classes[int(sizes.argmin())]
        notes.append(f"{', '.join(map(str, left_out))} images a class left out: {name} has {sizes.min()}")
    queries, answers = unit(task.vectors(task.test, features)[:]), task.test.labels_N
    vectors = task.vectors(task.train, features)
    figures: dict[str, Figure] = {}
    chosen: dict[int, float] = {}
    predicted = np.empty(0, np.int64)
    for n in possible:
        drawn = [np.concatenate([rng.permutation(pool)[:n] for pool in pools]) for _ in range(draws)]
        parts = [(unit(vectors[np.sort(rows)]), labels[np.sort(rows)]) for rows in drawn]
        chosen[n] = cs[0]
        if len(kept_back):
            chosen[n] = _best(cs, parts[:CHOOSING_DRAWS], unit(vectors[kept_back]), labels[kept_back])
        right_MS = np.empty((len(answers), draws), bool)
        for number, part in enumerate(parts):
            predicted = fitted(*part, chosen[n]).predict(queries)
            right_MS[:, number] = predicted == answers
        figures[f"accuracy_{n}"] = Figure(right_MS, "over_draws")
    settings = {
        "shots": possible,
        "draws": draws,
        "C": {str(n): c for n, c in chosen.items()},
        "features": features,
        "held_out_images": len(kept_back),
    }
    return result_of(
        "fewshot", task.model, figures, task.test.keys, settings=settings, counts=task.counts,
        bad_files=task.bad_files, notes=notes, **examples(task, predicted, seed),
    )  # fmt: skip


def _best(
    cs: Sequence[float],
    parts: list[tuple[NDArray[np.float32], NDArray[np.int64]]],
    vectors: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> float:
    """The C that is best on some images, over some draws."""
    scores = {
        c: np.mean([(fitted(*part, c).predict(vectors) == labels).mean() for part in parts]) for c in cs
    }
    return max(cs, key=lambda c: float(scores[c]))


def _kept_back(labels_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """About 1,000 training images to choose C on, a fifth of each class at most; rows in order."""
    rows = [np.flatnonzero(labels_N == number) for number in range(labels_N.max() + 1)]
    each = max(1, CHOSEN_ON // len(rows))
    return np.sort(np.concatenate([rng.permutation(own)[: min(each, len(own) // 5)] for own in rows]))
