"""Folders and lists: paths, labels, links, and how little an index takes."""

import os
import pickle
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlabeled.errors import UserError
from unlabeled.images.files import MAX_BYTES, FileSource, PathTable
from unlabeled.images.sources import number_classes, open_source


def test_labels_need_two_class_folders_and_no_image_above_them(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.jpg").write_bytes(b"x")
    assert open_source(tmp_path).labels() is None
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "b.PNG").write_bytes(b"y")
    assert open_source(tmp_path).class_names == ["one", "two"]
    (tmp_path / "c.jpeg").write_bytes(b"z")
    source = open_source(tmp_path)
    assert source.labels() is None and source.class_names is None
    assert [source.read(index).key for index in range(3)] == ["c.jpeg", "one/a.jpg", "two/b.PNG"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    photos, other = tmp_path / "photos", tmp_path / "other"
    (photos / "a").mkdir(parents=True)
    other.mkdir()
    (photos / "a" / "1.jpg").write_bytes(b"1")
    (other / "2.jpg").write_bytes(b"2")
    (photos / "b").symlink_to(other)
    (photos / "a" / "up").symlink_to(photos)
    (photos / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    source = open_source(photos)
    assert [source.paths[index] for index in range(len(source))] == ["a/1.jpg", "b/2.jpg", "gone.jpg"]
    with pytest.raises(OSError, match="gone"):
        source.read(2)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take only UTF-8 names")
def test_pipes_devices_and_endless_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # of no blocks
    source = open_source(tmp_path)
    reasons = {"large.jpg": "too large", "pipe.jpg": "no regular file", "zero.jpg": "no regular file"}
    for index, reason in enumerate(reasons.values()):
        with pytest.raises(OSError, match=reason):
            source.read(index)
    assert list(source.paths) == list(reasons)  # type: ignore[attr-defined]


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg"
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:  # noqa: PTH118, PTH123
        file.write(b"data")
    sample = open_source(tmp_path).read(0)
    assert sample.data == b"data" and sample.key == "caf\\xe9.jpg"
    (tmp_path / "list.txt").write_bytes(name + b"\n")
    assert open_source(tmp_path / "list.txt").read(0).data == b"data"


def test_single_files_and_globs_of_images(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.jpg", "c.png"):
        (tmp_path / name).write_bytes(name.encode())
    source = open_source(f"{tmp_path}/*.jpg")
    assert [source.read(index).data for index in range(len(source))] == [b"a.jpg", b"b.jpg"]
    assert open_source(tmp_path / "c.png").read(0).data == b"c.png"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), max_size=300
    )
)
def test_path_table(paths: list[str]) -> None:
    paths_held = PathTable(paths)
    assert len(paths_held) == len(paths)
    assert [paths_held[index] for index in range(len(paths))] == paths
    assert [paths_held[index] for index in reversed(range(len(paths)))] == paths[::-1]
    with pytest.raises(IndexError):
        paths_held[len(paths)]


def hashes(count: int) -> list[str]:
    digits = np.random.default_rng(0).bytes(32 * count).hex()
    return sorted(digits[64 * number : 64 * number + 64] for number in range(count))


@pytest.mark.parametrize(
    ("names", "most"),
    [
        ([f"{number // 1000:04d}/IMG_{number:08d}.jpg" for number in range(200_000)], 16),
        ([f"{name[:2]}/{name}.jpg" for name in hashes(200_000)], 64),
        ([f"scene_{number:07d}/camera/left/rgb.png" for number in range(200_000)], 16),
    ],
    ids=["numbered", "hashes", "a folder each"],
)
def test_a_path_takes_at_most_64_bytes(names: list[str], most: int) -> None:
    entries = ((name, name.split("/")[0]) for name in names)
    if names[0].startswith("scene"):
        entries = ((name, None) for name in names)
    tracemalloc.start()
    source = FileSource("x", "/", entries)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / len(names) <= most
    assert peak / len(names) <= 2 * most + 16
    assert len(pickle.dumps(source)) / len(names) <= most
    for index in (0, 63, 64, 99_999, 199_999):
        assert source.paths[index] == names[index]


def test_a_folder_of_many_files_is_listed_in_little_memory(tmp_path: Path) -> None:
    for folder in range(20):
        (tmp_path / f"{folder:02d}").mkdir()
        for number in range(500):
            (tmp_path / f"{folder:02d}" / f"image-{number:06d}.jpg").touch()
    tracemalloc.start()
    source = open_source(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 10_000 and held / 10_000 <= 64
    assert np.bincount(source.labels()).tolist() == [500] * 20


def test_lists_are_relative_to_themselves_or_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "lists").mkdir()
    (tmp_path / "here" / "a.jpg").write_bytes(b"here")
    (tmp_path / "lists" / "list.txt").write_text("a.jpg\n")
    with pytest.raises(UserError, match=r"lists a\.jpg first, which does not exist"):
        open_source(tmp_path / "lists" / "list.txt")
    monkeypatch.chdir(tmp_path / "here")
    source = open_source("../lists/list.txt")
    monkeypatch.chdir(tmp_path)
    assert source.read(0).data == b"here"
    (tmp_path / "lists" / "a.jpg").write_bytes(b"beside")
    monkeypatch.chdir(tmp_path / "here")
    assert open_source("../lists/list.txt").read(0).data == b"beside"
    (tmp_path / "lists" / "list.txt").write_text(f"\ufeff{tmp_path}/here/a.jpg\r\n\r\n", encoding="utf-8")
    source = open_source("../lists/list.txt")
    assert len(source) == 1 and source.read(0).data == b"here"


def test_csv_columns_and_labels(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    path = tmp_path / "list.csv"
    path.write_text("label,filename\n3,a.jpg\n10,b.jpg\n3,c.jpg\n")
    source = open_source(path)
    assert source.labels().tolist() == [3, 10, 3] and source.class_names == [
        str(number) for number in range(11)
    ]
    path.write_text("filename,label\na.jpg,cat\nb.jpg\n")
    assert open_source(path).labels() is None
    path.write_text("name,size\na.jpg,3\n")
    with pytest.raises(UserError, match=r"no column path .* it has name, size"):
        open_source(path)
    path.write_text("path\n")
    with pytest.raises(UserError, match="lists no image"):
        open_source(path)


def test_numbers_stay_numbers_and_names_are_sorted() -> None:
    assert number_classes(["10", "9"]) == ([str(number) for number in range(11)], [10, 9])
    assert number_classes(["b", "10", "a"]) == (["10", "a", "b"], [2, 0, 1])
    assert number_classes(["007", "7"]) == (["007", "7"], [0, 1])
    assert number_classes(["99999999999"]) == (["99999999999"], [0])
