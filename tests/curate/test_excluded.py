"""Decontamination by bytes, hashes and whitened features, on tiles of a photograph."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import encoded
from unlabeled.curate import pipeline
from unlabeled.curate.hashes import perceptual_hash
from unlabeled.curate.lineage import held
from unlabeled.curate.quality import shrunk_grey
from unlabeled.errors import UserError

from .made import random_model

LOOSE = {"quality.min_blur": 1, "quality.min_entropy": 0}


def tiles(photograph: np.ndarray, count: int) -> list[np.ndarray]:
    return [
        np.ascontiguousarray(photograph[top : top + 96, left : left + 96])
        for top, left in [((number * 37) % 220, (number * 83) % 340) for number in range(count)]
    ]


def written(folder: Path, images: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in images.items():
        (folder / name).write_bytes(data)
    return folder


def rows_of(done: pipeline.Curated) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(done.lineage).to_pylist()}


def bits(one: np.ndarray, other: np.ndarray) -> int:
    first, second = (perceptual_hash(shrunk_grey(pixels)) for pixels in (one, other))
    assert first is not None and second is not None
    return (first ^ second).bit_count()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_model(tmp_path_factory.mktemp("model"), width=16, depth=1, seed=1)


def test_leaked_images_go_by_bytes_and_by_hash_without_a_model(
    photograph: np.ndarray, tmp_path: Path
) -> None:
    pictures = tiles(photograph, 6)
    pile = written(tmp_path / "pile", {f"{n}.png": encoded(one) for n, one in enumerate(pictures)})
    test = written(
        tmp_path / "test",
        {
            "a_broken.jpg": b"no image",
            "b_same.png": encoded(pictures[1]),
            "c_jpeg.jpg": encoded(pictures[3], "JPEG", quality=60),
            "d_other.png": encoded(photograph[200:260, 300:420].copy()),
        },
    )

    def curated(**fields: Any) -> pipeline.Curated:
        return pipeline.curate(pile, tmp_path / "out", exclude=test, model="none", overrides=LOOSE | fields)

    done = curated()
    assert done.counts["decontaminate"]["reasons"] == {
        "a hash near an excluded image's": 1, "the bytes of an excluded image": 1
    }  # fmt: skip
    rows = rows_of(done)
    assert [name for name, row in rows.items() if not row["kept"]] == ["1.png", "3.png"]
    assert rows["1.png"]["other"] == f"{test}: b_same.png" and np.isnan(rows["1.png"]["value"])
    assert rows["3.png"]["other"] == f"{test}: c_jpeg.jpg" and rows["3.png"]["limit"] == 4
    assert rows["3.png"]["value"] == bits(pictures[3], cv2.imdecode(
        np.frombuffer((test / "c_jpeg.jpg").read_bytes(), np.uint8), cv2.IMREAD_COLOR_RGB
    ))  # fmt: skip
    page = done.report.read_text()
    assert (
        f"Held against 3 of {test} (1 more cannot be read): the same bytes, perceptual hashes up to 4 of 64 bits"
        in page
    )
    assert "without a model" in page and (done.report.parent / "decontaminate.png").is_file()
    fewer = curated(**{"duplicates.hash_distance": -1})
    assert fewer.counts["decontaminate"]["reasons"] == {"the bytes of an excluded image": 1}
    (test / "e_more.png").write_bytes(encoded(pictures[5]))  # a set that has grown is held against again
    assert rows_of(curated())["5.png"]["other"] == f"{test}: e_more.png"


def test_what_is_kept_for_a_copy_of_an_excluded_image_goes_too(
    photograph: np.ndarray, tmp_path: Path
) -> None:
    shifted = [np.ascontiguousarray(photograph[40:136, left : left + 96]) for left in range(60, 90)]
    middle, last = next(
        (one, two)
        for one in range(1, 15)
        for two in range(one + 1, 30)
        if max(bits(shifted[0], shifted[one]), bits(shifted[one], shifted[two])) <= 4
        and bits(shifted[0], shifted[two]) > 4
    )
    best = cv2.resize(shifted[0], (192, 192), interpolation=cv2.INTER_CUBIC)
    pile = written(
        tmp_path / "pile",
        {"best.png": encoded(best), "middle.png": encoded(shifted[middle]), "other.png": encoded(photograph)},
    )
    test = written(tmp_path / "test", {"last.png": encoded(shifted[last])})
    done = pipeline.curate(pile, tmp_path / "out", exclude=test, model="none", overrides=LOOSE)
    rows = rows_of(done)
    assert rows["middle.png"]["step"] == "perceptual" and rows["middle.png"]["other"] == "best.png"
    assert rows["best.png"]["reason"] == "copy of one with a hash near an excluded image's"
    assert rows["best.png"]["other"] == f"{test}: last.png"
    assert rows["best.png"]["other_index"] == 1  # middle.png
    assert rows["other.png"]["kept"]


def test_whitened_features_are_compared_in_both_steps_stopped_or_with_other_workers(
    photograph: np.ndarray, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = tiles(photograph, 40)
    copies_of = [encoded(one, "JPEG", quality=50) for one in pictures[:6]]
    pile = written(
        tmp_path / "pile",
        {f"{n:02}.png": encoded(one) for n, one in enumerate(pictures)}
        | {f"copy_{n}.jpg": data for n, data in enumerate(copies_of[:3])},
    )
    test = written(
        tmp_path / "test",
        {"a_broken.jpg": b"", **{f"copy_{n}.jpg": data for n, data in enumerate(copies_of[3:], 3)}},
    )

    def curated(out: str, workers: int, **fields: Any) -> pipeline.Curated:
        fields = {
            "duplicates.whiten": "yes",
            "duplicates.threshold": 0.8,
            "duplicates.hash_distance": -1,
        } | fields
        return pipeline.curate(
            pile, tmp_path / out, exclude=test, model=model, workers=workers, overrides=LOOSE | fields
        )

    def lineage(done: pipeline.Curated) -> list[dict[str, Any]]:
        return pq.read_table(done.lineage).to_pylist()

    whole = curated("whole", 1)
    steps = tmp_path / "whole" / "work" / "steps"
    copies, excluded = held(steps, "copies"), held(steps, "decontaminate")
    assert copies.figures["space"] == excluded.figures["space"] == "whitened"
    assert "Compared are whitened features." in whole.report.read_text()
    # Every value is a cosine of whitened vectors, by numpy alone.
    features = next((tmp_path / "whole" / "work").glob("features-*/*.npy")).parent.parent
    tables = [np.load(file).astype(np.float64) for file in sorted(features.glob("features-*/*.npy"))]
    own, other = sorted(tables, key=len, reverse=True)
    own, other = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (own, other))
    variances, directions = np.linalg.eigh(np.cov(own.T, bias=True))
    good = variances > 1e-6 * variances[-1]
    matrix = directions[:, good] / np.sqrt(variances[good])
    white, beside = ((one - own.mean(0)) @ matrix for one in (own, other))
    white, beside = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (white, beside))
    rows = copies.rows.to_pylist()
    assert len(rows) >= 3
    for row in rows:
        assert abs(row["value"] - white[row["index"]] @ white[row["other_index"]]) < 1e-3
    wanted = {int(one) for one in np.flatnonzero((white @ beside.T).max(1) >= 0.8)}
    direct = [row for row in excluded.rows.to_pylist() if row["reason"] == "near an excluded image"]
    assert {row["index"] for row in direct} == wanted - {row["index"] for row in rows} != set()
    for row in direct:
        assert abs(row["value"] - (white[row["index"]] @ beside.T).max()) < 1e-3
        assert row["other"].endswith(f"copy_{(white[row['index']] @ beside.T).argmax() + 3}.jpg")

    for workers in (2, 4):
        assert lineage(curated(f"workers_{workers}", workers)) == lineage(whole)
    real = pipeline.do.near_duplicates

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.do, "near_duplicates", stop)
    with pytest.raises(KeyboardInterrupt):
        curated("stopped", 2)
    assert len(list((tmp_path / "stopped" / "work" / "blocks").glob("whiten*"))) == 2
    monkeypatch.setattr(pipeline.do, "near_duplicates", real)
    assert lineage(curated("stopped", 1)) == lineage(whole)

    calibrated = curated("auto", 1, **{
        "duplicates.whiten": "auto", "duplicates.threshold": 0, "duplicates.calibration_images": 10
    })  # fmt: skip
    figures = held(tmp_path / "auto" / "work" / "steps", "copies").figures
    assert set(figures["micro_ap"]) == {"raw", "whitened"}
    assert figures["micro_ap"][figures["space"]] == max(figures["micro_ap"].values())
    assert "better by micro-average precision (features as they are " in calibrated.report.read_text()
    assert held(tmp_path / "auto" / "work" / "steps", "decontaminate").figures["space"] == figures["space"]


def test_too_few_to_whiten_and_an_older_folder_are_one_line(
    photograph: np.ndarray, model: str, tmp_path: Path
) -> None:
    pictures = tiles(photograph, 5)
    pile = written(tmp_path / "pile", {f"{n}.png": encoded(one) for n, one in enumerate(pictures)})
    with pytest.raises(
        UserError, match=r"duplicates\.whiten is yes\. .* take 32 images to be whitened, not 5"
    ):
        pipeline.curate(pile, tmp_path / "few", model=model, overrides=LOOSE | {"duplicates.whiten": "yes"})
    with pytest.raises(UserError, match="whiten"):
        pipeline.curate(pile, tmp_path / "bad", model=model, overrides={"duplicates.whiten": "perhaps"})
    pipeline.curate(pile, tmp_path / "old", model="none")
    state = tmp_path / "old" / "curation.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": "unlabeled curation 3"}))
    with pytest.raises(UserError, match="another format than 'unlabeled curation 4'; choose another --out"):
        pipeline.curate(pile, tmp_path / "old", model="none")


@pytest.mark.parametrize("name", ["exclude", "seeds"])
def test_a_set_of_which_nothing_can_be_read_is_refused_before_the_work(
    photograph: np.ndarray, model: Path, tmp_path: Path, name: str
) -> None:
    pile = written(tmp_path / "pile", {"one.png": encoded(photograph)})
    bad = written(tmp_path / "bad", {"bad.jpg": b"no image"})
    with pytest.raises(UserError, match=r"bad holds no image that can be read .*first: bad\.jpg"):
        pipeline.curate(pile, tmp_path / "out", model=model, overrides=LOOSE, **{name: bad})
    assert not (tmp_path / "out").exists()
