"""The index against a sort of all cosines, changed in every way, stopped at every moment."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from unlabeled import FeatureTable, Index, UserError, build_index, open_index
from unlabeled.search import build, graph
from unlabeled.search import index as index_module

from .conftest import clustered, cosines, write_table

Make = Callable[..., FeatureTable]


def keys_by_sort(
    queries: np.ndarray, vectors: np.ndarray, k: int, allowed=lambda number: True
) -> list[list[str]]:
    numbers = np.array([number for number in range(len(vectors)) if allowed(number)], int)
    order = np.argsort(-cosines(queries, vectors[numbers]), axis=1)[:, :k]
    return [[f"{numbers[place]}.png" for place in line] for line in order]


def keys_of(hits: list) -> list[list[str]]:
    return [[hit.key for hit in found] for found in hits]


def share_found(found: list[list[str]], truth: list[list[str]]) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, truth, strict=True)]))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_exact_index_answers_as_a_plain_sort(make_table: Make, tmp_path: Path, dtype: type) -> None:
    vectors, queries = clustered(2500).astype(dtype), clustered(30, seed=1)
    index = build_index(make_table("table", vectors), tmp_path / "index")
    assert index.kind == "exact" and index.recall == 1 and len(index) == 2500
    hits = index.search(queries, k=7)
    assert keys_of(hits) == keys_by_sort(queries, vectors, 7)
    assert [hit.rank for hit in hits[3]] == [1, 2, 3, 4, 5, 6, 7]
    expected = -np.sort(-cosines(queries, vectors), axis=1)[:, :7]
    np.testing.assert_allclose([[hit.similarity for hit in found] for found in hits], expected, atol=2e-6)
    assert index.search(queries[3], k=7) == hits[3]
    nearest = index.nearest(queries, k=7)
    assert [[index.row(row)["key"] for row in line] for line in nearest.rows.tolist()] == keys_of(hits)
    assert len(index.search(vectors[0].astype(np.float32), k=2500)) == 2500


CONDITIONS = {
    "width < 50": lambda number: number % 100 < 50,
    "width < 8": lambda number: number % 100 < 8,
    "width = 3": lambda number: number % 100 == 3,
    "label IN ('1', '2')": lambda number: number % 7 in (1, 2),
    "key = '77.png'": lambda number: number == 77,
    "width < 0": lambda number: False,
}


@pytest.mark.parametrize(("choice", "walk"), [("exact", 0), ("approximate", 0), ("approximate", 100)])
def test_conditions_leave_the_nearest_that_meet_them(
    make_table: Make, tmp_path: Path, choice, walk: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "WALK", walk)  # 0: exact search is never the faster way
    vectors, queries = clustered(4000), clustered(40, seed=1)
    index = build_index(make_table("table", vectors), tmp_path / "index", choice=choice, recall=0.98)
    for where, allowed in CONDITIONS.items():
        found = keys_of(index.search(queries, k=6, where=where))
        truth = keys_by_sort(queries, vectors, 6, allowed)
        assert all(allowed(int(key.split(".")[0])) for line in found for key in line), where
        assert [len(line) for line in found] == [len(line) for line in truth]
        if choice == "exact":
            assert found == truth
        elif truth[0]:
            assert share_found(found, truth) > 0.95, where


def test_a_condition_that_is_met_far_away_only(
    make_table: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "WALK", 0)
    vectors = np.concatenate((clustered(1500), -20 * np.abs(clustered(1500, seed=2))))
    queries = np.abs(clustered(20, seed=1))
    index = build_index(make_table("table", vectors), tmp_path / "index", choice="approximate")
    found = keys_of(index.search(queries, k=5, where='"index" >= 1500'))
    truth = keys_by_sort(queries, vectors, 5, lambda number: number >= 1500)
    assert share_found(found, truth) > 0.98  # float16 mistakes a near tie now and then


def test_an_approximate_index_knows_its_recall(make_table: Make, tmp_path: Path) -> None:
    vectors, queries = clustered(30_000, 32), clustered(500, 32, seed=1)
    table = make_table("table", vectors)
    index = build_index(table, tmp_path / "index", choice="approximate", recall=0.9)
    truth = keys_by_sort(queries, vectors, 10)
    for recall in (None, 0.8, 0.99):
        wanted = index.recall if recall is None else recall
        assert share_found(keys_of(index.search(queries, k=10, recall=recall)), truth) > wanted - 0.02
    assert share_found(keys_of(index.search(queries, k=60)), keys_by_sort(queries, vectors, 60)) > 0.88
    curve = index.now.manifest.curve
    assert {point["images"] for point in curve} == {min(1000, len(index) // 10)}
    assert curve == sorted(curve, key=lambda point: point["effort"]) and curve[-1]["recall"] > 0.99
    best = index.nearest(queries, 10, recall=0.99).similarities[:, 0]
    assert np.isclose(best, cosines(queries, vectors).max(1), atol=2e-4).mean() > 0.98
    with pytest.raises(UserError, match=r"reaches a recall of .*, not 1; ask for"):
        index.search(queries[0], recall=1.0 if curve[-1]["recall"] < 1 else 2)


def test_the_measured_recall_is_what_a_loop_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = clustered(3000), clustered(50, seed=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    held = graph.grow(None, [vectors], 24, len(vectors))
    monkeypatch.setattr(graph, "EFFORTS", (10, 12, 300))
    monkeypatch.setattr(graph, "PERFECT", 2)
    curve = graph.measure(held, queries)
    for point, effort in zip(curve, (10, 12, 300), strict=True):
        hits = 0
        for query in queries:
            truth = set(np.argsort(-held.vectors.astype(np.float64) @ query)[:10].tolist())
            parameters = faiss.SearchParametersHNSW(efSearch=effort)
            hits += len(truth & set(held.index.search(query[None], 10, params=parameters)[1][0].tolist()))
        assert point == {"effort": effort, "recall": round(hits / 500, 4), "images": 50}


def test_size_chooses_the_kind_and_growth_changes_it(
    make_table: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "EXACT_LIMIT", 1500)
    vectors, queries = clustered(3000), clustered(40, seed=1)
    index = build_index(make_table("a", vectors[:1200]), tmp_path / "index", recall=0.97)
    assert index.kind == "exact"
    index.delete('"index" < 100')
    assert index.add(make_table("b", vectors[1200:], first=1200)) == 1800
    assert index.kind == "approximate" and len(index) == 2900
    assert {file.name.split("-")[0] for file in index.path.iterdir()} == {
        ".lock",
        "index.json",
        "rows",
        "graph",
    }
    truth = keys_by_sort(queries, vectors, 5, lambda number: number >= 100)
    assert share_found(keys_of(index.search(queries, k=5)), truth) > 0.94
    index.rebuild(choice="exact")
    assert index.kind == "exact" and index.now.vectors.dtype == np.float32
    assert share_found(keys_of(index.search(queries, k=5)), truth) > 0.99  # by float16 vectors
    asked = build_index(make_table("c", vectors[:2000]), tmp_path / "exact", choice="exact")
    assert asked.kind == "exact"


class Changes(RuleBasedStateMachine):
    """Any order of additions, deletions and rebuilds, beside a dict of what should be there."""

    @initialize(approximate=st.booleans())
    def begin(self, approximate: bool) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.number = 0
        self.held: dict[int, np.ndarray] = {}
        table = self.table(0, 150)
        choice = "approximate" if approximate else "exact"
        self.index = build_index(table, self.path / "index", choice=choice)

    def table(self, first: int, count: int) -> FeatureTable:
        self.number += 1
        vectors = clustered(count, 8, seed=self.number)
        self.held |= dict(zip(range(first, first + count), vectors, strict=True))
        # Other hashes at numbers that are there: those images have changed.
        return write_table(self.path / f"t{self.number}", vectors, first=first, hashes=str(self.number))

    @rule(first=st.integers(0, 400), count=st.integers(1, 60))
    def add(self, first: int, count: int) -> None:
        assert self.index.add(self.table(first, count)) == count
        assert self.index.add(self.path / f"t{self.number}") == 0

    @rule(width=st.integers(0, 99))
    def delete(self, width: int) -> None:
        gone = [number for number in self.held if number % 100 == width]
        assert self.index.delete(f"width = {width}") == len(gone)
        self.held = {number: vector for number, vector in self.held.items() if number not in gone}

    @precondition(lambda self: len(self.held) >= 100)
    @rule()
    def rebuild(self) -> None:
        self.index.rebuild()
        assert len(self.index.now.rows) == len(self.held) and self.index.now.alive is None

    @invariant()
    def what_is_there_is_found(self) -> None:
        for index in (self.index, Index(self.index.path)):
            assert len(index) == len(self.held)
            numbers = sorted(self.held)
            vectors = np.stack([self.held[number] for number in numbers])
            found = index.nearest(vectors, 1)
            keys = index.now.rows.column("key").take(found.rows[:, 0].tolist()).to_pylist()
            right = np.mean([key == f"{number}.png" for key, number in zip(keys, numbers, strict=True)])
            assert right == 1 if index.kind == "exact" else right > 0.97
            everything = index.nearest(vectors[:1], len(index)).rows[0]
            keys = index.now.rows.column("key").take(everything[everything >= 0].tolist()).to_pylist()
            assert sorted(keys) == sorted(f"{number}.png" for number in numbers)

    def teardown(self) -> None:
        self.folder.cleanup()


TestChanges = Changes.TestCase
TestChanges.settings = settings(max_examples=12, stateful_step_count=6, deadline=None)

KILLED = """
import os, sys
from unlabeled import open_index
from unlabeled.search import build, index
path, more = sys.argv[1:3]
def run(moment):
    count, replace = 0, os.replace
    def counted(old, new):
        nonlocal count
        if count == moment:
            os.kill(os.getpid(), 9)
        count += 1
        replace(old, new)
        if count == moment and moment % 2:
            os.kill(os.getpid(), 9)
    os.replace = counted
    held = open_index(f"{path}{moment}")
    held.add(more)
    held.delete("label = '2'")
for moment in range(8):
    child = os.fork()
    if not child:
        try:
            run(moment)
        finally:
            os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize("choice", ["exact", "approximate"])
def test_killed_at_any_moment_the_index_is_whole(make_table: Make, tmp_path: Path, choice) -> None:
    vectors = clustered(400)
    index = build_index(make_table("a", vectors[:300]), tmp_path / "index", choice=choice)
    more = make_table("b", vectors[300:], first=300)
    before = keys_of(index.search(vectors[:50], k=3))
    for moment in range(8):
        shutil.copytree(index.path, tmp_path / f"copy{moment}")
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "copy"), str(more.path)]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, check=True, text=True)
    endings = [int(line) for line in done.stdout.split()]
    assert set(endings) == {0, signal.SIGKILL} and endings[0] == signal.SIGKILL
    sizes = []
    for moment in range(8):
        opened = open_index(tmp_path / f"copy{moment}")
        sizes.append(len(opened))
        if sizes[-1] == 300:
            assert keys_of(opened.search(vectors[:50], k=3)) == before
        opened.rebuild()  # what was half written goes
        kept = {".lock", "index.json"} | opened.now.manifest.files
        assert {file.name for file in opened.path.iterdir()} == kept
    assert set(sizes) == {300, 400, 343} and sorted(sizes, key=[300, 400, 343].index) == sizes


READER = """
import sys, time
import numpy as np
from unlabeled import open_index
queries = np.load(sys.argv[2])
sizes, rounds, begun = set(), 0, time.monotonic()
while (len(sizes) < 8 or rounds < 20) and time.monotonic() - begun < 100:
    index = open_index(sys.argv[1])
    hits = index.search(queries, k=3)
    assert all(hit[0].similarity > 0.999 and len(hit) == 3 for hit in hits)
    sizes.add(len(index))
    rounds += 1
print(len(sizes))
"""


@pytest.mark.parametrize("choice", ["exact", "approximate"])
def test_two_readers_and_a_writer(make_table: Make, tmp_path: Path, choice) -> None:
    vectors = clustered(2000)
    index = build_index(make_table("a", vectors[:500]), tmp_path / "index", choice=choice)
    held = open_index(index.path)
    np.save(tmp_path / "queries.npy", vectors[:20])
    arguments = [sys.executable, "-c", READER, str(index.path), str(tmp_path / "queries.npy")]
    readers = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    changes = 0
    while any(reader.poll() is None for reader in readers):
        first = 500 + 10 * changes % 1400
        index.add(
            write_table(
                tmp_path / f"t{changes}", vectors[first : first + 10], first=first, hashes=str(changes)
            )
        )
        if changes % 15 == 14:
            index.delete('"index" >= 1000')
        changes += 1
        if changes % 10 == 0 and len(index) > 100:
            index.rebuild()
    sizes = [int(reader.communicate()[0]) for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0] and min(sizes) >= 8
    assert len(held) == 500 and held.search(vectors[0], k=1)[0].similarity > 0.999  # as it was opened
    held.refresh()
    assert len(held) == len(index)


def test_writers_wait_for_each_other(make_table: Make, tmp_path: Path) -> None:
    vectors = clustered(600)
    build_index(make_table("a", vectors[:100]), tmp_path / "index")
    tables = [
        make_table(f"t{n}", vectors[100 + 50 * n : 150 + 50 * n], first=100 + 50 * n) for n in range(10)
    ]
    threads = [threading.Thread(target=lambda t=t: open_index(tmp_path / "index").add(t)) for t in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index = open_index(tmp_path / "index")
    assert keys_of(index.search(vectors, k=1)) == [[f"{n}.png"] for n in range(600)]


@pytest.mark.parametrize("choice", ["exact", "approximate"])
def test_duplicates_are_the_components_of_a_loop(make_table: Make, tmp_path: Path, choice) -> None:
    generator = np.random.default_rng(3)
    vectors = generator.standard_normal((300, 24)).astype(np.float32)
    for number in range(60):  # copies of copies, in groups of all sizes
        vectors[240 + number] = vectors[
            number // 4 if number < 40 else 200 + number
        ] + 0.1 * generator.standard_normal(24)
    vectors[100:140] = vectors[100] * generator.uniform(1, 2, (40, 1))  # the same direction, forty times
    vectors = vectors[generator.permutation(300)]
    index = build_index(make_table("a", vectors), tmp_path / "index", choice=choice)
    index.delete("label = '3'")
    keep = [number for number in range(300) if number % 7 != 3]
    similar = cosines(vectors, vectors) >= 0.98 - 1e-6
    expected, left = [], set(keep)
    while left:
        group, waiting = set(), {left.pop()}
        while waiting:
            number = waiting.pop()
            group.add(number)
            near = {other for other in left if similar[number, other]}
            left -= near
            waiting |= near
        if len(group) > 1:
            expected.append({f"{number}.png" for number in group})
    found = index.duplicates(0.98)
    assert sorted(map(sorted, expected)) == sorted(sorted(group.keys) for group in found)
    assert [len(group.keys) for group in found] == sorted(map(len, expected), reverse=True)
    for group in found:
        numbers = [int(key.split(".")[0]) for key in group.keys]
        np.testing.assert_allclose(
            group.similarities, cosines(vectors[numbers[:1]], vectors[numbers])[0], atol=1e-3
        )
    same = index.duplicates(1.0)
    assert len(same) == 1 and len(same[0].keys) >= 30
    assert index.duplicates(0.98, where="label = '1'") == [] or all(
        int(key.split(".")[0]) % 7 == 1
        for group in index.duplicates(0.98, where="label = '1'")
        for key in group.keys
    )


def test_a_full_disk_leaves_the_index_as_it_was(
    make_table: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = clustered(400)
    for choice in ("exact", "approximate"):
        index = build_index(make_table(f"a{choice}", vectors[:300]), tmp_path / choice, choice=choice)
        more = make_table(f"b{choice}", vectors[300:], first=300)
        names = sorted(os.listdir(index.path))  # noqa: PTH208
        code = (
            "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "from unlabeled import open_index, UserError\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
            "try:\n    open_index(sys.argv[1]).add(sys.argv[2])\nexcept UserError as error:\n    print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(index.path), str(more.path)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert (
            "cannot be written" in done.stdout
            and str(index.path) in done.stdout
            and done.stdout.count("\n") == 1
        )
        assert sorted(os.listdir(index.path)) == names  # noqa: PTH208
        assert len(open_index(index.path)) == 300


def test_bad_use_is_one_line(make_table: Make, tmp_path: Path) -> None:
    vectors = clustered(120)
    table = make_table("table", vectors)
    index = build_index(table, tmp_path / "index")
    for given, said in (
        (lambda: index.search(vectors[0], k=0), "k is 1 to 120"),
        (lambda: index.search(vectors[0], k=121), "k is 1 to 120.*not 121"),
        (lambda: index.search(vectors[0, :5]), r"are \(B, 24\), not \(1, 5\)"),
        (lambda: index.search(np.zeros(24)), "length 0"),
        (lambda: index.search(np.full(24, np.nan)), "not finite"),
        (lambda: index.search(vectors[0], where="nothing = 3"), "nothing"),
        (lambda: index.search(vectors[0], recall=1.5), "above 0 and up to 1"),
        (lambda: index.search("image.png"), "a model that was made in memory"),
        (lambda: index.add(make_table("other", vectors, layer=5)), "have layer 1, .* 5"),
        (
            lambda: index.add(make_table("model", vectors, model={"name": "b", "weights": "1" * 64})),
            "other weights",
        ),
        (lambda: index.delete("true"), "would delete all 120 images"),
        (lambda: index.duplicates(1.5), "up to 1, not 1.5"),
        (lambda: build_index(table, tmp_path / "index"), "is an index already"),
        (lambda: build_index(table, table.path), "is no index; choose another"),
        (lambda: build_index(table, tmp_path / "x", recall=0), "above 0"),
        (lambda: build_index(table, tmp_path / "x", choice="fast"), "auto, exact, approximate; not fast"),
        (
            lambda: build_index(make_table("few", vectors[:99]), tmp_path / "x", choice="approximate"),
            "100 images",
        ),
        (lambda: build_index(make_table("none", vectors[:0]), tmp_path / "x"), "holds no images"),
        (lambda: build_index(make_table("zero", 0 * vectors), tmp_path / "x"), "features of 0.png .* zero"),
        (
            lambda: build_index(make_table("grid", vectors, kind="patches"), tmp_path / "x"),
            r"holds grids \(patches\)",
        ),
        (lambda: open_index(tmp_path / "nowhere"), "is no index"),
        (lambda: open_index(table.path), "is no index"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            given()
        assert "\n" not in str(caught.value)
    assert len(open_index(tmp_path / "index")) == 120
    assert not (tmp_path / "x" / "index.json").exists()


@pytest.mark.parametrize("choice", ["exact", "approximate"])
def test_damage_is_said(make_table: Make, tmp_path: Path, choice) -> None:
    index = build_index(make_table("table", clustered(200)), tmp_path / "index", choice=choice)
    for file in sorted(index.path.iterdir()):
        if file.name == ".lock":
            continue
        whole = file.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], b"x" * len(whole)):
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=f"{file.name}.*again") as caught:
                open_index(index.path)
            assert "\n" not in str(caught.value)
        file.unlink()
        with pytest.raises(UserError):
            open_index(index.path)
        file.write_bytes(whole)
    assert len(open_index(index.path)) == 200
