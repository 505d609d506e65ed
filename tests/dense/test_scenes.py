"""Depth against closed forms, views of one room against each other, and what is written."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unlabeled.dense.labelled import depth_images
from unlabeled.dense.scene_data import (
    SceneRecipe,
    random_camera,
    random_scene,
    read_textures,
    write_scenes,
)
from unlabeled.dense.scenes import (
    JOINT,
    JOINT_DARKNESS,
    Box,
    Camera,
    Plane,
    Scene,
    Sphere,
    Texture,
    first_hits,
    look,
    render,
)
from unlabeled.errors import UserError

GREY = Texture(np.full((8, 8, 3), 128, np.uint8), 1.0)
X, Y, Z = np.eye(3)


def scene_of(*surfaces: object) -> Scene:
    return Scene(surfaces, np.array([0.3, -0.2, 5.0]), np.ones(3), 0.5)


def camera_at(
    position: tuple[float, float, float], yaw: float = 0, pitch: float = 0, roll: float = 0
) -> Camera:
    return Camera(40.0, (24, 32), np.array(position), look(yaw, pitch, roll))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.5, 3), st.floats(-3, 3), st.floats(-0.9, 0.9), st.floats(-0.3, 0.3))
def test_depth_of_a_floor(height: float, yaw: float, pitch: float, roll: float) -> None:
    """Of a camera at height h, a pixel whose ray (x, y, 1) falls by s a metre of depth sees the floor at h / s."""
    camera = camera_at((0.4, -1.0, height), yaw, pitch, roll)
    depth = render(scene_of(Plane(np.zeros(3), X, Y, GREY)), camera).depth
    for row in range(0, 24, 5):
        for column in range(0, 32, 7):
            x, y = (column + 0.5 - 16) / 40, (row + 0.5 - 12) / 40
            # Roll turns the camera, then pitch lifts it: the vertical part of the ray.
            upright_y = math.cos(roll) * y + math.sin(roll) * x
            falls = upright_y * math.cos(pitch) - math.sin(pitch)
            expected = height / falls if falls > 0 else math.inf
            assert depth[row, column] == pytest.approx(expected, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.floats(1.5, 9), st.floats(-0.4, 0.4), st.floats(-0.3, 0.3), st.floats(0.2, 1.2))
def test_depth_of_a_sphere(distance: float, aside: float, above: float, radius: float) -> None:
    """Seen along x from the origin: the nearer root of |t (x, y, 1) - c|^2 = r^2."""
    centre = np.array([distance, -aside, above])
    depth = render(scene_of(Sphere(centre, radius, GREY)), camera_at((0, 0, 0))).depth
    for row in range(24):
        for column in range(32):
            ray = np.array([1.0, -(column + 0.5 - 16) / 40, -(row + 0.5 - 12) / 40])
            along = ray @ centre / (ray @ ray)
            inside = radius**2 - centre @ centre + along**2 * (ray @ ray)
            expected = along - math.sqrt(inside / (ray @ ray)) if inside > 0 else math.inf
            if abs(inside) > 1e-9:
                assert depth[row, column] == pytest.approx(expected, rel=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 3.2), st.integers(0, 99))
def test_a_box_is_six_rectangles(yaw: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    centre, half = rng.uniform((3, -1, -0.5), (4, 1, 0.5)), rng.uniform(0.2, 0.8, 3)
    box = Box(centre, half, yaw, GREY)
    rays = np.stack((np.ones(200), rng.uniform(-0.6, 0.6, 200), rng.uniform(-0.4, 0.4, 200)), axis=1)
    found = box.hit(np.zeros((1, 3)), rays)
    axes = np.array([[math.cos(yaw), math.sin(yaw), 0], [-math.sin(yaw), math.cos(yaw), 0], [0, 0, 1]])
    for ray, t in zip(rays, found, strict=True):
        hits = [math.inf]
        for axis in range(3):
            for sign in (-1, 1):
                face = centre + sign * half[axis] * axes[axis]
                along = face @ axes[axis] / (ray @ axes[axis])
                offset = axes @ (along * ray - centre)
                others = [other for other in range(3) if other != axis]
                if along > 0 and all(abs(offset[other]) <= half[other] for other in others):
                    hits.append(along)
        assert t == pytest.approx(min(hits), rel=1e-9)


def test_two_views_of_a_room_agree() -> None:
    """What one camera sees at a depth, another sees at the depth at which it projects there, or something nearer."""
    recipe = SceneRecipe(size=(48, 64))
    rng = np.random.default_rng(5)
    photographs = [rng.integers(0, 255, (20, 30, 3), np.uint8) for _ in range(3)]
    scene = random_scene(rng, photographs, recipe)
    shared = 0
    for _ in range(4):
        first, second = (random_camera(rng, scene, recipe) for _ in range(2))
        depth = render(scene, first).depth
        assert np.isfinite(depth).all()
        rows, columns = (grid.ravel() + 0.5 for grid in np.mgrid[:48, :64])
        points = first.position + depth.reshape(-1, 1) * first.directions(rows, columns)
        places, z = second.project(points)
        seen = (z > 0) & (places > 0).all(1) & (places < (48, 64)).all(1)
        t, _ = first_hits(scene, second.position, second.directions(*places[seen].T))
        assert (t <= z[seen] + 1e-9).all()
        visible = np.isclose(t, z[seen], rtol=1e-9)
        shared += visible.sum()
    assert shared > 1000


def test_floors_have_tiles_and_walls_are_paler(photograph: np.ndarray) -> None:
    for walls in (0.0, 0.25):
        recipe = SceneRecipe(tile=0.5, walls=walls)
        scene = random_scene(np.random.default_rng(0), [photograph, photograph], recipe)
        floor, *others = (surface.texture for surface in scene.surfaces if isinstance(surface, Plane))
        assert floor.tile == 0.5
        assert np.array_equal(floor.levels[0], photograph)
        for texture in others:
            assert texture.tile == 0
            expected = photograph.mean((0, 1)) * (1 - walls) + walls * photograph
            assert np.abs(texture.levels[0] - expected).max() <= 1


def test_pixels_and_points_are_inverse() -> None:
    camera = camera_at((1, 2, 1.5), 0.7, -0.2, 0.1)
    rows, columns = np.random.default_rng(0).uniform(0, 24, (2, 50))
    depth = np.linspace(0.5, 9, 50)
    places, z = camera.project(camera.position + depth[:, None] * camera.directions(rows, columns))
    np.testing.assert_allclose(places, np.stack((rows, columns), 1), atol=1e-9)
    np.testing.assert_allclose(z, depth)
    np.testing.assert_allclose(camera.rotation @ camera.rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(camera.rotation) == pytest.approx(1)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 1.0), st.floats(0.001, 0.5), st.integers(0, 99))
@example(0.1015625, 0.0859375, 0)
def test_joints_are_the_share_of_a_pixel_that_they_cover(tile: float, footprint: float, seed: int) -> None:
    """Against a count of 4,001 points across the pixel, that sees one joint or several, in both directions."""
    points = np.random.default_rng(seed).uniform(-3, 3, 20)
    across = points[:, None] + np.linspace(-0.5, 0.5, 4001) * footprint
    counted = (np.abs(across - tile * np.round(across / tile)) <= JOINT / 2).mean(1)
    middle = np.full_like(points, 2.5 * tile)
    between = 2.5 * tile + np.linspace(-0.5, 0.5, 4001) * footprint
    counted_between = (np.abs(between - tile * np.round(between / tile)) <= JOINT / 2).mean()
    floor = Texture(np.zeros((4, 4, 3), np.uint8), 1.0, tile)
    for uv in ((points, middle), (middle, points)):
        found = floor.joints(np.stack(uv, 1), np.full(20, footprint))
        np.testing.assert_allclose(found, np.maximum(counted, counted_between), atol=2e-3)
    white = Texture(np.full((4, 4, 3), 255, np.uint8), 1.0, tile)
    colours = white.colours(np.array([[0, middle[0]], [middle[0], middle[0]]]), np.full(2, 1e-3))
    np.testing.assert_allclose(colours[:, 0], [1 - JOINT_DARKNESS, 1])


def test_a_texture_lies_where_it_should(photograph: np.ndarray) -> None:
    """A wall that fills the view, lit evenly: the photograph itself."""
    pixels = photograph[:240, :320]
    camera = Camera(320.0, (240, 320), np.zeros(3), look(0, 0, 0))
    wall = Plane(np.array([2.0, 1.0, 0.75]), -Y, -Z, Texture(pixels, 2.0))
    scene = Scene([wall], np.array([-1e6, 0, 0]), np.zeros(3), 1.0)
    view = render(scene, camera)
    np.testing.assert_allclose(view.depth, 2.0)
    assert np.abs(view.pixels.astype(int) - pixels).mean() < 1
    mirrored = render(
        Scene([Plane(np.array([2.0, -1.0, 0.75]), -Y, -Z, Texture(pixels, 2.0))], scene.lamp, np.zeros(3), 1),
        camera,
    )
    assert np.abs(mirrored.pixels[:, ::-1].astype(int) - pixels).mean() < 1


def test_shadows_and_light() -> None:
    """Under a lamp, the floor below a ball is darker than beside it."""
    floor = Plane(np.zeros(3), X, Y, GREY)
    ball = Sphere(np.array([0, 0, 1.0]), 0.3, GREY)
    camera = Camera(100.0, (64, 64), np.array([-2.0, 0, 1.0]), look(0, -0.45, 0))
    scene = Scene([floor, ball], np.array([0, 0, 4.0]), np.ones(3), 0.2)
    pixels = render(scene, camera).pixels.mean(2)
    (below, beside), _ = camera.project(np.array([[0, 0, 0], [0, 0.6, 0.0]]))
    dark, bright = (pixels[int(row), int(column)] for row, column in (below, beside))
    assert dark == pytest.approx(0.2 * 128, abs=1)
    assert bright > 2 * dark


@pytest.fixture
def photographs(tmp_path: Path, photograph: np.ndarray) -> str:
    from PIL import Image

    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(6):
        tile = photograph[20 * number : 20 * number + 120, 40 * number : 40 * number + 160]
        Image.fromarray(tile).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"nothing")
    return str(folder)


def test_no_photograph_is_in_both_parts(photographs: str) -> None:
    textures = read_textures(photographs)
    assert [len(textures[part]) for part in ("train", "test")] == [5, 1]
    held = {one.tobytes() for one in textures["train"]}
    assert not held & {one.tobytes() for one in textures["test"]}


def test_what_is_written(tmp_path: Path, photographs: str) -> None:
    recipe = SceneRecipe(size=(24, 32), views=2)
    out = tmp_path / "scenes"
    made = write_scenes(out, photographs, 3, 1, recipe, workers=1)
    assert (made.train, made.test) == (3, 1)
    data = depth_images(out / "train")
    assert len(data) == 3
    assert not data.bad
    example = data.read(2)
    cameras = [json.loads(line) for line in (out / "train" / "cameras.jsonl").read_text().splitlines()]
    camera = Camera(
        cameras[2]["focal"], tuple(cameras[2]["size"]), np.array(cameras[2]["position"]),
        np.array(cameras[2]["rotation"]),
    )  # fmt: skip
    # The room again, from its seed: number 2 is the first view of room 1.
    rng = np.random.default_rng([0, 0, 1])
    scene = random_scene(rng, read_textures(photographs)["train"], recipe)
    np.testing.assert_allclose(example.target, render(scene, camera).depth, atol=6e-4)

    before = {path: path.read_bytes() for path in out.rglob("*.*g")}
    lost = out / "train" / "cameras" / "000001.json"
    lost.unlink()
    again = write_scenes(out, photographs, 3, 1, recipe, workers=1)
    assert again.images_per_second * again.seconds == pytest.approx(1)
    assert before == {path: path.read_bytes() for path in out.rglob("*.*g")}
    with pytest.raises(UserError, match=r"holds other scenes \(of seed 0, not 1\)"):
        write_scenes(out, photographs, 3, 1, recipe, seed=1)


def test_scenes_that_are_not_possible(tmp_path: Path, photographs: str) -> None:
    with pytest.raises(UserError, match="at least one image"):
        write_scenes(tmp_path / "a", photographs, 0)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match="0 photographs that can be read"):
        write_scenes(tmp_path / "a", str(tmp_path / "one"), 1)
    assert not (tmp_path / "a").exists()
