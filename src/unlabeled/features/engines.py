"""Ways to run a backbone over a batch: exact on any device, or fast."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from unlabeled.devices import has_bf16
from unlabeled.errors import writing
from unlabeled.features.packed import PackedBackbone, can_pack
from unlabeled.vit import Block, Tokens, VisionTransformer
from unlabeled.weights.graph import run_block

Engine = Callable[[Tensor], Tokens]  # normalised float32 images (B, 3, h, w) on the engine's device -> tokens


def exact_engine(model: VisionTransformer, layer: int, device: torch.device) -> Engine:
    """Return float32 tokens after a block and the last norm; on a CPU by packed weights where torch has them."""
    if device.type == "cpu" and can_pack():
        return PackedBackbone(model, layer)
    last = layer % len(model.blocks)
    return lambda images: model.intermediate_layers(images, [last])[0]


def layers_engine(model: VisionTransformer, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what a linear probe chooses from, in one pass: CLS of the last blocks, mean patch of the last one.

    All after the last norm, side by side, (B, (blocks + 1) * D), see `num_probed`.
    """
    blocks = num_probed(model)
    if not (device.type == "cpu" and can_pack()):

        def plain(images: Tensor) -> Tensor:
            tokens = model.intermediate_layers(images, blocks)
            return torch.cat([*(one.cls for one in tokens), tokens[-1].patches.mean(1)], 1)

        return plain
    graph = PackedBackbone(model).graph

    def packed(images: Tensor) -> Tensor:
        x_BTD, parts = graph.embed(images), []
        for number, block in enumerate(graph.vit.blocks, 1):
            x_BTD = run_block(cast(Block, block), x_BTD)
            if number > len(graph.vit.blocks) - blocks:
                parts.append(graph.vit.norm(x_BTD[:, 0]))
        patches = graph.vit.norm(x_BTD[:, 1 + graph.config.num_registers :])
        return torch.cat([*parts, patches.mean(1)], 1)

    return packed


def num_probed(model: VisionTransformer) -> int:
    """Blocks whose CLS tokens a linear probe sees: the last four, or all of fewer."""
    return min(4, len(model.blocks))


def bf16_engine(model: VisionTransformer, layer: int, device: torch.device) -> Engine:
    """Return tokens computed in bfloat16 by a compiled graph, for GPUs."""
    compiled = torch.compile(exact_engine(model, layer, device), dynamic=True)

    def run(images: Tensor) -> Tokens:
        with torch.autocast(device.type, torch.bfloat16):
            tokens: Tokens = compiled(images)
        return tokens

    return run


def has_8_bit_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has instructions for products of 8 bits, without which those are slower than float32's.

    VNNI and AMX on x86, dot products on ARM; true where it cannot be told.
    """
    if not cpuinfo.exists():
        return True
    words = set(cpuinfo.read_text(errors="replace").split())
    return bool(words & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})


def int8_engine(model: VisionTransformer, layer: int, calibrate: str, weights: str) -> Engine:
    """Return tokens computed in 8 bits by OpenVINO, for CPUs; what is not is in bfloat16 where they have it.

    The graph is made once for a model, a layer and the images it is calibrated on, and kept in the cache folder
    ($UNLABELED_CACHE, or ~/.cache/unlabeled).

    Args:
        model: a backbone.
        layer: the block's index; later ones are left out.
        calibrate: DATA; up to 400 images spread over it set the ranges.
        weights: the model's hash.

    Raises:
        UserError: a package is missing, or too few images can be read.
    """
    from unlabeled.weights.graph import openvino_runner

    path, p = _int8_graph(model, layer, calibrate, weights), model.config.patch_size
    cores = torch.get_num_threads()
    # Compiled when first wanted: a batch at a time on all cores, or a batch on each (`devices.one_thread_each`).
    precision = "bf16" if has_bf16(torch.device("cpu")) else "f32"
    runner = cache(lambda streams: openvino_runner(path, streams, precision))
    compiling = threading.Lock()

    def tokens(images_B3HW: Tensor) -> Tokens:
        with compiling:
            run = runner(cores if torch.get_num_threads() == 1 else 1)
        found = {name: torch.from_numpy(value) for name, value in run(images_B3HW.numpy()).items()}
        registers = found.get("registers", found["cls"][:, None][:, :0])
        grid = (images_B3HW.shape[-2] // p, images_B3HW.shape[-1] // p)
        return Tokens(found["cls"], registers, found["patches"], grid)

    return tokens


def _int8_graph(model: VisionTransformer, layer: int, calibrate: str, weights: str) -> Path:
    from unlabeled.weights.graph import needed, openvino_runner, save_onnx, save_openvino, trace
    from unlabeled.weights.quantize import quantize, read_images

    needed("openvino"), needed("nncf")
    last = layer % len(model.blocks)
    name = hashlib.sha256(f"{weights} {last} {calibrate}".encode()).hexdigest()[:32]
    folder = cache_folder() / "int8" / name
    path = folder / "model.xml"
    if path.exists():
        return path
    shallow = VisionTransformer(replace(model.config, depth=last + 1))
    kept = {key: value for key, value in model.state_dict().items() if key in shallow.state_dict()}
    shallow.load_state_dict(kept)
    images = list(read_images(calibrate, model.config))
    part = folder.with_name(f"{name}.{os.getpid()}.part")
    with writing(part):
        part.mkdir(parents=True, exist_ok=True)
        onnx = part.with_suffix(".onnx")
        save_onnx(trace(shallow), shallow.config, onnx)
        save_openvino(onnx, part / path.name, shallow.config)
        for file in part.parent.glob(f"{onnx.name}*"):
            file.unlink()
        quantize("openvino", part / path.name, images, openvino_runner)
        if not path.exists():  # else another process was first
            part.rename(folder)
    return path


def cache_folder() -> Path:
    """Where graphs are kept: $UNLABELED_CACHE, or ~/.cache/unlabeled."""
    named = os.environ.get("UNLABELED_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "unlabeled"


def weights_hash(model: VisionTransformer) -> str:
    """Return the SHA-256 of a model's shape and parameters, as 64 hex digits: the same for the same features."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
