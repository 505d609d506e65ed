"""k-NN, linear, logistic regression and few-shot of tables against independent code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

import unlabeled
from tests.evaluate.conftest import MakeTable, clusters
from tests.evaluate.test_knn import plain_knn
from unlabeled.errors import UserError
from unlabeled.evaluate import nearest as nearest_module
from unlabeled.evaluate.labelled import held_out, labelled
from unlabeled.evaluate.linear import MOMENTUM, train_heads
from unlabeled.evaluate.nearest import nearest
from unlabeled.evaluate.result import edge_notes
from unlabeled.vit import VisionTransformer, vit_config


@pytest.fixture
def sides(make_table: MakeTable) -> tuple:
    """A table to learn from, one to test on; 5 classes that overlap."""
    train, test = clusters(150, 12, 5, 1.5, 0), clusters(80, 12, 5, 1.5, 1)
    return make_table("train", *train), make_table("test", *test), train, test


def test_knn_of_tables_is_the_plain_loop(sides: tuple) -> None:
    train, test, (vectors, labels), (queries, answers) = sides
    result = unlabeled.evaluate.knn(train=train, test=test, k=20)
    votes = plain_knn(vectors, labels, queries, 20)
    right = [max(one, key=one.get) == answer for one, answer in zip(votes, answers, strict=True)]
    assert result.accuracy == pytest.approx(np.mean(right))
    assert result.interval[0] < result.accuracy < result.interval[1]
    assert result.counts == {"train": 150, "test": 80, "classes": 5, "bad_files": 0}
    assert result.predictions == [max(one, key=one.get) for one in votes]


def test_k_is_chosen_within_train(sides: tuple) -> None:
    """Each training image is searched among the others, by a plain loop."""
    train, test, (vectors, labels), _ = sides
    result = unlabeled.evaluate.knn(train=train, test=test, k=[1, 10, 149, 500])
    for k in (1, 10, 149):
        right = []
        for row in range(len(vectors)):
            rest = np.arange(len(vectors)) != row
            votes = plain_knn(vectors[rest], np.array(labels)[rest], vectors[row : row + 1], k)[0]
            right.append(max(votes, key=votes.get) == labels[row])
        assert result.settings["held_out_accuracy"][str(k)] == pytest.approx(np.mean(right), abs=0.011)
    accuracies = result.settings["held_out_accuracy"]
    assert str(result.settings["k"]) == max(accuracies, key=accuracies.get)
    assert result.accuracy == result.metrics[f"accuracy_{result.settings['k']}"]
    assert "k = 500 left out: train has 150 labelled images; k = 1, 10, 149 used" in result.notes
    with pytest.raises(UserError, match="k = 500 needs as many labelled images; there are 150"):
        unlabeled.evaluate.knn(train=train, test=test, k=500)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 120), queries=st.integers(1, 20), k=st.integers(1, 120), block=st.integers(1, 50),
    chunk=st.integers(1, 9), seed=st.integers(0, 99),
)  # fmt: skip
@example(rows=104, queries=20, k=77, block=2, chunk=1, seed=91)  # the last two are 5e-8 apart
def test_neighbours_are_those_of_a_full_sort(
    rows: int, queries: int, k: int, block: int, chunk: int, seed: int
) -> None:
    """Blocks and chunks of any size, on the way of CPUs and, computed on the CPU, on that of GPUs."""
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(rows, 6)), rng.normal(size=(queries, 6))
    wanted = normalize(test) @ normalize(train).T
    k = min(k, rows)
    order = np.argsort(-wanted, 1)[:, :k]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "BLOCK": block,
            "CHUNK": chunk,
            "DEVICE_BLOCK": block,
            "DEVICE_CHUNK": chunk,
        }.items():
            patch.setattr(nearest_module, name, value)
        here = nearest(train, test, k)
        there = nearest_module._nearest_on(torch.device("cpu"), train, normalize(test).astype(np.float32), k)
    for found in (here, there):
        similarities = np.take_along_axis(wanted, order, 1)
        # Rows that are nearer to each other than float32 tells may trade places; each is there once.
        np.testing.assert_allclose(np.take_along_axis(wanted, found.rows, 1), similarities, atol=1e-6)
        assert all(len(set(one)) == k for one in found.rows.tolist())
        np.testing.assert_allclose(found.similarities, similarities, atol=1e-6)


def test_equal_neighbours_are_found_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_module, "BLOCK", 3)
    found = nearest(np.ones((10, 4), np.float16), np.ones((2, 4)), 4)
    for rows in found.rows.tolist():
        assert rows == sorted(set(rows))
    zeros = nearest(np.zeros((10, 4)), np.zeros((2, 4)), 2)
    assert zeros.similarities.tolist() == [[0, 0]] * 2


def test_logreg_is_scikit_learns(sides: tuple) -> None:
    train, test, (vectors, labels), (queries, answers) = sides
    result = unlabeled.evaluate.logreg(train=train, test=test, cs=[0.1, 10.0])
    numbers = np.unique(labels, return_inverse=True)[1]
    fit, rest = held_out(numbers, 0)
    labels = np.array(labels)
    unit = normalize(vectors.astype(np.float64))
    for c in (0.1, 10.0):
        model = LogisticRegression(C=c, max_iter=1000).fit(unit[fit], labels[fit])
        assert result.settings["held_out_accuracy"][f"{c:g}"] == pytest.approx(
            model.score(unit[rest], labels[rest]), abs=0.07
        )
    model = LogisticRegression(C=result.settings["C"], max_iter=1000).fit(unit, labels)
    assert result.accuracy == pytest.approx(model.score(normalize(queries), answers), abs=0.013)


def test_a_tenth_of_each_class_is_held_out() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [1000, 30, 1]))
    fit, rest = held_out(labels, 0)
    assert sorted([*fit, *rest]) == list(range(len(labels)))
    assert np.bincount(labels[rest], minlength=3).tolist() == [100, 3, 0]


def test_one_point_of_the_grid_is_plain_torch() -> None:
    """torch's linear layer, SGD and cosine, one step after the other."""
    torch.manual_seed(0)
    steps, rates = 30, [0.05, 0.4]
    batches = [(torch.randn(16, 7), torch.randint(0, 3, (16,))) for _ in range(steps)]
    first = 0.01 * torch.randn(8, 3)
    weights = {"cls": first[:, None].repeat(1, 2, 1)}
    ones = torch.ones(16, 1)
    train_heads(
        iter([({"cls": torch.cat((x, ones), 1)}, y) for x, y in batches]),
        weights,
        {"cls": torch.tensor(rates)},
        steps,
    )
    for place, rate in enumerate(rates):
        layer = torch.nn.Linear(7, 3)
        with torch.no_grad():
            layer.weight.copy_(first[:-1].T)
            layer.bias.copy_(first[-1])
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=MOMENTUM)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for x, y in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x), y).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(weights["cls"][:-1, place].T, layer.weight.data, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weights["cls"][-1, place], layer.bias.data, rtol=1e-4, atol=1e-6)


def test_the_grid_finds_the_layer_that_knows(make_table: MakeTable) -> None:
    """Of 4 layers and a mean patch (5 columns each) only the second layer tells classes apart."""
    found = {}
    for name, seed in (("train", 0), ("test", 1)):
        informed, labels = clusters(300, 5, 3, 0.5, seed)
        noise = np.random.default_rng(10 + seed).normal(size=(300, 25)).astype(np.float32)
        noise[:, 5:10] = informed
        found[name] = make_table(name, noise, labels, kind="layers")
    result = unlabeled.evaluate.linear(**found, steps=60, learning_rates=[1e-3, 1e-1])
    assert result.settings["features"].startswith("4 cls")
    assert result.accuracy > 0.9
    grid = result.settings["grid"]
    assert len(grid) == 4 * 2
    assert max(one["held_out_accuracy"] for one in grid if not one["features"].startswith("4")) < 0.7
    assert result.settings["held_out_accuracy"] == max(one["held_out_accuracy"] for one in grid)
    again = unlabeled.evaluate.linear(**found, steps=60, learning_rates=[1e-3, 1e-1])
    assert again.metrics == result.metrics
    assert again.predictions == result.predictions


def test_a_choice_at_the_end_of_what_was_tried_is_said(make_table: MakeTable) -> None:
    assert edge_notes("C", 10, {1: 0.5, 10: 0.7}) == [
        "the best C, 10, is the largest of those tried; a larger one may be better still"
    ]
    assert "the smallest of those tried; a smaller one" in edge_notes("C", 1, {1: 0.8, 10: 0.7})[0]
    assert not edge_notes("C", 10, {10: 0.5})
    assert not edge_notes("C", 10, {1: 0.5, 10: 0.7, 100: 0.6})
    assert not edge_notes("C", 1, {1: 0.7, 10: 0.7, 100: 0.6})  # one between the ends is as good
    found = {}
    for name, seed in (("train", 0), ("test", 1)):
        vectors, labels = clusters(200, 25, 4, 1.5, seed)
        found[name] = make_table(name, vectors, labels, kind="layers")
    slow = unlabeled.evaluate.linear(**found, steps=20, learning_rates=[1e-7, 1e-2])
    assert "the best learning rate of linear, 0.01, is the largest of those tried" in slow.notes[-1]
    two = unlabeled.evaluate.logreg(**found, cs=[1e-2, 1.0])
    assert f"the best C of logreg, {two.settings['C']:g}, is the " in two.notes[-1]


def test_fewshot_is_the_mean_over_draws(sides: tuple) -> None:
    train, test, _, _ = sides
    result = unlabeled.evaluate.fewshot(train=train, test=test, shots=[1, 5, 200], draws=4)
    assert list(result.metrics) == ["accuracy_1", "accuracy_5"]
    assert result.metrics["accuracy_1"] < result.metrics["accuracy_5"]
    assert any("200 images a class left out" in note for note in result.notes)
    values, statistic = result.figures["accuracy_5"]
    assert values.shape == (80, 4)
    assert statistic == "over_draws"
    assert result.metrics["accuracy_5"] == pytest.approx(values.mean())
    with pytest.raises(UserError, match="200 images a class are too many: class"):
        unlabeled.evaluate.fewshot(train=train, test=test, shots=200)


def test_classes_are_matched_by_name(make_table: MakeTable) -> None:
    vectors = np.eye(4, dtype=np.float32)
    train = make_table("train", np.concatenate([vectors, vectors]), ["dog", "cat", "10", "9"] * 2)
    test = make_table("test", vectors[[3, 1, 0, 2]], ["9", "cat", "dog", "10"])
    result = unlabeled.evaluate.knn(train=train, test=test, k=1)
    assert result.accuracy == 1
    assert labelled(None, train, test).classes == ["9", "10", "cat", "dog"]


def test_what_cannot_count_is_left_out_and_said(make_table: MakeTable) -> None:
    vectors = np.eye(4, dtype=np.float32)
    train = make_table("train", np.concatenate([vectors, vectors]), ["a", "b", None, "c"] * 2)
    test = make_table("test", vectors, ["a", None, "zebra", "c"])
    result = unlabeled.evaluate.knn(train=train, test=test, k=2)
    assert result.counts == {"train": 6, "test": 2, "classes": 3, "bad_files": 0}
    assert result.keys == ["test/0.jpg", "test/3.jpg"]
    assert result.accuracy == 1
    assert result.notes == (
        "2 of 8 images of /train have no label and are left out",
        "1 of 4 images of /test have no label and are left out",
        "1 images of /test are of classes that /train lacks and are left out: zebra",
    )


def test_images_on_both_sides_are_noted(make_table: MakeTable) -> None:
    table = make_table("both", *clusters(20, 4, 2, 1.0, 0))
    test = make_table("test", *clusters(20, 4, 2, 1.0, 1))
    assert not unlabeled.evaluate.knn(train=table, test=test, k=1).notes
    moved = test.path.with_name("moved")
    table.path.rename(moved)
    header = (moved / "table.json").read_text().replace('"/both"', '"/other"')
    (test.path / "table.json").write_text(header)
    for file in moved.glob("000*"):
        (test.path / file.name).write_bytes(file.read_bytes())
    found = unlabeled.evaluate.knn(train=str(moved), test=str(test.path), k=1)
    assert any("20 images of" in note and "byte for byte" in note for note in found.notes)


def test_errors_name_what_is_wrong(make_table: MakeTable, tile_folder: Path) -> None:
    vectors, labels = clusters(20, 4, 2, 1.0, 0)
    good = make_table("good", vectors, labels)
    for name, bad, message in (
        ("none", make_table("none", vectors, [None] * 20), "/none has no labels"),
        ("one", make_table("one", vectors, ["x"] * 20), "/one has images of one class only"),
        (
            "apart",
            make_table("apart", vectors, ["x", "y"] * 10),
            "no class in common: x, y and class 0, class 1",
        ),
        ("other", make_table("other", vectors, labels, weights="v"), "of other weights"),
        ("wide", make_table("wide", vectors, labels, layer=3), "have layer 3"),
    ):
        with pytest.raises(UserError, match=message):
            unlabeled.evaluate.knn(train=bad, test=good, k=1)
        assert name
    with pytest.raises(UserError, match="needs one neighbour"):
        unlabeled.evaluate.knn(train=good, test=good, k=0)
    with pytest.raises(UserError, match="is no feature table, so that a model is needed"):
        unlabeled.evaluate.knn(train=tile_folder, test=tile_folder, k=1)
    single = make_table("single", vectors[:2], ["class 0", "class 1"])
    for protocol in (unlabeled.evaluate.linear, unlabeled.evaluate.logreg):
        with pytest.raises(UserError, match="one image a class"):
            protocol(train=single, test=good)


def test_constant_features_are_chance_not_a_crash(make_table: MakeTable) -> None:
    _, labels = clusters(60, 4, 3, 1.0, 0)
    train, test = (make_table(name, np.zeros((60, 4)), labels) for name in ("train", "test"))
    for protocol in ("knn", "linear", "logreg", "fewshot"):
        result = getattr(unlabeled.evaluate, protocol)(train=train, test=test)
        assert 0 < result.accuracy < 0.6


def test_from_images(tile_folder: Path, tmp_path: Path) -> None:
    """Extraction in one pass, bad files named, the cache used again; features are the model's."""
    folder = tmp_path / "data"
    for path in tile_folder.rglob("*.*"):
        target = folder / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (folder / "left" / "bad.png").write_bytes(b"no image")
    torch.manual_seed(0)
    model = VisionTransformer(
        vit_config("vit_tiny", depth=5, width=24, num_heads=2, patch_size=8, image_size=32)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    options = {"train": folder, "test": tile_folder, "cache": tmp_path / "cache"}
    result = unlabeled.evaluate.linear(model, **options, steps=20)
    assert result.bad_files == [("left/bad.png", "not an image, or of a kind that is not supported")]
    assert result.counts["train"] == result.counts["test"] == 24
    right = sum(said == truth for said, truth in zip(result.predictions, result.truths, strict=True))
    assert sum(one.is_hit is True for one in result.pictures) == min(8, right)
    assert sum(one.is_hit is False for one in result.pictures) == min(8, 24 - right)
    assert result.accuracy == pytest.approx(right / 24)
    tables = sorted((tmp_path / "cache").iterdir())
    before = [path.stat().st_mtime_ns for table in tables for path in sorted(table.iterdir())]
    assert unlabeled.evaluate.linear(model, **options, steps=20).metrics == result.metrics
    assert before == [path.stat().st_mtime_ns for table in tables for path in sorted(table.iterdir())]
    task = labelled(model, folder, tile_folder, kind="layers", cache=tmp_path / "cache")
    assert list(task.views) == ["cls", "cls+mean", "4 cls", "4 cls+mean"]
    from unlabeled.features.embed import embed

    for view, kind in (("cls", "cls"), ("cls+mean", "cls+mean")):
        table = embed(folder, model, tmp_path / kind, kind=kind)
        np.testing.assert_allclose(task.vectors(task.train, view)[:], table.vectors, atol=1e-5)
    third = embed(folder, model, tmp_path / "third", layer=3)
    np.testing.assert_allclose(task.vectors(task.train, "4 cls")[:][:, 48:72], third.vectors, atol=1e-5)
    assert math.isclose(
        unlabeled.evaluate.knn(model, folder, tile_folder, k=3, features="cls+mean").accuracy,
        unlabeled.evaluate.knn(None, tmp_path / "cls+mean", embed(tile_folder, model, tmp_path / "q", kind="cls+mean"),
                               k=3, features="cls+mean").accuracy,
    )  # fmt: skip
