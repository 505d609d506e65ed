"""Average precision against scikit-learn and plain loops; retrieval of tables and of images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import normalize

import unlabeled
from tests.evaluate.conftest import MakeTable, clusters
from unlabeled.errors import UserError
from unlabeled.evaluate.average_precision import average_precision, trapezoid_average_precision
from unlabeled.evaluate.ground_truth import Places, read_ground_truth
from unlabeled.features.extractor import Extractor
from unlabeled.vit import VisionTransformer, vit_config


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=40))
def test_average_precision_is_scikit_learns(items: list) -> None:
    """Few distinct similarities, so that many are tied."""
    similarities, relevant = (np.array(column) for column in zip(*items, strict=True))
    found = average_precision(similarities.astype(float), relevant.astype(bool))
    if not relevant.any():
        assert np.isnan(found)
    else:
        assert found == pytest.approx(average_precision_score(relevant, similarities))


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 60), max_size=12))
def test_trapezoids_are_the_plain_loop(ranks: set[int]) -> None:
    ordered = sorted(ranks)
    found = trapezoid_average_precision(np.array(ordered, np.int64))
    if not ordered:
        assert np.isnan(found)
        return
    area = 0.0
    for number, rank in enumerate(ordered):
        before = 1.0 if rank == 0 else number / rank
        area += (before + (number + 1) / (rank + 1)) / 2 / len(ordered)
    assert found == pytest.approx(area)


def test_retrieval_by_label(make_table: MakeTable) -> None:
    (vectors, labels), (queries, answers) = clusters(90, 8, 4, 1.5, 0), clusters(40, 8, 4, 1.5, 1)
    result = unlabeled.evaluate.retrieval(
        train=make_table("train", vectors, labels), test=make_table("test", queries, answers)
    )
    similarities = normalize(queries) @ normalize(vectors).T
    relevant = np.array(answers)[:, None] == np.array(labels)
    precisions = [average_precision_score(*pair) for pair in zip(relevant, similarities, strict=True)]
    assert result.metrics["map"] == pytest.approx(np.mean(precisions), abs=1e-5)
    order = np.argsort(-similarities, 1)
    for k in (1, 5, 10):
        wanted = np.take_along_axis(relevant, order, 1)[:, :k].any(1).mean()
        assert result.metrics[f"recall_{k}"] == pytest.approx(wanted)
    assert result.interval[0] < result.score < result.interval[1]


def test_a_query_does_not_find_itself(make_table: MakeTable) -> None:
    vectors = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, -1]], np.float32)
    table = make_table("same", vectors, ["a", "a", "b", "b", "alone"])
    result = unlabeled.evaluate.retrieval(train=table, test=table)
    assert result.metrics["map"] == result.metrics["recall_1"] == 1
    assert result.counts["queries"] == 4
    assert "1 queries are the only images of their class and are left out" in result.notes
    with pytest.raises(UserError, match="nothing to find"):
        lone = make_table("lone", vectors[:2], ["a", "b"])
        unlabeled.evaluate.retrieval(train=lone, test=lone)


def plain_revisited(similarities: np.ndarray, wanted: list[int], ignored: list[int]) -> tuple[float, float]:
    """Average precision and precision of the first 10 as the evaluation describes them, place by place."""
    ranked = [place for place in np.argsort(-similarities) if place not in ignored]
    area, found, last_recall, last_precision = 0.0, 0, 0.0, 1.0
    for rank, place in enumerate(ranked, 1):
        found += place in wanted
        recall, precision = found / len(wanted), found / rank
        area += (recall - last_recall) * (last_precision + precision) / 2
        last_recall, last_precision = recall, precision
    last = max(ranked.index(place) for place in wanted) + 1
    few = min(last, 10)
    return area, sum(place in wanted for place in ranked[:few]) / few


def test_easy_medium_and_hard(make_table: MakeTable, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(60, 6)), rng.normal(size=(8, 6))
    train = make_table("gallery", vectors, [None] * 60, [f"jpg/all_{number:03}.jpg" for number in range(60)])
    test = make_table("queries", queries, [None] * 8, [f"q/query_{number}.png" for number in range(8)])
    gnd = []
    for number in range(8):
        places = rng.permutation(60)
        easy, hard, junk = places[:6], places[6:14], places[14:20]
        if number == 3:
            hard = hard[:0]  # counts at easy and medium only
        gnd.append({"easy": easy.tolist(), "hard": hard.tolist(), "junk": junk.tolist()})
    names = [f"all_{number:03}" for number in range(60)]
    path = tmp_path / "gnd.json"
    path.write_text(
        json.dumps(
            {"imlist": names, "qimlist": [*(f"query_{n}" for n in range(8)), "lost"], "gnd": [*gnd, gnd[0]]}
        )
    )
    result = unlabeled.evaluate.retrieval(train=train, test=test, ground_truth=path)
    similarities = normalize(queries) @ normalize(vectors).T
    levels = {
        "easy": (["easy"], ["junk", "hard"]),
        "medium": (["easy", "hard"], ["junk"]),
        "hard": (["hard"], ["junk", "easy"]),
    }
    for level, (wanted, ignored) in levels.items():
        sets = [
            [[place for name in part for place in one[name]] for part in (wanted, ignored)] for one in gnd
        ]
        plain = [
            plain_revisited(*pair)
            for pair in ((row, *both) for row, both in zip(similarities, sets, strict=True))
            if pair[1]
        ]
        assert len(plain) == (7 if level == "hard" else 8)
        assert result.metrics[f"map_{level}"] == pytest.approx(np.mean([one for one, _ in plain]), abs=1e-5)
        assert result.metrics[f"precision_10_{level}"] == pytest.approx(
            np.mean([one for _, one in plain]), abs=1e-5
        )
    assert result.main == "map_medium"
    assert "1 of 9 queries are not in" in result.notes[0]
    ours = {
        "gallery": [f"jpg/all_{number:03}.jpg" for number in range(60)],
        "queries": [
            {
                "name": f"query_{n}.png",
                **{level: [f"all_{place:03}.jpg" for place in one[level]] for level in one},
            }
            for n, one in enumerate(gnd)
        ],
    }
    path.write_text(json.dumps(ours))
    assert unlabeled.evaluate.retrieval(train=train, test=test, ground_truth=path).metrics == result.metrics


def test_queries_are_cropped_to_their_boxes(tmp_path: Path, photograph: np.ndarray) -> None:
    """A crop that is in the gallery as an image of its own is found first, and its features are the same."""
    gallery, queries = tmp_path / "gallery", tmp_path / "queries"
    for folder in (gallery, queries):
        folder.mkdir()
    for number in range(6):
        Image.fromarray(photograph[40 * number : 40 * number + 64, 10:74]).save(gallery / f"{number}.png")
    Image.fromarray(photograph).save(queries / "cat.png")
    torch.manual_seed(0)
    model = VisionTransformer(
        vit_config("vit_tiny", depth=2, width=24, num_heads=2, patch_size=8, image_size=32)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path / "truth.json"
    query = {"name": "cat", "box": [10, 80, 74, 144], "easy": ["2"], "hard": [], "junk": ["5"]}
    path.write_text(json.dumps({"queries": [query]}))
    result = unlabeled.evaluate.retrieval(model, gallery, queries, ground_truth=path)
    assert result.metrics["map_easy"] == result.metrics["map_medium"] == 1
    assert "map_hard" not in result.metrics
    assert result.settings["cropped_queries"] == 1
    crop = Extractor(model)(np.ascontiguousarray(photograph[80:144, 10:74]))
    np.testing.assert_allclose(crop, Extractor(model)(gallery / "2.png"), atol=1e-6)
    query["box"] = [9000, 80, 9074, 144]
    path.write_text(json.dumps({"queries": [query]}))
    with pytest.raises(UserError, match="outside of its 451 x 300 pixels"):
        unlabeled.evaluate.retrieval(model, gallery, queries, ground_truth=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is no JSON"),
        ("{}", "is no ground truth"),
        ('{"queries": []}', "has no query"),
        ('{"queries": [{"name": "a", "box": [1, 2, 1, 4]}]}', "without pixels"),
        ('{"imlist": ["a"], "qimlist": ["q"], "gnd": [{"easy": [7]}]}', "is no ground truth"),
    ],
)
def test_a_broken_ground_truth_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "gnd.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_ground_truth(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_ground_truth(tmp_path / "missing.json")
    with pytest.raises(UserError, match="may run code"):
        read_ground_truth(tmp_path / "gnd.pkl")


def test_names_that_several_images_share_are_refused() -> None:
    places = Places(["a/x.jpg", "b/x.jpg", "b/y.tar.png"])
    assert places("a/x") == 0
    assert places("b/x.jpg") == 1
    assert places("y.tar") == 2
    assert places("z") is None
    with pytest.raises(UserError, match="Several images are called x"):
        places("x")
