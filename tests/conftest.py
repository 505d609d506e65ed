"""What all tests share."""

import io
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled.errors import UserError
from unlabeled.ray_cluster import connected

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The tensors of tests are small: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of two workers, one for all tests."""
    pytest.importorskip("ray", reason="Ray is not installed (the extra scale)")
    with ExitStack() as stack:
        try:
            stack.enter_context(connected(workers=2))
        except UserError as error:
            if "did not start" not in str(error):
                raise
            pytest.skip(str(error))
        yield


@pytest.fixture(scope="session")
def photograph() -> np.ndarray:
    """A real photograph, uint8 (300, 451, 3)."""
    import skimage

    with Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png") as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="session")
def tile_folder(tmp_path_factory: pytest.TempPathFactory, photograph: np.ndarray) -> Path:
    """24 tiles of 40 pixels in two class folders, JPEG and PNG."""
    folder = tmp_path_factory.mktemp("tiles")
    for number in range(24):
        top, left = (number * 11) % 250, (number * 37) % 400
        tile = Image.fromarray(photograph[top : top + 40, left : left + 40])
        target = folder / ("left" if left < 200 else "right")
        target.mkdir(exist_ok=True)
        tile.save(target / f"{number:02d}.{'jpg' if number % 2 else 'png'}")
    return folder


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not on this machine")
    return SHARED


def encoded(image: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    """An image as a file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()
