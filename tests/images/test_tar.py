"""Tar shards, against the standard library's reader; labels, size of the index, broken shards."""

import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unlabeled.errors import UserError
from unlabeled.images.sources import open_source
from unlabeled.images.tar import TarSource

Add = Callable[[tarfile.TarFile, str, bytes], None]


def reference_members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        return [(member.name, archive.extractfile(member).read()) for member in archive if member.isfile()]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    tmp_path_factory: pytest.TempPathFactory, tar_member: Add, names: list[str], kind: int
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


def test_tar_with_links_folders_ustar_prefixes_and_hidden_files(tmp_path: Path, tar_member: Add) -> None:
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


def test_tar_labels_keep_their_numbers_and_need_every_sample(tmp_path: Path, tar_member: Add) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for number, label in enumerate((7, 2, 7)):
            tar_member(archive, f"{number}.jpg", b"x")
            tar_member(archive, f"{number}.cls", b"%d\n" % label)
    assert open_source(path).labels().tolist() == [7, 2, 7]
    with tarfile.open(path, "a") as archive:
        tar_member(archive, "other.jpg", b"x")
    assert open_source(path).labels() is None


def test_a_tar_index_takes_at_most_64_bytes_and_reads_no_data(tmp_path: Path, tar_member: Add) -> None:
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


def test_broken_tars_are_named(tmp_path: Path, tar_member: Add) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for number in range(4):
                tar_member(archive, f"{number}.jpg", bytes(range(256)) * 3)
    whole = (folder / "002.tar").read_bytes()
    with tarfile.open(folder / "002.tar") as archive:
        at = archive.getmembers()[2].offset
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
