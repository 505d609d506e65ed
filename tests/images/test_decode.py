"""Decoding, against Pillow's own conversion."""

import io
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps, UnidentifiedImageError

from unlabeled.images import decode as module
from unlabeled.images.decode import BadImage, decode


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(image: Image.Image) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(module, "_rgb", none)
    with pytest.raises(BadImage, match="not enough memory"):
        decode(encoded(Image.new("RGB", (9, 9)), "GIF"))


def pillow(data: bytes) -> np.ndarray:
    """The reference: Pillow's conversion, upright."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(
            ImageOps.exif_transpose(image.convert("RGB") if image.mode == "P" else image).convert("RGB")
        )


@pytest.fixture(scope="module")
def photo(photograph: np.ndarray) -> Image.Image:
    return Image.fromarray(photograph[:131, :201])


@pytest.fixture(scope="module")
def alpha(photo: Image.Image) -> Image.Image:
    with_alpha = photo.convert("RGBA")
    with_alpha.putalpha(photo.convert("L"))
    return with_alpha


KINDS = [
    ("JPEG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "RGB", {"subsampling": 0, "quality": 97}),
    ("JPEG", "RGB", {"keep_rgb": True}),
    ("JPEG", "RGB", {"restart_marker_blocks": 3}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("PNG", "RGB", {}),
    ("PNG", "L", {}),
    ("PNG", "1", {}),
    ("PNG", "P", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "LA", {}),
    ("PNG", "RGB", {"transparency": (10, 20, 30)}),
    ("PNG", "P", {"transparency": 3}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGBA", {}),
    ("WEBP", "RGBA", {"lossless": True, "exact": True}),
    ("GIF", "P", {}),
    ("GIF", "L", {}),
    ("GIF", "P", {"transparency": 3}),
    ("TIFF", "RGB", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "RGB", {"compression": "jpeg"}),
    ("TIFF", "L", {"compression": "tiff_deflate"}),
    ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "P", {}),
    ("TIFF", "RGBA", {}),
    ("TIFF", "LA", {}),
    ("TIFF", "CMYK", {}),
    ("BMP", "RGB", {}),
    ("BMP", "L", {}),
    ("BMP", "P", {}),
    ("BMP", "1", {}),
    ("MPO", "RGB", {}),
]


@pytest.mark.parametrize(("kind", "mode", "options"), KINDS)
def test_every_format_and_mode_is_what_pillow_converts_it_to(
    photo: Image.Image, alpha: Image.Image, kind: str, mode: str, options: dict[str, object]
) -> None:
    data = encoded((alpha if "A" in mode else photo).convert(mode), kind, **options)
    pixels = decode(data)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
    expected = pillow(data)
    if kind in ("JPEG", "MPO", "WEBP"):  # two builds of a lossy decoder may round differently
        assert pixels.shape == expected.shape
        assert np.abs(pixels.astype(int) - expected).max() <= 2
    else:
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(("size", "rows"), [((1, 7), 1), ((7, 1), 1)])
def test_one_pixel_sides_are_too_small(size: tuple[int, int], rows: int) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        with pytest.raises(BadImage, match="too small"):
            decode(encoded(Image.new("RGB", size), kind))


def test_one_by_one_is_too_small_and_two_by_two_is_not() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        with pytest.raises(BadImage, match="too small: 1 x 1"):
            decode(encoded(Image.new("RGB", (1, 1)), kind))
        assert decode(encoded(Image.new("RGB", (2, 2), "white"), kind)).min() > 250


def test_adobe_cmyk_is_inverted_back(photo: Image.Image) -> None:
    data = encoded(photo.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data[:64]
    assert np.abs(decode(data).astype(int) - np.asarray(photo)).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_grey_are_scaled(kind: str) -> None:
    values = np.linspace(0, 65535, 64 * 32).round().astype(np.uint16).reshape(32, 64)
    pixels = decode(encoded(Image.fromarray(values), kind))
    expected = (values.astype(np.int64) * 255 + 32767) // 65535
    np.testing.assert_array_equal(pixels, np.repeat(expected[:, :, None], 3, 2))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bits_colour_are_scaled(suffix: str, channels: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 65536, (33, 17, channels), dtype=np.uint16)
    ok, data = cv2.imencode(suffix, values)
    assert ok
    expected = values[:, :, 2::-1] / 257
    assert np.abs(decode(data.tobytes()) - expected).max() <= 1


def test_floats_and_long_integers_have_a_range() -> None:
    unit = np.linspace(0, 1, 256, dtype=np.float32).reshape(8, 32)
    expected = np.arange(256).reshape(8, 32)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(unit), "TIFF"))[:, :, 0], expected)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(unit * 1000), "TIFF"))[:, :, 0], expected)
    strange = unit.copy()
    strange[0, :3] = np.nan, np.inf, -np.inf
    assert decode(encoded(Image.fromarray(strange), "TIFF"))[0, :3, 0].tolist() == [0, 255, 0]
    longs = (unit * 2e9).astype(np.int32)
    assert np.abs(decode(encoded(Image.fromarray(longs), "TIFF"))[:, :, 0] - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(photo: Image.Image, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(photo, kind, exif=exif, **options)
    # The definition (EXIF 2.32): row 0 and column 0 of what is stored are these sides of what is seen.
    stored = np.asarray(photo)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(stored),
    }[orientation]
    pixels = decode(data)
    assert pixels.shape == upright.shape and pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - upright).mean() < (4 if kind == "JPEG" else 1e-9)


def test_a_broken_exif_block_does_not_lose_the_image(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    block = bytearray(exif.tobytes())
    for kind in ("JPEG", "PNG", "WEBP"):
        for junk in (b"Exif\0\0MM\0*\xff\xff\xff\xff", bytes(block[:20]), b"Exif\0\0" + b"\xff" * 40):
            assert min(decode(encoded(photo, kind, exif=junk)).shape[:2]) == 131


def test_gif_and_webp_give_the_first_frame(photo: Image.Image) -> None:
    frames = [Image.new("RGB", (20, 12), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        pixels = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50))
        assert pixels.shape == (12, 20, 3)
        assert pixels[..., 0].min() > 240 and pixels[..., 2].max() < 15


def test_reduced_decoding_keeps_the_side_asked_for(photograph: np.ndarray) -> None:
    image = Image.fromarray(photograph[:296, :448])
    jpeg = encoded(image, "JPEG", quality=95)
    sides = {None: 296, 296: 296, 149: 296, 148: 148, 75: 148, 74: 74, 38: 74, 37: 37, 2: 37}
    for min_side, expected in sides.items():
        pixels = decode(jpeg, min_side)
        assert min(pixels.shape[:2]) == expected
        size = pixels.shape[1::-1]
        shrunk = np.asarray(image.resize(size, Image.Resampling.BOX)).astype(int)
        assert np.abs(pixels - shrunk).mean() < 4  # the right colours in the right places
    assert decode(encoded(image, "PNG"), 10).shape == (296, 448, 3)


def test_a_large_image_is_converted_in_bands(monkeypatch: pytest.MonkeyPatch, photo: Image.Image) -> None:
    data = encoded(photo.convert("P"), "PNG")
    whole = decode(data)
    deep = encoded(Image.fromarray(np.arange(131 * 201, dtype=np.uint16).reshape(131, 201)), "PNG")
    whole_deep = decode(deep)
    monkeypatch.setattr(module, "_BAND", 201 * 7)
    np.testing.assert_array_equal(decode(data), whole)
    np.testing.assert_array_equal(decode(deep), whole_deep)


def test_real_photographs_are_what_pillow_makes_of_them() -> None:
    import skimage
    import sklearn

    folders = [Path(package.__file__).parent for package in (skimage, sklearn)]
    files = [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in (".jpg", ".png", ".tif", ".gif")
    ]
    count = 0
    for path in files:
        data = path.read_bytes()
        try:
            with Image.open(path) as image:
                if image.mode in ("I;16", "I", "F") or image.size[0] * image.size[1] > 4e6:
                    continue
        except UnidentifiedImageError:
            continue
        expected = pillow(data)
        pixels = decode(data)
        assert pixels.shape == expected.shape, path
        assert np.abs(pixels.astype(int) - expected).max() <= 2, path
        count += 1
    assert count >= 5


def test_workers_are_quiet_and_python_still_speaks(photo: Image.Image, tmp_path: Path) -> None:
    data = bytearray(encoded(photo, "JPEG"))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(range(40))
    (tmp_path / "broken.jpg").write_bytes(bytes(data))
    script = """
import sys
from pathlib import Path
from unlabeled.images.decode import decode, quiet_native_libraries
quiet_native_libraries()
decode(Path(sys.argv[1]).read_bytes())
print("said", file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "broken.jpg")], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "said\n"
