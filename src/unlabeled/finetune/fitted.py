"""Classifiers that are computed from features at once: k-NN and logistic regression.

Shape suffixes: N images, F features, C classes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from unlabeled.devices import choose_device
from unlabeled.errors import UserError
from unlabeled.finetune.backbone import reader
from unlabeled.finetune.batches import Report, all_batches
from unlabeled.finetune.examples import ClassExamples, Examples
from unlabeled.finetune.heads import ClassifierHead, KnnHead, LinearHead
from unlabeled.finetune.train import Trained, Validation
from unlabeled.progress import Progress
from unlabeled.vit import VisionTransformer

STRENGTHS = (
    1e-4,
    1e-3,
    1e-2,
    1e-1,
    1.0,
)  # inverse of the L2 penalty on standardised features, tried on validation
ABSENT = -30.0  # logit of a class without images
ONE_THREAD = 2**23  # features of all images together, up to which one thread is best
NEIGHBOURS = (1, 5, 10, 20, 50)  # tried on validation


@dataclass(frozen=True)
class Fitting:
    """What a classifier is computed from.

    Attributes:
        model: a frozen backbone.
        examples: to learn from. validation: to choose by, where something is held out.
        seed: of everything random. device: auto, cpu, cuda, cuda:1 or mps.
        report: is told the key of each image that cannot be used, and the reason.
        console: where progress is shown; nowhere without.
    """

    model: VisionTransformer
    examples: ClassExamples
    validation: Validation | None
    seed: int
    device: str
    report: Report
    console: Console | None

    def features(self, head: ClassifierHead) -> tuple[Tensor, Tensor]:
        """Return features (N, F) and labels (N,) of the examples."""
        return self._of(self.examples, head)

    def judged(self, head: ClassifierHead) -> tuple[Tensor, Tensor] | None:
        """Return those of validation, where there is one."""
        return self._of(self.validation.examples, head) if self.validation else None

    @torch.no_grad()
    def _of(self, examples: Examples, head: ClassifierHead) -> tuple[Tensor, Tensor]:
        """Return float32 features (N, F) and labels (N,) of all examples that can be read, on the CPU."""
        where = choose_device(self.device)
        self.model.to(where).eval()
        tokens_of = reader(self.model, head, where)
        features, labels = [], []
        with Progress(self.console or Console(quiet=True), "features", "image", 0, len(examples)) as progress:
            for group in all_batches(examples, 32 if where.type == "cpu" else 128, self.report):
                features.append(head.features(tokens_of(cast(Tensor, group.inputs))).cpu())
                labels.append(group.targets)
                progress.update(sum(map(len, labels)), "")
        if not labels:
            raise UserError("No image can be read; bad_files.jsonl names them.")
        found = torch.cat(features)
        if not bool(torch.isfinite(found).all()):
            raise UserError("The model computes infinities or NaN; are its weights whole?")
        return found, torch.cat(labels)


def fit_knn(plain: KnnHead, given: Fitting) -> tuple[KnnHead, Trained]:
    """Return a head that holds the features of all examples; k is that of NEIGHBOURS best on validation, or 20."""
    begun = time.perf_counter()
    features_NF, labels_N = given.features(plain)
    unit = functional.normalize(features_NF, dim=1)

    def make(k: int) -> KnnHead:
        made = KnnHead(**plain.arguments | {"num_stored": len(labels_N), "k": min(k, len(labels_N))})
        made.features_NF.copy_(unit)
        made.labels_N.copy_(labels_N)
        return made

    validation, judged = given.validation, given.judged(plain)
    if validation is None or judged is None:
        return make(20), Trained([], seconds=time.perf_counter() - begun)
    tried = [(k, _judged(make(k), judged, validation)) for k in NEIGHBOURS if k <= len(labels_N)]
    k, figures = max(tried, key=lambda one: one[1][validation.by])
    return make(k), Trained([], figures, seconds=time.perf_counter() - begun)


def fit_logreg(plain: LinearHead, given: Fitting) -> tuple[LinearHead, Trained]:
    """Return scikit-learn's logistic regression on standardised features as a linear head.

    The strength of its L2 penalty is that of STRENGTHS best on validation, or 0.01.
    Raises UserError where images of fewer than two classes can be read.
    """
    begun = time.perf_counter()
    features_NF, labels_N = given.features(plain)
    if len(labels_N.unique()) < 2:
        raise UserError("Images of one class only can be read; logistic regression needs two.")
    plain.standardise(features_NF)
    standard = ((features_NF - plain.mean_F) / plain.std_F).numpy()
    validation, judged = given.validation, given.judged(plain)
    best: tuple[LinearHead, dict[str, float]] | None = None
    for strength in STRENGTHS if validation else (0.01,):
        made = _logreg(plain, standard, labels_N.numpy(), strength, given.seed)
        figures = _judged(made, judged, validation) if validation and judged else {}
        if best is None or (validation and figures[validation.by] > best[1][validation.by]):
            best = made, figures
    assert best is not None
    return best[0], Trained([], best[1], seconds=time.perf_counter() - begun)


def _judged(head: ClassifierHead, judged: tuple[Tensor, Tensor], validation: Validation) -> dict[str, float]:
    with torch.no_grad():
        return validation.score([(head.logits(judged[0]), judged[1])])


@torch.no_grad()
def _logreg(
    plain: LinearHead,
    standard_NF: NDArray[np.float32],
    labels_N: NDArray[np.int64],
    strength: float,
    seed: int,
) -> LinearHead:
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    # Threads of small products mostly wait for each other, and for whatever else the machine does.
    limit = 1 if standard_NF.size < ONE_THREAD else None
    with threadpool_limits(limit):
        fitted = LogisticRegression(C=strength, max_iter=1000, random_state=seed).fit(standard_NF, labels_N)
    weight, bias = fitted.coef_, fitted.intercept_
    if len(fitted.classes_) == 2:  # one row, of the second class: half of it each way is the same softmax
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    made = LinearHead(**plain.arguments)
    made.mean_F.copy_(plain.mean_F)
    made.std_F.copy_(plain.std_F)
    made.linear.weight.zero_()
    made.linear.bias.fill_(ABSENT)
    made.linear.weight[fitted.classes_] = torch.from_numpy(weight).float()
    made.linear.bias[fitted.classes_] = torch.from_numpy(bias).float()
    return made
