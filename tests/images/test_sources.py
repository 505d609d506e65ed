"""Every kind of source gives the same images for the same content, holds little, and says what is wrong."""

import contextlib
import csv
import io
import itertools
import json
import multiprocessing
import os
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unlabeled.errors import UserError
from unlabeled.images.sources import Source, open_source

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
        good = False
        with contextlib.suppress(Exception):
            pairs = zip(indices * 5, expected * 5, strict=True)
            good = all(source.read(int(index)).data == data for index, data in pairs)
        queue.put(good)

    workers = [context.Process(target=work, daemon=True) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert all(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()


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
    with pytest.raises(UserError, match="hf: names no data set"):
        open_source("hf:")
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
