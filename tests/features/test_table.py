"""The feature table: what embed writes, whole after any stop, and what it refuses."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import unlabeled
from unlabeled import Extractor, FeatureTable, UserError, VisionTransformer, embed, open_table
from unlabeled.cli import app
from unlabeled.features import table as table_module
from unlabeled.features.convert import convert
from unlabeled.features.table import ShardedRows
from unlabeled.weights.huggingface import save_huggingface

embed_module = sys.modules[embed.__module__]


@pytest.fixture
def saved(make_model: Callable[..., VisionTransformer], tmp_path: Path) -> Path:
    save_huggingface(make_model(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_module, "SHARD_IMAGES", (8, 8))


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", ["cls", "cls+mean"])
def test_rows_are_the_images(tile_folder: Path, saved: Path, tmp_path: Path, kind: str) -> None:
    table = embed(tile_folder, saved, tmp_path / "table", kind=kind)
    assert isinstance(table, FeatureTable) and len(table) == 24 and table.bad_files == 0
    paths = sorted(tile_folder.rglob("*.*"))
    assert table.keys == [str(path.relative_to(tile_folder)) for path in paths]
    assert table.rows.column("label").to_pylist() == [path.parent.name for path in paths]
    assert set(table.rows.column("width").to_pylist()) == set(table.rows.column("height").to_pylist()) == {40}
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest()[:32] for path in paths]
    assert table.rows.column("content_hash").to_pylist() == hashes
    expected = Extractor(saved, kind)([str(path) for path in paths])
    assert table.vectors.shape == expected.shape and table.vectors.dtype == np.float32
    np.testing.assert_allclose(np.asarray(table.vectors), expected, atol=1e-5)
    assert table.read_image(17) == paths[17].read_bytes()
    assert len(list((tmp_path / "table").glob("*.npy"))) == 3
    chunks = list(open_table(tmp_path / "table").chunks(5))
    assert [first for first, _, _ in chunks] == [0, 5, 8, 13, 16, 21]
    assert [key for _, rows, _ in chunks for key in rows.column("key").to_pylist()] == table.keys
    np.testing.assert_array_equal(np.concatenate([part for _, _, part in chunks]), np.asarray(table.vectors))


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", ["patches", "attention"])
def test_grids_are_read_by_slice(tmp_path: Path, saved: Path, photograph: np.ndarray, kind: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        crop = photograph[: 60 + number * 9, : 200 - number * 5]
        Image.fromarray(crop).save(folder / f"{number:02}.png")
    table = embed(folder, saved, tmp_path / "table", kind=kind, shape="keep", size=32)
    extractor = Extractor(saved, kind, shape="keep", size=32)
    assert table.dtype == np.float16 and len(table.grids) == 20
    shapes = set()
    for number, grid in enumerate(table.grids[:]):
        expected = extractor(folder / f"{number:02}.png")
        assert grid.shape == expected.shape
        np.testing.assert_allclose(grid, expected, atol=4e-3, rtol=2e-3)
        shapes.add(grid.shape)
    assert len(shapes) > 4
    base = table.grids[3]
    while not isinstance(base, np.memmap):
        base = base.base
    with pytest.raises(UserError, match=r"use \.grids"):
        _ = table.vectors


STOPPED = """
import sys
import unlabeled.features.embed as module
module.SHARD_IMAGES = (4, 4)
module.embed(sys.argv[1], sys.argv[2], sys.argv[3], kind=sys.argv[4], shape="keep", size=40, device="cpu")
"""


@pytest.mark.parametrize("kind", ["cls", "patches"])
def test_a_killed_extraction_goes_on_to_the_same_table(
    tile_folder: Path, saved: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "whole").mkdir()
    arguments = [sys.executable, "-c", STOPPED, str(tile_folder), str(saved)]
    subprocess.run([*arguments, str(tmp_path / "whole"), kind], check=True)
    out = tmp_path / "stopped"
    kills = 0
    for wanted in (1, 3, 5):
        process = subprocess.Popen([*arguments, str(out), kind])
        while process.poll() is None and len(list(out.glob("*.parquet"))) < wanted:
            time.sleep(0.001)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (out / "table.json").exists():
            assert FeatureTable(out).rows.num_rows == len(FeatureTable(out))  # what is there is whole
    assert kills
    subprocess.run([*arguments, str(out), kind], check=True)
    for name in list(files_of(out)):
        if name.endswith(".tmp"):
            (out / name).unlink()
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_ranks_share_the_shards(
    tile_folder: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(tile_folder, saved, tmp_path / "one")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        embed(tile_folder, saved, tmp_path / "two")
        assert len(list((tmp_path / "two").glob("*.parquet"))) == (1 if rank else 3)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_rank_of_several_does_not_call_the_table_done(
    tile_folder: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "table"
    done = run("embed", str(tile_folder), "--model", str(saved), "--out", str(out))  # one shard, rank 0's
    assert f"rank 1 of 2 is done; {out}: 0 images so far, " in done.stdout
    assert "next:" not in done.stdout


@pytest.mark.usefixtures("small_shards", "local_ray")
def test_ray_writes_the_same_table(tile_folder: Path, saved: Path, tmp_path: Path) -> None:
    bad = tmp_path / "images.csv"
    paths = [str(path) for path in sorted(tile_folder.rglob("*.*"))]
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad.write_text("path\n" + "\n".join([*paths[:5], str(tmp_path / "bad.png"), *paths[5:]]) + "\n")
    for name, ray in (("one", None), ("two", "local")):
        table = embed(bad, saved, tmp_path / name, ray=ray)
        assert len(table) == len(paths) and table.bad_files == 1
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


@pytest.mark.usefixtures("small_shards")
def test_bad_files_are_in_the_report_and_not_in_the_table(
    tile_folder: Path, saved: Path, tmp_path: Path, photograph: np.ndarray
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        Image.fromarray(photograph[number : number + 40, :50]).save(folder / f"{number:02}.png")
    for number in (0, 8, 9, 10, 11, 12, 13, 14, 15):  # one, and a whole shard
        (folder / f"{number:02}.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    Image.fromarray(photograph[:4, :40]).save(folder / "19.png")  # less than a patch
    (folder / "20.png").symlink_to("nowhere.png")
    table = embed(folder, saved, tmp_path / "table", shape="keep", size=32)
    assert table.keys == [f"{number:02}.png" for number in (1, 2, 3, 4, 5, 6, 7, 16, 17, 18)]
    assert table.vectors.shape == (10, 24) and table.bad_files == 11
    lines = [json.loads(line) for line in (tmp_path / "table" / "bad_files.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {
        f"{n:02}.png" for n in (0, 8, 9, 10, 11, 12, 13, 14, 15, 19, 20)
    }
    assert "smaller than one patch" in next(line["reason"] for line in lines if line["key"] == "19.png")
    again = embed(folder, saved, tmp_path / "table", shape="keep", size=32)
    assert again.images_per_second == 0 and again.bad_files == 11
    assert [first for first, _, _ in again.chunks()] == [0, 7]


def test_another_source_is_added(tile_folder: Path, saved: Path, tmp_path: Path) -> None:
    embed(tile_folder / "left", saved, tmp_path / "table")
    before = files_of(tmp_path / "table")
    table = embed(tile_folder / "right", saved, tmp_path / "table")
    assert len(table) == 24 and len(table.sources) == 2
    after = files_of(tmp_path / "table")
    assert {name: after[name] for name in before if name != "table.json"} == {
        name: value for name, value in before.items() if name != "table.json"
    }
    assert table.read_image(len(table) - 1) == max((tile_folder / "right").iterdir()).read_bytes()


def test_what_does_not_belong_in_a_table_is_refused(
    tile_folder: Path, saved: Path, tmp_path: Path, make_model: Callable[..., VisionTransformer]
) -> None:
    out = tmp_path / "table"
    embed(tile_folder, saved, out)
    before = files_of(out)
    cases = [
        ({"model": make_model(seed=1)}, "other weights"),
        ({"kind": "mean"}, "kind cls.*mean"),
        ({"layer": 0}, "layer 1.*0"),
        ({"size": 48}, "size 32.*size 48"),
        ({"shape": "stretch"}, "shape crop.*shape stretch"),
        ({"dtype": "float16"}, "float32.*float16"),
        ({"dtype": "float64"}, "not float64"),
    ]
    for change, message in cases:
        with pytest.raises(UserError, match=message):
            embed(tile_folder, **{"model": saved, "out": out} | change)
    assert files_of(out) == before


def test_a_source_that_has_grown_is_refused(saved: Path, tmp_path: Path, photograph: np.ndarray) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(photograph).save(folder / "a.png")
    embed(folder, saved, tmp_path / "table")
    Image.fromarray(photograph).save(folder / "b.png")
    with pytest.raises(UserError, match=r"has 2 images and had 1"):
        embed(folder, saved, tmp_path / "table")


def test_folders_and_sources_that_will_not_do(saved: Path, tile_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image file"):
        embed(tmp_path / "empty", saved, tmp_path / "table")
    assert not (tmp_path / "table").exists()
    with pytest.raises(UserError, match="no feature table"):
        embed(tile_folder, saved, saved)
    with pytest.raises(UserError, match=r"no table\.json"):
        open_table(tmp_path / "empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="no image that can be read"):
        embed(tmp_path / "bad", saved, tmp_path / "table")
    for text in ("", "[]", '{"format": "other"}'):
        (tmp_path / "empty" / "table.json").write_text(text)
        with pytest.raises(UserError, match=r"table\.json"):
            open_table(tmp_path / "empty")


def test_a_damaged_shard_is_named(saved: Path, tile_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "table"
    embed(tile_folder, saved, out)
    vectors = out / "000-000000.npy"
    whole = vectors.read_bytes()
    vectors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"000-000000\.npy"):
        _ = open_table(out).vectors
    np.save(vectors, np.zeros((3, 24), np.float32))
    with pytest.raises(UserError, match=r"shape \(3, 24\)"):
        _ = open_table(out).vectors
    (out / "000-000000.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        open_table(out)


@pytest.mark.usefixtures("small_shards")
def test_a_full_disk_leaves_what_was_written(
    saved: Path, tile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = np.save, []

    def fill(file: io.BufferedWriter, array: np.ndarray) -> None:
        calls.append(file)
        if len(calls) == 2:
            file.write(b"x")
            raise OSError(28, "No space left on device")
        save(file, array)

    monkeypatch.setattr(np, "save", fill)
    with pytest.raises(UserError, match="No space left"):
        embed(tile_folder, saved, tmp_path / "table")
    assert len(open_table(tmp_path / "table")) == 8
    assert not list((tmp_path / "table").glob(".*"))
    monkeypatch.setattr(np, "save", save)
    embed(tile_folder, saved, tmp_path / "table")
    embed(tile_folder, saved, tmp_path / "other")
    assert files_of(tmp_path / "table") == files_of(tmp_path / "other")


def test_an_image_that_has_changed_is_not_shown_as_the_row(
    saved: Path, tmp_path: Path, photograph: np.ndarray
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(photograph).save(folder / "a.png")
    table = embed(folder, saved, tmp_path / "table")
    Image.fromarray(photograph[::-1]).save(folder / "a.png")
    with pytest.raises(UserError, match="another image now"):
        table.read_image(0)
    with pytest.raises(IndexError):
        table.read_image(1)


@pytest.mark.usefixtures("small_shards")
def test_one_file_for_other_tools(saved: Path, tile_folder: Path, tmp_path: Path) -> None:
    table = embed(tile_folder, saved, tmp_path / "table")
    vectors = np.asarray(table.vectors)
    held = pq.read_table(convert(table, "parquet", tmp_path / "a.parquet"))
    np.testing.assert_array_equal(np.stack(held.column("vector").to_numpy()), vectors)
    assert held.drop_columns(["vector"]).equals(table.rows.combine_chunks())
    with np.load(convert(tmp_path / "table", "npz", tmp_path / "a.npz")) as arrays:
        np.testing.assert_array_equal(arrays["vectors"], vectors)
        assert arrays["key"].tolist() == table.keys
    with convert(table, "csv", tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == table.keys
    np.testing.assert_allclose([float(row["v23"]) for row in rows], vectors[:, 23], rtol=1e-6)
    with pytest.raises(UserError, match="not xlsx"):
        convert(table, "xlsx", tmp_path / "a.xlsx")
    with pytest.raises(UserError, match="cannot be written"):
        convert(table, "csv", tmp_path / "a.csv" / "b.csv")


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_sharded_rows_are_one_array(data: st.DataObject, sizes: list[int]) -> None:
    whole = np.arange(sum(sizes) * 2, dtype=np.float32).reshape(-1, 2)
    rows = ShardedRows(np.split(whole, np.cumsum(sizes)[:-1]), 2, whole.dtype)
    assert rows.shape == whole.shape and len(rows) == len(whole)
    np.testing.assert_array_equal(np.asarray(rows), whole)
    place = st.none() | st.integers(-9, 30)
    step = data.draw(st.none() | st.integers(-3, 3).filter(bool))
    chosen = slice(data.draw(place), data.draw(place), step)
    np.testing.assert_array_equal(rows[chosen], whole[chosen])
    if len(whole):
        numbers = data.draw(st.lists(st.integers(-len(whole), len(whole) - 1), max_size=9))
        np.testing.assert_array_equal(rows[np.array(numbers, int)], whole[np.array(numbers, int)])
        truths = np.array(data.draw(st.lists(st.booleans(), min_size=len(whole), max_size=len(whole))))
        np.testing.assert_array_equal(rows[truths], whole[truths])
        np.testing.assert_array_equal(rows[numbers[0] if numbers else 0], whole[numbers[0] if numbers else 0])
    with pytest.raises(IndexError):
        rows[len(whole)]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "unlabeled", *arguments], capture_output=True, text=True, env=environment
    )


def test_the_command(saved: Path, tile_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "table"
    done = run("embed", str(tile_folder), "--model", str(saved), "--out", str(out), "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["rows"] == 24 and result["bad_files"] == 0
    assert result["table"] == str(out) and result["images_per_second"] > 0
    assert "24/24" in done.stderr
    done = run("export", str(out), "--to", "csv", "--out", str(tmp_path / "a.csv"))
    assert done.returncode == 0 and len((tmp_path / "a.csv").read_text().splitlines()) == 25
    for arguments, message in (
        (["embed", str(tile_folder), "--model", "facebook/dinov2-smal", "--out", str(out)], "dinov2-small"),
        (["embed", str(tmp_path / "none"), "--model", str(saved), "--out", str(out)], "nothing at"),
        (["embed", str(tile_folder), "--model", str(saved), "--out", str(out), "--kind", "mean"], "kind"),
    ):
        done = run(*arguments)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, (
            done.stderr
        )
    assert len(open_table(out)) == 24


def test_fast_without_instructions_for_8_bits(
    saved: Path, tile_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 is faster there, and is used, with a word; a table begun in 8 bits elsewhere stays one of 8 bits."""
    from unlabeled.features import engines

    monkeypatch.setattr(engines, "has_8_bit_products", lambda: False)
    out = tmp_path / "table"
    arguments = [
        "embed",
        str(tile_folder),
        "--model",
        str(saved),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--fast",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "no instructions for 8 bits" in done.output
    header = json.loads((out / "table.json").read_text())
    assert header["identity"]["precision"] == "float32"
    header["identity"]["precision"] = "int8"
    (out / "table.json").write_text(json.dumps(header))
    wanted: list[bool] = []
    monkeypatch.setattr(embed_module, "embed", lambda *_, fast, **__: wanted.append(fast) or open_table(out))
    done = CliRunner().invoke(app, arguments)
    assert wanted == [True] and "no instructions for 8 bits" not in done.output


def test_names_that_users_import() -> None:
    assert unlabeled.embed is embed and unlabeled.FeatureTable is table_module.FeatureTable
    assert torch.get_num_threads() >= 1
    assert {"embed", "Extractor", "evaluate", "build_index"} <= set(
        dir(unlabeled)
    )  # as notebooks complete them
