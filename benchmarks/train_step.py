"""One training step of ViT-S/14 by the real recipe (2 x 224 + 8 x 98, 65,536 prototypes): rate, memory, FLOP/s.

    python benchmarks/train_step.py [--batch 16] [--steps 6] [--precision float32 bf16] [--device auto]

FLOPs are those of the matrix products, counted from the shapes; the limit is the rate of a matrix product of the
backbone's own shape, measured in the same run.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from machine import device_name, gemm_rate, peak_memory
from unlabeled.pretrain.data import step_masks
from unlabeled.pretrain.loop import make_optimizer
from unlabeled.pretrain.method import Batch, SelfDistillation
from unlabeled.pretrain.optimizer import apply_schedule
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import Recipe, named_recipe, override


def flops(recipe: Recipe, num_masked: int) -> float:
    """FLOPs of one step: 2 a multiply-add; a backward pass costs twice its forward pass."""
    config, head = recipe.vit_config(), recipe.head
    width, hidden = config.width, config.hidden_width
    images = recipe.run.batch_size

    def backbone(crops: int, side: int) -> float:
        tokens = (side // config.patch_size) ** 2 + 1 + config.num_registers
        patch = 2 * 3 * config.patch_size**2 * width * (tokens - 1)
        linear = 2 * tokens * (4 * width**2 + 2 * width * hidden)
        attention = 4 * tokens**2 * width
        return crops * (patch + config.depth * (linear + attention))

    def projection(rows: int) -> float:
        mlp = width * head.hidden + head.hidden**2 + head.hidden * head.bottleneck
        return 2 * rows * (mlp + head.bottleneck * head.num_prototypes)

    kept = 1 - recipe.model.drop_path if recipe.model.drop_path > 0.1 else 1.0  # batch-subset drop path
    large = backbone(2 * images, recipe.crops.global_size)
    small = backbone(recipe.crops.num_locals * images, recipe.crops.local_size)
    student_rows = (2 + recipe.crops.num_locals) * images + num_masked
    teacher_rows = 2 * images + num_masked
    return 3 * kept * (large + small) + large + 3 * projection(student_rows) + projection(teacher_rows)


def measure(recipe: Recipe, parallel: Parallel, steps: int) -> tuple[float, float]:
    """(seconds of a step, median after two; FLOPs of a step)."""
    method = SelfDistillation(recipe, parallel)
    optimizer = make_optimizer(method)
    apply_schedule(optimizer, 1e-4, 0.04, 1e-4)
    from unlabeled.pretrain.schedules import values_at

    rng, count, crops = np.random.default_rng(0), recipe.run.batch_size, recipe.crops
    seconds, work = [], []
    for step in range(steps):
        images = [
            torch.from_numpy(rng.integers(0, 256, (number * count, 3, side, side), dtype=np.uint8))
            for number, side in ((2, crops.global_size), (crops.num_locals, crops.local_size))
        ]
        masks = step_masks(recipe, step, 0, 1)
        batch = Batch(images[0], images[1], masks, count).to(parallel.device)
        begun = time.perf_counter()
        result = method.train_step(batch, optimizer, values_at(recipe, 1000 + step))
        float(result["loss"])  # waits for the device
        seconds.append(time.perf_counter() - begun)
        work.append(flops(recipe, 0 if masks is None else int(masks.sum())))
    return statistics.median(seconds[2:]), statistics.median(work[2:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="vits14")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", nargs="+", default=["bf16", "float32"])
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    parallel = Parallel.start(options.device)
    print(f"{options.recipe}, batch {options.batch}, on {device_name(parallel.device)}\n")
    print(
        "| precision | images/s | s a step | TFLOP a step | GFLOP/s | GEMM GFLOP/s | share | peak memory so far, GB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for precision in options.precision:
        fields = {"run.batch_size": options.batch, "run.precision": precision}
        recipe = override(named_recipe(options.recipe), fields, "benchmark")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        width = recipe.vit_config().width
        limit = gemm_rate(parallel.device, dtype, 2 * options.batch * 257, width, 4 * width)
        seconds, work = measure(recipe, parallel, options.steps)
        print(
            f"| {precision} | {options.batch / seconds:.2f} | {seconds:.2f} | {work / 1e12:.2f} | "
            f"{work / seconds / 1e9:.0f} | {limit / 1e9:.0f} | {work / seconds / limit:.0%} | "
            f"{peak_memory(parallel.device):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
