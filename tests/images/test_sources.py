"""Every kind of source gives the same images for the same content, holds little, and says what is wrong."""

import csv
import io
import itertools
import json
import multiprocessing
import os
import pickle
import sys
import tarfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unlabeled.errors import UserError
from unlabeled.images import parquet
from unlabeled.images.files import FileSource, PathTable
from unlabeled.images.sources import Source, number_classes, open_source
from unlabeled.images.tar import TarSource

CLASSES = ("aigu\u00eb \u9c7c", "tench", "zebra")
LONG = "a-rather-long-name-" * 8  # more than the 100 bytes of a tar header


def jpeg(number: int) -> bytes:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


# Eleven images of three classes: (class, name, bytes), in the order of their paths.
CONTENT = [
    (name, f"{number:02d}-{LONG if number == 5 else ''}\u00fc\U0001f41f.jpg", jpeg(number))
    for number, name in enumerate(sorted(CLASSES[number % 3] for number in range(11)))
]
LABELS = [CLASSES.index(name) for name, _, _ in CONTENT]


def in_folder(base: Path) -> str:
    for name, file_name, data in reversed(CONTENT):
        (base / "photos" / name / "deeper").mkdir(parents=True, exist_ok=True)
        (base / "photos" / name / "deeper" / file_name).write_bytes(data)
    (base / "photos" / "readme.txt").write_text("not an image")
    (base / "photos" / ".hidden.jpg").write_bytes(b"")
    return str(base / "photos")


def tar_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_tar(path: Path, content: list[tuple[str, str, bytes]], kind: int, label: str) -> None:
    with tarfile.open(path, "w", format=kind) as archive:
        folder = tarfile.TarInfo("train")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, file_name, data in content:
            stem = f"train/{file_name.removesuffix('.jpg')}"
            note = name.encode() if label == "cls" else json.dumps({"label": name, "width": 7}).encode()
            if label == "cls":
                tar_member(archive, f"{stem}.cls", note)
            tar_member(archive, f"{stem}.jpg", data)
            tar_member(archive, f"{stem}.caption.txt", b"a caption")
            if label == "json":
                tar_member(archive, f"{stem}.json", note)


def in_tar(base: Path, kind: int = tarfile.PAX_FORMAT, label: str = "cls") -> str:
    folder = base / f"shards-{kind}-{label}"
    folder.mkdir()
    write_tar(folder / "000.tar", CONTENT[:4], kind, label)
    write_tar(folder / "001.tar", [], kind, label)
    write_tar(folder / "002.tar", CONTENT[4:], kind, label)
    return str(folder)


def table(content: list[tuple[str, str, bytes]], labels: list[int], image: str = "image") -> pa.Table:
    features = {
        "id": {"dtype": "int64", "_type": "Value"},
        "thumbnail": {"dtype": "binary", "_type": "Value"},
        image: {"_type": "Image"},
        "label": {"names": list(CLASSES), "_type": "ClassLabel"},
    }
    names = {"info": {"features": features}}
    return pa.table(
        {
            "id": pa.array(range(len(content))),
            "thumbnail": pa.array([b"no"] * len(content)),
            image: pa.array([{"bytes": data, "path": name} for _, name, data in content]),
            "label": pa.array(labels),
        }
    ).replace_schema_metadata({"huggingface": json.dumps(names)})


def in_parquet(base: Path) -> str:
    folder = base / "parquet"
    folder.mkdir()
    pq.write_table(table(CONTENT[:6], LABELS[:6]), folder / "train-00000.parquet", row_group_size=4)
    pq.write_table(table(CONTENT[6:], LABELS[6:]), folder / "train-00001.parquet", row_group_size=2)
    return str(folder)


def in_binary_parquet(base: Path) -> str:
    columns = {
        "jpg": pa.array([data for _, _, data in CONTENT], pa.large_binary()),
        "class": pa.array([name for name, _, _ in CONTENT]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), base / "binary.parquet", row_group_size=3)
    return str(base / "binary.parquet")


def in_csv(base: Path) -> str:
    in_folder(base)
    with (base / "list.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "Path", "label"])
        for number, (name, file_name, _) in enumerate(CONTENT):
            writer.writerow([number, f"photos/{name}/deeper/{file_name}", name])
    return str(base / "list.csv")


def in_list(base: Path) -> str:
    folder = Path(in_folder(base))
    lines = [f"{folder.name}/{name}/deeper/{file_name}\n" for name, file_name, _ in CONTENT]
    (base / "list.txt").write_text("".join(lines) + "\n", encoding="utf-8")
    return str(base / "list.txt")


def in_hugging_face(base: Path) -> str:
    pytest.importorskip("datasets")
    return f"hf:{in_parquet(base)}"


def in_saved_data_set(base: Path) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {"img": [{"bytes": data, "path": None} for _, _, data in CONTENT], "label": LABELS}
    split = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"validation": split}).save_to_disk(str(base / "saved"))
    return f"hf:{base / 'saved'}:validation"


KINDS = {
    "folder": in_folder,
    "pax tar, .cls": in_tar,
    "gnu tar, .json": lambda base: in_tar(base, tarfile.GNU_FORMAT, "json"),
    "glob of tar": lambda base: in_tar(base) + "/*.tar",
    "range of tar": lambda base: in_tar(base) + "/{000..002}.tar",
    "folder of Parquet": in_parquet,
    "glob of Parquet": lambda base: in_parquet(base) + "/train-*.parquet",
    "Parquet of bytes": in_binary_parquet,
    "CSV": in_csv,
    "list": in_list,
    "hf: folder": in_hugging_face,
    "hf: saved": in_saved_data_set,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_images(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = open_source(KINDS[kind](tmp_path))
    for opened in (source, pickle.loads(pickle.dumps(source))):
        assert len(opened) == 11
        samples = [opened.read(index) for index in range(11)]
        assert [sample.data for sample in samples] == [data for _, _, data in CONTENT]
        assert len({sample.key for sample in samples}) == 11
        if kind == "list":
            assert opened.labels() is None and opened.class_names is None
        else:
            labels = opened.labels()
            assert labels is not None and labels.dtype == np.int64 and labels.tolist() == LABELS
            assert [sample.label for sample in samples] == LABELS
            assert opened.class_names == list(CLASSES)
        if kind not in ("Parquet of bytes", "hf: saved"):
            for sample, (_, name, _) in zip(samples, CONTENT, strict=True):
                assert Path(sample.key).name == name
        starts = opened.block_starts
        if starts is not None:
            assert starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < 11
    source.read(3)
    pickle.loads(pickle.dumps(source)).read(3)  # a handle that is open stays behind


def read_in_worker(arguments: tuple[Source, int]) -> bytes:
    source, index = arguments
    return source.read(index).data


@pytest.mark.parametrize("kind", ["folder", "pax tar, .cls", "folder of Parquet"])
def test_threads_and_forked_workers_do_not_disturb_each_other(kind: str, tmp_path: Path) -> None:
    source = open_source(KINDS[kind](tmp_path))
    source.read(0)  # opened before the fork: descriptors are shared
    indices = list(np.random.default_rng(0).integers(0, 11, 300))
    expected = [CONTENT[index][2] for index in indices]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda index: source.read(int(index)).data, indices)) == expected
    if sys.platform != "linux":
        return
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def work() -> None:
        good = all(
            source.read(int(index)).data == data
            for index, data in zip(indices * 5, expected * 5, strict=True)
        )
        queue.put(good)

    workers = [context.Process(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert all(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()


# Folders


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


# Lists


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


# Tar


def reference_members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive if member.isfile()]


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(
        st.text(st.sampled_from("ab/\u00fc\u9c7c -_0"), min_size=1, max_size=180),
        min_size=1,
        max_size=8,
        unique=True,
    ),
    kind=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_tar_names_are_those_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], kind: int
) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    with tarfile.open(path, "w", format=kind) as archive:
        for number, name in enumerate(names):
            tar_member(archive, f"{name.strip('/')}x.jpg", bytes([number]) * (number * 300))
    source = TarSource("x", [path])
    found = [
        (source.read(index).key.removeprefix("x.tar/"), source.read(index).data)
        for index in range(len(source))
    ]
    assert found == reference_members(path)


def test_tar_with_links_folders_ustar_prefixes_and_hidden_files(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        tar_member(archive, "d" * 90 + "/" + "n" * 80 + ".jpg", b"prefix")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname = kind, "elsewhere.jpg"
            archive.addfile(link)
        tar_member(archive, "._hidden.jpg", b"hidden")
        tar_member(archive, "plain.JPG", b"plain")
        tar_member(archive, "two.left.jpg", b"left")
        tar_member(archive, "two.right.png", b"right")
        tar_member(archive, "empty.jpg", b"")
    source = open_source(path)
    assert [source.read(index).data for index in range(len(source))] == [
        b"prefix",
        b"plain",
        b"left",
        b"right",
        b"",
    ]
    assert source.read(0).key == "x.tar/" + "d" * 90 + "/" + "n" * 80 + ".jpg"
    assert source.labels() is None


def test_tar_labels_keep_their_numbers_and_need_every_sample(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate((7, 2, 7)):
            tar_member(archive, f"{number}.jpg", b"x")
            tar_member(archive, f"{number}.cls", b"%d\n" % label)
    assert open_source(path).labels().tolist() == [7, 2, 7]
    with tarfile.open(path, "a") as archive:
        tar_member(archive, "other.jpg", b"x")
    assert open_source(path).labels() is None


def test_a_tar_index_takes_at_most_64_bytes_and_reads_no_data(tmp_path: Path) -> None:
    path, count = tmp_path / "x.tar", 20_000
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in range(count):
            tar_member(archive, f"{number:08d}.jpg", b"x")
    tracemalloc.start()
    source = open_source(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count and held / count <= 64
    assert source.block_starts is not None and source.block_starts[:2].tolist() == [0, 256]
    hole = tmp_path / "hole.tar"  # a member of 8 GB that takes no space: skipped, not read
    with tarfile.open(hole, "w", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo("video.mp4")
        member.size = 2**33 + 5
        head = member.tobuf(tarfile.GNU_FORMAT)
    tail = tarfile.TarInfo("last.jpg")
    tail.size = 3
    with hole.open("wb") as file:
        file.write(head)
        file.seek(512 + 2**33 + 512)
        file.write(tail.tobuf() + b"abc" + bytes(509 + 1024))
    start = time.process_time()
    assert open_source(hole).read(0).data == b"abc"
    assert time.process_time() - start < 5


def test_broken_tars_are_named(tmp_path: Path) -> None:
    folder = Path(in_tar(tmp_path))
    whole = (folder / "002.tar").read_bytes()
    with tarfile.open(folder / "002.tar") as archive:
        at = next(member.offset_data for member in archive if member.isfile() and member.size > 100) - 512
    for data, message in (
        (b"no tar at all" * 100, "no tar file"),
        (whole[: at + 512 + 100], "cut short"),
        (whole[:1000], "cut short"),
        (whole[:at] + b"\x01" * 512 + whole[at + 512 :], f"broken or cut short at byte {at}"),
    ):
        (folder / "002.tar").write_bytes(data)
        with pytest.raises(UserError, match=rf"002\.tar.*({message})") as caught:
            open_source(folder)
        assert "\n" not in str(caught.value)
    with tarfile.open(folder / "002.tar", "w:gz") as archive:
        tar_member(archive, "a.jpg", b"x")
    with pytest.raises(UserError, match="compressed"):
        open_source(folder)
    with tarfile.open(tmp_path / "empty.tar", "w") as archive:
        tar_member(archive, "readme.txt", b"x")
    with pytest.raises(UserError, match=r"empty\.tar holds no image"):
        open_source(tmp_path / "empty.tar")


# Parquet


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
    folder = Path(in_parquet(tmp_path))
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


# What cannot be opened


def test_what_is_not_there_or_not_ours(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "notes.docx").write_bytes(b"x")
    (tmp_path / "images.tar.gz").write_bytes(b"x")
    for data, message in (
        (tmp_path / "photso", "nothing at .*; did you mean .*photos"),
        (tmp_path / "xyz" / "abc", "the folder .*xyz does not exist"),
        (tmp_path / "photos", "photos holds no image file"),
        (tmp_path / "notes.docx", r"of no kind that is read \(\.docx\)"),
        (tmp_path / "images.tar.gz", r"of no kind that is read \(\.gz\)"),
        (tmp_path / "*.tar", "no file matches"),
        (tmp_path / "{00..02}.tar", r"00\.tar of .* does not exist"),
    ):
        for given_as in (data, str(data)):
            with pytest.raises(UserError, match=message) as caught:
                open_source(given_as)
            assert "\n" not in str(caught.value)


def test_hugging_face_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = in_parquet(tmp_path)
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=r"test.*cannot be loaded") as caught:
        open_source(f"hf:{folder}:test")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the datasets library: pip install"):
        open_source(f"hf:{folder}")


def test_order_does_not_depend_on_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = in_folder(tmp_path)
    expected = [sample.key for sample in map(open_source(folder).read, range(11))]
    scandir = os.scandir

    class Reversed:
        def __init__(self, path: str) -> None:
            self.entries = scandir(path)

        def __enter__(self) -> Any:
            return iter(list(self.entries)[::-1])

        def __exit__(self, *_: object) -> None:
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Reversed)
    assert [sample.key for sample in map(open_source(folder).read, range(11))] == expected
    assert all(a.split("/")[0] <= b.split("/")[0] for a, b in itertools.pairwise(expected))
