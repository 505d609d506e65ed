"""The command, on a pile with planted copies and junk, through main()."""

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import encoded
from unlabeled.cli import main
from unlabeled.curate import pipeline
from unlabeled.curate.lineage import held
from unlabeled.curate.recipe import CurateRecipe, resolved
from unlabeled.errors import UserError
from unlabeled.images.sources import open_source

from .made import random_model

FEW = {"duplicates.calibration_images": "6"}


@pytest.fixture(scope="module")
def pile(tmp_path_factory: pytest.TempPathFactory, photograph: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("pile")
    for number in range(10):
        top, left = (number * 37) % 200, (number * 83) % 340
        tile = np.ascontiguousarray(photograph[top : top + 96, left : left + 96])
        if number % 2:
            tile = tile[:, :, ::-1].copy()  # other colours
        (folder / f"{number:02}.png").write_bytes(encoded(tile))
        if number < 2:
            (folder / f"{number:02}_same.png").write_bytes(encoded(tile))
        if number in (2, 3):
            (folder / f"{number:02}_jpeg.jpg").write_bytes(encoded(tile, "JPEG", quality=60))
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "blank.png").write_bytes(encoded(np.full((60, 60, 3), 90, np.uint8)))
    (folder / "tiny.png").write_bytes(encoded(photograph[:20, :20]))
    (folder / "blurred.png").write_bytes(encoded(cv2.GaussianBlur(photograph, (0, 0), 4)))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_model(tmp_path_factory.mktemp("model"), width=32, depth=2, seed=0)


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["unlabeled", "curate", *map(str, words), "--json"])
    main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["unlabeled", "curate", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("unlabeled: ")
    return last


def files(folder: Path) -> dict[str, bytes]:
    """What a curation is to a user, but for what names its own folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "work" not in path.relative_to(folder).parts and path.name != "recipe.toml"
        and path.suffix != ".html"
    }  # fmt: skip


def test_all_steps(
    pile: Path,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    (evaluation / "seen.png").write_bytes((pile / "05.png").read_bytes())
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    (seeds / "like.png").write_bytes((pile / "06.png").read_bytes())
    out = tmp_path / "out"
    words = [
        pile, "--out", out, "--model", model, "--exclude", evaluation, "--seeds", seeds, "--count", 3,
        "--duplicates.threshold", "0.99999", "--retrieve.method", "nearest", "--retrieve.neighbours", 6,
        "--quality.min_blur", 5,
    ]  # fmt: skip
    done = run(monkeypatch, capsys, *words)
    counts = done["counts"]
    assert list(counts) == [
        "quality",
        "exact",
        "perceptual",
        "copies",
        "decontaminate",
        "retrieve",
        "cluster",
    ]
    assert counts["quality"]["reasons"] == {"blank": 1, "blurred": 1, "small": 1, "unreadable": 1}
    assert counts["exact"]["dropped"] == 2
    assert counts["perceptual"]["dropped"] == 2
    assert counts["decontaminate"]["dropped"] >= 1
    assert counts["cluster"]["kept"] == 3
    for one, following in zip(list(counts.values()), list(counts.values())[1:], strict=False):
        assert one["in"] - one["dropped"] == one["kept"] == following["in"]
    lineage = pq.read_table(done["lineage"]).to_pylist()
    by_key = {row["key"]: row for row in lineage}
    assert len(lineage) == len(open_source(pile)) == 18
    assert by_key["00_same.png"]["other"] == "00.png" and by_key["00_same.png"]["step"] == "exact"
    assert by_key["02_jpeg.jpg"]["other"] == "02.png" and by_key["02_jpeg.jpg"]["reason"] == "near hash"
    assert by_key["05.png"]["step"] == "decontaminate" and by_key["05.png"]["other"].endswith("seen.png")
    assert by_key["tiny.png"]["value"] == 20 and by_key["tiny.png"]["limit"] == 32
    assert by_key["broken.jpg"]["bad"] and not by_key["broken.jpg"]["kept"]
    kept = open_source(out)
    assert sorted(kept.read(index).key for index in range(3)) == sorted(
        str(pile / row["key"]) for row in lineage if row["kept"]
    )
    page = Path(done["report"]).read_text()
    assert 'src="http' not in page and "<link" not in page  # all of it is in the page
    assert page.count("<figure>") >= 5
    before = files(out)
    monkeypatch.setattr(pipeline.do, "quality", None)  # all steps are there already
    assert run(monkeypatch, capsys, *words)["counts"] == counts
    assert files(out) == before


def test_stopped_at_each_step_and_other_workers_give_the_same(
    pile: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def curated(out: str, workers: int) -> dict[str, bytes]:
        pipeline.curate(
            pile, tmp_path / out, model=model, count=4, workers=workers, shards=True, overrides=FEW
        )
        return files(tmp_path / out)

    whole = curated("whole", 1)
    point = json.loads((tmp_path / "whole" / "work" / "calibration.json").read_text())["points"]["raw"]
    page = (tmp_path / "whole" / "report" / "index.html").read_text()
    said = "No cosine gives" if point["recall"] == 0 else f"{point['recall']:.1%} of the copies are found"
    assert said in page  # and not the recall of the search for neighbours
    assert "features as they are: Vectors of 32 values take 64 images to be whitened, not 9." in page
    assert curated("two", 2) == whole
    for number, step in enumerate(("exact", "copies", "cluster")):
        real = getattr(pipeline.do, step)

        def stop(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(pipeline.do, step, stop)
        with pytest.raises(KeyboardInterrupt):
            curated("stopped", 1 + number)
        monkeypatch.setattr(pipeline.do, step, real)
    assert curated("stopped", 4) == whole
    assert len(open_source(tmp_path / "whole")) == 4


def test_seeds_that_changed_are_noticed(pile: Path, model: str, tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    overrides = {"retrieve.method": "nearest", "retrieve.neighbours": 1, "run.memory": "512MB"}
    found = []
    for name in ("06.png", "07.png"):
        (seeds / "like.png").write_bytes((pile / name).read_bytes())
        done = pipeline.curate(
            pile,
            tmp_path / "out",
            model=model,
            seeds=seeds,
            steps=["quality", "retrieve"],
            overrides=overrides,
        )
        found.append([row["key"] for row in pq.read_table(done.lineage).to_pylist() if row["kept"]])
    assert found == [["06.png"], ["07.png"]]


def test_a_cluster_of_seeds_is_shown_with_them(pile: Path, model: str, tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    for name in ("04.png", "06.png", "08.png"):
        (seeds / name).write_bytes((pile / name).read_bytes())
    overrides = {"retrieve.method": "clusters", "retrieve.clusters": 2}
    done = pipeline.curate(
        pile, tmp_path / "out", model=model, seeds=seeds, steps=["quality", "retrieve"], overrides=overrides
    )
    figures = held(tmp_path / "out" / "work" / "steps", "retrieve").figures
    assert figures["by_seed"] and figures["matched"] == len(figures["by_seed"])
    for shown, images in figures["by_seed"]:
        assert 1 <= len(shown) <= 2 and all(data == str(seeds) and row < 3 for data, row in shown)
        assert images
    assert "Seeds of a cluster" in done.report.read_text() and (done.report.parent / "retrieve.png").is_file()


@pytest.mark.parametrize("change", ["noise", "grey"])
def test_of_two_copies_the_one_without_noise_and_with_colour_is_kept(
    photograph: np.ndarray, tmp_path: Path, change: str
) -> None:
    noise = np.random.default_rng(0).normal(0, 25, photograph.shape)
    grey = np.repeat(cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    copy = np.clip(photograph + noise, 0, 255).astype(np.uint8) if change == "noise" else grey
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "a_copy.png").write_bytes(encoded(copy))
    (tmp_path / "pile" / "b_original.jpg").write_bytes(encoded(photograph, "JPEG", quality=90))
    done = pipeline.curate(
        tmp_path / "pile", tmp_path / "out", model="none", overrides={"duplicates.hash_distance": 7}
    )
    kept = {row["key"]: row["kept"] for row in pq.read_table(done.lineage).to_pylist()}
    assert kept == {"a_copy.png": False, "b_original.jpg": True}


def test_without_a_model_and_a_scorer_of_ones_own(
    pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_scorer.py").write_text("def red(pixels):\n    return pixels[:, :, 0].mean() / 255\n")
    words = [pile, "--out", tmp_path / "out", "--model", "none", "--quality.scorer", "own_scorer:red"]
    counts = run(monkeypatch, capsys, *words, "--quality.score", 0.45)["counts"]
    assert counts["quality"]["reasons"]["score"] >= 1
    assert list(counts) == ["quality", "exact", "perceptual"]
    done = run(monkeypatch, capsys, *words, "--quality.score", 0.0)  # a changed limit is done again
    more = done["counts"]
    assert "score" not in more["quality"]["reasons"]
    page = Path(done["report"])
    before = page.read_bytes()
    page.unlink()
    assert run(monkeypatch, capsys, "report", tmp_path / "out") == {
        "counts": more, "out": str(tmp_path / "out"), "report": str(page)
    }  # fmt: skip
    assert page.read_bytes() == before
    (tmp_path / "out" / "work" / "steps" / "exact.parquet").unlink()
    assert "run the curation again" in refused(monkeypatch, capsys, "report", tmp_path / "out")
    assert "is no curation" in refused(monkeypatch, capsys, "report", pile)
    assert "own_scorer:none" in refused(
        monkeypatch, capsys, pile, "--out", tmp_path / "b", "--quality.scorer", "own_scorer:none"
    )


def test_pretrain_takes_what_curate_made(pile: Path, tmp_path: Path) -> None:
    import unlabeled

    curated = unlabeled.curate(pile, out=tmp_path / "out", model="none")
    overrides = {
        "model.width": 24, "model.depth": 1, "model.num_heads": 2, "model.patch_size": 8, "crops.global_size": 16,
        "crops.local_size": 8, "head.num_prototypes": 16, "head.hidden": 16, "run.batch_size": 4, "run.workers": 0,
    }  # fmt: skip
    made = unlabeled.pretrain(
        str(curated.path), tmp_path / "run", recipe="tiny", steps=1, device="cpu", overrides=overrides
    )
    assert np.isfinite(made.metrics[-1]["loss"])


def test_bad_input_is_one_line(
    pile: Path,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*words: object) -> str:
        return refused(monkeypatch, capsys, *words)

    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    assert "no image file" in said(empty, "--out", out)
    assert "no image file" in said(pile, "--out", out, "--model", model, "--seeds", empty)
    assert "did you mean quality.min_blur?" in said(pile, "--out", out, "--quality.min_blurr", 3)
    assert "duplicates.precision is 2" in said(pile, "--out", out, "--duplicates.precision", 2)
    assert "amount of memory" in said(pile, "--out", out, "--memory", "much")
    assert "run.memory is 1KB, and must be 128MB at least" in said(pile, "--out", out, "--memory", "1KB")
    assert "no curation" in said(pile, "--out", pile)
    assert "needs --seeds" in said("retrieve", pile, "--out", out)
    assert "model is none" in said(pile, "--out", out, "--model", "none", "--count", 3)
    assert not out.exists()
    assert "left" in said(
        pile,
        "--out",
        tmp_path / "nothing",
        "--model",
        model,
        "--exclude",
        pile,
        "--duplicates.threshold",
        0.9,
    )
    lineage = pq.read_table(tmp_path / "nothing" / "report" / "lineage.parquet")
    assert not any(lineage.column("kept").to_pylist())


def test_changed_data_and_a_full_disk(pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in pile.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    pipeline.curate(copy, tmp_path / "out", model="none")
    (copy / "04.png").write_bytes((pile / "05.png").read_bytes())
    with pytest.raises(UserError, match="other images"):
        pipeline.curate(copy, tmp_path / "out", model="none")
    (copy / "04.png").unlink()
    with pytest.raises(UserError, match="17 images and had 18"):
        pipeline.curate(copy, tmp_path / "out", model="none")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unlabeled.curate.measured.pq.write_table", full)
    with pytest.raises(UserError, match="No space left"):
        pipeline.curate(pile, tmp_path / "full", model="none")


def test_recipe_fields_read_back(tmp_path: Path) -> None:
    from unlabeled.pretrain.recipes import write_recipe

    recipe = resolved(None, {"collect.hosts": "a.org,b.org", "cluster.levels": "30,3", "run.memory": "2GB"})
    write_recipe(recipe, tmp_path / "recipe.toml")
    assert resolved(tmp_path / "recipe.toml", {}) == recipe
    assert resolved(None, {"collect.hosts": "a.org"}).collect.hosts == ("a.org",)
    assert resolved(None, {}) == CurateRecipe()


def test_sheet_of_seeds_shows_the_seeds_beside_an_unreadable_file(
    pile: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    (seeds / "a_bad.jpg").write_bytes(b"no image")
    (seeds / "b_good.png").write_bytes((pile / "06.png").read_bytes())
    for method in ("nearest", "clusters"):
        chosen = {"retrieve.method": method, "retrieve.neighbours": 3}
        pipeline.curate(
            pile, tmp_path / method, model=model, seeds=seeds, steps=["retrieve"], overrides=chosen
        )
        outcome = held(tmp_path / method / "work" / "steps", "retrieve")
        for shown, _ in outcome.figures["by_seed"]:
            assert [open_source(data).read(index).key for data, index in shown] == ["b_good.png"]


def test_sheets_show_what_is_nearest_to_a_limit_that_nothing_is_beyond(pile: Path, tmp_path: Path) -> None:
    done = pipeline.curate(pile, tmp_path / "out", model="none", steps=["quality", "duplicates"])
    page = done.report.read_text()
    assert "text: the images nearest to the limit of 0.32, all within it" in page
    assert "small: the images nearest to the limit of 32, beyond it and within it" in page
    assert (done.report.parent / "quality_text_max_text.png").is_file()
    with Image.open(done.report.parent / "perceptual.png") as two_pairs:
        assert two_pairs.width > two_pairs.height  # beside each other
    assert '<a href="lineage.parquet">' in page and "http" not in page
