"""Parquet files: columns, labels, reading in windows, broken and giant files."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unlabeled.errors import UserError
from unlabeled.images import parquet
from unlabeled.images.sources import Source, open_source


def test_parquet_columns_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    images = pa.array([b"1", None, b"3"])

    def opened(**columns: Any) -> Source:
        pq.write_table(pa.table(columns), path)
        return open_source(path)

    source = opened(
        audio=images, img=pa.array([b"a", b"b", None]), fine_label=[5, 0, 5], coarse_label=[1, 1, 1]
    )
    assert [source.read(index).data for index in range(3)] == [b"a", b"b", b""]
    assert source.labels().tolist() == [5, 0, 5] and len(source.class_names) == 6
    assert opened(photo=images).labels() is None
    assert opened(photo=images, label=[1, None, 2]).labels() is None
    assert opened(photo=images, label=[-1, -1, -1]).labels() is None
    assert opened(photo=images, label=[0.5, 1.5, 2.5]).labels() is None
    source = opened(photo=images, label=[10**12, 5, 10**12])
    assert source.labels().tolist() == [0, 1, 0] and source.class_names == ["1000000000000", "5"]
    with pytest.raises(
        UserError, match=r"x\.parquet has no column of encoded image bytes; it has path, label"
    ):
        opened(path=["a.jpg"], label=[1])
    with pytest.raises(UserError, match="holds no row"):
        opened(image=pa.array([], pa.binary()))


def test_parquet_that_only_names_files(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    rows = pa.array([{"bytes": None, "path": "a.jpg"}, {"bytes": None, "path": "gone.jpg"}])
    rows = rows.cast(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert source.read(0).data == b"a"
    with pytest.raises(OSError, match="gone"):
        source.read(1)


def test_parquet_row_groups_beyond_the_cache_are_read_in_a_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    images = [rng.bytes(1000) for _ in range(2000)]
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet", row_group_size=50)
    small = open_source(tmp_path / "x.parquet")
    assert small.block_starts is None and small.window is None
    monkeypatch.setattr(parquet, "CACHE_BYTES", 800_000)
    source = open_source(tmp_path / "x.parquet")
    assert source.block_starts.tolist() == list(range(0, 2000, 50)) and 256 <= source.window <= 400
    from unlabeled.images.order import ShuffledOrder

    reads = []
    read_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, *args, **more: reads.append(1) or read_group(self, *args, **more),
    )
    order = ShuffledOrder(len(source), 0, source.block_starts, source.window)
    for index in order.indices(np.arange(2000)):
        assert source.read(int(index)).data == images[index]
        assert source._cached_bytes <= 850_000
    assert len(reads) <= 60  # 40 row groups, and those that two windows share


def test_giant_row_groups_and_broken_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(2):
        pq.write_table(pa.table({"image": [bytes(500)] * 5}), folder / f"train-0000{number}.parquet")
    second = folder / "train-00001.parquet"
    whole = second.read_bytes()
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 100)
    with pytest.raises(UserError, match=r"row_group_size=100"):
        open_source(folder)
    monkeypatch.undo()
    for data in (b"no parquet", whole[: len(whole) // 2], b"", whole[:-20] + bytes(20)):
        second.write_bytes(data)
        with pytest.raises(UserError, match=r"train-00001\.parquet") as caught:
            open_source(folder)
        assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"picture": [b"x"]}), second)
    with pytest.raises(UserError, match=r"train-00001\.parquet has no column"):
        open_source(folder)


def test_damaged_row_groups_are_unreadable_images_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    images = [np.random.default_rng(0).bytes(2000) for _ in range(20)]
    pq.write_table(
        pa.table({"image": images}), path, row_group_size=10, compression="zstd", use_dictionary=False
    )
    source = open_source(path)
    data = bytearray(path.read_bytes())
    data[4:4000] = bytes(3996)
    path.write_bytes(bytes(data))
    with pytest.raises(OSError, match=r"x\.parquet"):
        source.read(0)
    assert source.read(15).data == images[15]
