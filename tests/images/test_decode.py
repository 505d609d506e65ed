"""Decoding, against Pillow's own conversion; broken and hostile files are refused with a reason, cheaply."""

import contextlib
import io
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, UnidentifiedImageError

from unlabeled.images import decode as module
from unlabeled.images.decode import MAX_PIXELS, BadImage, decode
from unlabeled.images.headers import jpeg_header, png_header, webp_header

SETTINGS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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


# What is refused


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_refused_wherever_they_end(photo: Image.Image, kind: str) -> None:
    data = encoded(photo, kind)
    decode(data)
    for share in (0.02, 0.1, 0.3, 0.5, 0.8, 0.95, 0.99):
        with pytest.raises(BadImage):
            decode(data[: int(share * len(data))])
    # The last bytes of GIF and PNG say only that nothing follows; checksums come before them in PNG.
    with pytest.raises(BadImage):
        decode(data[: {"GIF": -4, "PNG": -24}.get(kind, -2)])


def test_the_reason_says_truncated(photo: Image.Image) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encoded(photo, kind)
        with pytest.raises(BadImage, match="truncated"):
            decode(data[: len(data) // 2])


def test_the_thumbnail_of_a_truncated_jpeg_does_not_hide_it(photo: Image.Image) -> None:
    thumbnail = encoded(photo.resize((30, 20)), "JPEG")
    block = b"\xff\xe1" + (len(thumbnail) + 8).to_bytes(2, "big") + b"Exif\0\0" + thumbnail
    data = encoded(photo, "JPEG")
    whole = data[:2] + block + data[2:]
    np.testing.assert_array_equal(decode(whole), decode(data))
    with pytest.raises(BadImage, match="truncated"):
        decode(whole[: len(block) + 1200])


def test_bytes_after_the_image_do_no_harm(photo: Image.Image) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        data = encoded(photo, kind)
        np.testing.assert_array_equal(decode(data + bytes(10_000)), decode(data))


def test_a_zero_filled_download_is_refused(photo: Image.Image) -> None:
    for kind in ("JPEG", "PNG"):
        for mode in ("RGB", "L", *(("P", "RGBA") if kind == "PNG" else ())):
            data = encoded(photo.convert(mode), kind)
            with pytest.raises(BadImage):
                decode(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\0", "not an image"),
        (b"hello, I am a text file\n" * 50, "not an image"),
        (b"<html><body>404</body></html>", "not an image"),
        (b"%PDF-1.4 ...", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"\xff\xd8\xff", "."),
        (b"\x89PNG\r\n\x1a\n", "."),
        (b"RIFF\0\0\0\0WEBP", "."),
        (b"GIF89a", "."),
        (b"BM", "."),
        (b"II*\0", "."),
        (bytes(1_000_000), "not an image"),
    ],
)
def test_what_is_no_image_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        decode(data)
    assert str(caught.value) and "\n" not in str(caught.value)


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def huge_png(width: int, height: int, data: bytes = b"") -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + png_chunk(b"IDAT", data or zlib.compress(bytes(1000)))
        + png_chunk(b"IEND", b"")
    )


def huge_jpeg(width: int, height: int, marker: int = 0xC0) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=marker == 0xC2))
    at = data.index(bytes([0xFF, marker]))
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def huge_tiff(width: int, height: int, tile: int | None = None) -> bytes:
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)]
    body = zlib.compress(bytes(1000))
    at = 8 + 2 + 12 * (len(tags) + (4 if tile else 3)) + 4
    if tile:
        tags += [(322, 4, tile), (323, 4, tile), (324, 4, at), (325, 4, len(body))]
    else:
        tags += [(273, 4, at), (278, 4, height), (279, 4, len(body))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted(tags))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + body


def huge_gif(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def huge_gif_frame(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    at = data.index(b",\0\0\0\0\x08\0\x08\0")
    data[at + 5 : at + 9] = struct.pack("<HH", width, height)
    return bytes(data)


def huge_bmp(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def huge_webp(kind: str) -> bytes:
    if kind == "lossless":
        data = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True))
        data[21:25] = struct.pack("<I", 16382 | 16382 << 14)
    elif kind == "lossy":
        data = bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP"))
        data[26:30] = struct.pack("<HH", 16383, 16383)
    else:
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        data = bytearray(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
        data[24:30] = (16382).to_bytes(3, "little") * 2
    return bytes(data)


HUGE = {
    "png": huge_png(100_000, 100_000),
    "png just beyond": huge_png(16_384, MAX_PIXELS // 16_384 + 1),
    "jpeg": huge_jpeg(65_500, 65_500),
    "jpeg progressive": huge_jpeg(65_500, 65_500, 0xC2),
    "jpeg below the limit, but too few bytes": huge_jpeg(10_000, 10_000),
    "progressive below the limit, but too few bytes": huge_jpeg(10_000, 10_000, 0xC2),
    "tiff": huge_tiff(100_000, 100_000),
    "tiff tile": huge_tiff(100, 100, 100_000),
    "gif": huge_gif(65_535, 65_535),
    "gif frame": huge_gif_frame(65_535, 65_535),
    "bmp": huge_bmp(100_000, 100_000),
    "bmp upside down": huge_bmp(100_000, -100_000),
    "webp lossy": huge_webp("lossy"),
    "webp lossless": huge_webp("lossless"),
    "webp animated": huge_webp("animated"),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_declared_sizes_are_refused(name: str) -> None:
    with pytest.raises(BadImage, match="truncated" if "few" in name else "too large"):
        decode(HUGE[name])


def test_refusing_takes_no_memory(tmp_path: Path) -> None:
    """In a process of its own, whose resident memory may grow by 100 MB and no more."""
    for name, data in HUGE.items():
        (tmp_path / name.replace(" ", "_")).write_bytes(data)
    script = """
import resource, sys
from pathlib import Path
from unlabeled.images.decode import BadImage, decode
files = [p.read_bytes() for p in sorted(Path(sys.argv[1]).iterdir())]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for data in files:
    try:
        decode(data)
    except BadImage:
        continue
    raise SystemExit("decoded")
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown // (1024 if sys.platform == "darwin" else 1))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000  # kB
    assert not done.stderr


def test_a_progressive_jpeg_of_endless_scans_is_refused(photo: Image.Image) -> None:
    data = encoded(photo, "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    with pytest.raises(BadImage, match="scans"):
        decode(data[:-2] + 2000 * data[scan:-2] + data[-2:])


def test_a_png_text_bomb_takes_little(photo: Image.Image) -> None:
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9))
    data = encoded(photo, "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(BadImage):
        decode(data[:33] + bomb + data[33:])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000 * (
        1024 if sys.platform == "darwin" else 1
    )


def test_another_librarys_settings_change_nothing(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    data = encoded(photo, "GIF")
    with pytest.raises(BadImage):
        decode(data[: len(data) // 2])
    with pytest.raises(BadImage, match="too large"):
        decode(HUGE["gif"])


# Fuzz: never anything but pixels or BadImage

FUZZED = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("GIF", {}),
    ("TIFF", {}),
    ("BMP", {}),
]


@pytest.fixture(scope="module")
def samples(photo: Image.Image) -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    small = photo.resize((67, 45))
    return [
        encoded(small, kind, **options, **({} if kind in ("GIF", "BMP") else {"exif": exif}))
        for kind, options in FUZZED
    ] + [encoded(small.convert(mode), "PNG") for mode in ("P", "LA", "1")]


def survives(data: bytes) -> None:
    try:
        pixels = decode(data)
    except BadImage as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert 4 <= pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS


@SETTINGS
@given(which=st.integers(0, 9), share=st.floats(0, 1))
def test_any_truncation(samples: list[bytes], which: int, share: float) -> None:
    survives(samples[which][: int(share * len(samples[which]))])


@SETTINGS
@given(
    which=st.integers(0, 9),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=8),
    head=st.booleans(),
)
def test_any_flipped_bytes(
    samples: list[bytes], which: int, flips: list[tuple[float, int]], head: bool
) -> None:
    data = bytearray(samples[which])
    for place, change in flips:
        data[int(place * (min(len(data), 200) if head else len(data)))] ^= change
    survives(bytes(data))


@SETTINGS
@given(which=st.integers(0, 9), junk=st.binary(max_size=300), keep=st.integers(0, 60))
def test_any_junk_behind_a_true_beginning(samples: list[bytes], which: int, junk: bytes, keep: int) -> None:
    survives(samples[which][:keep] + junk)
    for header in (jpeg_header, png_header, webp_header):
        header(samples[which][:keep] + junk)


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
