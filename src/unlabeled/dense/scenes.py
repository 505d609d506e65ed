"""Scenes whose depth is known exactly: textured planes, boxes and spheres before a pinhole camera.

Lengths are in metres. World axes: z is up. Camera axes: x to the right, y down, z forward; depth is z.

Shape suffixes: P rays or points, S surfaces, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NEAR = 1e-6  # nearer hits are the surface that a ray starts on
JOINT = 0.02  # metres, the width of a joint between tiles
JOINT_DARKNESS = 0.8
SHADOW_GAP = 1e-4  # metres between a surface and where its shadow ray starts
SUBPIXELS = tuple((y, x) for y in (0.25, 0.75) for x in (0.25, 0.75))
REMAP_COLUMNS = 4096  # OpenCV's remap takes sides below 32768


class Texture:
    """A photograph that covers a surface, mirrored where it ends.

    pixels: uint8 (h, w, 3). metres: that its longer side covers. tile: metres between dark joints, as of a tiled floor;
    0 for none.
    """

    def __init__(self, pixels: NDArray[np.uint8], metres: float, tile: float = 0.0) -> None:
        self.tile = tile
        self.levels = [np.ascontiguousarray(pixels)]
        while min(self.levels[-1].shape[:2]) >= 2:
            h, w = self.levels[-1].shape[:2]
            half = cv2.resize(self.levels[-1], (w // 2, h // 2), interpolation=cv2.INTER_AREA)
            self.levels.append(np.asarray(half, np.uint8))
        self.texels = max(pixels.shape[:2]) / metres  # texels a metre

    def colours(self, uv_P2: Floats, footprint_P: Floats) -> Floats:
        """Return colours (P, 3) in [0, 1] at surface coordinates in metres.

        footprint: metres of surface that a pixel sees; the texture is taken from the level of its pyramid whose texels
        are about as large.
        """
        wanted = np.log2(np.maximum(footprint_P * self.texels, 1e-9)).round().astype(np.int64)
        level_P = wanted.clip(0, len(self.levels) - 1)
        colours = np.empty((len(uv_P2), 3))
        for level in np.unique(level_P):
            here = np.flatnonzero(level_P == level)
            texture = self.levels[level]
            h, w = texture.shape[:2]
            # Mirrored: 0 to w, and back.
            texels = uv_P2[here] * (self.texels / 2**level)
            x = w - np.abs(texels[:, 0] % (2 * w) - w)
            y = h - np.abs(texels[:, 1] % (2 * h) - h)
            pad = -len(here) % REMAP_COLUMNS if len(here) > REMAP_COLUMNS else 0
            maps = [
                np.pad(values - 0.5, (0, pad)).astype(np.float32).reshape(-1, min(len(here), REMAP_COLUMNS))
                for values in (x, y)
            ]
            found = cv2.remap(texture, *maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            colours[here] = np.asarray(found).reshape(-1, 3)[: len(here)] / 255
        if self.tile:
            colours *= 1 - JOINT_DARKNESS * self.joints(uv_P2, footprint_P)[:, None]
        return colours

    def joints(self, uv_P2: Floats, footprint_P: Floats) -> Floats:
        """Return the share (P,) of what a pixel sees that is joint: across the rows or the columns, what is more."""
        seen_P1 = np.maximum(footprint_P, NEAR)[:, None]

        def covered(places_P2: Floats) -> Floats:
            """Metres of joint from the middle of the one at 0 to a place."""
            nearest_P2 = np.round(places_P2 / self.tile)
            within_P2 = (places_P2 - self.tile * nearest_P2).clip(-JOINT / 2, JOINT / 2)
            metres_P2: Floats = JOINT * nearest_P2 + within_P2
            return metres_P2

        share_P2 = (covered(uv_P2 + seen_P1 / 2) - covered(uv_P2 - seen_P1 / 2)) / seen_P1
        share_P: Floats = share_P2.max(1)
        return share_P


class Surface(Protocol):
    """What a ray can hit."""

    @property
    def texture(self) -> Texture:
        """What it looks like."""

    def hit(self, origins_P3: Floats, directions_P3: Floats) -> Floats:
        """Return t (P,) of the first hit origin + t direction with t > NEAR; infinity where there is none."""

    def at(self, points_P3: Floats) -> tuple[Floats, Floats]:
        """Return the outward normals (P, 3) and surface coordinates (P, 2), in metres, of points on the surface."""


@dataclass(frozen=True)
class Plane:
    """An infinite plane through a point, spanned by two axes of length 1 at a right angle.

    Its normal is u x v; it is seen from both sides.
    """

    origin: Floats
    u: Floats
    v: Floats
    texture: Texture

    @cached_property
    def normal(self) -> Floats:
        """u x v."""
        return np.cross(self.u, self.v)

    def hit(self, origins_P3: Floats, directions_P3: Floats) -> Floats:
        """Return the first hits."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = ((self.origin - origins_P3) @ self.normal) / (directions_P3 @ self.normal)
        return np.where(t > NEAR, t, np.inf)

    def at(self, points_P3: Floats) -> tuple[Floats, Floats]:
        """Return normals and coordinates."""
        offsets = points_P3 - self.origin
        normals = np.broadcast_to(self.normal, points_P3.shape)
        return normals, np.stack((offsets @ self.u, offsets @ self.v), axis=1)


@dataclass(frozen=True)
class Box:
    """A box that stands upright, turned by `yaw` radians about the vertical through its centre."""

    centre: Floats
    half: Floats  # (3,) half of its sides
    yaw: float
    texture: Texture

    @cached_property
    def axes(self) -> Floats:
        """(3, 3), rows are its axes in the world."""
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])

    def hit(self, origins_P3: Floats, directions_P3: Floats) -> Floats:
        """Return the first hits, from outside or inside: the slab method."""
        origins, directions = (origins_P3 - self.centre) @ self.axes.T, directions_P3 @ self.axes.T
        with np.errstate(divide="ignore", invalid="ignore"):
            one, other = (-self.half - origins) / directions, (self.half - origins) / directions
        enter, leave = np.fmin(one, other).max(1), np.fmax(one, other).min(1)
        t = np.where(enter > NEAR, enter, leave)
        return np.where((enter <= leave) & (t > NEAR), t, np.inf)

    def at(self, points_P3: Floats) -> tuple[Floats, Floats]:
        """Return normals and coordinates: those of the face that a point is nearest to."""
        offsets = (points_P3 - self.centre) @ self.axes.T
        axis_P = (np.abs(offsets) / self.half).argmax(1)
        rows = np.arange(len(offsets))
        normals = np.sign(offsets[rows, axis_P])[:, None] * self.axes[axis_P]
        u, v = offsets[rows, (axis_P + 1) % 3], offsets[rows, (axis_P + 2) % 3]
        return normals, np.stack((u, v), axis=1) + 3.7 * axis_P[:, None]  # faces show different parts


@dataclass(frozen=True)
class Sphere:
    """A ball."""

    centre: Floats
    radius: float
    texture: Texture

    def hit(self, origins_P3: Floats, directions_P3: Floats) -> Floats:
        """Return the first hits, from outside or inside."""
        offsets = origins_P3 - self.centre
        a = np.einsum("pi,pi->p", directions_P3, directions_P3)
        b = np.einsum("pi,pi->p", offsets, directions_P3)
        c = np.einsum("pi,pi->p", offsets, offsets) - self.radius**2
        with np.errstate(invalid="ignore"):
            root = np.sqrt(b * b - a * c)
            near, far = (-b - root) / a, (-b + root) / a
            t = np.where(near > NEAR, near, far)
            return np.where(t > NEAR, t, np.inf)  # NaN is not above it

    def at(self, points_P3: Floats) -> tuple[Floats, Floats]:
        """Return normals and coordinates: longitude and latitude, as lengths on the equator."""
        normals = (points_P3 - self.centre) / self.radius
        longitude = np.arctan2(normals[:, 1], normals[:, 0])
        latitude = np.arcsin(normals[:, 2].clip(-1, 1))
        return normals, self.radius * np.stack((longitude, latitude), axis=1)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    focal: in pixels. size: (height, width) in pixels. position: in the world. rotation: (3, 3), world to camera. The
    principal point is the middle of the image; the centre of pixel (row, column) is at (column + 0.5, row + 0.5).
    """

    focal: float
    size: tuple[int, int]
    position: Floats
    rotation: Floats

    def directions(self, rows_P: Floats, columns_P: Floats) -> Floats:
        """Return ray directions (P, 3) in the world whose camera z is 1, so that t is depth."""
        height, width = self.size
        x, y = (columns_P - width / 2) / self.focal, (rows_P - height / 2) / self.focal
        return np.stack((x, y, np.ones_like(x)), axis=1) @ self.rotation

    def project(self, points_P3: Floats) -> tuple[Floats, Floats]:
        """Return where points appear, (P, 2) of (row, column), and their depth (P,)."""
        x, y, z = ((points_P3 - self.position) @ self.rotation.T).T
        height, width = self.size
        return np.stack((height / 2 + self.focal * y / z, width / 2 + self.focal * x / z), axis=1), z


def look(yaw: float, pitch: float, roll: float) -> Floats:
    """Return a world-to-camera rotation: yaw about the vertical, pitch upwards, roll about the view; radians."""
    forward = np.array([np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), np.sin(pitch)])
    right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    return np.stack((c * right + s * down, c * down - s * right, forward))


@dataclass(frozen=True)
class Scene:
    """Surfaces and the light on them: ambient, and a lamp whose light falls off and throws shadows."""

    surfaces: Sequence[Surface]
    lamp: Floats  # (3,) its position
    lamp_colour: Floats  # (3,)
    ambient: float  # light everywhere, in [0, 1]


class View(NamedTuple):
    """What a camera sees."""

    pixels: NDArray[np.uint8]  # (H, W, 3)
    depth: Floats  # (H, W) along the optical axis; infinite where nothing is hit


def render(scene: Scene, camera: Camera) -> View:
    """Return an image and its depth.

    Depth is that of each pixel's centre. Colour too, but along edges, where it is the mean of four points of a pixel.
    """
    height, width = camera.size
    rows, columns = (grid.ravel() + 0.5 for grid in np.mgrid[:height, :width])
    directions = camera.directions(rows, columns)
    depth_P, surface_P = first_hits(scene, camera.position, directions)
    colours_P3 = shade(scene, camera, directions, depth_P, surface_P)
    edges = np.flatnonzero(edge_mask(surface_P.reshape(height, width)))
    if len(edges):
        colours_P3[edges] = 0
        for y, x in SUBPIXELS:
            inside = camera.directions(rows[edges] - 0.5 + y, columns[edges] - 0.5 + x)
            hits = first_hits(scene, camera.position, inside)
            colours_P3[edges] += shade(scene, camera, inside, *hits) / len(SUBPIXELS)
    pixels = (colours_P3.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return View(pixels.reshape(height, width, 3), depth_P.reshape(height, width))


def first_hits(scene: Scene, origin: Floats, directions_P3: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Return t (P,) and the number of the surface (P,) that rays hit first."""
    origins = origin[None]
    t_SP = np.stack([surface.hit(origins, directions_P3) for surface in scene.surfaces])
    surface_P = t_SP.argmin(0)
    return np.take_along_axis(t_SP, surface_P[None], 0)[0], surface_P


def shade(
    scene: Scene, camera: Camera, directions_P3: Floats, t_P: Floats, surface_P: NDArray[np.int64]
) -> Floats:
    """Return colours (P, 3): texture * (ambient + lamp * max(0, cosine) / (1 + (distance / 4 m)^2)); black for none."""
    colours = np.zeros((len(t_P), 3))
    hit = np.isfinite(t_P)
    for number in np.unique(surface_P[hit]):
        here = np.flatnonzero(hit & (surface_P == number))
        directions = directions_P3[here]
        points = camera.position + t_P[here, None] * directions
        normals, uv = scene.surfaces[number].at(points)
        # The side that is seen.
        facing = np.einsum("pi,pi->p", normals, directions)
        normals = np.where(facing[:, None] > 0, -normals, normals)
        slant = np.abs(facing) / np.linalg.norm(directions, axis=1)
        # Half way between the lengths along and across the slope, in octaves.
        footprint = t_P[here] / camera.focal / np.sqrt(slant.clip(0.05))
        to_lamp = scene.lamp - points
        distance = np.linalg.norm(to_lamp, axis=1)
        cosine = np.einsum("pi,pi->p", normals, to_lamp) / distance
        lit = cosine > 0
        lit[lit] = ~in_shadow(scene, (points + SHADOW_GAP * normals)[lit])
        strength = np.where(lit, cosine, 0) / (1 + (distance / 4) ** 2)
        light = scene.ambient + strength[:, None] * scene.lamp_colour
        colours[here] = scene.surfaces[number].texture.colours(uv, footprint) * light
    return colours


def in_shadow(scene: Scene, points_P3: Floats) -> NDArray[np.bool_]:
    """Return (P,) whether something stands between points and the lamp; planes do not, they are what encloses both."""
    to_lamp = scene.lamp - points_P3
    blocked = np.zeros(len(points_P3), np.bool_)
    for surface in scene.surfaces:
        if not isinstance(surface, Plane):
            blocked |= surface.hit(points_P3, to_lamp) < 1
    return blocked


def edge_mask(surface_HW: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return where a pixel's surface is not that of all of its four neighbours."""
    mask = np.zeros(surface_HW.shape, np.bool_)
    across, down = surface_HW[:, 1:] != surface_HW[:, :-1], surface_HW[1:] != surface_HW[:-1]
    mask[:, 1:] |= across
    mask[:, :-1] |= across
    mask[1:] |= down
    mask[:-1] |= down
    return mask
