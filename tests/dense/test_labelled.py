"""Pairs of images and targets: what is read, what is left out and named, and the crops they are trained on."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unlabeled.dense.augment import PADDING, DenseAugmentation, jittered, resize_pair
from unlabeled.dense.labelled import depth_images, labelled_images
from unlabeled.errors import UserError
from unlabeled.images.decode import BadImage


def save(path: Path, array: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pairs of 12 x 16 pixels, classes 0 to 2, the last one ignored in places."""
    rng = np.random.default_rng(0)
    for number in range(4):
        save(tmp_path / "images" / "town" / f"{number}.jpg", rng.integers(0, 255, (12, 16, 3), np.uint8))
        labels = rng.integers(0, 3, (12, 16)).astype(np.uint8)
        labels[:2] = 255
        save(tmp_path / "labels" / "town" / f"{number}.png", labels)
    return tmp_path


def test_pairs_are_read_by_number(folder: Path) -> None:
    data = labelled_images(folder)
    assert len(data) == 4
    assert data.class_names == ("0", "1", "2")
    assert not data.bad
    assert not data.notes
    assert sum(data.class_pixels) == 4 * 10 * 16
    example = data.read(2)
    assert example.key == "town/2"
    assert example.pixels.shape == (12, 16, 3)
    with Image.open(folder / "labels" / "town" / "2.png") as image:
        np.testing.assert_array_equal(example.target, np.asarray(image))
    assert data.subset([3, 1]).read(0).key == "town/3"


def test_names_of_classes(folder: Path) -> None:
    (folder / "classes.txt").write_text("road\nsky\nsheep\nlake\n")
    data = labelled_images(folder)
    assert data.class_names == ("road", "sky", "sheep", "lake")
    assert data.notes == (f"{folder}: 1 class has no pixel: lake.",)
    with pytest.raises(UserError, match="has 4 class names, not 3"):
        labelled_images(folder, num_classes=3)
    assert labelled_images(folder, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")


def test_a_stray_label_without_names_is_found(folder: Path) -> None:
    stray = np.zeros((12, 16), np.uint8)
    stray[3, 4] = 40
    save(folder / "labels" / "town" / "1.png", stray)
    (note,) = labelled_images(folder).notes
    assert "classes have no pixel" in note
    assert "label 40 is the largest, in town/1; --ignore leaves one out" in note


def test_a_palette_holds_numbers(folder: Path) -> None:
    image = Image.fromarray(np.full((12, 16), 2, np.uint8), "P")
    image.putpalette([9, 9, 9, 8, 8, 8, 7, 7, 7])
    image.save(folder / "labels" / "town" / "0.png")
    assert (labelled_images(folder).read(0).target == 2).all()


def test_bad_pairs_are_named_and_the_rest_is_kept(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    labels = folder / "labels" / "town"
    save(labels / "0.png", np.zeros((12, 15), np.uint8))
    save(labels / "1.png", np.full((12, 16), 7, np.uint8))
    (folder / "images" / "town" / "3.jpg").rename(folder / "images" / "town" / "4.jpg")
    data = labelled_images(folder, num_classes=3)
    assert [pair.key for pair in data.pairs] == ["town/2"]
    reasons = dict(data.bad)
    assert reasons["town/0"] == "0.png has 15 x 12 pixels, its image 16 x 12"
    assert reasons["town/1"] == "label 7 is outside of the 3 classes (0 to 2)"
    assert reasons["images/town/4"] == "no file of that name in labels/"
    assert reasons["labels/town/3"] == "no image of that name"
    (note,) = data.notes
    assert note.startswith(f"{folder}: 4 left out, 1 pairs are good (")
    assert note.endswith("; and 1 more).")
    report = tmp_path_factory.mktemp("report") / "bad_files.jsonl"
    data.report(report)
    assert len([json.loads(line) for line in report.read_text().splitlines()]) == 4


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.full((12, 16), 255, np.uint8), "all of its pixels have the label to ignore, 255"),
        (np.zeros((12, 16, 3), np.uint8), "0.png has 3 channels; one is needed"),
        (b"nothing", "0.png cannot be read"),
    ],
)
def test_labels_that_say_nothing(folder: Path, labels: np.ndarray | bytes, reason: str) -> None:
    path = folder / "labels" / "town" / "0.png"
    path.write_bytes(labels) if isinstance(labels, bytes) else save(path, labels)
    ((key, found),) = labelled_images(folder).bad
    assert key == "town/0"
    assert found.startswith(reason)


def test_an_upright_image_is_compared(folder: Path) -> None:
    """EXIF orientation 6: stored 12 x 16, upright 16 x 12."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.random.default_rng(0).integers(0, 255, (16, 12, 3), np.uint8)
    save(folder / "images" / "town" / "0.jpg", turned, exif=exif)
    data = labelled_images(folder)
    assert not data.bad
    assert data.read(0).pixels.shape == (12, 16, 3)


def test_a_broken_image_is_met_when_it_is_read(folder: Path) -> None:
    path = folder / "images" / "town" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    data = labelled_images(folder)
    with pytest.raises(BadImage, match="truncated"):
        data.read(0)
    path.unlink()
    with pytest.raises(BadImage, match="cannot be read"):
        data.read(0)


def test_folders_that_are_no_data(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="has no images/"):
        labelled_images(tmp_path_factory.mktemp("empty"))
    with pytest.raises(UserError, match=r"has no depth/: images/ and depth/"):
        depth_images(folder)
    with pytest.raises(UserError, match="no good pair of 4; town/3: label 2 is outside"):
        labelled_images(folder, num_classes=2)
    for path in (folder / "labels" / "town").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(UserError, match="none of 4 images has a file of the same name"):
        labelled_images(folder)


def test_depth_in_both_forms(folder: Path) -> None:
    metres = np.random.default_rng(0).uniform(0.5, 9, (12, 16)).astype(np.float32)
    metres[0, :4] = 0
    save(folder / "depth" / "town" / "0.png", np.round(metres * 1000).astype(np.uint16))
    holes = metres.copy()
    holes[0, :3] = np.nan, np.inf, -1
    np.save(folder / "depth" / "town" / "1.npy", holes)
    np.save(folder / "depth" / "town" / "2.npy", np.full((12, 16), np.nan))
    save(folder / "depth" / "town" / "3.png", np.ones((12, 16), np.uint8))
    data = depth_images(folder)
    np.testing.assert_allclose(data.read(0).target, metres, atol=5.1e-4)
    np.testing.assert_array_equal(data.read(1).target, metres)
    assert dict(data.bad) == {
        "town/2": "no pixel has a valid depth",
        "town/3": "depth of 8 bits; 16-bit PNG or .npy of metres is needed",
    }
    assert data.notes[1] == f"{folder}: 2 depths that are NaN or infinite do not count, in town/1."
    assert data.depth_range == pytest.approx((metres[metres > 0].min(), metres.max()), abs=1e-3)
    (folder / "depth" / "town" / "3.png").unlink()
    (folder / "depth" / "town" / "3.npy").write_bytes(b"x")
    assert ("town/3", "3.npy is no array of numbers, or damaged") in depth_images(folder).bad
    assert depth_images(folder, depth_scale=500).read(0).target.max() == pytest.approx(
        2 * metres.max(), abs=2e-3
    )


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.integers(0, 999),
)
def test_crops_keep_image_and_target_together(
    sides: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    """A picture whose red is its target: what is cropped, resized and flipped of one is of the other too."""
    target = np.arange(sides[0] * sides[1]).reshape(sides) % 200
    pixels = np.repeat(target[..., None], 3, 2).astype(np.uint8)
    rng = np.random.default_rng(seed)
    crop, known = DenseAugmentation(size, scale=(1, 1), jitter=0)(pixels, target, 255, rng)
    assert crop.shape == (*size, 3)
    assert known.shape == size
    outside = known == 255
    np.testing.assert_array_equal(crop[..., 0][~outside], known[~outside])
    assert (crop[outside] == PADDING).all()
    assert (~outside).sum() == min(size[0], sides[0]) * min(size[1], sides[1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 999))
def test_crops_at_any_scale_have_their_size(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (height, width, 3), np.uint8)
    crop, known = DenseAugmentation((16, 24))(pixels, np.ones((height, width), np.float32), 0, rng)
    assert crop.shape == (16, 24, 3)
    assert crop.flags.c_contiguous
    assert set(np.unique(known)) <= {0, 1}
    assert (known == 1).any()


def test_the_scale_is_what_it_says() -> None:
    """A disc of radius 20 in the middle: at half the scale it is of radius 10."""
    y, x = np.mgrid[:101, :101] - 50
    disc = (x * x + y * y <= 400).astype(np.uint8)
    pixels = np.repeat(disc[..., None] * 200, 3, 2)
    for scale in (0.5, 1.0, 2.0):
        recipe = DenseAugmentation((220, 220), (scale, scale), jitter=0)
        _, known = recipe(pixels, disc, 9, np.random.default_rng(0))
        assert (known == 1).sum() == pytest.approx(disc.sum() * scale**2, rel=0.05)


def test_jitter_keeps_grey_grey_and_nothing_at_0(photograph: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(jittered(photograph, 0, rng), photograph)
    changed = jittered(photograph, 1, rng)
    assert np.abs(changed.astype(int) - photograph).mean() > 5
    grey = np.full((4, 4, 3), 90, np.uint8)
    assert np.ptp(jittered(grey, 1, rng), axis=2).max() == 0


def test_nearest_values_of_a_target() -> None:
    target = np.arange(6, dtype=np.float32).reshape(2, 3)
    pixels = np.zeros((2, 3, 3), np.uint8)
    _, larger = resize_pair(pixels, target, (4, 6))
    np.testing.assert_array_equal(larger, target.repeat(2, 0).repeat(2, 1))


def test_same_seed_same_crop(photograph: np.ndarray) -> None:
    target = photograph[..., 0].astype(np.int64)
    crops = [DenseAugmentation((64, 64))(photograph, target, 255, np.random.default_rng(3)) for _ in range(2)]
    np.testing.assert_array_equal(crops[0][0], crops[1][0])
    np.testing.assert_array_equal(crops[0][1], crops[1][1])
