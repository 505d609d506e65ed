"""One training step at the real recipe: images/s, memory, and FLOP/s against what the machine's matrix products reach.

    python benchmarks/train_step.py [TAR] [--rival-python PYTHON] [--size vit_small] [--device cpu] [--steps 8] [--json]

2 x 224 + 8 x 98 crops, 65536 prototypes, batch 16. With a TAR of photographs a worker process decodes them and makes
the crops, as in a run; without one the crops are random pixels. Each row is a process of its own, one after the
other; a step is timed from its end to the end of the next, and the median is taken. Memory is the high-water mark of
the training process (on CUDA, of the device's memory), not of its worker.

--rival-python: a Python that has lightly-train (see benchmarks/README.md); it gets the same photographs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from machine import device_name, gemm_rate, peak_memory
from unlabeled.devices import tuned_for
from unlabeled.drop_path import SUBSET_DROP_PATH
from unlabeled.images.bad_files import BadFiles
from unlabeled.images.sources import open_source
from unlabeled.pretrain.batch import Batch
from unlabeled.pretrain.data import batches, step_masks
from unlabeled.pretrain.loop import make_optimizer, step_seed
from unlabeled.pretrain.method import SelfDistillation
from unlabeled.pretrain.optimizer import apply_schedule
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import Recipe, override
from unlabeled.pretrain.recipes import named_recipe
from unlabeled.pretrain.schedules import values_at

PRECISIONS = ("float32", "bf16")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
ATTENTION = ("query key^T", "weights value")
AHEAD = 8  # steps the worker goes on for, so that it has work to do during all that are measured
RIVAL = Path(__file__).parent / "rivals" / "lightly_train_step.py"
RIVAL_ROWS: dict[str, list[str]] = {
    "lightly-train, its default (float32)": [],
    "lightly-train, float32, denormals flushed": ["--flush-denormal"],
    "lightly-train, bf16-mixed, denormals flushed": ["--flush-denormal", "--precision", "bf16-mixed"],
}


@dataclass(frozen=True)
class Product:
    """Matrix products (rows x inner) (inner x out) of one kind in one step.

    count: how many there are. passes: 1 forward only, 2 with the gradient of one factor, 3 with those of both.
    """

    name: str
    rows: int
    inner: int
    out: int
    count: int
    passes: int

    @property
    def flops(self) -> float:
        """2 rows inner out for a product, and as many again for each gradient."""
        return 2.0 * self.rows * self.inner * self.out * self.count * self.passes


def products_of_step(recipe: Recipe, num_masked: float) -> list[Product]:
    """Every matrix product that the method asks for in one step, from the shapes alone.

    What is computed twice to save memory counts once; what is no matrix product (norms, softmax, GELU, Sinkhorn-Knopp,
    optimizer, EMA, the few products of the position embedding and KoLeo) does not count.

    num_masked: masked patches of the batch.
    """
    crops, num_images = recipe.crops, recipe.run.batch_size
    num_global, num_local = crops.num_globals * num_images, crops.num_locals * num_images
    masked = round(num_masked)
    return [
        # The teacher sees the global crops, forward only, without drop path.
        *backbone_products(recipe, "teacher", num_global, crops.global_size, 1, 0.0),
        *head_products(recipe, "teacher", num_global, masked, 1),
        # The student sees all crops, forward and backward.
        *backbone_products(recipe, "student", num_global, crops.global_size, 3, recipe.model.drop_path),
        *head_products(recipe, "student", num_global, masked, 3),
        *backbone_products(recipe, "student", num_local, crops.local_size, 3, recipe.model.drop_path),
        *head_products(recipe, "student", num_local, 0, 3),
    ]


def backbone_products(
    recipe: Recipe, name: str, num_crops: int, side: int, passes: int, drop_path: float
) -> list[Product]:
    """Patch embedding and blocks over some crops of one size."""
    config = recipe.vit_config()
    patches, D = (side // config.patch_size) ** 2, config.width
    T, hidden = 1 + config.num_registers + patches, config.hidden_width
    # Above this rate a branch runs on a part of the crops only; below, dropped branches are computed and zeroed.
    kept = max(1, int(num_crops * (1 - drop_path))) if drop_path > SUBSET_DROP_PATH else num_crops
    rows, depth, heads = kept * T, config.depth, config.num_heads
    gated = 2 if config.ffn == "swiglu" else 1
    pixels = config.in_channels * config.patch_size**2
    return [
        # The pixels get no gradient.
        Product(f"{name}: patches", num_crops * patches, pixels, D, 1, min(passes, 2)),
        Product(f"{name}: query, key, value", rows, D, 3 * D, depth, passes),
        Product(f"{name}: query key^T", T, D // heads, T, depth * heads * kept, passes),
        Product(f"{name}: weights value", T, T, D // heads, depth * heads * kept, passes),
        Product(f"{name}: projection", rows, D, D, depth, passes),
        Product(f"{name}: first of FFN", rows, D, gated * hidden, depth, passes),
        Product(f"{name}: second of FFN", rows, hidden, D, depth, passes),
    ]


def head_products(recipe: Recipe, name: str, num_cls: int, num_masked: int, passes: int) -> list[Product]:
    """The heads on CLS tokens and on masked patches."""
    head, width = recipe.head, recipe.vit_config().width
    products = []
    for rows, bottleneck, prototypes in (
        (num_cls, head.bottleneck, head.num_prototypes),
        (
            num_masked,
            head.bottleneck if head.shared else head.ibot_bottleneck,
            head.num_prototypes if head.shared else head.ibot_num_prototypes,
        ),
    ):
        if rows:
            products += [
                Product(f"{name}: head", rows, width, head.hidden, 1, passes),
                Product(f"{name}: head", rows, head.hidden, head.hidden, 1, passes),
                Product(f"{name}: head", rows, head.hidden, bottleneck, 1, passes),
                Product(f"{name}: prototypes", rows, bottleneck, prototypes, 1, passes),
            ]
    return products


def limit(products: list[Product], device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the step's own products, if each went at the rate it reaches alone: a harmonic mean over FLOPs.

    The small products inside attention are taken at the rate of the others.
    """
    large = [product for product in products if not product.name.endswith(ATTENTION)]
    shapes: dict[tuple[int, int, int], float] = {}
    for product in large:
        shape = (product.rows, product.inner, product.out)
        shapes[shape] = shapes.get(shape, 0.0) + product.flops
    seconds = sum(
        flops / gemm_rate(device, dtype, *shape, seconds=0.5)
        for shape, flops in shapes.items()
        if flops > 0.01 * sum(shapes.values())
    )
    counted = sum(flops for flops in shapes.values() if flops > 0.01 * sum(shapes.values()))
    return counted / seconds


def make_recipe(options: argparse.Namespace, precision: str) -> Recipe:
    values = dict(item.split("=", 1) for item in options.set)
    values |= {"model.size": options.size, "run.batch_size": options.batch, "run.precision": precision}
    values |= {"run.steps": options.warmup + options.steps + AHEAD}
    return override(named_recipe(options.recipe), values, "the command line")


def step_batches(recipe: Recipe, tar: Path | None, parallel: Parallel) -> Iterator[tuple[int, Batch]]:
    if tar is not None:
        with tempfile.TemporaryDirectory() as folder:
            report = BadFiles(Path(folder) / "bad_files.jsonl")
            yield from batches(open_source(str(tar)), recipe, parallel, 0, report)
        return
    crops, num_images = recipe.crops, recipe.run.batch_size
    sides = (crops.global_size, crops.local_size)
    counts = (crops.num_globals * num_images, crops.num_locals * num_images)
    images = [
        torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
        for count, side in zip(counts, sides, strict=True)
    ]
    for step in range(recipe.run.steps):
        masks = step_masks(recipe, step, 0, 1)
        yield step, Batch(images[0], images[1], masks, num_images).to(parallel.device)


def measure_ours(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Some steps as `unlabeled pretrain` does them, then the machine's limit."""
    parallel = Parallel.start(options.device)
    device, recipe = parallel.device, make_recipe(options, precision)
    torch.manual_seed(0)
    method = SelfDistillation(recipe, parallel)
    optimizer = make_optimizer(method)
    times: list[tuple[float, float]] = []
    masked: list[float] = []
    for step, batch in step_batches(recipe, options.tar, parallel):
        values = values_at(recipe, step)
        apply_schedule(optimizer, values)
        torch.manual_seed(step_seed(0, step, 0))
        loss = method.train_step(batch, optimizer, values)["loss"].item()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter(), time.process_time()))
        masked.append(float(sum(batch.masks.counts)) if batch.masks else 0.0)
        if len(times) > options.warmup + options.steps - 1:
            break
    measured = list(pairwise(times))[options.warmup - 1 :]
    result = {
        "precision": precision,
        "batch": recipe.run.batch_size,
        "seconds": [after[0] - before[0] for before, after in measured],
        "cpu_seconds": [after[1] - before[1] for before, after in measured],
        "peak_gb": peak_memory(device),
        "last_loss": loss,
    }
    products = products_of_step(recipe, statistics.mean(masked[options.warmup :]))
    result["flops"] = sum(product.flops for product in products)
    result["gemm_rate"] = limit(products, device, DTYPES[precision])
    result["device"] = device_name(device)
    return result


def check_flops(options: argparse.Namespace) -> None:
    """The formula against torch's own count of the products that a step runs.

    The fused attention of a CPU is not counted by torch; the plain one, in bf16, computes its weights once more for
    the gradient, so that its count is above the formula's. The rest should agree to a thousandth.
    """
    from torch.utils.flop_counter import FlopCounterMode

    parallel = Parallel.start("cpu")
    recipe = make_recipe(options, options.one or "float32")
    method = SelfDistillation(recipe, parallel)
    optimizer = make_optimizer(method)
    _, batch = next(step_batches(recipe, None, parallel))
    with FlopCounterMode(display=False) as counter:
        method.train_step(batch, optimizer, values_at(recipe, 0))
    num_masked = float(sum(batch.masks.counts)) if batch.masks else 0.0
    products = products_of_step(recipe, num_masked)
    attention = sum(product.flops for product in products if product.name.endswith(ATTENTION))
    total = sum(product.flops for product in products)
    counts: dict[str, int] = {}
    for operator, count in counter.get_flop_counts()["Global"].items():
        counts[str(operator)] = counts.get(str(operator), 0) + count
    inside = ("bmm", "attention")
    counted_attention = sum(count for name, count in counts.items() if any(part in name for part in inside))
    counted = sum(counts.values())
    print(f"all: formula {total:.6g}, counted {counted:.6g}, ratio {counted / total:.5f}")
    print(
        f"without attention: formula {total - attention:.6g}, counted {counted - counted_attention:.6g}, "
        f"ratio {(counted - counted_attention) / (total - attention):.5f}"
    )
    print(
        f"attention: formula {attention:.6g}, counted {counted_attention:.6g}, by operator {json.dumps(counts)}"
    )


def run_one(command: list[str]) -> dict[str, Any]:
    """The JSON object on the last line of a command's output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    if options.rival_python:
        if options.tar is None or options.size != "vit_small":
            sys.exit("--rival-python needs a TAR of photographs, and --size vit_small")
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(options.tar) as archive:
                members = [m for m in archive if m.name.lower().endswith((".jpg", ".jpeg"))]
                archive.extractall(folder, members=members, filter="data")
            for name in RIVAL_ROWS:
                rows[name] = run_one(
                    [
                        options.rival_python,
                        str(RIVAL),
                        folder,
                        f"--batch={options.batch}",
                        f"--steps={options.steps}",
                        f"--warmup={options.warmup}",
                        f"--device={'cuda' if options.device.startswith('cuda') else 'cpu'}",
                        *RIVAL_ROWS[name],
                    ]
                )
                print(f"{name}: {rate(rows[name]):.2f} images/s", file=sys.stderr)
    for precision in options.precision:
        name = f"ours, {precision}"
        rows[name] = run_one([sys.executable, __file__, *sys.argv[1:], "--one", precision])
        print(f"{name}: {rate(rows[name]):.2f} images/s", file=sys.stderr)
    return rows


def rate(row: dict[str, Any]) -> float:
    return float(row["batch"] / statistics.median(row["seconds"]))


def as_table(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> str:
    ours = rows[f"ours, {options.precision[0]}"]
    recipe = make_recipe(options, options.precision[0])
    crops = recipe.crops
    lines = [
        f"{ours['device']}, torch {torch.__version__}; {options.size}/{recipe.model.patch_size}, "
        f"{crops.num_globals} x {crops.global_size} + {crops.num_locals} x {crops.local_size}, "
        f"{recipe.head.num_prototypes} prototypes, batch {options.batch}, {ours['flops'] / 1e12:.2f} TFLOP a step; "
        f"{'photographs, decoded and cropped by one worker' if options.tar else 'random pixels'}; "
        f"median of {options.steps} steps after {options.warmup}.",
        "",
        "| | images/s | slowest..fastest step, s | processor s a step | peak GB | GFLOP/s | of its matrix products' |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        seconds = row["seconds"]
        achieved = ours["flops"] / statistics.median(seconds)  # the rival's model and crops are the same
        share = (
            f"{achieved / row['gemm_rate']:.0%} of {row['gemm_rate'] / 1e9:.0f}" if "gemm_rate" in row else ""
        )
        lines.append(
            f"| {name} | {rate(row):.2f} | {max(seconds):.2f}..{min(seconds):.2f} "
            f"| {statistics.median(row['cpu_seconds']):.2f} | {row['peak_gb']:.2f} | {achieved / 1e9:.0f} | {share} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tar", nargs="?", type=Path, help="of photographs; none: random pixels")
    parser.add_argument("--rival-python")
    parser.add_argument("--recipe", default="vits14")
    parser.add_argument("--size", default="vit_small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=8, help="measured, after the warm-up")
    parser.add_argument("--warmup", type=int, default=2, help="steps that do not count")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="more recipe fields")
    parser.add_argument("--json", action="store_true", help="everything measured, as one line, last")
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument(
        "--check-flops", action="store_true", help="hold the formula against torch's count, no more"
    )
    parser.add_argument("--one", choices=PRECISIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check_flops:
        check_flops(options)
    elif options.one:
        with tuned_for(torch.device(options.device)):
            print(json.dumps(measure_ours(options, options.one)), flush=True)
    else:
        rows = measure_rows(options)
        table = as_table(rows, options)
        print(table)
        if options.out:
            options.out.write_text(f"# The training step\n\n{table}\n")
        if options.json:
            print(json.dumps(rows))


if __name__ == "__main__":
    main()
