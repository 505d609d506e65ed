"""Masks as users have them, and what they say of patches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import encoded
from unlabeled.dense.masks import IGNORE, labels_of, patch_shares, read_mask
from unlabeled.errors import UserError

SHAPE = (6, 8)


def classes(*numbers: int) -> np.ndarray:
    """A mask of stripes of these numbers."""
    mask = np.zeros(SHAPE, np.uint8)
    for place, number in enumerate(numbers):
        mask[:, place * 8 // len(numbers) : (place + 1) * 8 // len(numbers)] = number
    return mask


def labels(*masks: object, names: list[str] | None = None) -> object:
    return labels_of(list(masks), [SHAPE] * len(masks), [f"r{i}.jpg" for i in range(len(masks))], names)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_shares_of_patches_are_those_of_a_plain_loop(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 13)), data.draw(st.integers(1, 13))
    grid = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    inside = np.random.default_rng(data.draw(st.integers(0, 99))).random((height, width)) < 0.5
    expected = np.zeros(grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            for y in range(height):
                for x in range(width):
                    down = min((row + 1) * height / grid[0], y + 1) - max(row * height / grid[0], y)
                    across = min((column + 1) * width / grid[1], x + 1) - max(column * width / grid[1], x)
                    expected[row, column] += max(0, down) * max(0, across) * inside[y, x]
    expected *= grid[0] * grid[1] / (height * width)
    np.testing.assert_allclose(patch_shares(inside, grid), expected, atol=1e-6)


def test_zeros_and_255_are_one_object() -> None:
    found = labels(classes(0, 255))
    assert found.is_binary and found.classes == (0, 1)
    np.testing.assert_array_equal(found.maps[0], classes(0, 1))


def test_255_is_unknown_beside_other_numbers_of_any_of_the_masks() -> None:
    found = labels(classes(0, 3, 255), classes(0, 255))
    assert not found.is_binary and found.classes == (0, 3)
    assert (found.maps[1][:, 4:] == IGNORE).all()


def test_a_mask_an_object() -> None:
    first, second = classes(255, 0, 0, 0), classes(255, 255, 0, 0)
    found = labels([first, second])
    assert found.classes == (0, 2) and not found.is_binary
    np.testing.assert_array_equal(found.maps[0], classes(IGNORE, 2, 0, 0))


def test_every_form_of_one_mask_is_the_same(tmp_path: Path) -> None:
    mask = classes(0, 1, 2, 255)
    palette = Image.fromarray(mask, "P")
    palette.putpalette([value for number in range(256) for value in (number * 7 % 256, 255 - number, number)])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(mask).save(tmp_path / "grey.png")
    rgb = np.stack([mask] * 3, axis=2)
    forms = [
        mask, mask.astype(np.int64), mask.astype(np.float32), torch.from_numpy(mask), palette, rgb, mask[:, :, None],
        tmp_path / "palette.png", str(tmp_path / "grey.png"), encoded(mask), encoded(np.dstack((rgb, rgb[:, :, 0]))),
    ]  # fmt: skip
    for form in forms:
        np.testing.assert_array_equal(read_mask(form), mask)
    np.testing.assert_array_equal(read_mask(mask > 1), (mask > 1) * 255)


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ([np.zeros(SHAPE, np.uint8)], "mask 1 is empty: no pixel is of the object"),
        ([np.full(SHAPE, 255, np.uint8)], "all pixels are of the object"),
        ([classes(255), classes(3)], "mask 1 is empty: all pixels are 255"),
        ([classes(2)], "all pixels are of class 2"),
        ([classes(0, 255), np.zeros(SHAPE, np.uint8)], "mask 2 is empty"),
        ([np.zeros((5, 8), np.uint8)], "mask 1 has 8 x 5 pixels and its reference r0.jpg 8 x 6"),
        ([np.full(SHAPE, 300)], "values from 300 to 300"),
        ([np.full(SHAPE, -1)], "values from -1"),
        ([np.full(SHAPE, 0.5)], "no whole numbers"),
        ([np.zeros((2, *SHAPE, 3))], "shape (2, 6, 8, 3)"),
        ([np.dstack([classes(0, 1), classes(0, 2), classes(0)])], "is in colour"),
        ([b"no image"], "mask 1 cannot be read"),
        ([encoded(classes(0, 255), "JPEG")], "is a JPEG"),
        (["missing.png"], "missing.png cannot be read"),
        ([[]], "1 to 254 masks of one object each, not 0"),
    ],
)
def test_what_cannot_be_a_mask_is_one_clear_line(masks: list, words: str) -> None:
    with pytest.raises(UserError) as error:
        labels(*masks)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_numbers_outside_of_the_classes() -> None:
    assert labels(classes(0, 1, 255), names=["a", "b"]).classes == (0, 1)
    with pytest.raises(UserError, match=r"mask 1 has the number 2, outside of the 2 classes \(0 to 1\)"):
        labels(classes(0, 2), names=["a", "b"])


def test_each_reference_has_its_mask() -> None:
    with pytest.raises(UserError, match="2 references have 1 masks"):
        labels_of([classes(0, 1)], [SHAPE, SHAPE], ["a", "b"])
