"""Bootstrap against plain loops and distributions whose answers are known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlabeled.errors import UserError
from unlabeled.evaluate import bootstrap
from unlabeled.evaluate.bootstrap import class_ious, compare, figure, interval, miou, replicates
from unlabeled.evaluate.result import Figure, Result, column, compared, result_of


@settings(max_examples=25, deadline=None)
@given(items=st.integers(1, 12), count=st.integers(2, 6), seed=st.integers(0, 99), chunk=st.integers(1, 2000))
def test_replicates_are_the_plain_loop(items: int, count: int, seed: int, chunk: int) -> None:
    """Confusion matrices resampled by index, whatever is held at once."""
    confusion = np.random.default_rng(seed).integers(0, 9, (items, 3, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "CHUNK_BYTES", chunk)
        found = replicates(confusion, "miou", count=count, seed=seed)
    drawn = np.random.default_rng(seed).integers(0, items, (count, items))
    for one, indices in zip(found, drawn, strict=True):
        total = np.zeros((3, 3))
        for index in indices:
            total += confusion[index]
        assert one == pytest.approx(plain_miou(total))


def plain_miou(confusion: np.ndarray) -> float:
    ious = []
    for number in range(len(confusion)):
        hits = confusion[number, number]
        union = confusion[number].sum() + confusion[:, number].sum() - hits
        if union:
            ious.append(hits / union)
    return float(np.mean(ious)) if ious else 0.0


def test_a_class_that_is_nowhere_does_not_count() -> None:
    confusion = np.array([[[3, 1, 0], [1, 3, 0], [0, 0, 0]]], float)
    assert miou(confusion)[0] == pytest.approx(0.6)
    assert np.isnan(class_ious(confusion)[0, 2])


def test_95_percent_intervals_hold_the_true_share_95_percent_of_the_time() -> None:
    """300 samples of 150 coin throws: the share of intervals with .3 inside has a standard error of 1.3%."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        low, high = interval(rng.random(150) < 0.3, count=200, seed=int(rng.integers(1 << 30)))
        held += low <= 0.3 <= high
    assert 0.9 < held / 300 < 0.985


def test_the_interval_is_as_wide_as_theory_says() -> None:
    low, high = interval(np.arange(500) < 350, count=4000)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.7 * 0.3 / 500), rel=0.06)
    assert (low + high) / 2 == pytest.approx(0.7, abs=0.004)
    low, high = interval(np.full(10, 4.0), "root")
    assert low == high == 2


def test_draws_of_the_training_set_widen_the_interval() -> None:
    """Ten draws whose accuracies differ, on items that do not: all of the width comes from the draws."""
    draws = np.repeat(np.linspace(0.4, 0.6, 10)[None], 50, 0)
    assert figure(draws, "over_draws") == pytest.approx(0.5)
    low, high = interval(draws, "over_draws", count=4000)
    assert (high - low) / 2 == pytest.approx(1.96 * np.linspace(0.4, 0.6, 10).std() / math.sqrt(10), rel=0.06)


def test_pairs_tell_apart_what_intervals_cannot() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(2000) < 0.5
    a, b = hard.copy(), hard.copy()
    b[rng.choice(np.flatnonzero(~hard), 25, replace=False)] = True
    assert interval(a)[1] > figure(b)
    found = compare(a, b)
    assert found.difference == pytest.approx(25 / 2000)
    assert found.is_clear
    assert found.p_value < 0.01
    back = compare(b, a)
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-found.difference, -found.high, -found.low)
    )
    same = compare(a, a)
    assert not same.is_clear
    assert same.p_value == 1
    with pytest.raises(UserError, match="same test items"):
        compare(a, b[:5])


def test_chance_differences_are_called_clear_one_time_in_twenty() -> None:
    rng = np.random.default_rng(1)
    clear = sum(compare(*(rng.random((2, 100)) < 0.4), count=100).is_clear for _ in range(300))
    assert 0.02 < clear / 300 < 0.09


def make(model: str, right: list[int], keys: list[str]) -> Result:
    return result_of("knn", model, {"accuracy": Figure(np.array(right))}, keys, settings={}, counts={})


def test_a_result_names_its_main_metric() -> None:
    result = make("m", [1, 0, 1, 1], ["a", "b", "c", "d"])
    assert result.accuracy == result.score == 0.75
    assert result.interval[0] < 0.75 <= result.interval[1]
    assert [column("knn", "accuracy"), column("knn", "accuracy_20"), column("depth", "rmse")] == [
        "knn", "knn_20", "depth_rmse",
    ]  # fmt: skip
    rmse = result_of("depth", "m", {"rmse": Figure(np.ones(3), "root")}, "abc", settings={}, counts={})
    with pytest.raises(UserError, match="depth has no accuracy"):
        _ = rmse.accuracy


def test_models_are_compared_on_the_images_that_both_could_read() -> None:
    a = make("a", [1, 0, 1], ["x", "y", "z"])
    b = make("b", [1, 1, 0], ["z", "y", "w"])
    assert compared(a, b).difference == pytest.approx(0.5)
    with pytest.raises(UserError, match="no test image in common"):
        compared(a, make("c", [1], ["v"]))
