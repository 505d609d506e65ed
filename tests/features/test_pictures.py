"""Pages: everything inside, in its aspect, nothing over anything else; what is drawn over an image is at its place."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unlabeled.errors import UserError
from unlabeled.features.attention import AttentionMaps
from unlabeled.features.match import Matches
from unlabeled.features.page import MARGIN, SMALL, WIDTH, Box, Page, Scale, blocks, heat, lay_out, shortened
from unlabeled.features.pca import PatchPca
from unlabeled.features.pictures import Picture, draw_attention, draw_match, draw_pca, draw_similar

SHAPES = [(98, 98), (300, 451), (451, 300), (98, 1600), (1600, 98), (1600, 1600), (1067, 1600), (14, 20)]


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(
        st.one_of(st.sampled_from(SHAPES), st.tuples(st.integers(98, 1600), st.integers(98, 1600))),
        min_size=1,
        max_size=4,
    ),
    num_panels=st.sampled_from([1, 2, 6, 9, 15]),
    width=st.sampled_from([800, 1600, 2000]),
    barred=st.booleans(),
)
def test_a_page_holds_its_panels(
    shapes: list[tuple[int, int]], num_panels: int, width: int, barred: bool
) -> None:
    titles = [["a photograph.jpg", *(f"head {n}" for n in range(num_panels - 1))] for _ in shapes]
    scale = Scale("a scale", 0, 1, "viridis") if barred else None
    page = lay_out(shapes, titles, scale=scale, caption="a model, and some words about it", width=width)
    assert page.width <= width and page.height <= 1.3 * width
    boxes = [box for row in page.boxes for box in row]
    assert len(boxes) == num_panels * len(shapes)
    for row, (height_of_image, width_of_image) in zip(page.boxes, shapes, strict=True):
        assert len({box[2:] for box in row}) == 1
        for left, top, w, h in row:
            assert left >= MARGIN * width / WIDTH - 1 and left + w <= page.width - MARGIN * width / WIDTH + 1
            assert top >= 0 and top + h < page.height
            # Either side is right to half a pixel.
            assert abs(w * height_of_image - h * width_of_image) <= 0.5 * (height_of_image + width_of_image)
    for one, two in itertools.combinations(boxes, 2):
        beside = one.left + one.width <= two.left or two.left + two.width <= one.left
        assert beside or one.top + one.height < two.top or two.top + two.height < one.top


def read(page: Page, path: Path) -> np.ndarray:
    page.save(path)
    with Image.open(path) as opened:
        assert opened.format == "PNG" and opened.size == (page.width, page.height)
        pixels = np.asarray(opened.convert("RGB"))
    edge = [pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]]
    assert all((side == 255).all() for side in edge), "something touches the edge"
    return pixels


def inside(pixels: np.ndarray, box: Box) -> np.ndarray:
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width].astype(int)


def place_of(mask: np.ndarray, shape: tuple[int, int]) -> tuple[float, float]:
    """Centre of what is marked in a panel, as (x, y) in pixels of the image."""
    rows, columns = np.nonzero(mask)
    return (columns.mean() + 0.5) * shape[1] / mask.shape[1], (rows.mean() + 0.5) * shape[0] / mask.shape[0]


@pytest.mark.parametrize(
    "shapes", [[(300, 451)], [(451, 300), (120, 400)], [(98, 98), (98, 1600), (1600, 1067)]]
)
def test_the_maximum_is_drawn_at_its_patch(shapes: list[tuple[int, int]], tmp_path: Path) -> None:
    pictures, maps, hot = [], [], []
    for index, (height, width) in enumerate(shapes):
        h, w = 5 + index, 9
        heads = np.full((4, h, w), 0.001, np.float32)
        for head in range(4):
            heads[head, head, 2 * head] = 0.5
        mask = np.zeros((h, w), bool)
        mask[3, 4] = True
        maps.append(AttentionMaps(heads, heads[1], mask, heads > 0.1))
        hot.append((h, w))
        pictures.append(Picture(f"{index}.png", np.full((height, width, 3), 90, np.uint8)))
    page = draw_attention(pictures, maps, 0.6, "a model")
    pixels = read(page, tmp_path / "page.png")
    for boxes, (height, width), (h, w) in zip(page.boxes, shapes, hot, strict=True):
        assert (inside(pixels, boxes[0]) == 90).all()
        kept = (inside(pixels, boxes[2]) == 90).all(-1)
        panels = [(inside(pixels, boxes[1]).sum(-1) > 400, 1, 2), (kept, 3, 4)]
        panels += [(inside(pixels, boxes[3 + n]).sum(-1) > 400, n, 2 * n) for n in range(4)]
        for mask, row, column in panels:
            x, y = place_of(mask, (height, width))
            assert abs(x - (column + 0.5) * width / w) < 1.5 * width / mask.shape[1]
            assert abs(y - (row + 0.5) * height / h) < 1.5 * height / mask.shape[0]
            assert mask.mean() == pytest.approx(1 / (h * w), rel=0.25)


def test_pca_colours_are_the_colours(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes, grids = [(200, 300), (320, 200)], [(4, 6), (8, 5)]
    colours = [rng.random((*grid, 3)).astype(np.float32) for grid in grids]
    masks = [rng.random(grid) < 0.7 for grid in grids]
    photographs = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    page = draw_pca(
        [Picture("some.png", pixels) for pixels in photographs],
        PatchPca(colours, masks, np.array([0.5, 0.2, 0.1])),
    )
    pixels = read(page, tmp_path / "page.png")
    for (_, box), grid, mask in zip(page.boxes, colours, masks, strict=True):
        drawn = inside(pixels, box)
        for row, column in np.ndindex(*mask.shape):
            y = int((row + 0.5) * box.height / mask.shape[0])
            x = int((column + 0.5) * box.width / mask.shape[1])
            wanted = np.round(grid[row, column] * 255) if mask[row, column] else np.zeros(3)
            assert np.abs(drawn[y, x] - wanted).max() <= 1


def test_the_mark_and_the_cosine_are_at_the_point(tmp_path: Path) -> None:
    grey = np.full((240, 400, 3), 128, np.uint8)
    values = np.full((6, 10), 0.2, np.float32)
    values[4, 7] = 1
    others = np.full((5, 5), -0.3, np.float32)
    others[0, 0] = 0.9
    page = draw_similar(
        [Picture("a.png", grey), Picture("b.png", grey[:, :240])], [values, others], (300, 180), "words"
    )
    assert page.scale is not None and page.scale.low == pytest.approx(-0.3) and page.scale.high == 1
    pixels = read(page, tmp_path / "page.png")
    for box in page.boxes[0]:
        drawn = inside(pixels, box)
        x, y = place_of((drawn > 250).all(-1) | (drawn < 5).all(-1), (240, 400))
        assert abs(x - 300.5) < 1 and abs(y - 180.5) < 1
    bright = inside(pixels, page.boxes[1][1])
    yellow = (bright[..., 0] > 150) & (bright[..., 2] < 60)
    x, y = place_of(yellow, (240, 240))
    assert abs(x - 24) < 1 and abs(y - 24) < 1 and yellow.mean() == pytest.approx(1 / 25, rel=0.05)


def test_lines_end_at_their_points(tmp_path: Path) -> None:
    black = np.zeros((200, 300, 3), np.uint8)
    tall = np.zeros((400, 240, 3), np.uint8)
    matches = Matches(np.array([[50.0, 60.0]]), np.array([[200.0, 300.0]]), np.array([0.7], np.float32))
    page = draw_match(Picture("a.png", black), Picture("b.png", tall), matches, "words")
    pixels = read(page, tmp_path / "page.png")
    for (box,), point, shape in zip(
        page.boxes, ((50, 60), (200, 300)), ((200, 300), (400, 240)), strict=True
    ):
        x, y = point[0] * box.width / shape[1], point[1] * box.height / shape[0]
        drawn = inside(pixels, box).sum(-1)
        assert drawn[int(y), int(x)] > 200
        # Beyond the end, where no line goes, it is black again.
        far = int(x) - 30 if shape[1] == 300 else int(x) + 30
        assert drawn[int(y), far] == 0
    empty = Matches(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0, np.float32))
    read(draw_match(Picture("a.png", black), Picture("b.png", tall), empty), tmp_path / "none.png")


def test_heat_keeps_the_scale_s_colours_on_average(photograph: np.ndarray) -> None:
    from matplotlib import colormaps

    scale = Scale("", -1, 3, "viridis")
    drawn = heat(photograph, np.full(photograph.shape[:2], 1.0), scale).astype(float)
    np.testing.assert_allclose(drawn.mean((0, 1)) / 255, colormaps["viridis"](0.5)[:3], atol=0.01)
    assert drawn.std(axis=(0, 1)).min() > 5  # the image can be seen


def test_blocks() -> None:
    grid = np.arange(6).reshape(2, 3)
    np.testing.assert_array_equal(blocks(grid, Box(0, 0, 9, 4)), np.kron(grid, np.ones((2, 3), int)))
    assert blocks(np.zeros((2, 3, 3)), Box(0, 0, 7, 5)).shape == (5, 7, 3)


def test_names() -> None:
    assert shortened("short.png") == "short.png"
    long = shortened("a very long name of a file that nobody wants to read.jpeg")
    assert len(long) == 26 and long.startswith("a very long") and long.endswith("ad.jpeg")
    assert shortened("\u732b \u72ac\n.png") == "? ??.png"  # what the font has no glyph for


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.png"
    lay_out([(20, 30)], [["a$b$c_{.png"]]).save(path)
    before = path.read_bytes()
    page = lay_out([(20, 30)], [["b.png"]])

    def full(file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.figure, "savefig", full)
    with pytest.raises(UserError, match=r"page\.png cannot be written: .*No space left"):
        page.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_ribbon_leaves_room_for_the_others() -> None:
    titles = [["a.png", "PCA"], ["b.png", "PCA"]]
    ordinary, ribbon = lay_out([(300, 450), (1600, 98)], titles).boxes
    side = (ordinary[0].width * ordinary[0].height) ** 0.5
    assert side > 300 and ribbon[0].height == pytest.approx(2 * side, abs=3)


@pytest.mark.parametrize("shape", [(300, 450), (450, 300)])
def test_sixteen_images_with_long_names_have_room(shape: tuple[int, int]) -> None:
    titles = [[f"a long name of a photograph {n}.jpg", *(f"head {m}" for m in range(8))] for n in range(16)]
    page = lay_out([shape] * 16, titles)
    assert page.titles[3][0].endswith("jpg") and page.titles[3][1] == "head 0"
    with pytest.raises(UserError, match="no room for so many panels; choose fewer images"):
        lay_out([shape] * 16, titles, width=400)


def test_text_of_a_small_page_can_be_read_and_is_inside(tmp_path: Path) -> None:
    caption = "runs/street/model, marked: 800, 500 in a_photograph_of_a_cat.jpg, short side 160 pixels"
    page = lay_out([(300, 450)] * 3, [["a.png", "PCA"]] * 3, caption=caption, width=400)
    assert page.unit * SMALL > 9  # pixels
    pixels = read(page, tmp_path / "page.png")
    below = max(box.top + box.height for row in page.boxes for box in row)
    _, columns = np.nonzero((pixels[below + 2 :] < 250).any(-1))
    margin = MARGIN * page.unit - 1
    assert margin <= columns.min() and columns.max() <= page.width - margin
