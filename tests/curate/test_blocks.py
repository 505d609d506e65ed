"""Rows of any matrix, and what a step may hold."""

import pickle
import threading

import numpy as np
import pytest

from unlabeled.curate.blocks import Resources, Rows, Threads, parse_bytes, spans
from unlabeled.errors import UserError
from unlabeled.features.table import ShardedRows


@pytest.mark.parametrize(
    ("text", "count"), [("4GB", 4 << 30), ("500 M", 500 << 20), ("1.5g", 3 << 29), ("7", 7), ("2KiB", 2048)]
)
def test_amounts_of_memory(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "4 XB", "four"])
def test_no_amounts_of_memory(text):
    with pytest.raises(UserError, match="amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_of_arrays_files_and_shards(dtype, tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 6)).astype(dtype)
    values[7] = 0
    unit = values.astype(np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-30)
    np.save(tmp_path / "all.npy", values)
    mapped = np.load(tmp_path / "all.npy", mmap_mode="r")
    shards = ShardedRows([mapped[:20], mapped[20:21], np.array(mapped[21:])], 6, np.dtype(dtype))
    some = np.array([49, 0, 20, 20, 7, 21])
    for vectors in (values, mapped, shards, mapped[:]):
        for rows in (Rows(vectors), pickle.loads(pickle.dumps(Rows(vectors)))):
            assert len(rows) == 50
            assert rows.between(15, 30) == pytest.approx(unit[15:30], abs=1e-6)
            rows.release()
            assert rows.at(some) == pytest.approx(unit[some], abs=1e-6)
            assert rows.fingerprint() == Rows(values).fingerprint()
    assert b"all.npy" in pickle.dumps(Rows(mapped))
    assert (Rows(values, unit=False).between(0, 50) == values).all()


def test_results_come_in_order_and_errors_as_they_are():
    assert list(Threads(3).map(lambda context, item: context * item, 2, range(20))) == list(range(0, 40, 2))

    def fails(_, item):
        if item == 5:
            raise UserError("five")
        return item

    with pytest.raises(UserError, match="five"):
        list(Threads(2).map(fails, None, range(20)))


def test_no_more_at_once_than_the_memory_holds():
    now, most, lock = 0, 0, threading.Lock()

    def work(_, item):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        threading.Event().wait(0.005)
        with lock:
            now -= 1

    list(Resources(workers=4, memory=1000).map(work, None, range(30), held=250))
    assert most <= 2
    most = 0
    list(Resources(workers=4, memory=1000).map(work, None, range(30), held=10))
    assert most == 4


def test_blocks_shrink_with_the_memory():
    assert Resources(memory=1 << 30).block_rows(1 << 10) == 65536
    assert Resources(memory=1 << 20).block_rows(1 << 10) == 128
    assert Resources(memory=1).block_rows(1 << 10) == 1


def test_spans():
    assert spans(5, 2) == [(0, 2), (2, 4), (4, 5)]
    assert spans(0, 2) == []
