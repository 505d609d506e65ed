"""A backbone as a graph for other runtimes: ONNX, OpenVINO, torch.export archives, all of dynamic sizes.

Shape suffixes: B images, T tokens (1 + R + N), R registers, N patches, D width, H W pixels, h w patches.
"""

from __future__ import annotations

import copy
import json
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from unlabeled.errors import UserError
from unlabeled.images.transform import IMAGENET_MEAN, IMAGENET_STD
from unlabeled.vit import Block, SwiGlu, VisionTransformer, VitConfig

INPUT = "images"
CUBIC = {"size": -0.75, "scale": -0.75, "antialias": -0.5}  # torch's bicubic coefficient in each mode
POSITIONS = "positions/"  # begins the names of the nodes that resize the position embedding
MISSING = "{name} is needed for this and is not installed; run: pip install 'unlabeled[export]'"

Features = dict[str, NDArray[np.float32]]
Runner = Callable[[NDArray[np.float32]], Features]


def output_names(config: VitConfig) -> list[str]:
    """Return the graph's outputs in order: cls (B, D), registers (B, R, D) where there are any, patches (B, N, D)."""
    return ["cls", "registers", "patches"] if config.num_registers else ["cls", "patches"]


def metadata(config: VitConfig) -> dict[str, str]:
    """Return what a reader of the file has to know, as JSON texts by name."""
    held = {
        "mean": IMAGENET_MEAN,  # of RGB in [0, 1], taken out of the input
        "std": IMAGENET_STD,
        "patch_size": config.patch_size,  # both sides are multiples of it
        "image_size": config.image_size,  # the position embedding was learned at it
        "width": config.width,
        "num_registers": config.num_registers,
    }
    return {name: json.dumps(value) for name, value in held.items()}


class Graph(nn.Module):
    """A backbone's features by plain operations on symbolic sizes; the numbers are VisionTransformer's.

    Weights become constants in the order in which runtimes multiply by them, LayerScale multiplied into them.
    The position embedding's bicubic resizing is written out, since runtimes differ in theirs. `model` is copied.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.config = model.config
        self.vit = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
        for block in cast("list[Block]", list(self.vit.blocks)):
            last = block.mlp.w3 if isinstance(block.mlp, SwiGlu) else block.mlp.fc2
            for linear, scale in ((block.attn.proj, block.ls1), (last, block.ls2)):
                linear.weight.mul_(scale.gamma[:, None])
                linear.bias.mul_(scale.gamma)
            del block.ls1, block.ls2
        self.cls_11D = nn.Buffer(self.vit.cls_token + self.vit.pos_embed[:, :1])
        self.positions = Positions(self.vit)
        self.cut = Product(self.vit.patch_embed.proj)
        del self.vit.patch_embed, self.vit.mask_token, self.vit.cls_token, self.vit.pos_embed
        for module in list(self.vit.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Product(child))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the tokens after the last norm by name, see output_names.

        images: (B, C, H, W) float32, normalised; H and W are multiples of the patch size.
        """
        x_BTD = self.embed(images)
        for block in self.vit.blocks:
            x_BTD = run_block(cast(Block, block), x_BTD)
        x_BTD = self.vit.norm(x_BTD)
        first_patch = 1 + self.config.num_registers
        parts = {"cls": x_BTD[:, 0], "registers": x_BTD[:, 1:first_patch], "patches": x_BTD[:, first_patch:]}
        return {name: parts[name] for name in output_names(self.config)}

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Return the tokens that enter the first block, (B, T, D)."""
        B, C, H, W = images_BCHW.shape
        p = self.config.patch_size
        h, w = H // p, W // p
        # Patches are cut by reshaping, not by a convolution: that would cut other sides off without a word.
        cut_BhwCpp = images_BCHW.reshape(B, C, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
        patches_BND = self.cut(cut_BhwCpp.reshape(B, h * w, C * p * p)) + self.positions(h, w)
        tokens = [self.cls_11D.expand(B, -1, -1), patches_BND]
        if self.config.num_registers:
            tokens.insert(1, self.vit.register_tokens.expand(B, -1, -1))
        return torch.cat(tokens, dim=1)


class Positions(nn.Module):
    """The patches' position embedding on any grid."""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.config, side = vit.config, vit.config.grid_side
        self.learned = nn.Buffer(vit.pos_embed[0, 1:].reshape(side, -1).clone())  # (side, side * D)

    def forward(self, h: int, w: int) -> Tensor:
        """Return the embedding of a grid, (1, h * w, D)."""
        side, mode = self.config.grid_side, self.config.interpolation
        index_h, index_w = torch.arange(h, dtype=torch.float32), torch.arange(w, dtype=torch.float32)
        # Sizes as tensors, since a comparison of shapes would be decided once, when the graph is made.
        num_h, num_w = index_h[-1] + 1, index_w[-1] + 1
        if mode == "scale":
            is_resized = (num_h - side).abs() + (num_w - side).abs() > 0
            num_h, num_w = num_h + 0.1 * is_resized, num_w + 0.1 * is_resized
        rows_hs = resize_weights(index_h, num_h, side, mode)
        columns_ws = resize_weights(index_w, num_w, side, mode)
        pos_hsD = (rows_hs @ self.learned).view(h, side, self.config.width)
        return (columns_ws @ pos_hsD).reshape(1, h * w, self.config.width)


class Product(nn.Module):
    """x W + b of a Linear, or of a convolution over patches that are cut already; W is kept transposed."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Buffer(layer.weight.flatten(1).T.contiguous())
        self.bias = None if layer.bias is None else nn.Buffer(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last axis multiplied."""
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


def run_block(block: Block, x_BTD: Tensor) -> Tensor:
    """Return the tokens after a block whose LayerScale is in its weights."""
    query, key, value = block.attn.packed(block.norm1(x_BTD)).permute(2, 0, 3, 1, 4).unbind(0)
    mixed_BTD = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    x_BTD = x_BTD + block.attn.proj(mixed_BTD)
    hidden = block.norm2(x_BTD)
    if isinstance(block.mlp, SwiGlu):
        gate, values = block.mlp.w12(hidden).chunk(2, dim=-1)
        return x_BTD + cast(Tensor, block.mlp.w3(functional.silu(gate) * values))
    return x_BTD + cast(Tensor, block.mlp.fc2(functional.gelu(block.mlp.fc1(hidden))))


def resize_weights(index_n: Tensor, size: Tensor, side: int, mode: str) -> Tensor:
    """Return vit.resize_matrix, (n, side), from arithmetic alone.

    index: float32, the new samples, 0 to n - 1. size: their number; in mode "scale" that and 0.1.
    """
    a, old_s = CUBIC[mode], torch.arange(side, dtype=torch.float32)
    scale = side / size
    centre_n = (index_n + 0.5) * scale - 0.5
    if mode == "antialias":
        weights_ns = cubic((old_s - centre_n[:, None]) / scale.clamp(min=1.0), a)
        return weights_ns / weights_ns.sum(1, keepdim=True)
    # Samples beyond an end are the one at the end.
    place_n4 = centre_n[:, None].floor() + torch.arange(-1.0, 3.0)
    hit_n4s = (place_n4.clamp(0, side - 1)[:, :, None] == old_s).float()
    return (hit_n4s * cubic(place_n4 - centre_n[:, None], a)[:, :, None]).sum(1)


def cubic(distance: Tensor, a: float) -> Tensor:
    """Keys' bicubic kernel, zero from a distance of 2."""
    x = distance.abs().clamp(max=2.0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, far)


def trace(model: VisionTransformer) -> torch.export.ExportedProgram:
    """Return the graph for any number of images and any sides of at least two patches."""
    from torch.export import Dim, export

    p = model.config.patch_size
    example = torch.zeros(2, model.config.in_channels, 3 * p, 5 * p)
    shapes = {INPUT: {0: Dim("batch", min=1), 2: p * Dim("rows", min=2), 3: p * Dim("columns", min=2)}}
    with quiet():
        return export(Graph(model), (example,), dynamic_shapes=shapes, strict=False)


def save_pt2(traced: torch.export.ExportedProgram, config: VitConfig, path: Path) -> None:
    """Write a torch.export archive; metadata.json is in its extra files."""
    with quiet():
        extra = {"metadata.json": json.dumps({k: json.loads(v) for k, v in metadata(config).items()})}
        torch.export.save(traced, path, extra_files=extra)


def save_onnx(traced: torch.export.ExportedProgram, config: VitConfig, path: Path) -> None:
    """Write an ONNX file (weights beyond 1.5 GB in `path`.data beside it), metadata in its properties.

    Raises UserError where the exporter's packages are missing.
    """
    ir = needed("onnx_ir", "onnx")
    needed("onnxscript")
    names = output_names(config)
    with quiet():
        program = cast(Any, torch.onnx.export(traced, dynamo=True, output_names=names, verbose=False))
        D, R = config.width, config.num_registers
        shapes = {
            INPUT: ["batch", config.in_channels, "height", "width"],
            "cls": ["batch", D],
            "registers": ["batch", R, D],
            "patches": ["batch", "num_patches", D],
        }
        for value in (*program.model.graph.inputs, *program.model.graph.outputs):
            value.shape = ir.Shape(shapes[value.name])
        for node in program.model.graph:
            if "positions" in node.metadata_props.get("pkg.torch.onnx.name_scopes", ""):
                node.name = POSITIONS + str(node.name)
        program.model.metadata_props.update(metadata(config))
        program.save(str(path))


def save_openvino(onnx_path: Path, path: Path, config: VitConfig) -> None:
    """Write an ONNX file as OpenVINO's .xml, and .bin beside it, metadata in its rt_info under "unlabeled"."""
    openvino = needed("openvino")
    graph = openvino_core().read_model(onnx_path)
    for name, text in metadata(config).items():
        graph.set_rt_info(text, ["unlabeled", name])
    openvino.save_model(graph, path, compress_to_fp16=False)


def onnx_runner(path: Path) -> Runner:
    """Return a function from images (B, C, H, W), float32, to features by output name; ONNX Runtime, CPU."""
    runtime = needed("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {INPUT: images}), strict=True))


def openvino_runner(path: Path, streams: int = 1, precision: str = "f32") -> Runner:
    """Return a function as onnx_runner's, by OpenVINO on the CPU.

    streams: how many threads may call it at once, each then with its share of the cores.
    precision: f32 or bf16, of all that the graph does not have in 8 bits.
    """
    # Left to itself it computes in bfloat16 where the processor can.
    settings = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": str(streams)}
    graph = openvino_core().read_model(path)
    compiled = openvino_core().compile_model(graph, "CPU", settings)
    patch_size = json.loads(graph.get_rt_info(["unlabeled", "patch_size"]).astype(str))
    names = [output.any_name for output in compiled.outputs]
    of_thread = threading.local()

    def run(images: NDArray[np.float32]) -> Features:
        height, width = images.shape[2:]
        if height % patch_size or width % patch_size:  # on one core OpenVINO reads beyond the image instead
            raise ValueError(f"{height} x {width} pixels are no multiples of a patch of {patch_size}.")
        if not hasattr(of_thread, "request"):
            of_thread.request = compiled.create_infer_request()
        found = of_thread.request.infer([images])
        return {name: found[name] for name in names}

    return run


@cache
def openvino_core() -> Any:
    """Return OpenVINO's one core of this process, which is never freed.

    Its CPU plugin gives the thread that first compiles a stack for signal handlers, and unmaps it when the core is
    freed, in whatever thread that happens: the next signal would then end the process.
    """
    return needed("openvino").Core()


def pt2_runner(path: Path) -> Runner:
    """Return a function as onnx_runner's, by torch, from an archive."""
    module = torch.export.load(path).module()

    def run(images: NDArray[np.float32]) -> Features:
        with torch.no_grad():
            return {name: value.numpy() for name, value in module(torch.from_numpy(images)).items()}

    return run


def needed(name: str, package: str = "") -> Any:
    """Import an optional package; raises UserError with what to install where it is missing."""
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(MISSING.format(name=package or name)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' remarks on themselves off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
