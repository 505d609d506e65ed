"""Several protocols and models: one table, kept results, a page that stands alone."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluate.conftest import MakeTable, clusters
from unlabeled.cli import main
from unlabeled.errors import UserError
from unlabeled.evaluate import report as reports
from unlabeled.evaluate.bootstrap import miou
from unlabeled.evaluate.page import as_html, as_markdown, notes_of, short_names
from unlabeled.evaluate.report import load_result, run, save_result
from unlabeled.evaluate.result import Figure, Picture, Result, result_of
from unlabeled.vit import VisionTransformer, vit_config
from unlabeled.weights.huggingface import save_huggingface


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two small models, the folders of which end alike."""
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        model = VisionTransformer(
            vit_config("vit_tiny", depth=2, width=24, num_heads=2, patch_size=8, image_size=32)
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        save_huggingface(model.eval(), folder / name / "model")
        paths.append(str(folder / name / "model"))
    return paths


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["unlabeled", *words])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_all_protocols_of_two_models(
    models: list[str],
    tile_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "report"
    words = ["evaluate", "all", "--model", models[0], "--model", models[1], "--train", str(tile_folder)]
    words += ["--test", str(tile_folder), "--out", str(out), "--json"]
    assert command(monkeypatch, *words) == 0
    first = capsys.readouterr()
    found = json.loads(first.out)
    assert set(found["metrics"]) == set(models)
    assert {"knn", "linear", "logreg", "fewshot_1", "retrieval_map"} <= set(found["metrics"][models[0]])
    assert found["metrics"][models[0]]["knn"] == next(
        one["metrics"]["accuracy"]
        for one in found["results"]
        if one["task"] == "knn" and one["model"] == models[0]
    )
    assert len(found["comparisons"]) == 5
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 5
    assert page.count("data:image/jpeg;base64,") > 20
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "a/model" in page
    assert "| knn |" in (out / "report.md").read_text()
    assert json.loads((out / "report.json").read_text())["metrics"] == found["metrics"]

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a kept result is computed again")

    monkeypatch.setattr(reports, "tables_of", fail)
    assert command(monkeypatch, *words) == 0
    second = capsys.readouterr()
    assert json.loads(second.out) == found
    assert second.err.count("kept in") == 10
    (next((out / "results").glob("knn-*.npz"))).write_bytes(b"cut off")
    with pytest.raises(AssertionError, match="computed again"):
        command(monkeypatch, *words)


def test_one_model_has_its_metrics_at_the_top(make_table: MakeTable) -> None:
    train, test = (
        make_table(name, *clusters(60, 6, 3, 1.0, seed)) for seed, name in enumerate(("train", "test"))
    )
    found = run(["knn"], [], train, test, options={"knn": {"k": [5, 10]}}).as_json()
    assert {"knn", "knn_5", "knn_10"} <= set(found)
    assert found["knn"] == found["metrics"]["a model without a name"]["knn"]


def test_errors_of_the_command_are_one_line(
    models: list[str], tile_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data = ["--train", str(tile_folder), "--test", str(tile_folder)]
    for words, message in (
        (["knn", *data], "a model is needed"),
        (["knn", "--model", models[0], *data, "--k", "x"], "--k x is no list of whole numbers"),
        (["knn", "--model", models[0], "--model", models[0], *data], "given twice"),
        (["retrieval", "--model", models[0], *data, "--ground-truth", "no.json"], "no.json cannot be read"),
        (["knn", "--model", "nowhere", *data], "no model 'nowhere'"),
        (["knn", "--model", models[0], *data, "--features", "patches"], "no features 'patches'"),
        (["health", str(tile_folder)], "is no feature table"),
    ):
        assert command(monkeypatch, "evaluate", *words) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert message in said[-1], said
        assert "Traceback" not in "".join(said)


def test_health_command(
    make_table: MakeTable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    table = make_table("table", *clusters(50, 8, 3, 1.0, 0))
    assert command(monkeypatch, "evaluate", "health", str(table.path), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rankme"] > 1
    assert found["meanings"]["rankme"]


def test_of_all_protocols_those_that_cannot_run_are_skipped(make_table: MakeTable) -> None:
    vectors = np.eye(3, dtype=np.float32)
    train = make_table("train", vectors, ["a", "b", "c"])
    test = make_table("test", vectors[:2], ["a", None])
    found = run(["all"], [], train, test)
    assert set(found.tasks) == {"knn", "fewshot", "retrieval"}
    assert [task for task, _, _ in found.skipped] == ["linear", "logreg"]
    assert found.tasks["knn"][0].settings["k"] == 3
    assert "linear was left out" in as_markdown(found, "all")
    empty = make_table("empty", vectors, [None] * 3)
    with pytest.raises(UserError, match="has no labels"):
        run(["all"], [], empty, test)


def test_results_of_all_kinds_are_kept_whole(tmp_path: Path) -> None:
    confusion = np.random.default_rng(0).integers(0, 9, (4, 3, 3))
    result = result_of(
        "segmentation", "<m>", {"miou": Figure(confusion, "miou")}, list("wxyz"), settings={"a": [1]},
        counts={"test": 4}, metrics={"iou_road": 0.5}, bad_files=[("f", "broken")], notes=["note & more"],
        pictures=[Picture("<b>", b"\x89PNG123", None)],
    )  # fmt: skip
    path = tmp_path / "kept.npz"
    save_result(path, result)
    kept = load_result(path)
    assert kept is not None
    np.testing.assert_array_equal(kept.figures["miou"].values_M, confusion)
    for name in ("metrics", "intervals", "settings", "counts", "bad_files", "notes", "keys", "pictures"):
        assert getattr(kept, name) == getattr(result, name)
    assert kept.score == pytest.approx(float(miou(confusion.mean(0)[None])[0]))
    page = as_html(reports.Report([result], []), "t <i>")
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "data:image/png" in page
    assert load_result(tmp_path / "none.npz") is None


def test_short_names_tell_models_apart() -> None:
    assert short_names(["runs/a/model", "runs/b/model"]) == {
        "runs/a/model": "a/model",
        "runs/b/model": "b/model",
    }
    assert short_names(["facebook/dinov2-small"]) == {"facebook/dinov2-small": "dinov2-small"}


def test_a_note_of_one_model_among_several_names_it() -> None:
    results = [
        Result(task, model, {"accuracy": 0.5}, {}, {}, {}, notes=notes)
        for task, model, notes in (
            ("knn", "runs/a", ("2 images were left out",)),
            ("knn", "runs/b", ("2 images were left out",)),
            ("linear", "runs/b", ("the best learning rate is the largest", "2 images were left out")),
        )
    ]
    names = {"runs/a": "a", "runs/b": "b"}
    expected = ["2 images were left out", "b: the best learning rate is the largest"]
    assert notes_of(reports.Report(results, []), names) == expected
    alone = reports.Report(results[1:], [])
    assert notes_of(alone, {"runs/b": "b"}) == [
        "2 images were left out",
        "the best learning rate is the largest",
    ]
