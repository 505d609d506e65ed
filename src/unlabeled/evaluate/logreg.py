"""Logistic regression on frozen features: scikit-learn's, its regularisation chosen on a held-out part of train."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Unpack

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from unlabeled.errors import UserError
from unlabeled.evaluate.examples import examples
from unlabeled.evaluate.labelled import Data, Extraction, Model, held_out, labelled
from unlabeled.evaluate.nearest import unit
from unlabeled.evaluate.result import Figure, Result, edge_notes, result_of

CS = (0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0)
MAX_ITERATIONS = 1000


def logreg(
    model: Model | None = None,
    train: Data = "",
    test: Data = "",
    *,
    cs: Sequence[float] = CS,
    features: str = "cls",
    seed: int = 0,
    **extraction: Unpack[Extraction],
) -> Result:
    """Accuracy of logistic regression on L2-normalised frozen features (DINOv2 appendix B.3).

    Each C is fitted from the one before. The C that is best on a tenth of train is fitted again on all of it, from its
    own fit on the nine tenths, and tested once.

    Args:
        model: a MODEL; none where both sides are feature tables.
        train, test: labelled DATA, or feature tables.
        cs: scikit-learn's C: the weight of the summed loss against half the squared norm of the weights.
        features: cls, or cls+mean for CLS and mean patch side by side.
        seed: of the split.
        extraction: see `Extraction`.

    Raises:
        UserError: as `labelled` does, or a class has too few images to hold one out.
    """
    task = labelled(model, train, test, kind="cls+mean" if "mean" in features else "cls", **extraction)
    labels = task.train.labels_N
    fit, chosen_on = held_out(labels, seed)
    if not len(chosen_on):
        raise UserError(f"{task.train.name} has one image a class: C is chosen on others; use fewshot.")
    vectors = unit(task.vectors(task.train, features)[:])
    fits = path(vectors[fit], labels[fit], cs)
    accuracies = {
        c: float((one.predict(vectors[chosen_on]) == labels[chosen_on]).mean()) for c, one in fits.items()
    }
    unfinished = [f"{c:g}" for c, one in fits.items() if one.n_iter_.max() >= MAX_ITERATIONS]
    best = max(accuracies, key=lambda c: accuracies[c])
    final = fitted(vectors, labels, best, fits[best])
    predicted = final.predict(unit(task.vectors(task.test, features)[:]))
    notes = [*task.notes, *edge_notes("C of logreg", best, accuracies)]
    if unfinished:
        notes.append(f"lbfgs was stopped after {MAX_ITERATIONS} iterations at C = {', '.join(unfinished)}")
    settings = {
        "C": best,
        "features": features,
        "held_out_accuracy": {f"{c:g}": round(value, 4) for c, value in accuracies.items()},
        "held_out_images": len(chosen_on),
        "iterations": int(final.n_iter_.max()),
    }
    return result_of(
        "logreg", task.model, {"accuracy": Figure(predicted == task.test.labels_N)}, task.test.keys,
        settings=settings, counts=task.counts, bad_files=task.bad_files, notes=notes,
        **examples(task, predicted, seed),
    )  # fmt: skip


def path(
    vectors_ND: NDArray[np.float32], labels_N: NDArray[np.int64], cs: Sequence[float]
) -> dict[float, LogisticRegression]:
    """Return the fit of each C, in ascending order, each from the one before."""
    fits: dict[float, LogisticRegression] = {}
    for c in sorted(cs):
        fits[c] = fitted(vectors_ND, labels_N, c, next(reversed(fits.values()), None))
    return fits


def fitted(
    vectors_ND: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    c: float,
    start: LogisticRegression | None = None,
) -> LogisticRegression:
    """Fit by lbfgs, from another fit's weights where there is one of the same classes."""
    model = LogisticRegression(C=c, max_iter=MAX_ITERATIONS, warm_start=start is not None)
    if start is not None:
        model.coef_, model.intercept_, model.classes_ = start.coef_, start.intercept_, start.classes_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told by n_iter_
        return model.fit(vectors_ND, labels_N)
