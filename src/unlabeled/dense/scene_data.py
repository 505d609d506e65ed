"""Rendered rooms as training data for depth: thousands of images, train and test with nothing in common."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from unlabeled.dense.scenes import Box, Camera, Plane, Scene, Sphere, Surface, Texture, look, render
from unlabeled.errors import UserError, writing
from unlabeled.images.decode import BadImage, decode
from unlabeled.images.sources import open_source
from unlabeled.progress import Progress
from unlabeled.scripts import refuse_imported_script
from unlabeled.weights.files import replacing

MILLIMETRES = 1000.0  # what depth files hold
TEXTURE_SIDE = 384  # pixels; short side of the photographs
MAX_TEXTURES = 240  # of a split
PARTS = ("train", "test")


@dataclass(frozen=True)
class SceneRecipe:
    """How rooms are drawn; lengths in metres, angles in degrees, all ranges uniform.

    Attributes:
        size: (height, width) of the images in pixels.
        field_of_view: horizontal; one for all images by default, since one image does not tell it from distance.
        room: range of both sides of the floor. ceiling: range of the height.
        boxes, spheres: least and most of them.
        tile: side of the floor's tiles, one for all: of lines a known length apart an image says how far they are,
            which it cannot of photographs of any scale. 0 is a floor without joints.
        walls: contrast of the photographs on walls and ceiling, in [0, 1]; 0 is paint. Where all surfaces are
            photographs in full, nothing tells a wall from the floor or from a box.
        eyes: range of the camera's height. pitch: of its angle, upwards.
        views: images of one room.
    """

    size: tuple[int, int] = (192, 256)
    field_of_view: tuple[float, float] = (60.0, 60.0)
    room: tuple[float, float] = (4.0, 8.0)
    ceiling: tuple[float, float] = (2.4, 3.4)
    boxes: tuple[int, int] = (3, 8)
    spheres: tuple[int, int] = (1, 4)
    tile: float = 0.4
    walls: float = 0.15
    eyes: tuple[float, float] = (1.4, 1.7)
    pitch: tuple[float, float] = (-20.0, 0.0)
    views: int = 1


class Written(NamedTuple):
    """What was made."""

    out: Path
    train: int  # images
    test: int
    seconds: float
    images_per_second: float


def write_scenes(
    out: str | Path,
    photographs: str,
    count: int,
    test_count: int | None = None,
    recipe: SceneRecipe | None = None,
    *,
    seed: int = 0,
    workers: int | None = None,
    console: Console | None = None,
) -> Written:
    """Render OUT/train and OUT/test: images/NNNNNN.jpg, depth/NNNNNN.png (16 bits, millimetres) and cameras.jsonl.

    photographs: DATA whose images are the textures; every fifth one is of test scenes only. count: training images.
    test_count: a fifth of that by default. seed: of everything random; an image depends on it, its part and its number
    alone. workers: processes; as many as cores by default. What is there already from the same call is kept.

    Raises:
        UserError: no two photographs can be read, a count or a size is not possible, or OUT holds other scenes.
    """
    refuse_imported_script()
    recipe = recipe or SceneRecipe()
    counts = {"train": count, "test": max(1, count // 5) if test_count is None else test_count}
    if count < 1 or counts["test"] < 1 or min(recipe.size) < 8 or recipe.views < 1:
        raise UserError("Scenes need at least one image of each part, of 8 pixels or more.")
    out = Path(out)
    # Counts are left out: more scenes may follow later.
    said = json.loads(json.dumps({"photographs": photographs, "seed": seed, **asdict(recipe)}))
    _check_same(out, said)
    begun = time.perf_counter()
    bar = Progress(console, "scenes", "image", 0, sum(counts.values())) if console else None
    done = made = 0
    textures = read_textures(photographs)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "scenes.json").write_text(json.dumps(said, indent=1) + "\n")
        if bar:
            bar.__enter__()
        try:
            jobs = list[tuple[str, range]]()
            for part in PARTS:
                for name in ("images", "depth", "cameras"):
                    (out / part / name).mkdir(parents=True, exist_ok=True)
                starts = range(0, counts[part], recipe.views)
                jobs += [(part, range(start, min(start + recipe.views, counts[part]))) for start in starts]
            for written, found in _mapped(
                jobs, (out, recipe, seed, textures), workers or os.cpu_count() or 1
            ):
                made += written
                done += found
                if bar:
                    bar.update(done, f"{made / (time.perf_counter() - begun):.1f} images/s")
        finally:
            if bar:
                bar.__exit__()
        for part in PARTS:
            lines = [path.read_text() for path in sorted((out / part / "cameras").glob("*.json"))]
            (out / part / "cameras.jsonl").write_text("".join(lines))
    seconds = time.perf_counter() - begun
    return Written(out, counts["train"], counts["test"], seconds, made / seconds)


def _check_same(out: Path, said: dict[str, Any]) -> None:
    if not (out / "scenes.json").exists():
        return
    held = json.loads((out / "scenes.json").read_text())
    different = [
        f"{name} {held.get(name)}, not {value}" for name, value in said.items() if held.get(name) != value
    ]
    if different:
        raise UserError(f"{out} holds other scenes (of {'; '.join(different)}); choose another --out.")


def read_textures(photographs: str) -> dict[str, list[NDArray[np.uint8]]]:
    """Return photographs of the two parts, evenly drawn over DATA; each fifth of them is for test."""
    source = open_source(photographs)
    numbers = np.unique(np.linspace(0, len(source) - 1, min(len(source), 5 * MAX_TEXTURES // 4)).astype(int))
    found: list[NDArray[np.uint8]] = []
    for number in numbers.tolist():
        try:
            pixels = decode(source.read(number).data, TEXTURE_SIDE)
        except (BadImage, OSError):
            continue  # one texture fewer
        scale = TEXTURE_SIDE / min(pixels.shape[:2])
        if scale < 1:
            h, w = (max(1, round(side * scale)) for side in pixels.shape[:2])
            pixels = np.asarray(cv2.resize(pixels, (w, h), interpolation=cv2.INTER_AREA), np.uint8)
        found.append(pixels)
    if len(found) < 2:
        raise UserError(f"{photographs} holds {len(found)} photographs that can be read; textures need 2.")
    test = found[1::5]
    return {"train": [one for place, one in enumerate(found) if place % 5 != 1], "test": test}


def random_scene(rng: np.random.Generator, textures: list[NDArray[np.uint8]], recipe: SceneRecipe) -> Scene:
    """Return a room with boxes and balls in it, some boxes on others, each surface a photograph's."""

    def texture(low: float, high: float) -> Texture:
        return Texture(textures[rng.integers(len(textures))], rng.uniform(low, high))

    def painted() -> Texture:
        pixels = textures[rng.integers(len(textures))]
        mean = pixels.reshape(-1, 3).mean(0)
        return Texture((mean + recipe.walls * (pixels - mean)).astype(np.uint8), rng.uniform(1, 4))

    width, depth = rng.uniform(*recipe.room, 2)
    height = rng.uniform(*recipe.ceiling)
    x, y, z = np.eye(3)
    zero, far = np.zeros(3), np.array([width, depth, height])
    surfaces: list[Surface] = [
        Plane(zero, x, y, Texture(textures[rng.integers(len(textures))], rng.uniform(1, 4), recipe.tile)),
        Plane(far, x, y, painted()),
        *(Plane(corner, x, z, painted()) for corner in (zero, far)),
        *(Plane(corner, y, z, painted()) for corner in (zero, far)),
    ]
    for _ in range(rng.integers(recipe.boxes[0], recipe.boxes[1] + 1)):
        half = rng.uniform((0.1, 0.1, 0.1), (0.6, 0.6, min(0.9, 0.4 * height)))
        place = rng.uniform(0.1, 0.9, 2) * (width, depth)
        yaw = rng.uniform(0, np.pi)
        surfaces.append(Box(np.array([*place, half[2]]), half, yaw, texture(0.5, 2)))
        if rng.random() < 0.3:  # something on top
            side = rng.uniform(0.3, 0.9) * min(half[0], half[1])
            top = 2 * half[2]
            if rng.random() < 0.5:
                surfaces.append(Sphere(np.array([*place, top + side]), side, texture(0.5, 2)))
            else:
                upper = np.array([side, side, rng.uniform(0.5, 1.5) * side])
                centre = np.array([*place, top + upper[2]])
                surfaces.append(Box(centre, upper, yaw + rng.uniform(0, 1), texture(0.5, 2)))
    for _ in range(rng.integers(recipe.spheres[0], recipe.spheres[1] + 1)):
        radius = rng.uniform(0.1, 0.5)
        place = rng.uniform(0.1, 0.9, 2) * (width, depth)
        surfaces.append(Sphere(np.array([*place, radius]), radius, texture(0.5, 2)))
    lamp = np.array([*(rng.uniform(0.2, 0.8, 2) * (width, depth)), height - 0.2])
    return Scene(surfaces, lamp, rng.uniform(0.8, 1.6) * rng.uniform(0.85, 1, 3), rng.uniform(0.3, 0.6))


def random_camera(rng: np.random.Generator, scene: Scene, recipe: SceneRecipe) -> Camera:
    """Return a camera at the height of eyes, half a metre or more from what it looks at, aimed into the room."""
    # The far corner of the floor: all six planes go through it or through 0.
    room = np.max([surface.origin for surface in scene.surfaces if isinstance(surface, Plane)], axis=0)
    height, width = recipe.size
    while True:
        focal = width / 2 / np.tan(np.radians(rng.uniform(*recipe.field_of_view)) / 2)
        position = np.array(
            [*(rng.uniform(0.08, 0.92, 2) * room[:2]), min(rng.uniform(*recipe.eyes), room[2] - 0.3)]
        )
        target = rng.uniform(0.25, 0.75, 2) * room[:2] - position[:2]
        yaw = np.arctan2(target[1], target[0]) + rng.normal(0, 0.15)
        rotation = look(yaw, np.radians(rng.uniform(*recipe.pitch)), np.radians(rng.normal(0, 2)))
        camera = Camera(float(focal), recipe.size, position, rotation)
        inside = any(
            isinstance(surface, Box | Sphere) and np.isfinite(_nearest(surface, position)).all()
            for surface in scene.surfaces
        )
        rows, columns = (grid.ravel() for grid in np.mgrid[0 : height : height / 8, 0 : width : width / 8])
        seen = np.min(
            [surface.hit(position[None], camera.directions(rows, columns)) for surface in scene.surfaces], 0
        )
        if not inside and seen.min() > 0.5:
            return camera


def _nearest(surface: Surface, position: NDArray[np.float64]) -> NDArray[np.float64]:
    """t of two opposite rays from a point; both are finite only for points inside of a closed surface."""
    up = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    return surface.hit(position[None], up)


def make_view(
    rng_of_room: np.random.Generator,
    rng_of_view: np.random.Generator,
    textures: list[NDArray[np.uint8]],
    recipe: SceneRecipe,
) -> tuple[NDArray[np.uint8], NDArray[np.float64], Camera]:
    """Return pixels, depth and camera of one view of a room."""
    scene = random_scene(rng_of_room, textures, recipe)
    camera = random_camera(rng_of_view, scene, recipe)
    return *render(scene, camera), camera


Job = tuple[str, range]  # a part, and the numbers of a room's views
_Setting = tuple[Path, SceneRecipe, int, dict[str, list[NDArray[np.uint8]]]]
_setting: _Setting  # of a worker process


def _mapped(jobs: list[Job], setting: _Setting, workers: int) -> Iterator[tuple[int, int]]:
    if workers == 1:
        _start_worker(setting)
        yield from map(_write_room, jobs)
        return
    # Spawned: a fork of a process with threads may wait for a lock that nobody holds.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (setting,)) as pool:
        yield from pool.map(_write_room, jobs)


def _start_worker(setting: _Setting) -> None:
    global _setting
    _setting = setting


def _write_room(job: Job) -> tuple[int, int]:
    """Write the views of one room that are missing; returns (written, there)."""
    out, recipe, seed, textures = _setting
    part, numbers = job
    folder = out / part
    missing = [number for number in numbers if not (folder / "cameras" / f"{number:06d}.json").exists()]
    for number in missing:
        room = np.random.default_rng([seed, PARTS.index(part), number // recipe.views])
        view = np.random.default_rng([seed, PARTS.index(part), number // recipe.views, 1 + number])
        pixels, depth, camera = make_view(room, view, textures[part], recipe)
        millimetres = (
            np.where(np.isfinite(depth), depth * MILLIMETRES + 0.5, 0).clip(0, 65535).astype(np.uint16)
        )
        _encode(folder / "images" / f"{number:06d}.jpg", pixels[..., ::-1], cv2.IMWRITE_JPEG_QUALITY, 95)
        _encode(folder / "depth" / f"{number:06d}.png", millimetres, cv2.IMWRITE_PNG_COMPRESSION, 3)
        line = {
            "key": f"{number:06d}", "focal": camera.focal, "size": camera.size,
            "position": camera.position.tolist(), "rotation": camera.rotation.tolist(),
        }  # fmt: skip
        # Written last: it says that the other two are whole.
        with replacing(folder / "cameras" / f"{number:06d}.json") as temporary:
            temporary.write_text(json.dumps(line) + "\n")
    return len(missing), len(numbers)


def _encode(path: Path, pixels: NDArray[Any], option: int, value: int) -> None:
    _, data = cv2.imencode(path.suffix, np.ascontiguousarray(pixels), [option, value])
    with replacing(path) as temporary:
        temporary.write_bytes(data.tobytes())
