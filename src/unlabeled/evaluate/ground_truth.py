"""Lists of which images a query should find: the revisited Oxford and Paris layout, as JSON.

Ours:
    {"gallery": [NAME, ...],
     "queries": [{"name": NAME, "box": [left, top, right, bottom],
                  "easy": [NAME, ...], "hard": [...], "junk": [...]}]}
Revisitop's, numbers being places in imlist:
    {"imlist": [NAME, ...], "qimlist": [NAME, ...],
     "gnd": [{"bbx": [left, top, right, bottom], "easy": [NUMBER, ...], "hard": [...], "junk": [...]}]}

A box is optional, in pixels. A name is an image's key in its DATA, or the end of one, with the file's ending
or without.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from unlabeled.errors import UserError

LEVELS = ("easy", "hard", "junk")


class Query(NamedTuple):
    """What a query should find: names in the gallery, by level."""

    name: str
    box: tuple[float, float, float, float] | None  # left, top, right, bottom in pixels
    easy: list[str]
    hard: list[str]
    junk: list[str]


class GroundTruth(NamedTuple):
    """The images that are searched (all of DATA where it is empty), and the queries."""

    gallery: list[str]
    queries: list[Query]


def read_ground_truth(path: str | Path) -> GroundTruth:
    """Read a ground truth in either layout.

    Raises:
        UserError: the file is missing, no JSON, or of another layout.
    """
    file = Path(path).expanduser()
    if file.suffix == ".pkl":
        raise UserError(
            f"{path} is a pickle, which may run code and is not opened; write it as JSON, see docs/evaluate.md."
        )
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}.") from error
    try:
        found = _revisitop(held) if "gnd" in held else _ours(held)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is no ground truth, see docs/evaluate.md: {error!r}.") from error
    if not found.queries:
        raise UserError(f"{path} has no query.")
    return found


def _ours(held: dict[str, Any]) -> GroundTruth:
    queries = [
        Query(
            str(one["name"]),
            _box(one.get("box")),
            *([str(name) for name in one.get(level, [])] for level in LEVELS),
        )
        for one in held["queries"]
    ]
    return GroundTruth([str(name) for name in held.get("gallery", [])], queries)


def _revisitop(held: dict[str, Any]) -> GroundTruth:
    gallery = [str(name) for name in held["imlist"]]
    queries = [
        Query(
            str(name),
            _box(one.get("bbx")),
            *([gallery[int(place)] for place in one.get(level, [])] for level in LEVELS),
        )
        for name, one in zip(held["qimlist"], held["gnd"], strict=True)
    ]
    return GroundTruth(gallery, queries)


def _box(held: Any) -> tuple[float, float, float, float] | None:
    if held is None:
        return None
    left, top, right, bottom = map(float, held)
    if not (left < right and top < bottom):
        raise ValueError(f"a box {held} without pixels")
    return left, top, right, bottom


class Places:
    """Where an image is in a list of keys, by any name it may be called by."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.found: dict[str, int] = {}
        self.ambiguous: set[str] = set()
        for place, key in enumerate(keys):
            for name in _names(key):
                if self.found.setdefault(name, place) != place:
                    self.ambiguous.add(name)

    def __call__(self, name: str) -> int | None:
        """The place of a name, or None. Raises UserError for one that several images share."""
        place = self.found.get(name)
        if place is not None and name in self.ambiguous:
            raise UserError(
                f"Several images are called {name}; name them by their whole keys in the ground truth."
            )
        return place

    def all_of(self, names: Iterable[str]) -> list[int]:
        """Places of those names that are there."""
        return [place for name in names if (place := self(name)) is not None]


def _names(key: str) -> set[str]:
    path = PurePosixPath(key)
    bare = path.with_suffix("")
    ends = [PurePosixPath(*one.parts[start:]) for one in (path, bare) for start in range(len(one.parts))]
    return {key, *map(str, ends)}
