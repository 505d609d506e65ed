"""The student's crops in one pass (`run.packed`) beside a pass of the local and one of the global ones.

    python benchmarks/packed.py [--recipe vits14] [--set FIELD=VALUE ...] [--precision bf16] [--steps 6] [--device cpu]

Both train in one process on the same random pixels, in turns: two passes, packed, packed, two passes, and so on; the
median of each is taken. Memory is the high-water mark after the first steps of two passes, then after those of packed
ones. The operators of a step that compute something (no views, no allocations) are counted as they are dispatched: on a
GPU each is a kernel or more. `--recipe small_images` is what `auto` takes for images of 32 pixels.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from machine import device_name, peak_memory
from train_step import step_batches
from unlabeled.devices import tuned_for
from unlabeled.pretrain.auto import small_images
from unlabeled.pretrain.batch import Batch
from unlabeled.pretrain.loop import make_optimizer, step_seed
from unlabeled.pretrain.method import SelfDistillation
from unlabeled.pretrain.optimizer import apply_schedule
from unlabeled.pretrain.parallel import Parallel
from unlabeled.pretrain.recipe import override
from unlabeled.pretrain.recipes import named_recipe
from unlabeled.pretrain.schedules import values_at

NAMES = {False: "two passes", True: "packed"}
WARM_UP = 2
FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "narrow", "new_empty", "new_empty_strided", "permute", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts what is dispatched, but for views and allocations."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ not in FREE
        return function(*arguments, **(options or {}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="vits14")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--precision", default="float32", choices=("float32", "bf16"))
    parser.add_argument("--steps", type=int, default=6, help="measured, of each")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    parallel = Parallel.start(options.device)
    base = small_images(32) if options.recipe == "small_images" else named_recipe(options.recipe)
    values: dict[str, Any] = {
        "run.precision": options.precision,
        "run.steps": 2 * options.steps + 3 * WARM_UP,
    }
    recipe = override(base, values | dict(item.split("=", 1) for item in options.set), "the command line")
    torch.manual_seed(0)
    method = SelfDistillation(recipe, parallel)
    optimizer = make_optimizer(method)

    def one_step(step: int, batch: Batch, packed: bool) -> None:
        method.packed = packed
        values = values_at(recipe, step)
        apply_schedule(optimizer, values)
        torch.manual_seed(step_seed(0, step, 0))
        method.train_step(batch, optimizer, values)["loss"].item()

    seconds: dict[bool, list[float]] = {False: [], True: []}
    processor: dict[bool, list[float]] = {False: [], True: []}
    peaks: dict[bool, float] = {}
    operators: dict[bool, int] = {}
    turns = (
        [False] * WARM_UP
        + [True] * WARM_UP
        + ([False, True, True, False] * options.steps)[: 2 * options.steps]
    )
    with tuned_for(parallel.device):
        batches = step_batches(recipe, None, parallel)
        for number, (packed, (step, batch)) in enumerate(zip(turns, batches, strict=False)):
            begun, used = time.perf_counter(), time.process_time()
            one_step(step, batch, packed)
            if number >= 2 * WARM_UP:
                seconds[packed].append(time.perf_counter() - begun)
                processor[packed].append(time.process_time() - used)
            else:
                peaks[packed] = peak_memory(parallel.device)
        step, batch = next(batches)
        for packed in (False, True):
            with Operators() as counted:
                one_step(step, batch, packed)
            operators[packed] = counted.count
    crops, tokens = recipe.crops, recipe.vit_config()
    print(
        f"{device_name(parallel.device)}, torch {torch.__version__}; {options.recipe}, width {tokens.width}, "
        f"{tokens.depth} blocks, 2 x {crops.global_size} + {crops.num_locals} x {crops.local_size}, batch "
        f"{recipe.run.batch_size}, {options.precision}, median of {options.steps} steps each\n"
    )
    print("| | s a step, fastest | processor s a step | peak GB | operators a step |")
    print("|---|---|---|---|---|")
    for packed, name in NAMES.items():
        print(
            f"| {name} | {statistics.median(seconds[packed]):.3f}, {min(seconds[packed]):.3f} "
            f"| {statistics.median(processor[packed]):.3f} | {peaks[packed]:.2f} | {operators[packed]} |"
        )


if __name__ == "__main__":
    main()
