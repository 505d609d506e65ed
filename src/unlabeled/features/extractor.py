"""Images in any form to features, by one model and one preprocessing.

Shape suffixes: B images of a batch, D width of the features, h w patches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast, get_args, overload

import numpy as np
import torch
from numpy.typing import NDArray

from unlabeled.ahead import ahead
from unlabeled.devices import choose_device, keep_freed_memory, one_thread_each
from unlabeled.errors import UserError
from unlabeled.features.engines import bf16_engine, exact_engine, int8_engine, layers_engine, weights_hash
from unlabeled.features.extract import features_of
from unlabeled.features.fitting import check_layer
from unlabeled.features.identity import check_same
from unlabeled.features.inputs import ImageLike, are_several, as_pixels
from unlabeled.features.preprocessing import Shape, default_preprocessing
from unlabeled.images.transform import normalize
from unlabeled.vit import VisionTransformer
from unlabeled.weights.load import as_model

Kind = Literal["cls", "mean", "cls+mean", "layers", "patches", "attention"]
Features = NDArray[np.float32]
Prepared = tuple[int, NDArray[np.uint8]]  # an image's number, its pixels (3, h, w)
BATCH_PATCHES = {"cpu": 4 * 256, "cuda": 256 * 256, "mps": 64 * 256}  # of a batch, by device


class Extractor:
    """A model that turns images into features.

    Args:
        model: a MODEL's text, or a backbone.
        kind: cls: the CLS token (D,); mean: the mean patch token (D,); cls+mean: both, side by side (2D,);
            layers: CLS of each of the last 4 blocks and the mean patch, (5D,); patches: (h, w, D); attention: what
            the CLS token attends to, (heads, h, w), softmax weights with CLS and registers left out.
        layer: the block whose tokens are taken, after the last norm; whose attention, for that kind.
        size: in pixels, see `Preprocessing`; None: 224, or what the model was trained at if that is less.
        shape: crop, keep or stretch, see `Preprocessing`.
        fast: 8 bits on CPUs (OpenVINO), bfloat16 and a compiled graph on GPUs.
        calibrate: DATA like the images to come, that 8 bits are calibrated on.
        device: auto, cpu, cuda, cuda:1 or mps.
        batch_size: images at once; None: by device and size.

    Attributes:
        identity: everything that features must share to be comparable, as JSON types.
        is_grid: whether an image's features have a grid.

    Raises:
        UserError: one of these is not possible.
    """

    def __init__(
        self,
        model: str | Path | VisionTransformer,
        kind: Kind = "cls",
        *,
        layer: int = -1,
        size: int | None = None,
        shape: Shape = "crop",
        fast: bool = False,
        calibrate: str | None = None,
        device: str = "auto",
        batch_size: int | None = None,
    ) -> None:
        if kind not in get_args(Kind):
            raise UserError(
                f"There is no kind {kind!r} of features; choose one of {', '.join(get_args(Kind))}."
            )
        if batch_size is not None and batch_size < 1:
            raise UserError(f"A batch has at least one image, not {batch_size}.")
        self.device = choose_device(device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model = as_model(model)
        if self.model.training:
            raise UserError("The model is in training mode; call model.eval() first.")
        check_layer(self.model, layer)
        self.kind, self.batch_size = kind, batch_size
        self.layer = layer % len(self.model.blocks)
        self.preprocessing = default_preprocessing(self.model.config, size, shape)
        self.is_grid = kind in ("patches", "attention")
        weights = weights_hash(self.model)
        precision = ("int8" if self.device.type == "cpu" else "bfloat16") if fast else "float32"
        if precision == "int8" and calibrate is None:
            raise UserError(
                "8 bits need images to be calibrated on: give DATA like those to come as calibrate."
            )
        if fast and kind in ("attention", "layers"):
            raise UserError(f"Features of kind {kind} are computed in float32 only; leave fast out.")
        if kind == "layers" and self.layer != len(self.model.blocks) - 1:
            raise UserError("Features of kind layers are of the last blocks; leave layer out.")
        self.identity: dict[str, Any] = {
            "model": {"name": self.model.name, "weights": weights},
            "kind": kind,
            "layer": self.layer,
            "preprocessing": asdict(self.preprocessing),
            "precision": precision,
        }
        if precision == "int8":
            self.identity["calibrated_on"] = calibrate
            self.engine = int8_engine(self.model, layer, str(calibrate), weights)
        elif kind == "layers":
            self.layers_engine = layers_engine(self.model.to(self.device), self.device)
        else:
            self.model.to(self.device)
            make = bf16_engine if fast else exact_engine
            self.engine = make(self.model, layer, self.device)

    @staticmethod
    def of(
        identity: dict[str, Any], device: str = "auto", model: str | Path | VisionTransformer | None = None
    ) -> Extractor:
        """Return the extractor that makes features of an identity, such as a table's.

        model: the identity's, where it has no name or has moved.

        Raises:
            UserError: the model has no name, cannot be loaded, or has other weights than the identity's.
        """
        name = model or identity["model"]["name"]
        if not name:
            raise UserError(
                "These features come from a model that was made in memory; give it again (an index's extractor can be "
                "set to Extractor(model), and search has --model)."
            )
        try:
            loaded = as_model(name)
        except UserError as error:
            if model is not None:
                raise
            raise UserError(
                f"{error} These features are of it; search has --model for where it is now."
            ) from error
        here = {"name": loaded.name, "weights": weights_hash(loaded)}
        check_same(
            {"model": identity["model"]}, {"model": here}, "These features", "the model that is there now"
        )
        preprocessing = identity["preprocessing"]
        return Extractor(
            loaded,
            identity["kind"],
            layer=identity["layer"],
            size=preprocessing["size"],
            shape=preprocessing["shape"],
            fast=identity["precision"] != "float32",
            calibrate=identity.get("calibrated_on"),
            device="cpu" if identity["precision"] == "int8" else device,
        )

    @overload
    def __call__(self, images: ImageLike) -> Features: ...
    @overload
    def __call__(self, images: Iterable[ImageLike]) -> Features | list[Features]: ...
    def __call__(self, images: ImageLike | Iterable[ImageLike]) -> Features | list[Features]:
        """Return the float32 features of one image, or of a list: (N, D), or a list of grids for kinds with a grid.

        images: paths, bytes, Pillow images, arrays or tensors, see `as_pixels`; one, a list, a generator (read as
            it is needed), or a batch of four dimensions.

        Raises:
            UserError: an image cannot be read, or the list is empty.
        """
        if not are_several(images):
            return self([cast(ImageLike, images)])[0]
        batch = cast("Iterable[ImageLike]", images)
        found: dict[int, Features] = {}
        prepared = ((place, self.prepare(as_pixels(image))) for place, image in enumerate(batch))
        for places, features in self.run(prepared):
            found.update(zip(places, features, strict=True))
        if not found:
            raise UserError("There is no image to extract features of: the list is empty.")
        whole = [found[place] for place in range(len(found))]
        return whole if self.is_grid else np.stack(whole)

    def prepare(self, pixels_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return pixels as the model takes them, (3, h, w)."""
        return self.preprocessing(pixels_HW3)

    def run(self, prepared: Iterator[Prepared]) -> Iterator[tuple[list[int], list[Features] | Features]]:
        """Give the features of prepared images, a batch at a time, with the numbers they came with.

        The same images in the same order make the same batches. On a CPU each core runs batches of its own, where
        there are several.
        """
        batches = self._batches(prepared)
        first = list(itertools.islice(batches, 2))
        cores = torch.get_num_threads() if self.device.type == "cpu" else 1
        if len(first) < 2 or cores == 1:
            yield from map(self._run, itertools.chain(first, batches))
            return
        with (
            one_thread_each(),
            ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            yield from ahead(pool, self._run, itertools.chain(first, batches), most=cores)

    def _batches(self, prepared: Iterator[Prepared]) -> Iterator[list[Prepared]]:
        """Images of one shape together; at most four batches of other shapes wait meanwhile."""
        waiting: dict[tuple[int, ...], list[Prepared]] = {}
        for place, image in prepared:
            group = waiting.setdefault(image.shape, [])
            group.append((place, image))
            if len(group) == self.batch_of(image.shape):
                yield waiting.pop(image.shape)
            elif len(waiting) > 4:
                yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
        yield from waiting.values()

    def batch_of(self, shape: tuple[int, ...]) -> int:
        """Images of a shape (3, h, w) that are run at once."""
        if self.batch_size is not None:
            return self.batch_size
        patches = max(1, shape[1] * shape[2] // self.preprocessing.patch_size**2)
        most = BATCH_PATCHES.get(self.device.type, 4096)
        return max(1, min(512, most // patches))

    @torch.inference_mode()
    def _run(self, group: list[Prepared]) -> tuple[list[int], list[Features] | Features]:
        places = [place for place, _ in group]
        images_B3hw = normalize(torch.from_numpy(np.stack([image for _, image in group])).to(self.device))
        if self.kind == "attention":
            weights = self.model.cls_attention(images_B3hw, self.layer)
            p = self.preprocessing.patch_size
            grid = (images_B3hw.shape[2] // p, images_B3hw.shape[3] // p)
            patches = weights[:, :, 1 + self.model.config.num_registers :].unflatten(2, grid)
            return places, list(_array(patches))
        if self.kind == "layers":
            return places, _array(self.layers_engine(images_B3hw))
        tokens = self.engine(images_B3hw)
        if self.kind == "patches":
            return places, list(_array(tokens.patches.unflatten(1, tokens.grid)))
        return places, _array(features_of(tokens, self.kind))


def _array(values: torch.Tensor) -> Features:
    array: Features = values.float().cpu().numpy()
    if not np.isfinite(array).all():
        raise UserError("The model computes infinities or NaN; are its weights whole?")
    return array
