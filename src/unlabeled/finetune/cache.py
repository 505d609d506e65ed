"""Tokens of a frozen backbone on disk, computed once: epochs then cost a head's time alone.

    cls.bin       (E, L, D) of E entries and the L layers that a head reads
    patches.bin   (P, L, D) of all patches, one entry after another; of heads that read their mean, that alone
    targets.bin   of all entries, one after another
    cache.npz     grids, places and shapes; written last, which says that the rest is whole

Shape suffixes: B images, E entries, N patches, P patches of all entries, D width, L layers.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from unlabeled.errors import UserError, writing
from unlabeled.finetune.batches import Group, Report, all_batches
from unlabeled.finetune.examples import Examples
from unlabeled.images.order import ShuffledOrder
from unlabeled.progress import Progress
from unlabeled.vit import Tokens
from unlabeled.weights.files import replacing

FREE_SHARE = 0.5  # of the free disk that a cache may fill

TokensOf = Callable[[Tensor], list[Tokens]]  # of uint8 images (B, 3, H, W)


class CacheTooLarge(Exception):  # noqa: N818  (a fact about a disk)
    """The tokens would fill the disk; the message says how much they would take."""


class TokenCache:
    """Tokens of E entries and their targets, memory-mapped; a batch is copied out of it.

    Attributes:
        seconds: that the tokens took to compute.
        size: bytes on the disk.
    """

    def __init__(self, folder: Path) -> None:
        with np.load(folder / "cache.npz") as held:
            self.grids: NDArray[np.int64] = held["grids"]
            self.target_shapes: NDArray[np.int64] = held["target_shapes"]
            said = json.loads(str(held["said"]))
        self.said: dict[str, Any] = said
        self.seconds: float = said["seconds"]
        counts = self.grids.prod(axis=1)
        self.ends: NDArray[np.int64] = np.cumsum(counts)
        sizes = self.target_shapes.prod(axis=1)
        self.target_ends: NDArray[np.int64] = np.cumsum(sizes)
        L, D, dtype = said["layers"], said["width"], np.dtype(said["dtype"])
        self.cls = np.memmap(folder / "cls.bin", dtype, "r", shape=(len(self), L, D))
        self.patches = np.memmap(folder / "patches.bin", dtype, "r", shape=(int(self.ends[-1]), L, D))
        self.targets = np.memmap(folder / "targets.bin", np.dtype(said["target"]), "r")
        self.size = sum(path.stat().st_size for path in folder.iterdir())

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.grids)

    def order(self, seed: int) -> ShuffledOrder:
        """Return an endless shuffled walk over the entries."""
        return ShuffledOrder(len(self), seed)

    def groups(self, entries_B: NDArray[np.int64]) -> list[Group]:
        """Return some entries, those of one grid together."""
        by_grid: dict[tuple[int, ...], list[int]] = {}
        for entry in entries_B.tolist():
            by_grid.setdefault((*self.grids[entry], *self.target_shapes[entry]), []).append(entry)
        return [self._group(entries) for entries in by_grid.values()]

    def all_groups(self, batch_size: int) -> Iterator[Group]:
        """Give all entries in their order."""
        for first in range(0, len(self), batch_size):
            yield from self.groups(np.arange(first, min(first + batch_size, len(self))))

    def _group(self, entries: list[int]) -> Group:
        h, w = (int(side) for side in self.grids[entries[0]])
        shape = tuple(self.target_shapes[entries[0]].tolist())
        patches_BNLD = self._stack(self.patches, self.ends, entries, h * w)
        cls_BLD = torch.from_numpy(self.cls[entries]).float()
        targets = self._stack(self.targets, self.target_ends, entries, int(np.prod(shape, dtype=np.int64)))
        empty = cls_BLD.new_zeros(len(entries), 0, cls_BLD.shape[-1])
        layers = [
            Tokens(cls_BLD[:, layer], empty, patches_BNLD[:, :, layer].float(), (h, w))
            for layer in range(cls_BLD.shape[1])
        ]
        return Group(layers, targets.view(len(entries), *shape))

    @staticmethod
    def _stack(values: NDArray[Any], ends: NDArray[np.int64], entries: list[int], count: int) -> Tensor:
        return torch.from_numpy(np.stack([values[ends[one] - count : ends[one]] for one in entries]))


def cached(
    examples: Examples,
    tokens_of: TokensOf,
    folder: Path,
    key: dict[str, Any],
    *,
    pooled_only: bool,
    batch_size: int,
    report: Report,
    console: Console | None,
    views: int = 1,
    seed: int = 0,
    dtype: Literal["float16", "float32"] = "float16",
) -> TokenCache:
    """Return the tokens of all examples that can be read, computed unless they are in the folder already.

    tokens_of: uint8 images (B, 3, H, W) to the tokens that the head reads. key: JSON; what tokens depend on besides: a
    cache of another is made anew. pooled_only: the mean of the patches stands for them.

    Raises:
        CacheTooLarge: the disk has no room.
        UserError: no example can be read, a token is beyond the dtype's range, or the disk is full.
    """
    key = key | {"views": views, "seed": seed, "dtype": dtype, "pooled_only": pooled_only}
    if (folder / "cache.npz").exists() and (held := TokenCache(folder)).said["key"] == key:
        return held
    shutil.rmtree(folder, ignore_errors=True)
    grids, shapes, begun = list[tuple[int, int]](), list[tuple[int, ...]](), time.perf_counter()
    layers = width = 0
    target = ""
    total, bar = len(examples) * views, None
    if console:
        bar = Progress(console, "features", "image", 0, total)
        bar.__enter__()
    try:
        with writing(folder):
            folder.mkdir(parents=True)
            names = ("cls", "patches", "targets")
            files = {name: (folder / f"{name}.bin").open("wb") for name in names}
        try:
            for group in all_batches(examples, batch_size, report, views, seed):
                tokens = tokens_of(cast(Tensor, group.inputs))
                parts = _arrays(tokens, pooled_only, np.dtype(dtype))
                layers, width, target = len(tokens), tokens[0].cls.shape[-1], str(group.targets.numpy().dtype)
                with writing(folder):
                    for name, values in (*parts.items(), ("targets", group.targets.numpy())):
                        _write(files[name], values)
                grids += [(1, 1) if pooled_only else tokens[0].grid] * len(group.targets)
                shapes += [tuple(group.targets.shape[1:])] * len(group.targets)
                if len(grids) == len(group.targets):
                    _check_room(folder, sum(file.tell() for file in files.values()) * total // len(grids))
                if bar:
                    rate = len(grids) / (time.perf_counter() - begun)
                    bar.update(len(grids), f"{rate:.1f} images/s")
        finally:
            for file in files.values():
                file.close()
    finally:
        if bar:
            bar.__exit__()
    if not grids:
        raise UserError("No image of the training data can be read; bad_files.jsonl names them.")
    said = {
        "key": key, "dtype": dtype, "layers": layers, "width": width, "target": target,
        "seconds": time.perf_counter() - begun,
    }  # fmt: skip
    with writing(folder), replacing(folder / "cache.npz") as part, part.open("wb") as file:
        np.savez(
            file, grids=np.array(grids, np.int64), said=np.array(json.dumps(said)),
            target_shapes=np.array(shapes, np.int64).reshape(len(shapes), -1),
        )  # fmt: skip
    return TokenCache(folder)


def _arrays(tokens: list[Tokens], pooled_only: bool, dtype: np.dtype[Any]) -> dict[str, NDArray[Any]]:
    cls_BLD = torch.stack([one.cls for one in tokens], dim=1)
    patches = [one.patches.mean(1, keepdim=True) if pooled_only else one.patches for one in tokens]
    patches_BNLD = torch.stack(patches, dim=2)
    arrays = {}
    for name, values in (("cls", cls_BLD), ("patches", patches_BNLD)):
        with np.errstate(over="ignore"):
            arrays[name] = values.float().cpu().numpy().astype(dtype)
        if not np.isfinite(arrays[name]).all():
            raise UserError(
                f"The backbone's tokens are infinite, NaN or beyond {dtype}'s range: are its weights whole? "
                "--no-cache trains without storing them."
            )
    return arrays


def _write(file: IO[bytes], values: NDArray[Any]) -> None:
    file.write(np.ascontiguousarray(values).data)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > FREE_SHARE * free:
        raise CacheTooLarge(
            f"tokens would take {needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB that are free in {folder}"
        )
