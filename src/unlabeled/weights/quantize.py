"""Graphs in 8 bits for CPUs: post-training quantization, and what it costs on images it has not seen.

Shape suffixes: B images, N patches, D width, H W pixels.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.images.decode import BadImage, decode
from unlabeled.images.sources import open_source
from unlabeled.images.transform import evaluation_transform, normalize
from unlabeled.vit import VitConfig
from unlabeled.weights.graph import INPUT, POSITIONS, Runner, needed, openvino_core, quiet

NUM_CALIBRATION = 300  # images; ranges hardly move beyond
NUM_HELD_OUT = 100
MIN_IMAGES = 8


@dataclass(frozen=True)
class Int8Accuracy:
    """Cosine of int8 features to float32 features of the same images, none of them calibrated on.

    Attributes:
        cls_mean, cls_worst: over the images, of the CLS token.
        patches_mean, patches_worst: of the mean patch token.
        calibration_images, held_out_images: how many images of each kind.
        megabytes: of the int8 files; float_megabytes: of the float32 ones.
    """

    cls_mean: float
    cls_worst: float
    patches_mean: float
    patches_worst: float
    calibration_images: int
    held_out_images: int
    megabytes: float
    float_megabytes: float


def quantize(
    to: str, path: Path, images: list[NDArray[np.float32]], runner: Callable[[Path], Runner]
) -> Int8Accuracy:
    """Replace the float32 graph at `path`, alone in its folder, by one of int8 weights and activations.

    to: onnx or openvino. images: of read_images; a part is calibrated on and another measured on.
    Raises UserError if a package is missing.
    """
    num_held_out = min(NUM_HELD_OUT, len(images) // 4)
    # Spread, since images in a row are often of a kind.
    is_held_out = np.zeros(len(images), bool)
    is_held_out[np.linspace(0, len(images) - 1, num_held_out).round().astype(int)] = True
    calibration = [image for image, held in zip(images, is_held_out, strict=True) if not held]
    held_out = [image for image, held in zip(images, is_held_out, strict=True) if held]
    expected = features(runner(path), held_out)
    float_megabytes = megabytes(path.parent)
    (quantize_onnx if to == "onnx" else quantize_openvino)(path, calibration)
    found = features(runner(path), held_out)
    cls, patches = (cosine(a, b) for a, b in zip(found, expected, strict=True))
    return Int8Accuracy(
        cls_mean=float(cls.mean()),
        cls_worst=float(cls.min()),
        patches_mean=float(patches.mean()),
        patches_worst=float(patches.min()),
        calibration_images=len(calibration),
        held_out_images=len(held_out),
        megabytes=megabytes(path.parent),
        float_megabytes=float_megabytes,
    )


def read_images(data: str, config: VitConfig) -> Iterator[NDArray[np.float32]]:
    """Give up to NUM_CALIBRATION + NUM_HELD_OUT images, spread over DATA, as (1, 3, H, W), normalised.

    Raises UserError if fewer than MIN_IMAGES can be read.
    """
    if config.in_channels != 3:
        raise UserError(f"--calibrate reads RGB images; this model takes {config.in_channels} channels.")
    source = open_source(data)
    p = config.patch_size
    side = max(2, min(224, config.image_size) // p) * p
    wanted = np.linspace(0, len(source) - 1, min(len(source), NUM_CALIBRATION + NUM_HELD_OUT))
    num_read = 0
    for index in wanted.round().astype(int):
        try:
            pixels = decode(source.read(int(index)).data)
        except (OSError, BadImage):
            continue
        num_read += 1
        image_3HW = evaluation_transform(pixels, round(side * 256 / 224), side)
        yield normalize(torch.from_numpy(image_3HW)[None]).numpy()
    if num_read < MIN_IMAGES:
        raise UserError(
            f"--calibrate {data} has {num_read} images that can be read; at least {MIN_IMAGES} are needed, and "
            f"{NUM_CALIBRATION + NUM_HELD_OUT} are used where there are as many."
        )


def features(
    run: Runner, images: list[NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the CLS and the mean patch tokens, (images, D) each."""
    outputs = [run(image) for image in images]
    cls = np.concatenate([output["cls"] for output in outputs])
    return cls, np.concatenate([output["patches"].mean(1) for output in outputs])


def cosine(a_ND: NDArray[np.float32], b_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine of each pair of rows, (N,)."""
    norms = np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)
    cosines: NDArray[np.float32] = (a_ND * b_ND).sum(1) / norms
    return cosines


def quantize_onnx(path: Path, images: list[NDArray[np.float32]]) -> None:
    """Quantize an ONNX file in place."""
    onnx = needed("onnx")
    graph = _quantized(onnx.load(path), images)
    data = path.with_name(path.name + ".data")
    is_large = data.exists()
    data.unlink(missing_ok=True)
    onnx.save(graph, path, save_as_external_data=is_large, location=data.name)


def quantize_openvino(path: Path, images: list[NDArray[np.float32]]) -> None:
    """Quantize an OpenVINO .xml, and its .bin, in place."""
    openvino = needed("openvino")
    # Elsewhere first: the weights are mapped from the file that is replaced.
    part = path.parent / "int8"
    openvino.save_model(
        _quantized(openvino_core().read_model(path), images), part / path.name, compress_to_fp16=False
    )
    for file in part.iterdir():
        os.replace(file, path.parent / file.name)  # noqa: PTH105
    shutil.rmtree(part)


def _quantized(graph: object, images: list[NDArray[np.float32]]) -> object:
    """Weights per channel and activations per tensor to 8 bits, outlying channels smoothed (2211.10438)."""
    os.environ["NNCF_CI"] = "1"  # it would report its use to its makers
    nncf = needed("nncf")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    # Its progress would stand before the result of --json.
    with quiet(), redirect_stdout(sys.stderr):
        quantized: object = nncf.quantize(
            graph,
            nncf.Dataset(images, lambda image: {INPUT: image}),
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(patterns=[f"^{POSITIONS}.*"], validate=False),
        )
    gc.collect()  # its own cores in this thread, see openvino_core
    return quantized


def megabytes(folder: Path) -> float:
    """Return the size of a folder's files in 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6
