"""One image in every form it can be given, against its pixels."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import encoded
from unlabeled.errors import UserError
from unlabeled.features.inputs import as_pixels


def check(given: object, expected: np.ndarray) -> None:
    pixels = as_pixels(given)  # type: ignore[arg-type]
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)


def test_every_form_gives_the_same_pixels(tmp_path: Path, photograph: np.ndarray) -> None:
    path = tmp_path / "a cat.png"
    path.write_bytes(encoded(photograph))
    planar = torch.from_numpy(photograph.transpose(2, 0, 1).copy())
    alpha = np.dstack((photograph, np.full(photograph.shape[:2], 7, np.uint8)))
    forms = [
        str(path), path, path.read_bytes(), bytearray(path.read_bytes()), Image.open(path),
        Image.fromarray(alpha), photograph, alpha, photograph / 255, (photograph / 255).astype(np.float32),
        photograph[:, ::-1][:, ::-1], planar, planar.permute(1, 2, 0), planar / 255, planar.double() / 255,
        (planar / 255).requires_grad_(), torch.from_numpy(alpha), torch.from_numpy(alpha).permute(2, 0, 1),
    ]  # fmt: skip
    for form in forms:
        check(form, photograph)


def test_grey_becomes_rgb(photograph: np.ndarray) -> None:
    grey = photograph[:, :, 0]
    expected = np.dstack([grey] * 3)
    for form in (grey, grey[:, :, None], Image.fromarray(grey), torch.from_numpy(grey.copy()), grey / 255):
        check(form, expected)
    check(torch.from_numpy(grey.copy())[None], expected)


def test_bfloat16_and_the_channels_first_where_both_would_do() -> None:
    square = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
    check(square, square.permute(1, 2, 0).numpy())
    check(torch.tensor([0.0, 0.5, 1.0]).bfloat16().expand(3, 2, 3), np.tile([[[0], [128], [255]]], (2, 1, 3)))


def test_a_pillow_image_is_turned_upright_as_its_file_is(tmp_path: Path, photograph: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph).save(tmp_path / "turned.png", exif=exif)
    check(tmp_path / "turned.png", np.rot90(photograph, -1))
    check(Image.open(tmp_path / "turned.png"), np.rot90(photograph, -1))


def test_a_deep_pillow_image_is_scaled_as_its_file_is(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 60).astype(np.uint16).reshape(6, 10)
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG")
    check(Image.open(io.BytesIO(buffer.getvalue())), as_pixels(buffer.getvalue()))
    check(Image.fromarray(deep), np.dstack([np.round(deep / 257).astype(np.uint8)] * 3))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((4, 5, 2), np.uint8), r"\(4, 5, 2\)"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        (torch.zeros(1, 3, 8, 8), r"\(1, 3, 8, 8\)"),
        (np.zeros((4, 5, 3), np.uint16), "uint16"),
        (np.full((4, 5, 3), 200.0), r"\[200, 200\]"),
        (np.full((4, 5, 3), np.nan), "nan"),
        (torch.full((3, 4, 5), -0.1), r"\[-0.1, -0.1\]"),
        (b"", "0 bytes cannot be read: empty"),
        (b"no image at all", "15 bytes cannot be read"),
        (7, "not int"),
        ("nowhere.jpg", "nowhere.jpg cannot be read: No such file"),
        ("zero\0byte.jpg", "zero.x00byte.jpg"),
        (Path(__file__).parent, "features cannot be read: Is a directory"),
        (Path(__file__), "test_inputs.py cannot be read"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(given: object, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        as_pixels(given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_named_also_when_pillow_opened_it(tmp_path: Path, photograph: np.ndarray) -> None:
    path = tmp_path / "half.png"
    path.write_bytes(encoded(photograph)[:20000])
    with pytest.raises(UserError, match=r"half\.png cannot be read"):
        as_pixels(path)
    with Image.open(path) as opened, pytest.raises(UserError, match=r"half\.png cannot be read"):
        as_pixels(opened)
