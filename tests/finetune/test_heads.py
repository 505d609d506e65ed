"""Classifiers: folding, votes, logistic regression, splits; against independent code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.linear_model import LogisticRegression

from tests.finetune.conftest import examples_of, small_model
from unlabeled.dense.losses import resized
from unlabeled.evaluate.knn import knn_predict
from unlabeled.finetune.fitted import Fitting, fit_knn, fit_logreg
from unlabeled.finetune.heads import KnnHead, LinearHead, pooled
from unlabeled.finetune.saved import most_likely
from unlabeled.finetune.tasks import DataOptions, class_figures, split
from unlabeled.finetune.train import Validation
from unlabeled.vit import Tokens

QUIET = Console(quiet=True)


def random_layers(count: int, B: int = 7, width: int = 6) -> list[Tokens]:
    torch.manual_seed(0)
    return [
        Tokens(torch.randn(B, width), torch.randn(B, 1, width), torch.randn(B, 4, width), (2, 2))
        for _ in range(count)
    ]


def test_features_are_in_the_order_of_the_released_heads() -> None:
    layers = random_layers(4)
    wanted = torch.cat([*(one.cls for one in layers), layers[3].patches.mean(1)], dim=1)
    assert torch.equal(pooled(layers, mean_patch=True), wanted)
    assert LinearHead(6, 3, num_layers=4).linear.weight.shape == (3, 30)
    assert LinearHead(6, 3, num_layers=4).layers(12) == [8, 9, 10, 11]


def test_a_folded_head_is_the_same_function() -> None:
    layers = random_layers(1, B=50)
    head = LinearHead(6, 3)
    features = 3 * head.features(layers) + 100
    features[:, 2] = 5.0  # constant
    head.standardise(features)
    np.testing.assert_allclose(head.mean_F, features.double().mean(0), rtol=1e-6)
    assert head.std_F[2] == 1
    with torch.no_grad():
        plain = head.folded()
        assert not plain.mean_F.any() and (plain.std_F == 1).all()
        torch.testing.assert_close(plain.logits(features), head.logits(features), rtol=1e-3, atol=2e-4)


def test_votes_are_those_of_the_protocol() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(60, 6)).astype(np.float32), rng.normal(size=(40, 6)).astype(np.float32)
    labels = rng.integers(0, 4, 60)
    head = KnnHead(6, 5, num_stored=60, k=7)
    head.features_NF.copy_(torch.nn.functional.normalize(torch.from_numpy(train), dim=1))
    head.labels_N.copy_(torch.from_numpy(labels))
    logits = head.logits(torch.from_numpy(test))
    assert np.array_equal(logits.argmax(1).numpy(), knn_predict(train, labels, test, k=7))
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(40))
    assert (logits[:, 4] == -30).all()  # a class without images


def test_logistic_regression_is_scikit_learns(colour_folder: Path) -> None:
    examples, model = examples_of(colour_folder), small_model()
    given = Fitting(model, examples, None, 0, "cpu", lambda key, reason: None, QUIET)
    head, found = fit_logreg(LinearHead(32, 3), given)
    images = torch.from_numpy(np.stack([examples.load(i, None).pixels for i in range(len(examples))]))
    from unlabeled.images.transform import normalize

    with torch.no_grad():
        tokens = [model(normalize(images))]
        features = head.features(tokens).numpy().astype(np.float64)
        probabilities = head(tokens).softmax(1).numpy()
    standard = (features - features.mean(0)) / features.std(0)
    wanted = LogisticRegression(C=0.01, max_iter=1000).fit(standard, examples.labels_N)
    np.testing.assert_allclose(probabilities, wanted.predict_proba(standard), atol=1e-4)
    assert found.figures == {}


def test_two_classes_and_a_class_without_images(colour_folder: Path) -> None:
    examples = examples_of(colour_folder)
    kept = np.flatnonzero(examples.labels_N != 1)
    examples.indices, examples.labels_N = kept, examples.labels_N[kept]
    judge = Validation(examples, class_figures, "accuracy")
    given = Fitting(small_model(), examples, judge, 0, "cpu", lambda key, reason: None, QUIET)
    for fit, head in ((fit_logreg, LinearHead(32, 3)), (fit_knn, KnnHead(32, 3))):
        made, found = fit(head, given)
        assert found.figures["accuracy"] == 1.0
        assert type(made) is type(head)


@pytest.mark.parametrize("shots", [0, 3])
def test_held_out_is_a_share_of_each_class(shots: int) -> None:
    labels = np.array([0] * 50 + [1] * 20 + [3] * 5)
    chosen, held = split(labels, DataOptions("data", held_out=0.1, shots=shots))
    if shots:
        assert np.bincount(labels[chosen]).tolist() == [3, 3, 0, 3] and not len(held)
    else:
        assert np.bincount(labels[held]).tolist() == [5, 2]
        assert sorted([*chosen, *held]) == list(range(75))
    again, _ = split(labels, DataOptions("data", held_out=0.1, shots=shots))
    other, _ = split(labels, DataOptions("data", held_out=0.1, shots=shots, seed=1))
    assert np.array_equal(chosen, again) and not np.array_equal(chosen, other)
    assert (np.diff(chosen) > 0).all()


@pytest.mark.parametrize("num_classes", [2, 8, 9, 21])
def test_classes_a_few_at_a_time_are_all_at_once(num_classes: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(num_classes, 5, 6).round(decimals=1)  # with equals
    logits[-1] = logits[0]
    found = most_likely(logits, (23, 17))
    assert torch.equal(found, resized(logits[None], (23, 17))[0].argmax(0))
