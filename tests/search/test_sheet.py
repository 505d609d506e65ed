"""Contact sheets: what stands where, and images that are gone."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unlabeled import Extractor, Index, build_index, embed
from unlabeled.search.sheet import ACROSS, MOST, Tile, write_groups, write_hits, write_sheet
from unlabeled.vit import VisionTransformer, VitConfig

COLOURS = [(200, 30, 30), (30, 160, 40), (40, 60, 200), (240, 200, 40)]


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Four images of one colour each and of different shapes, and a copy of the first."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (40 + 60 * number, 100), colour).save(folder / f"{number}.png")
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    model = VisionTransformer(VitConfig(width=24, depth=1, num_heads=3, patch_size=8, image_size=32)).eval()
    index = build_index(embed(folder, model, tmp_path / "table"), tmp_path / "index")
    index.extractor = Extractor(model)
    return index


def colours_of(path: Path) -> list[int]:
    """How many pixels of a picture have each of the four colours."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    return [int((np.abs(pixels - colour).max(1) < 3).sum()) for colour in COLOURS]


def test_query_and_hits_are_shown_whole_and_in_order(index: Index, tmp_path: Path) -> None:
    query = Image.new("RGB", (100, 50), COLOURS[0])
    hits = index.search(query, k=5)
    out = tmp_path / "hits.png"
    assert write_hits(out, index, [query], ["query.png"], [hits]) == 0
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    found, order = {}, ["query", *(hit.key for hit in hits)]
    side = pixels.shape[1] / 6
    for place, key in enumerate(order):
        cell = pixels[:, round(place * side) : round((place + 1) * side)]
        number = 0 if key in ("query", "copy.png") else int(key[0])
        inside = np.abs(cell - COLOURS[number]).max(2) < 3
        rows, columns = inside.any(1).sum(), inside.any(0).sum()
        found[key] = columns / rows
    for key, aspect in found.items():
        expected = 2 if key == "query" else (40 + 60 * (0 if key == "copy.png" else int(key[0]))) / 100
        assert aspect == pytest.approx(expected, rel=0.02), key


def test_images_that_are_gone_or_others_now_are_counted(index: Index, tmp_path: Path) -> None:
    hits = index.search(Image.new("RGB", (40, 100), COLOURS[0]), k=5)
    (tmp_path / "images" / "1.png").unlink()
    Image.new("RGB", (40, 100), COLOURS[3]).save(tmp_path / "images" / "2.png")
    out = tmp_path / "hits.png"
    reopened = Index(index.path)
    query = Image.new("RGB", (40, 100), COLOURS[0])
    assert write_hits(out, reopened, [query], ["query"], [hits]) == 2
    shown = colours_of(out)
    assert shown[0] > 0 and shown[1] == shown[2] == 0 and shown[3] > 0


def test_groups_begin_a_line_each(index: Index, tmp_path: Path) -> None:
    (group,) = [group for group in index.duplicates(0.9999) if "0.png" in group.keys]
    assert sorted(group.keys)[:1] == ["0.png"] and "copy.png" in group.keys
    out = tmp_path / "groups.png"
    assert write_groups(out, index, [group]) == 0
    assert colours_of(out)[0] > 0


@pytest.mark.parametrize("lengths", [[1], [2], [ACROSS], [ACROSS + 1], [3, ACROSS * 2, 1]])
def test_sheets_of_all_sizes_show_every_tile(lengths: list[int], tmp_path: Path) -> None:
    total, lines, number = sum(lengths), [], 0
    for length in lengths:
        line = []
        for _ in range(length):
            line.append(
                Tile(
                    "t",
                    "a name that is far too long for its place.jpg",
                    np.full((9, 9, 3), 10 + number, np.uint8),
                )
            )
            number += 1
        lines.append(line)
    assert write_sheet(tmp_path / "sheet.png", lines) == 0
    with Image.open(tmp_path / "sheet.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    areas = [(pixels == 10 + shade).all(2).sum() for shade in range(total)]
    assert min(areas) > 0.9 * max(areas) > 2000


def test_a_sheet_has_an_end(index: Index, tmp_path: Path) -> None:
    query = Image.new("RGB", (40, 100), COLOURS[0])
    hits = index.search([query] * 40, k=5)
    assert write_hits(tmp_path / "a.png", index, [query] * 40, ["q"] * 40, hits) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.height < 400 * (MOST // 6 + 1)
