"""The report of bad files, and the search for the first good one."""

import json
from pathlib import Path

import pytest

from unlabeled.errors import UserError
from unlabeled.images.bad_files import BadFiles, first_readable
from unlabeled.images.sources import open_source


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_key_once_over_restarts(tmp_path: Path) -> None:
    path = tmp_path / "run" / "bad_files.jsonl"
    report = BadFiles(path)
    assert report.count == 0 and not path.exists()
    report.add("a.jpg", "truncated")
    report.add("a.jpg", "truncated")
    report.add("\u00fc\n\udce9.jpg", "empty file")
    assert report.count == 2
    again = BadFiles(path)
    assert again.count == 2
    again.add("\u00fc\n\udce9.jpg", "empty file")
    again.add("c.jpg", "x")
    assert lines(path) == [
        {"key": "a.jpg", "reason": "truncated"},
        {"key": "\u00fc\n\udce9.jpg", "reason": "empty file"},
        {"key": "c.jpg", "reason": "x"},
    ]


def test_ranks_that_share_the_file(tmp_path: Path) -> None:
    first, second = (BadFiles(tmp_path / "bad_files.jsonl") for _ in range(2))
    first.add("a", "x")
    second.add("a", "x")
    second.add("b", "x")
    first.add("b", "x")
    assert [line["key"] for line in lines(tmp_path / "bad_files.jsonl")] == ["a", "b"]


def test_a_line_cut_by_a_crash_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "bad_files.jsonl"
    path.write_bytes(b'{"key": "a", "reason": "x"}\n7\n{"key": "b", "rea')
    report = BadFiles(path)
    assert report.keys == {"a"}
    report.add("c", "x")
    report.add("b", "x")
    assert path.read_bytes().splitlines()[-2:] == [
        b'{"key": "c", "reason": "x"}',
        b'{"key": "b", "reason": "x"}',
    ]
    assert BadFiles(path).keys == {"a", "b", "c"}


def test_the_first_readable_image(tmp_path: Path, tile_folder: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in (("a.jpg", b""), ("b.png", b"no image"), ("c.jpg", b"\xff\xd8\xff\xe0")):
        (folder / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        first_readable(open_source(folder))
    message = str(caught.value)
    assert "photos holds no image that can be read (3 files tried; first: a.jpg: empty file)" in message
    assert (
        message.endswith("Supported: JPEG, PNG, WebP, GIF (first frame), TIFF, BMP.") and "\n" not in message
    )
    with pytest.raises(UserError, match="1 files tried"):
        first_readable(open_source(folder), limit=1)
    (folder / "a.jpg").unlink()
    (folder / "a.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"first: .*No such file"):
        first_readable(open_source(folder))
    good = next(tile_folder.rglob("*.png")).read_bytes()
    (folder / "d.png").write_bytes(good)
    assert first_readable(open_source(folder)) == 3
    assert first_readable(open_source(tile_folder)) == 0
