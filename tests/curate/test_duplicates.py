"""Near-duplicates against brute force and plain loops."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from unlabeled.curate import duplicates, neighbours
from unlabeled.curate.blocks import Resources, Rows
from unlabeled.curate.duplicates import near_duplicates, representatives
from unlabeled.curate.neighbours import components, pairs_above
from unlabeled.errors import UserError

from .made import clustered, parts_of


def brute_force(vectors, threshold):
    return set(map(tuple, np.argwhere(np.triu(vectors @ vectors.T >= threshold, 1)).tolist()))


def all_pairs(stream):
    return [
        pair for pairs in stream for pair in zip(pairs.left_P.tolist(), pairs.right_P.tolist(), strict=True)
    ]


def greedy(vectors, component, quality, threshold):
    """The best image of each component is kept, what is near it is its copy, and so on with the rest."""
    representative = np.arange(len(vectors))
    left = set(range(len(vectors)))
    while left:
        best = min(left, key=lambda row: (-quality[row], row))
        near = {
            row
            for row in left
            if component[row] == component[best] and vectors[row] @ vectors[best] >= threshold
        }
        representative[list(near)] = best
        left -= near | {best}
    return representative


def test_few_pairs_are_those_of_brute_force():
    vectors, *_ = clustered(3000)
    assert sorted(all_pairs(pairs_above(vectors, 0.9))) == sorted(brute_force(vectors, 0.9))


def test_cells_find_the_recall_they_report():
    vectors, *_ = clustered(12000)
    true = brute_force(vectors, 0.9)
    found = all_pairs(pairs_above(vectors, 0.9))
    assert len(set(found)) == len(found)
    assert set(found) <= true
    with neighbours.prepared(vectors, 0.9, 0.99, Resources()) as (join, _):
        assert join.recall.pairs > 50
        assert join.recall.bound < len(found) / len(true)
    assert len(found) >= 0.97 * len(true)
    assert components(vectors, 0.9).compared < 0.2 * 12000**2 / 2


def test_all_pairs_within_half_the_distance():
    """With recall 1 a cell is probed wherever the geometry allows a pair, and none is missed."""
    vectors, *_ = clustered(9000, width=8)
    assert set(all_pairs(pairs_above(vectors, 0.95, recall=1))) == brute_force(vectors, 0.95)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_groups_are_those_of_a_plain_loop(dtype, tmp_path):
    vectors, *_ = clustered(2000, width=12, noise=0.3)
    np.save(tmp_path / "vectors.npy", 7 * vectors.astype(dtype))  # any length
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    quality = np.random.default_rng(1).integers(0, 9, 2000)
    found = near_duplicates(mapped, 0.85, quality)
    exact = Rows(mapped).between(0, 2000)
    sets = list(range(2000))
    for a, b in brute_force(exact, 0.85 - 1e-6):
        low, high = sorted((sets[a], sets[b]))
        sets = [low if label == high else label for label in sets]
    assert parts_of(found.component_N) == parts_of(sets)
    assert found.chained > 20
    assert (found.representative_N == greedy(exact, sets, quality, 0.85 - 1e-6)).all()
    copies = ~found.is_kept
    cosines = np.einsum("nd,nd->n", exact[copies], exact[found.representative_N[copies]])
    assert found.similarity_N[copies] == pytest.approx(cosines, abs=1e-5)
    assert found.similarity_N.min() >= 0.85 - 2e-6
    assert found.is_kept[found.representative_N].all()
    groups = list(found.groups())
    assert all(found.is_kept[group[0]] and not found.is_kept[group[1:]].any() for group in groups)
    assert sum(len(group) - 1 for group in groups) == copies.sum()


def test_a_chain_is_split():
    angles = np.arange(7) * np.pi / 18  # ten degrees apart
    vectors = np.stack((np.cos(angles), np.sin(angles)), 1).astype(np.float32)
    found = near_duplicates(vectors, np.cos(np.pi / 17), quality=[0, 5, 0, 0, 4, 0, 0])
    assert found.component_N.tolist() == [0] * 7
    assert found.representative_N.tolist() == [1, 1, 1, 4, 4, 4, 6]
    near = np.cos(np.pi / 18)
    assert found.similarity_N == pytest.approx([near, 1, near, near, 1, near, 1])


def test_long_chains_are_taken_in_blocks(monkeypatch):
    """More representatives than there are rounds: the same as a plain loop."""
    monkeypatch.setattr(duplicates, "TOGETHER", 16)
    angles = np.linspace(0, np.pi, 300)
    vectors = np.stack((np.cos(angles), np.sin(angles)), 1).astype(np.float32)
    quality = np.random.default_rng(0).permutation(300)
    found = near_duplicates(vectors, np.cos(0.05), quality)
    assert found.is_kept.sum() > 2 * duplicates.ROUNDS
    assert (found.representative_N == greedy(vectors, np.zeros(300), quality, np.cos(0.05) - 1e-6)).all()


def test_a_component_that_is_too_large_is_cut(monkeypatch):
    monkeypatch.setattr(duplicates, "LARGEST", 50)
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(200, 8)).astype(np.float32) + 3
    representative, similarity, cut = representatives(
        Rows(vectors), np.zeros(200, np.int64), np.zeros(200), 0.8, Resources()
    )
    assert cut == 1
    unit = Rows(vectors).between(0, 200)
    assert np.einsum("nd,nd->n", unit, unit[representative]) == pytest.approx(similarity, abs=1e-5)
    assert similarity.min() >= 0.8 - 1e-5


def test_thousands_of_copies_of_one_image_are_not_compared_with_each_other():
    vectors, *_ = clustered(12000)
    blank = np.flatnonzero(np.arange(12000) % 2)
    generator = np.random.default_rng(0)
    vectors[blank] = vectors[1] + 0.02 * generator.normal(size=(len(blank), 32)).astype(np.float32)
    begun = time.process_time()
    found = components(vectors, 0.9)
    spent = time.process_time() - begun
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    true = int(np.triu(unit @ unit.T >= 0.9, 1).sum())
    assert abs(found.pairs / true - 1) < 0.01
    assert (found.labels_N[blank] == found.labels_N[1]).all()
    assert spent < 60


def test_workers_do_not_matter():
    vectors, *_ = clustered(12000)
    first, *others = (near_duplicates(vectors, 0.9, resources=Resources(workers=n)) for n in (1, 2, 4))
    for other in others:
        assert (first.representative_N == other.representative_N).all()
        assert (first.similarity_N == other.similarity_N).all()
        assert (first.recall, first.pairs, first.compared) == (other.recall, other.pairs, other.compared)


KILLED = """
import sys
import numpy as np
from unlabeled.curate import neighbours
from unlabeled.curate.blocks import Resources
from unlabeled.curate.duplicates import near_duplicates
from pathlib import Path
vectors, work = np.load(sys.argv[1], mmap_mode="r"), Path(sys.argv[2])
near_duplicates(vectors, 0.9, resources=Resources(workers=1, work=work))
"""


def test_killed_and_run_again(tmp_path):
    vectors, *_ = clustered(12000)
    np.save(tmp_path / "vectors.npy", vectors)
    work = tmp_path / "work"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "vectors.npy"), str(work)]
    process = subprocess.Popen(command, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not list(work.glob("neighbours-*/connected-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in work.glob("neighbours-*/connected-*.npz")}
    assert done
    whole = near_duplicates(vectors, 0.9)
    resumed = near_duplicates(vectors, 0.9, resources=Resources(work=work))
    assert all(file.stat().st_mtime_ns == when for file, when in done.items())
    assert (whole.representative_N == resumed.representative_N).all()
    assert (whole.recall, whole.pairs) == (resumed.recall, resumed.pairs)


def test_work_of_another_input_is_not_taken(tmp_path):
    resources = Resources(work=tmp_path)
    first, second = clustered(2000, seed=1)[0], clustered(2000, seed=2)[0]
    near_duplicates(first, 0.9, resources=resources)
    again = near_duplicates(second, 0.9, resources=resources)
    assert (again.representative_N == near_duplicates(second, 0.9).representative_N).all()


def test_nothing_and_one():
    assert len(near_duplicates(np.empty((0, 4), np.float32), 0.9).representative_N) == 0
    assert near_duplicates(np.ones((1, 4), np.float32), 0.9).is_kept.all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 1.5}, "above 0 and up to 1"),
        ({"threshold": 0}, "above 0 and up to 1"),
        ({"recall": 2}, "recall is above 0"),
        ({"quality": [1, 2]}, "2 values of quality for 3 vectors"),
        ({"quality": [1, 2, np.nan]}, "quality of row 2"),
        ({"vectors": np.array([[0, 1], [np.nan, 0], [1, 0]], np.float32)}, "Row 1 of the vectors"),
        ({"resources": Resources(memory=100)}, "at least are needed"),
    ],
)
def test_mistakes_are_named(change, message):
    given = {"vectors": np.eye(3, dtype=np.float32), "threshold": 0.9} | change
    with pytest.raises(UserError, match=message):
        near_duplicates(given.pop("vectors"), given.pop("threshold"), **given)
